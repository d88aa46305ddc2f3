"""Kernel key to compiled kernel: one compile a key however many threads ask, then a dict lookup.

Importing TileLang takes seconds, so it happens at the first compile, not with the package.
"""

from __future__ import annotations

import importlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .dispatch import Key

logger = logging.getLogger("mhc_ops")

_LEAST_PDL_ARCH = 90  # programmatic dependent launch exists from Hopper on

_compiled: dict[Key, Any] = {}
_ready: dict[tuple[Key, int | None], Callable[..., Any]] = {}
_locks: dict[Key, threading.Lock] = {}
_locks_lock = threading.Lock()


def _arch_number(arch: str) -> int:
    return int(arch.removeprefix("sm_").rstrip("af"))


@contextmanager
def _quiet_tilelang() -> Iterator[None]:
    """TileLang logs two INFO lines a kernel; ours replace them."""
    tilelang_logger = logging.getLogger("tilelang")
    level = tilelang_logger.level
    tilelang_logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        tilelang_logger.setLevel(level)


def program(key: Key) -> Any:
    """The TileLang program of a key, before any lowering."""
    factory = getattr(
        importlib.import_module(f"mhc_ops.csrc_tilelang.{key.kernel}"), key.kernel
    )
    return factory(
        key.hidden, pdl=_arch_number(key.arch) >= _LEAST_PDL_ARCH, **dict(key.options)
    )


def pass_configs() -> dict[Any, bool]:
    """What TileLang's compiler is told about every kernel."""
    import tilelang  # type: ignore[import-untyped]

    config = tilelang.PassConfigKey
    return {
        # threads, barriers and copies are written out in the kernels
        config.TL_DISABLE_WARP_SPECIALIZED: True,
        config.TL_DISABLE_TMA_LOWER: True,
        config.TL_DISABLE_THREAD_STORAGE_SYNC: True,
        config.TL_DISABLE_SHARED_MEMORY_REUSE: True,
        # they guard their own bounds; the pass doubles the address arithmetic
        config.TL_DISABLE_SAFE_MEMORY_ACCESS: True,
    }


def compile_key(key: Key) -> Any:
    """Compile a kernel; needs no GPU.

    Args:
        key: what to compile, for whichever architecture it names.

    Returns:
        TileLang's ``JITKernel``: callable on a device of that architecture,
        ``get_kernel_source()`` is the CUDA source.
    """
    with _locks_lock:
        lock = _locks.setdefault(key, threading.Lock())
    with lock:
        kernel = _compiled.get(key)
        if kernel is not None:
            return kernel
        start = time.perf_counter()
        logger.info("compiling %s", key)
        import tilelang  # type: ignore[import-untyped]

        with _quiet_tilelang():
            kernel = tilelang.compile(
                program(key),
                target={"kind": "cuda", "arch": key.arch},
                pass_configs=pass_configs(),
            )
        _compiled[key] = kernel
        logger.info("compiled %s in %.1f s", key, time.perf_counter() - start)
        return kernel


def _prepare(key: Key, device: torch.device) -> Callable[..., Any]:
    """The first launch of a kernel on a device compiles it and loads its module."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"mhc: kernel {key.kernel} for hidden size {key.hidden} is not loaded on {device} and "
            "cannot be during CUDA-graph capture; before the capture call "
            f"mhc_ops.prewarm(hidden=[{key.hidden}], device={str(device)!r})"
        )
    kernel = compile_key(key)
    _ready[key, device.index] = kernel
    return kernel


def launch(key: Key, device: torch.device, *args: Any) -> None:
    """Launch a kernel on the device's current stream.

    Args:
        key: the kernel; compiled and loaded at its first launch.
        device: the CUDA device, with an index, that all tensors of ``args`` are on.
        args: the arguments of the TileLang program, in its order.

    Raises:
        RuntimeError: the kernel is not loaded yet and the stream is being captured.
    """
    kernel = _ready.get((key, device.index))
    if kernel is None:
        kernel = _prepare(key, device)
    if device.index == torch.cuda.current_device():
        kernel(*args)
    else:
        # TileLang's host code sets the device and leaves it set
        with torch.cuda.device(device):
            kernel(*args)

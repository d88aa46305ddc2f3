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

from . import host
from .dispatch import ONE_LAUNCH, Key

logger = logging.getLogger("mhc_ops")

_LEAST_PDL_ARCH = 90  # programmatic dependent launch exists from Hopper on

_compiled: dict[Key, Callable[..., Any]] = {}
_ready: dict[tuple[Key, int | None], Callable[..., Any]] = {}
_locks: dict[Key, threading.Lock] = {}
_locks_lock = threading.Lock()


def _arch_number(arch: str) -> int:
    return int(arch.removeprefix("sm_").rstrip("af"))


_thread = threading.local()


def _is_not_ours(record: logging.LogRecord) -> bool:
    return record.levelno > logging.INFO or not getattr(_thread, "compiling", False)


logging.getLogger("tilelang.jit.kernel").addFilter(_is_not_ours)


@contextmanager
def _quiet_tilelang() -> Iterator[None]:
    """TileLang logs two INFO lines a kernel; ours replace them, in this thread alone."""
    _thread.compiling = True
    try:
        yield
    finally:
        _thread.compiling = False


def program(key: Key) -> Any:
    """The TileLang program of a key, before any lowering."""
    factory = getattr(importlib.import_module(f"mhc_ops.csrc_tilelang.{key.kernel}"), key.kernel)
    return factory(key.hidden, pdl=_arch_number(key.arch) >= _LEAST_PDL_ARCH, **dict(key.options))


def pass_configs() -> dict[Any, bool]:
    """What TileLang's compiler is told about every kernel."""
    import tilelang

    config = tilelang.PassConfigKey
    return {
        # barriers are written out in the kernels: the pass knows nothing of their named ones
        config.TL_DISABLE_THREAD_STORAGE_SYNC: True,
        # without that pass nothing orders two buffers that share memory: finish and head would
        # write the norm's sums over partial sums that a slower warp still reads
        config.TL_DISABLE_SHARED_MEMORY_REUSE: True,
        # they guard their own bounds; the pass doubles the address arithmetic
        config.TL_DISABLE_SAFE_MEMORY_ACCESS: True,
    }


def _main(kernel: Any) -> Callable[..., Any]:
    """The host function of a compiled kernel.

    TileLang's own wrapper looks it up anew and checks the arguments again: 7.6 us a call against
    5.2 to 6.5 on the host of an H200.
    """
    executable = kernel.adapter.get_exportable_executable()
    module = executable.jit() if hasattr(type(executable), "jit") else executable
    return module.main


def compile_key(key: Key) -> Callable[..., Any]:
    """Compile a kernel, or read it from TileLang's cache; needs no GPU.

    Args:
        key: what to compile, for whichever architecture it names.

    Returns:
        Its host function, which takes the arguments of the TileLang program in order and launches
        on the current stream of their device.
    """
    with _locks_lock:
        lock = _locks.setdefault(key, threading.Lock())
    with lock:
        compiled = _compiled.get(key)
        if compiled is not None:
            return compiled
        start = time.perf_counter()
        logger.info("compiling %s", key)
        import tilelang

        with _quiet_tilelang():
            compiled = _main(
                tilelang.compile(
                    program(key),
                    target={"kind": "cuda", "arch": key.arch},
                    pass_configs=pass_configs(),
                )
            )
        if key.kernel == ONE_LAUNCH:
            host.load()  # here, where it takes no longer than what goes on anyway
        _compiled[key] = compiled
        logger.info("compiled %s in %.1f s", key, time.perf_counter() - start)
        return compiled


def _prepare(key: Key, device: torch.device) -> Callable[..., Any]:
    """The first launch of a kernel on a device compiles it and loads its module."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"mhc: kernel {key.kernel} for hidden size {key.hidden} is not loaded on {device} and "
            "cannot be during CUDA-graph capture; before the capture call "
            f"mhc_ops.prewarm(hidden=[{key.hidden}], device={str(device)!r})"
        )
    compiled = compile_key(key)
    _ready[key, device.index] = compiled
    return compiled


def entry_point(key: Key, device: torch.device) -> Callable[..., Any]:
    """The host function of a kernel on a device.

    Args:
        key: the kernel; compiled at its first launch.
        device: a CUDA device with an index.

    Returns:
        As :func:`compile_key`.

    Raises:
        RuntimeError: the kernel is not loaded yet and the stream is being captured.
    """
    ready = _ready.get((key, device.index))
    return _prepare(key, device) if ready is None else ready


def launch(key: Key, device: torch.device, *args: Any) -> None:
    """Launch a kernel on the device's current stream.

    Args:
        key: the kernel; compiled and loaded at its first launch.
        device: the CUDA device, with an index, that all tensors of ``args`` are on.
        args: the arguments of the TileLang program, in its order.

    Raises:
        RuntimeError: the kernel is not loaded yet and the stream is being captured.
    """
    run = entry_point(key, device)
    if device.index == torch.cuda.current_device():
        run(*args)
    else:
        # TileLang's host code sets the device and leaves it set
        with torch.cuda.device(device):
            run(*args)

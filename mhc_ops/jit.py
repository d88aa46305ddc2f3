"""Kernel key to compiled kernel: built ahead, from the cache, or compiled; then a dict lookup.

However many threads and processes ask for a key at once, it is compiled once. Importing TileLang
takes seconds, so it happens at the first compile: a kernel that is there already needs none.
"""

from __future__ import annotations

import errno
import importlib
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from . import config, host, store
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
def quiet_tilelang() -> Iterator[None]:
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

    flags = tilelang.PassConfigKey
    return {
        # barriers are written out in the kernels: the pass knows nothing of their named ones
        flags.TL_DISABLE_THREAD_STORAGE_SYNC: True,
        # without that pass nothing orders two buffers that share memory: finish and head would
        # write the norm's sums over partial sums that a slower warp still reads
        flags.TL_DISABLE_SHARED_MEMORY_REUSE: True,
        # they guard their own bounds; the pass doubles the address arithmetic
        flags.TL_DISABLE_SAFE_MEMORY_ACCESS: True,
    }


def _main(kernel: Any) -> Callable[..., Any]:
    """The host function of a compiled kernel.

    TileLang's own wrapper looks it up anew and checks the arguments again: 7.6 us a call against
    5.2 to 6.5 on the host of an H200.
    """
    executable = kernel.adapter.get_exportable_executable()
    module = executable.jit() if hasattr(type(executable), "jit") else executable
    return module.main


def build_commands(key: Key) -> str:
    """What a user types to have a kernel built ahead and used."""
    return (
        f"python -m mhc_ops build --arch {key.arch} --hidden {key.hidden} -o DIR, "
        "then MHC_OPS_KERNELS=DIR"
    )


def _name(key: Key) -> str:
    return f"kernel {key.kernel} for hidden size {key.hidden} on {key.arch}"


def _advice(error: BaseException) -> str:
    """What helps against a failed compile, by what went wrong first."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return (
                f"make room in {config.cache_folder()} and in the folder for temporary files, or "
                "let TILELANG_CACHE_DIR and TMPDIR name others"
            )
        if isinstance(cause, OSError) and cause.filename is not None:
            return "let TILELANG_CACHE_DIR name a folder that this process can write"
        cause = cause.__cause__ or cause.__context__
    from tilelang.contrib.nvcc import get_nvcc_compiler

    try:
        found = shutil.which(get_nvcc_compiler())
    except RuntimeError:
        found = None
    if found is None:
        return "there is no nvcc: install the CUDA toolkit and let CUDA_HOME name it"
    return f"nvcc is {found}; TILELANG_VERBOSE=1 shows what it says"


def _failure(key: Key, error: Exception) -> RuntimeError:
    return RuntimeError(
        f"mhc: {_name(key)} cannot be compiled: {type(error).__name__}: {error}\n"
        f"{_advice(error)}; or build it on another machine: {build_commands(key)}"
    )


def compile_kernel(key: Key) -> Any:
    """Compile a kernel with TileLang, or read it from TileLang's own cache; needs no GPU.

    Args:
        key: what to compile, for whichever architecture it names.

    Returns:
        TileLang's compiled kernel.

    Raises:
        RuntimeError: it cannot be compiled, with the reason and what to do.
    """
    try:
        import tilelang  # makes its cache folder
    except OSError as error:
        raise _failure(key, error) from error
    source = program(key)
    try:
        with quiet_tilelang():
            return tilelang.compile(
                source, target={"kind": "cuda", "arch": key.arch}, pass_configs=pass_configs()
            )
    except Exception as error:
        raise _failure(key, error) from error


def _compile(key: Key, folder: Path) -> Callable[..., Any]:
    start = time.perf_counter()
    logger.info("compiling %s", key)
    kernel = compile_kernel(key)
    try:
        with quiet_tilelang():
            store.save_kernel(folder, key, kernel)
    except (OSError, RuntimeError) as error:
        logger.warning("%s cannot be kept for other processes: %s", _name(key), error)
    logger.info("compiled %s in %.1f s", key, time.perf_counter() - start)
    return _main(kernel)


def _obtain(key: Key) -> Callable[..., Any]:
    ahead = store.load_kernel(config.kernels_folder(), key)
    if ahead is not None:
        return ahead
    folder = store.cached_folder()
    cached = store.load_kernel(folder, key)
    if cached is not None:
        return cached
    if config.switch("MHC_OPS_DISABLE_JIT"):
        raise RuntimeError(
            f"mhc: {_name(key)} is neither built ahead, in {config.kernels_folder()}, nor cached, "
            f"in {folder}, and MHC_OPS_DISABLE_JIT is set; build it: {build_commands(key)}"
        )
    with store.lock(folder, store.file_name(key)):
        # another process may have compiled it while this one waited
        return store.load_kernel(folder, key) or _compile(key, folder)


def compile_key(key: Key) -> Callable[..., Any]:
    """Take a kernel that was built ahead, or from the cache, or compile it; needs no GPU.

    Args:
        key: the kernel, for whichever architecture it names.

    Returns:
        Its host function, which takes the arguments of the TileLang program in order and launches
        on the current stream of their device.

    Raises:
        RuntimeError: it cannot be compiled, or ``MHC_OPS_DISABLE_JIT`` is set, or others can write
            a folder that it would be loaded from; each with what to do.
    """
    with _locks_lock:
        lock = _locks.setdefault(key, threading.Lock())
    with lock:
        if key not in _compiled:
            compiled = _obtain(key)
            if key.kernel == ONE_LAUNCH:
                host.load()  # here, where it takes no longer than what goes on anyway
            _compiled[key] = compiled
        return _compiled[key]


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

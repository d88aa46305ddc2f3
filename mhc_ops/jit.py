"""Turn a kernel's key into a compiled kernel, and that into a loaded one.

A compiled kernel was built ahead, comes from the cache, or is compiled now. However many threads
and processes ask for a kernel at once, it is compiled once, and each process loads it once on a
device. After that a kernel costs a dict lookup.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import torch

from . import compiler, config, disk, routes, store
from .compiler import Compiled, describe
from .native import launcher
from .routes import Key

logger = logging.getLogger("mhc_ops")

_compiled: dict[Key, Compiled] = {}
_loaded: dict[tuple[Key, int | None], launcher.Kernel] = {}
_locks: dict[Key, threading.Lock] = {}
_locks_lock = threading.Lock()


class KernelUnavailable(RuntimeError):
    """Report that a call needs a kernel that is not available; nothing has been launched."""


def _lock(key: Key) -> threading.Lock:
    with _locks_lock:
        return _locks.setdefault(key, threading.Lock())


def _compile(key: Key, folder: Path) -> Compiled:
    start = time.perf_counter()
    logger.info("compiling %s", key)
    kernel = compiler.compile_kernel(key)
    try:
        store.save_kernel(folder, key, kernel)
    except OSError as error:
        room = disk.advice(error)
        logger.warning(
            "%s cannot be kept for other processes: %s%s",
            describe(key),
            error,
            f"; {room}" if room else "",
        )
    logger.info("compiled %s in %.1f s", key, time.perf_counter() - start)
    return kernel


def _stored(key: Key) -> Compiled | None:
    """Read a kernel that was built ahead or is cached; None where there is neither."""
    ahead = store.load_kernel(store.ahead_folder(), key)
    return ahead or store.load_kernel(store.cached_folder(), key)


def _obtain(key: Key) -> Compiled:
    stored = _stored(key)
    if stored is not None:
        return stored
    folder = store.cached_folder()
    if config.switch("MHC_OPS_DISABLE_JIT"):
        raise RuntimeError(
            f"mhc: {describe(key)} is neither built ahead, in {config.kernels_folder()}, nor "
            f"cached, in {folder}, and MHC_OPS_DISABLE_JIT is set; build it: "
            f"{compiler.build_commands(key)}"
        )
    with store.lock(folder, store.file_name(key)):
        # Another process may have compiled the kernel while this process waited for the lock.
        return store.load_kernel(folder, key) or _compile(key, folder)


def compile_key(key: Key) -> Compiled:
    """Return a kernel that was built ahead or is cached, or compile it; this needs no GPU.

    Args:
        key: the kernel, for any architecture.

    Raises:
        RuntimeError: the kernel cannot be compiled, ``MHC_OPS_DISABLE_JIT`` is set, or others can
            write the kernel or its folder. The message says what to do.
        ValueError: a variable of the environment has a value that it cannot have, such as
            ``MHC_OPS_KERNELS`` one that names no folder of kernels.
    """
    with _lock(key):
        if key not in _compiled:
            _compiled[key] = _obtain(key)
        return _compiled[key]


def _nvcc_is_there() -> bool:
    """Say whether TileLang would find nvcc.

    The answer in doubt is yes, because the message of a compile that fails is more precise.
    """
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    folders = [os.environ.get("PATH", os.defpath), *(f"{home}/bin" for home in homes if home)]
    return shutil.which("nvcc", path=os.pathsep.join(folders)) is not None or any(
        importlib.metadata.distributions(name="nvidia-cuda-nvcc")
    )


def _why_not_compile() -> str | None:
    """Say what a compile lacks, without importing TileLang; None where nothing is lacking."""
    if config.switch("MHC_OPS_DISABLE_JIT"):
        return "MHC_OPS_DISABLE_JIT is set"
    wanted = f"expected TileLang {compiler.TILELANG} to compile it"
    try:
        installed = importlib.metadata.version("tilelang")
    except importlib.metadata.PackageNotFoundError:
        return f"{wanted}, got none"
    if installed != compiler.TILELANG:
        return f"{wanted}, got {installed}"
    return None if _nvcc_is_there() else "expected nvcc to compile it, got none"


def obtainable(hidden: int, arch: str) -> tuple[bool, str]:
    """Say whether the kernels of a hidden size are available; this compiles nothing, on no GPU.

    Args:
        hidden: hidden size.
        arch: architecture, such as ``sm_90a``.

    Returns:
        (True, where the kernels come from) or (False, the reason why one is not available).
    """
    try:
        for key in routes.keys(hidden, arch, sys.maxsize):
            if key not in _compiled and _stored(key) is None:
                lack = _why_not_compile()
                if lack is None:
                    return True, "compiled at the first call"
                return False, f"{describe(key)} is neither built ahead nor cached: {lack}"
    except (OSError, RuntimeError, ValueError) as error:
        return False, str(error)
    return True, "built ahead or cached"


def load(key: Key, device: torch.device) -> launcher.Kernel:
    """Load a kernel on a device; a kernel that is not compiled yet is compiled first.

    Args:
        key: the kernel.
        device: a CUDA device with an index.

    Raises:
        KernelUnavailable: :func:`compile_key` fails, or the driver refuses the kernel.
    """
    try:
        return _load(key, device)
    except RuntimeError as error:
        unavailable = KernelUnavailable(str(error)).with_traceback(error.__traceback__)
        raise unavailable from error.__cause__


def _load(key: Key, device: torch.device) -> launcher.Kernel:
    compiled = compile_key(key)
    with _lock(key):
        kernel = _loaded.get((key, device.index))
        if kernel is None:
            kernel = launcher.load(describe(key), compiled, device.index)
            _loaded[key, device.index] = kernel
        return kernel


def loaded_already(key: Key, device: torch.device) -> launcher.Kernel | None:
    """Return a kernel that is loaded on a device; None where it is not."""
    return _loaded.get((key, device.index))


def loaded(key: Key, device: torch.device) -> launcher.Kernel:
    """Return a kernel on a device, ready for a call on the device's current stream.

    Args:
        key: the kernel; the first call compiles and loads it.
        device: a CUDA device with an index.

    Raises:
        KernelUnavailable: :func:`load` fails, or the kernel is not loaded yet and the stream is
            being captured.
    """
    kernel = loaded_already(key, device)
    if kernel is not None:
        return kernel
    if torch.cuda.is_current_stream_capturing():
        raise KernelUnavailable(
            f"mhc: kernel {key.kernel} for hidden size {key.hidden} is not loaded on {device} and "
            "cannot be during CUDA-graph capture; before the capture call "
            f"mhc_ops.prewarm(hidden=[{key.hidden}], device={str(device)!r})"
        )
    return load(key, device)

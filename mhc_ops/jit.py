"""Kernel key to compiled and to loaded kernel: built ahead, from the cache, or compiled.

However many threads and processes ask for a key at once, it is compiled once, and loaded once on a
device. From then on a key costs a dict lookup.
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

from . import compiler, config, routes, store
from .compiler import Compiled, describe
from .native import launcher
from .routes import Key

logger = logging.getLogger("mhc_ops")

_compiled: dict[Key, Compiled] = {}
_loaded: dict[tuple[Key, int | None], launcher.Kernel] = {}
_locks: dict[Key, threading.Lock] = {}
_locks_lock = threading.Lock()


class KernelUnavailable(RuntimeError):
    """A call needs a kernel that cannot be had; nothing has been launched."""


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
        logger.warning("%s cannot be kept for other processes: %s", describe(key), error)
    logger.info("compiled %s in %.1f s", key, time.perf_counter() - start)
    return kernel


def _stored(key: Key) -> Compiled | None:
    """A kernel that was built ahead or is cached."""
    ahead = store.load_kernel(config.kernels_folder(), key)
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
        # another process may have compiled it while this one waited
        return store.load_kernel(folder, key) or _compile(key, folder)


def compile_key(key: Key) -> Compiled:
    """Take a kernel that was built ahead, or from the cache, or compile it; needs no GPU.

    Args:
        key: the kernel, for whichever architecture it names.

    Raises:
        RuntimeError: it cannot be compiled, or ``MHC_OPS_DISABLE_JIT`` is set, or others can write
            a folder that it would be taken from; each with what to do.
    """
    with _lock(key):
        if key not in _compiled:
            _compiled[key] = _obtain(key)
        return _compiled[key]


def _nvcc_is_there() -> bool:
    """Whether TileLang would find nvcc; in doubt yes, a compile that fails says more."""
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    folders = [os.environ.get("PATH", os.defpath), *(f"{home}/bin" for home in homes if home)]
    return shutil.which("nvcc", path=os.pathsep.join(folders)) is not None or any(
        importlib.metadata.distributions(name="nvidia-cuda-nvcc")
    )


def _why_not_compile() -> str | None:
    """What a compile lacks; TileLang is not imported."""
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
    """Whether the kernels of a hidden size can be had; compiles nothing and needs no GPU.

    Args:
        hidden: H.
        arch: such as ``sm_90a``.

    Returns:
        (True, where they come from) or (False, the reason why one cannot be had).
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
    """Load a kernel on a device, and compile it first where that is not done.

    Args:
        key: the kernel.
        device: a CUDA device with an index.

    Raises:
        KernelUnavailable: as :func:`compile_key`, or the driver refuses the kernel.
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
    """A kernel on a device, where it is loaded there."""
    return _loaded.get((key, device.index))


def loaded(key: Key, device: torch.device) -> launcher.Kernel:
    """A kernel on a device, for a call on its current stream.

    Args:
        key: the kernel; compiled and loaded at its first call.
        device: a CUDA device with an index.

    Raises:
        KernelUnavailable: as :func:`load`, or the kernel is not loaded yet and the stream is being
            captured.
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

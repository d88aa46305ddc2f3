"""The native short way of ``mhc::fused_post_pre``: its library, its plans, and early reading.

``_host.cpp`` says what it does and how a call gets there. Where it was not built ahead with the
kernels, it is built with the host's C++ compiler when the first one-launch kernel is compiled,
which takes as long, and kept beside the kernels in TileLang's cache folder. Where there is no
compiler, every call takes the Python kernels instead.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import config, store

logger = logging.getLogger("mhc_ops")

NAME = "host"  # among kernels that are built ahead
SOURCE = Path(__file__).with_name("_host.cpp")
FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden")
BUILD_SECONDS = 600  # 13 s on two busy cores

_lock = threading.Lock()
_tried = False
_library: ctypes.CDLL | None = None
_plans: dict[tuple[torch.device, int, bool], tuple[Any, Sequence[int]]] = {}


def _built_with(tvm_ffi_version: str) -> dict[str, str]:
    """What the library depends on; of Python only the stable interface, so any Python's."""
    return {
        "torch": torch.__version__,
        "torch_commit": str(torch.version.git_version),
        "tvm_ffi": tvm_ffi_version,
        "machine": platform.machine(),
        "flags": " ".join(FLAGS),
        "host_source": hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16],
    }


def _cache_folder(built_with: dict[str, str]) -> Path:
    return config.own_cache_folder() / f"host-{store.digest(built_with)}"


def _command(target: Path, tvm_ffi_include: str, tvm_ffi_library: str) -> list[str]:
    """The compiler's command line.

    The libraries it names are loaded already when the result is, so it holds no path of theirs.
    """
    home = Path(torch.__file__).parent
    libraries = ("torch_cpu", "c10", *(("torch_cuda",) if torch.version.cuda else ()))
    return [
        *shlex.split(os.environ.get("CXX", "g++")),
        *FLAGS,
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-I{home / 'include'}",
        f"-I{tvm_ffi_include}",
        str(SOURCE),
        "-o",
        str(target),
        f"-L{home / 'lib'}",
        "-Wl,--no-as-needed",  # torch_cuda: its one symbol is weak
        *(f"-l{name}" for name in libraries),
        tvm_ffi_library,
    ]


def _build(target: Path, tvm_ffi: Any) -> None:
    start = time.perf_counter()
    logger.info("building %s", target.name)
    subprocess.run(
        _command(target, tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_libtvm_ffi()),
        check=True,
        capture_output=True,
        text=True,
        timeout=BUILD_SECONDS,
    )
    logger.info("built %s in %.1f s", target.name, time.perf_counter() - start)


def build(folder: Path) -> None:
    """Build the library into a folder.

    Args:
        folder: where to put it.

    Raises:
        OSError, subprocess.SubprocessError: it cannot be built or written.
    """
    import tvm_ffi  # late: it comes with TileLang, which the package does not import

    store.save(folder, NAME, _built_with(tvm_ffi.__version__), lambda path: _build(path, tvm_ffi))


def reason(error: Exception) -> str:
    """What went wrong in :func:`build`: in the compiler's words, where it has said something."""
    said: str = getattr(error, "stderr", None) or str(error)
    return said.strip()


def _obtain() -> Path:
    """The library: built ahead, from the cache, or built."""
    import tvm_ffi

    built_with = _built_with(tvm_ffi.__version__)
    ahead = store.find(config.kernels_folder(), NAME, built_with)
    if ahead is not None:
        return ahead
    folder = _cache_folder(built_with)
    config.require_trusted(folder)
    if store.find(folder, NAME, built_with) is None:
        with store.lock(folder, NAME):
            # another process may have built it while this one waited
            if store.find(folder, NAME, built_with) is None:
                build(folder)
    return folder / f"{NAME}.so"


def _load() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_obtain()))
    library.mhc_remember.argtypes = (
        ctypes.c_int32,
        ctypes.c_int32,
        ctypes.c_int64,
        ctypes.c_int32,
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_int32),
        ctypes.c_int64,
    )
    library.mhc_remember.restype = None
    library.mhc_forget.restype = None
    library.mhc_may_read_early.argtypes = (ctypes.c_void_p,)
    library.mhc_may_read_early.restype = ctypes.c_int32
    library.mhc_calls.restype = ctypes.c_int64
    library.mhc_tracked.restype = ctypes.c_int64
    return library


def load() -> bool:
    """Load the library, which puts the native kernels in front; build it where that is not done.

    Tried once a process. A failure is logged and leaves the op as it is, served in Python.

    Returns:
        Whether the library is there.
    """
    global _library, _tried
    with _lock:
        if not _tried:
            _tried = True
            try:
                _library = _load()
            except (OSError, RuntimeError, subprocess.SubprocessError) as error:
                logger.warning(
                    "no native host path, calls of fused_post_pre take longer on the host and "
                    "their kernels start later: %s",
                    reason(error),
                )
        return _library is not None


def remember(
    device: torch.device,
    hidden: int,
    norm: bool,
    entry_point: Callable[..., Any],
    group_tokens: Sequence[int],
) -> None:
    """From now on, calls that this kernel can serve take the short way.

    Args:
        device: where the kernel is loaded and has run.
        hidden: H.
        norm: whether it is the kernel with the RMSNorm.
        entry_point: its host function, of tvm-ffi, kept for as long as the process lives.
        group_tokens: its argument of that name for 1, 2, ... tokens; calls with more tokens than
            that are not served.
    """
    if _library is None:
        return
    key, plan = (device, hidden, norm), (entry_point, group_tokens)
    with _lock:
        if _plans.get(key) == plan:
            return
        _plans[key] = plan
        _library.mhc_remember(
            device.type == "cuda",
            -1 if device.index is None else device.index,
            hidden,
            norm,
            entry_point.__chandle__(),  # type: ignore[attr-defined]
            (ctypes.c_int32 * len(group_tokens))(*group_tokens),
            len(group_tokens),
        )


def forget() -> None:
    """Forget all kernels: until each has run once more, its calls take the Python kernels."""
    if _library is not None:
        with _lock:
            _plans.clear()
            _library.mhc_forget()


def may_read_early(fn: Tensor) -> bool:
    """Whether the kernel may read ``fn`` before the kernel in front of it has finished.

    It may when this very tensor was given to an earlier call and nothing has written it since:
    then the kernel that wrote it had finished before that call read it. A call that may not reads
    late, and lets its successor start only then. A tensor without a version counter, one that was
    made in inference mode, is always read late, and so is every tensor without the library: the
    one table of what was read is in it, for the calls of both ways.

    Args:
        fn: the projection that a call is about to read, and has read once this is asked.

    Returns:
        Whether it was read before, at this version and at this place in memory.
    """
    return _library is not None and bool(_library.mhc_may_read_early(fn._cdata))


def calls() -> int:
    """How many calls took the short way in this process."""
    return 0 if _library is None else _library.mhc_calls()


def tracked() -> int:
    """How many projections :func:`may_read_early` knows, some of which may be gone by now."""
    return 0 if _library is None else _library.mhc_tracked()

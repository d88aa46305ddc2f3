"""Folders of compiled kernels: those that were built ahead, and those of the cache.

A kernel is a shared library and beside it a JSON file that says what it was built with, and the
library's hash. Reading one needs no compiler and nothing of TileLang's Python: tvm-ffi loads it
onto TileLang's run-time library. One that does not match this installation is left alone.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import config
from .dispatch import Key

logger = logging.getLogger("mhc_ops")

LOCK_SECONDS = 600.0  # the longest compile takes 30; whoever holds a lock for longer is stuck
POLL_SECONDS = 0.05

_PACKAGE = Path(__file__).parent

_warned: set[tuple[Path, str]] = set()
_warned_lock = threading.Lock()


def kernel_sources() -> list[Path]:
    """The files that decide what a kernel is: factories, constants, flags of the compiler."""
    package = importlib.util.find_spec("mhc_ops.csrc_tilelang")
    folders = package.submodule_search_locations if package else None
    factories = [path for folder in folders or () for path in Path(folder).glob("*.py")]
    return [*sorted(factories), _PACKAGE / "dispatch.py", _PACKAGE / "jit.py"]


def digest(facts: Mapping[str, str]) -> str:
    """A short name for what something was built with."""
    return hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def _versions() -> dict[str, str]:
    sources = hashlib.sha256()
    for path in kernel_sources():
        sources.update(f"{path.name}\0{path.read_text()}\0".encode())
    return {
        "tilelang": importlib.metadata.version("tilelang"),
        "tvm_ffi": importlib.metadata.version("apache-tvm-ffi"),
        "machine": platform.machine(),
        "kernel_sources": sources.hexdigest()[:16],
    }


def file_name(key: Key) -> str:
    """Stem of a kernel's files, such as ``finish-sm_90a-4096-norm1``."""
    options = (f"{name}{int(value)}" for name, value in key.options)
    return "-".join((key.kernel, key.arch, str(key.hidden), *options))


def _leave(file: Path, reason: str, where: Path | None = None) -> None:
    """Warn once that a file is not used; once a folder where the reason is all its files'."""
    with _warned_lock:
        if (where or file, reason) in _warned:
            return
        _warned.add((where or file, reason))
    logger.warning("%s is not used: %s", file, reason)


def find(folder: Path, name: str, built_with: Mapping[str, str]) -> Path | None:
    """A library of a folder, if it is whole and was built with this.

    Args:
        folder: where to look; need not exist.
        name: the stem of its files.
        built_with: what it must have been built with.

    Returns:
        The library; None where there is none, or one that does not match, which is logged.
    """
    library, manifest = folder / f"{name}.so", folder / f"{name}.json"
    try:
        facts = json.loads(manifest.read_bytes())
    except FileNotFoundError:
        if library.exists():
            _leave(library, f"there is no {manifest.name} beside it")
        return None
    except (OSError, ValueError) as error:
        _leave(manifest, f"it cannot be read: {error}")
        return None
    if not isinstance(facts, dict) or facts.get("name") != name:
        _leave(manifest, f"it is not that of {library.name}")
        return None
    for fact, value in built_with.items():
        if facts.get(fact) != value:
            _leave(library, f"built with {fact} {facts.get(fact)}, expected {value}", folder)
            return None
    try:
        got = hashlib.sha256(library.read_bytes()).hexdigest()
    except OSError as error:
        _leave(library, f"it cannot be read: {error}")
        return None
    if got != facts.get("sha256"):
        _leave(library, f"it is truncated or changed, its SHA-256 is not that in {manifest.name}")
        return None
    return library


def save(
    folder: Path, name: str, built_with: Mapping[str, str], export: Callable[[Path], None]
) -> None:
    """Put a library into a folder, whole or not at all.

    Args:
        folder: where to put it; made where it does not exist.
        name: the stem of its files.
        built_with: what it was built with.
        export: writes the library to the path that it is given.

    Raises:
        OSError: the folder cannot be written.
    """
    library, manifest = folder / f"{name}.so", folder / f"{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        new_library, new_manifest = Path(scratch) / library.name, Path(scratch) / manifest.name
        export(new_library)
        sha256 = hashlib.sha256(new_library.read_bytes()).hexdigest()
        facts = {"name": name, **built_with, "sha256": sha256}
        new_manifest.write_text(json.dumps(facts, indent=1) + "\n")
        # whoever looks in between finds none, not the one's library with the other's manifest
        manifest.unlink(missing_ok=True)
        os.replace(new_library, library)
        os.replace(new_manifest, manifest)


@functools.cache
def _load_runtime() -> None:
    """TileLang's run-time library, 2 ms; its Python, which takes a second or more, stays out."""
    package = importlib.util.find_spec("tilelang")
    folders = package.submodule_search_locations if package else None
    for folder in folders or ():
        # global, as TileLang loads it: kernels name no library that they need
        ctypes.CDLL(f"{folder}/lib/libtvm_runtime.so", mode=ctypes.RTLD_GLOBAL)


def load_kernel(folder: Path, key: Key) -> Callable[..., Any] | None:
    """The host function of a kernel in a folder.

    Args:
        folder: where to look; need not exist.
        key: the kernel.

    Returns:
        As :func:`mhc_ops.jit.compile_key`; None where there is none that can be used, with the
        reason in the log where there is one that cannot.
    """
    library = find(folder, file_name(key), _versions())
    if library is None:
        return None
    import tvm_ffi  # late: it comes with TileLang, which the package does not import

    try:
        _load_runtime()
        run: Callable[..., Any] = tvm_ffi.load_module(str(library)).main
    except (AttributeError, OSError, RuntimeError) as error:
        _leave(library, f"it cannot be loaded: {error}")
        return None
    return run


def save_kernel(folder: Path, key: Key, kernel: Any) -> None:
    """Put a compiled kernel into a folder.

    Args:
        folder: where to put it; made where it does not exist.
        key: the kernel.
        kernel: what TileLang's compiler returned for it.

    Raises:
        OSError, RuntimeError: it cannot be written.
    """
    save(folder, file_name(key), _versions(), lambda path: kernel.export_library(str(path)))


def cached_folder() -> Path:
    """Where the cache keeps the kernels of this installation.

    Raises:
        RuntimeError: others can write to it, see :func:`mhc_ops.config.require_trusted`.
    """
    folder = config.own_cache_folder() / f"kernels-{digest(_versions())}"
    config.require_trusted(folder)
    return folder


@contextmanager
def lock(folder: Path, name: str) -> Iterator[None]:
    """Keep other processes out of a piece of work, as long as that can be had.

    The system frees the lock of a process that ends, however it ends. One that holds it for longer
    than ``LOCK_SECONDS`` is no longer waited for, and a folder that takes no lock (read-only, or a
    file system without them) goes without: the work is then done twice, which does no harm.

    Args:
        folder: where the lock's file is; made where it does not exist.
        name: its stem.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        logger.debug("no lock for %s: %s", name, error)
        yield
        return
    try:
        _wait(descriptor, name)
        yield
    finally:
        os.close(descriptor)


def _wait(descriptor: int, name: str) -> None:
    start = time.monotonic()
    told = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not told:
                logger.info("another process is compiling %s, waiting for it", name)
                told = True
        except OSError as error:
            logger.debug("no lock for %s: %s", name, error)
            return
        if time.monotonic() - start > LOCK_SECONDS:
            logger.warning(
                "another process has been compiling %s for %.0f s, no longer waiting for it",
                name,
                LOCK_SECONDS,
            )
            return
        time.sleep(POLL_SECONDS)

"""Keep compiled kernels and native libraries in folders: those built ahead, and those cached.

A kernel is stored as a cubin and a JSON file beside it, the manifest. The manifest says how the
kernel is launched, gives the SHA-256 of the cubin and of the sources, and records the versions of
the compilers. Reading a kernel needs neither a compiler nor TileLang. A kernel that does not match
this installation is left alone.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from . import compiler, config, formula, trust
from .compiler import Compiled
from .routes import Key

logger = logging.getLogger("mhc_ops")

LOCK_SECONDS = 600.0  # a process that holds a lock for so long is stuck: no compile takes as long
POLL_SECONDS = 0.05

CUBIN = ".cubin"
LIBRARY = ".so"

_warned: set[tuple[Path, str]] = set()
_warned_lock = threading.Lock()


class Found(NamedTuple):
    """Hold a file that is whole and was built with what was asked for.

    Attributes:
        path: path of the file.
        content: content of the file.
        facts: content of the file's manifest.
    """

    path: Path
    content: bytes
    facts: Mapping[str, Any]


def digest(facts: Mapping[str, str]) -> str:
    """Make a short name of what something was built with."""
    return hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def kernels_built_with() -> dict[str, str]:
    """Return what a kernel must have been built with: these sources, by any compilers."""
    sources = hashlib.sha256()
    for name, path in compiler.sources().items():
        sources.update(f"{name}\0{path.read_text()}\0".encode())
    return {"sources": sources.hexdigest()[:16]}


def file_name(key: Key) -> str:
    """Return the stem of a kernel's files, such as ``finish-sm_90a-4096-norm1``."""
    options = (f"{name}{int(value)}" for name, value in key.options)
    return "-".join((key.kernel, key.arch, str(key.hidden), *options))


def _leave(file: Path, reason: str, where: Path | None = None) -> None:
    """Warn once that a file is not used.

    Args:
        file: the file.
        reason: why it is not used.
        where: the folder, for a reason that all its files share; the folder is warned of once.
    """
    with _warned_lock:
        if (where or file, reason) in _warned:
            return
        _warned.add((where or file, reason))
    logger.warning("%s is not used: %s", file, reason)


def find(
    folder: Path,
    name: str,
    suffix: str,
    built_with: Mapping[str, str],
    *,
    read: Callable[[Path], bytes] = trust.read,
) -> Found | None:
    """Find a file of a folder that is whole and was built with what is asked for.

    Args:
        folder: where to look; the folder need not exist.
        name: stem of the file and of its manifest.
        suffix: suffix of the file.
        built_with: what the file must have been built with.
        read: how a file is read. :meth:`Path.read_bytes` is for who loads nothing.

    Returns:
        The file. None where there is no file, or the file does not match, which is logged.

    Raises:
        RuntimeError: others can write the file or its manifest, see :func:`mhc_ops.trust.read`.
    """
    file, manifest = folder / f"{name}{suffix}", folder / f"{name}.json"
    try:
        facts = json.loads(read(manifest))
    except FileNotFoundError:
        if file.exists():
            _leave(file, f"there is no {manifest.name} beside it")
        return None
    except (OSError, ValueError, RecursionError) as error:
        _leave(manifest, f"it cannot be read: {error}")
        return None
    if not isinstance(facts, dict) or facts.get("name") != name:
        _leave(manifest, f"it is not that of {file.name}")
        return None
    for fact, value in built_with.items():
        if facts.get(fact) != value:
            _leave(file, f"built with {fact} {facts.get(fact)}, expected {value}", folder)
            return None
    try:
        content = read(file)
    except OSError as error:
        _leave(file, f"it cannot be read: {error}")
        return None
    if hashlib.sha256(content).hexdigest() != facts.get("sha256"):
        _leave(file, f"it is truncated or changed, its SHA-256 is not that in {manifest.name}")
        return None
    return Found(file, content, facts)


def save(folder: Path, name: str, suffix: str, facts: Mapping[str, Any], content: bytes) -> None:
    """Put a file and its manifest into a folder, both whole or neither.

    Args:
        folder: where to put them; the folder is made if it does not exist.
        name: stem of the file and of its manifest.
        suffix: suffix of the file.
        facts: content of the manifest, including what the file was built with.
        content: content of the file.

    Raises:
        OSError: the folder cannot be written.
    """
    file, manifest = folder / f"{name}{suffix}", folder / f"{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        new_file, new_manifest = Path(scratch) / file.name, Path(scratch) / manifest.name
        new_file.write_bytes(content)
        new_file.chmod(0o755 if suffix == LIBRARY else 0o644)
        facts = {"name": name, **facts, "sha256": hashlib.sha256(content).hexdigest()}
        new_manifest.write_text(json.dumps(facts, indent=1) + "\n")
        # The old manifest goes first. A process that looks in between then finds no kernel instead
        # of a new file with an old manifest.
        manifest.unlink(missing_ok=True)
        os.replace(new_file, file)
        os.replace(new_manifest, manifest)


def _from_facts(found: Found) -> Compiled:
    facts = found.facts
    x, y = (formula.parse(text) for text in facts["grid"])
    return Compiled(
        cubin=found.content,
        symbol=str(facts["symbol"]),
        parameters=tuple((name, kind) for name, kind in map(str.split, facts["parameters"])),
        grid=(x, y),
        block=int(facts["block"]),
        cluster=int(facts["cluster"]),
        shared=int(facts["shared"]),
        pdl=bool(facts["pdl"]),
        compiled_with=facts["compiled_with"],
    )


def load_kernel(
    folder: Path, key: Key, *, read: Callable[[Path], bytes] = trust.read
) -> Compiled | None:
    """Load a kernel from a folder.

    Args:
        folder: where to look; the folder need not exist.
        key: the kernel.
        read: as of :func:`find`.

    Returns:
        The kernel. None where the folder has none, or has one that cannot be used; the log then
        gives the reason.

    Raises:
        RuntimeError: others can write the kernel's files, see :func:`mhc_ops.trust.read`.
    """
    found = find(folder, file_name(key), CUBIN, kernels_built_with(), read=read)
    if found is None:
        return None
    try:
        return _from_facts(found)
    except (KeyError, TypeError, ValueError) as error:
        _leave(found.path, f"its manifest is not one of a kernel: {error!r}")
        return None


def save_kernel(folder: Path, key: Key, kernel: Compiled) -> None:
    """Put a compiled kernel into a folder.

    Args:
        folder: where to put the kernel; the folder is made if it does not exist.
        key: the kernel's key.
        kernel: what the compiler returned for the key.

    Raises:
        OSError: the folder cannot be written.
    """
    facts = {
        **kernels_built_with(),
        "symbol": kernel.symbol,
        "parameters": [f"{name} {kind}" for name, kind in kernel.parameters],
        "grid": [str(extent) for extent in kernel.grid],
        "block": kernel.block,
        "cluster": kernel.cluster,
        "shared": kernel.shared,
        "pdl": kernel.pdl,
        "compiled_with": dict(kernel.compiled_with),
    }
    save(folder, file_name(key), CUBIN, facts, kernel.cubin)


def ahead_folder() -> Path:
    """Return the folder of the kernels built ahead.

    Raises:
        ValueError: ``MHC_OPS_KERNELS`` names none, see :func:`mhc_ops.config.kernels_folder`.
        RuntimeError: others can write the folder, see :func:`mhc_ops.trust.require_folder`.
    """
    config.warn_of_unread()
    folder = config.kernels_folder()
    if folder != config.PACKAGED:
        trust.require_folder(folder)
    return folder


def cached_folder() -> Path:
    """Return the folder in which the cache keeps the kernels of these sources.

    Raises:
        RuntimeError: others can write the folder, see :func:`mhc_ops.trust.require_folder`.
    """
    folder = config.own_cache_folder() / f"kernels-{digest(kernels_built_with())}"
    trust.require_folder(folder)
    return folder


@contextmanager
def lock(folder: Path, name: str) -> Iterator[None]:
    """Keep other processes out of a piece of work, where a lock is possible.

    The system frees the lock of a process that ends, however the process ends. A process that holds
    the lock for longer than ``LOCK_SECONDS`` is no longer waited for. In a folder that takes no
    lock (a read-only one, or a file system without locks) the work goes on without one. In both
    cases the work may be done twice, which does no harm.

    Args:
        folder: where the lock's file is; the folder is made if it does not exist.
        name: stem of the lock's file.
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

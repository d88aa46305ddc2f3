"""Recognise a full disk in what the system and compilers say, and say where room is needed."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

from . import config

# The files of one compile take 4 MiB; several compiles run side by side.
LEAST_FREE = 32 << 20

_WORDS = (
    os.strerror(errno.ENOSPC),
    os.strerror(errno.EDQUOT),
    "No usable temporary directory",  # tempfile says so where every folder is full.
)


def is_full(error: BaseException) -> bool:
    """Say whether an error, or one that led to it, is that of a full disk or an exceeded quota."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        said = f"{seen} {getattr(seen, 'stderr', None) or ''}"
        if any(words in said for words in _WORDS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _temporary() -> Path:
    try:
        return Path(tempfile.gettempdir())
    except OSError:
        return Path(os.environ.get("TMPDIR") or "/tmp")


def _free(folder: Path) -> int | None:
    """Count the free bytes where a folder is or would be; None where the system does not tell."""
    existing = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    try:
        return shutil.disk_usage(existing).free
    except OSError:
        return None


def advice(
    error: BaseException, output: Path | None = None, *, suspected: bool = False
) -> str | None:
    """Say what helps against a full disk.

    Args:
        error: what went wrong while something was compiled or written.
        output: the folder that was written, instead of the cache folder.
        suspected: whether to look for a full disk also where the error names none: ``nvcc`` often
            names none.

    Returns:
        The advice, which names the folders that may be full; None where no disk is full.
    """
    places = {"TMPDIR": _temporary()}
    places["-o" if output else "TILELANG_CACHE_DIR"] = output or config.cache_folder()
    free = {name: _free(folder) for name, folder in places.items()}
    full = [name for name, left in free.items() if left is not None and left < LEAST_FREE]
    if not is_full(error) and not (suspected and full):
        return None
    named = full or list(places)
    said = []
    for name in named:
        left = free[name]
        said.append(str(places[name]))
        if left is not None:
            said[-1] += f" ({left / 2**20:.1f} MiB free)"
    return (
        f"make room in {' and in '.join(said)}, or let {' and '.join(named)} name "
        f"{'another folder' if len(named) == 1 else 'other folders'}"
    )

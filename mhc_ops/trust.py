"""Refuse files that somebody else can write: what is loaded runs in this process or on its GPU.

A *folder* is refused where another user owns it, and where others can write it, a folder above it
or a folder through which a link leads to it. A *file* of a folder is refused where another user
owns it or others can write it; where the file is a link, the folder to which the link leads counts,
too. Root and the user of this process are nobody else.

Of the package's own folder the files alone are looked at: whoever can write the folder can change
the package, so a file there may be as open as the package's code is, and no more.

``MHC_OPS_TRUST_CACHE=1`` turns all of that off.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from . import config

_MOST_LINKS = 40  # Linux follows no more in one look-up.
_FILES = ("*.cubin", "*.json", "*.so")
_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class _Exposed(NamedTuple):
    """Tell what somebody else can write.

    Attributes:
        said: what it is and who can, in words.
        cure: what to type against it.
    """

    said: str
    cure: str


def _own_group(gid: int) -> bool:
    """Say whether a group is the user's private group, which bears the user's name."""
    try:
        return grp.getgrgid(gid).gr_name == pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return False


def _open_to_others(status: os.stat_result) -> int:
    """Return the bits of a mode by which others can write."""
    private = stat.S_IWGRP if _own_group(status.st_gid) else 0
    return status.st_mode & _OTHERS & ~private


def _is_read_only(path: Path) -> bool:
    try:
        return bool(os.statvfs(path).f_flag & os.ST_RDONLY)
    except OSError:
        return False


def _told(path: Path, status: os.stat_result, whole: Path | None) -> _Exposed:
    """Say what is wrong with a path, and what helps.

    Args:
        path: what somebody else can write.
        status: status of the path.
        whole: the folder whose files are all put right at once; None for the path alone.
    """
    user, link = os.geteuid(), stat.S_ISLNK(status.st_mode)
    target = shlex.quote(str(whole or path))
    option = "-R " if whole else "-h " if link else ""
    said, commands = [], []
    if status.st_uid not in (0, user):
        said.append(f"belongs to another user (uid {status.st_uid})")
        commands.append(f"chown {option}{user} {target}")
    if _open_to_others(status) and not link:
        said.append(f"can be written by others (mode {stat.S_IMODE(status.st_mode):04o})")
        commands.append(f"chmod {option}go-w {target}")
    cure = f"type: {' && '.join(commands)}"
    if _is_read_only(path) or (user != 0 and status.st_uid != user):
        why = "its file system is read-only" if _is_read_only(path) else f"or as root {cure}"
        cure = f"copy it to a folder of your own (cp -rL {target} DIR), {why}"
    return _Exposed(f"{path} {' and '.join(said)}", cure)


def _way(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Give each folder and link through which a look-up of a path goes, and the path's end.

    What does not exist is left out: nothing is loaded from there.
    """
    here, names, links = Path("/"), list(reversed(path.absolute().parts[1:])), 0
    yield here, here.lstat()
    while names:
        name = names.pop()
        if name == "..":
            here = here.parent
            continue
        step = here / name
        try:
            status = step.lstat()
        except OSError:
            return
        yield step, status
        if not stat.S_ISLNK(status.st_mode):
            here = step
            continue
        links += 1
        if links > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        target = Path(os.readlink(step))
        here = Path("/") if target.is_absolute() else here
        names += reversed([part for part in target.parts if part != "/"])


def _exposed_way(path: Path, folder: Path) -> _Exposed | None:
    """Look for what somebody else can write on the way to a path.

    Args:
        path: what is loaded, or the folder that something is loaded from.
        folder: the folder at the end of the way. Its owner counts, which the owners of folders
            above do not: in a container these often belong to a user whom the container does not
            know.
    """
    shared: Path | None = None  # In such a folder, /tmp for one, others can replace their own.
    for step, status in _way(path):
        foreign = status.st_uid not in (0, os.geteuid())
        if foreign and (step == folder or step.parent == shared):
            return _told(step, status, None)
        if not stat.S_ISDIR(status.st_mode):
            continue
        sticky = bool(status.st_mode & stat.S_ISVTX)
        if _open_to_others(status) and (step == folder or not sticky):
            return _told(step, status, None)
        shared = step if sticky else shared
    return None


def _exposed_file(path: Path, status: os.stat_result, whole: Path) -> _Exposed | None:
    """Look at an opened file, not at its path, which may lead elsewhere by now."""
    owners, others = {0, os.geteuid()}, _open_to_others(status)
    if whole == config.PACKAGED:
        code = os.stat(__file__)
        owners.add(code.st_uid)
        others &= ~code.st_mode
    if others or status.st_uid not in owners:
        return _told(path, status, whole if path.parent == whole else None)
    return None


def exposure(folder: Path) -> str | None:
    """Say who else can bring files to a folder, or write one of its kernels and libraries.

    Args:
        folder: the folder. Every folder above it and every link on the way are looked at too,
            because whoever can write one of those can replace the folders below it.

    Returns:
        Who can, in words; None where nobody else can.
    """
    found = None if folder == config.PACKAGED else _exposed_way(folder, folder.resolve())
    files = (path for pattern in _FILES for path in folder.glob(pattern))
    for path in () if found else files:
        found = _exposed_way(path, path.resolve().parent) if path.is_symlink() else None
        found = found or _exposed_file(path, path.stat(), folder)
        if found is not None:
            break
    return None if found is None else found.said


def _refuse(what: Path, found: _Exposed) -> RuntimeError:
    return RuntimeError(
        f"mhc: no kernel is loaded from {what}: {found.said}, and what lies there would run in "
        f"this process; {found.cure}; or let TILELANG_CACHE_DIR or MHC_OPS_KERNELS name a folder "
        "of your own, or set MHC_OPS_TRUST_CACHE=1"
    )


def require_folder(folder: Path) -> None:
    """Refuse a folder to which others can bring kernels and libraries.

    Args:
        folder: where kernels and libraries are loaded from; the folder need not exist.

    Raises:
        RuntimeError: others can write the folder. The message says how, and what to do.
    """
    if config.switch("MHC_OPS_TRUST_CACHE"):
        return
    found = _exposed_way(folder, folder.resolve())
    if found is not None:
        raise _refuse(folder, found)


def read(path: Path) -> bytes:
    """Read a file of a folder that :func:`require_folder` has let pass.

    The file that was opened is looked at, so what others put into its place meanwhile is neither
    read nor trusted.

    Args:
        path: the file.

    Returns:
        The content of the file.

    Raises:
        OSError: the file cannot be read.
        RuntimeError: others can write the file. The message says how, and what to do.
    """
    if config.switch("MHC_OPS_TRUST_CACHE"):
        return path.read_bytes()
    # A pipe without a writer would keep a blocking open waiting for ever.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    real = path
    if path.is_symlink():
        real = path.resolve()
        found = _exposed_way(path, real.parent)
        if found is not None:
            raise _refuse(path, found)
    with open(os.open(real, flags), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        found = _exposed_file(real, status, path.parent)
        if found is not None:
            raise _refuse(path, found)
        return file.read()

"""Read every environment variable of the package; all have one prefix and stand in one table.

::

    variable               default  meaning
    ---------------------  -------  --------------------------------------------------------
    MHC_OPS_FUSE_POST_PRE  0        model wiring runs boundaries, and the ends, as one op each
    MHC_OPS_TILELANG_PRE   1        model wiring runs pre and head on the TileLang kernels
    MHC_OPS_TILELANG_POST  1        model wiring runs post on the TileLang kernels
    MHC_OPS_DISABLE_JIT    0        a kernel that is not there is an error, not compiled
    MHC_OPS_TRUST_CACHE    0        load kernels also from folders that others can write
    MHC_OPS_KERNELS                 folder of kernels built ahead, instead of the package's

Fusing needs the first three switches to be on. These three steer the model wiring (``mhc_ops.nn``
and the adapters), never a direct call of an op, and are read when a model is wired, not at import.
The other variables are read when a kernel is first needed.

Compiled kernels and libraries are kept in TileLang's cache folder, which ``TILELANG_CACHE_DIR``
moves. setup.py reads three more variables when a wheel is built: ``MHC_OPS_AOT_ARCHS``,
``MHC_OPS_AOT_HIDDEN`` and ``MHC_OPS_AOT_TORCH``.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from pathlib import Path
from typing import NamedTuple

PREFIX = "MHC_OPS_"

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


class Switches(NamedTuple):
    """Hold the switches of the model wiring.

    Attributes:
        fuse_post_pre: run a boundary as one ``fused_post_pre``.
        tilelang_pre: run ``pre`` and ``head`` on the TileLang kernels.
        tilelang_post: run ``post`` on the TileLang kernels.
    """

    fuse_post_pre: bool
    tilelang_pre: bool
    tilelang_post: bool

    @property
    def fuse(self) -> bool:
        """Tell whether a boundary is fused, which takes all three switches."""
        return self.fuse_post_pre and self.tilelang_pre and self.tilelang_post


DEFAULTS: dict[str, bool] = {
    "MHC_OPS_FUSE_POST_PRE": False,
    "MHC_OPS_TILELANG_PRE": True,
    "MHC_OPS_TILELANG_POST": True,
    "MHC_OPS_DISABLE_JIT": False,
    "MHC_OPS_TRUST_CACHE": False,
}
WIRING = tuple(DEFAULTS)[: len(Switches._fields)]
VARIABLES = (
    *DEFAULTS,
    "MHC_OPS_KERNELS",
    "MHC_OPS_AOT_ARCHS",
    "MHC_OPS_AOT_HIDDEN",
    "MHC_OPS_AOT_TORCH",
)

PACKAGED = Path(__file__).with_name("packaged")  # a wheel may carry kernels built ahead here


def switch(name: str) -> bool:
    """Read one switch from the environment.

    Args:
        name: a key of :data:`DEFAULTS`.

    Returns:
        Whether the switch is on now.

    Raises:
        ValueError: the variable is neither on (1, true, yes, on) nor off (0, false, no, off).
    """
    text = os.environ.get(name)
    if text is None or not text.strip():
        return DEFAULTS[name]
    word = text.strip().lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise ValueError(f"{name}: expected 0 or 1, got {text!r}")


def switches() -> Switches:
    """Read the switches of the model wiring from the environment.

    Returns:
        The switches as they are now.

    Raises:
        ValueError: as :func:`switch` raises it.
    """
    return Switches(*map(switch, WIRING))


def unread() -> list[str]:
    """List the variables that bear the package's prefix and that nothing reads."""
    return sorted(name for name in os.environ if name.startswith(PREFIX) and name not in VARIABLES)


def kernels_folder() -> Path:
    """Return the folder of the kernels built ahead: ``MHC_OPS_KERNELS``, else the package's own.

    Raises:
        RuntimeError: the variable names a folder that others can write.
    """
    named = os.environ.get("MHC_OPS_KERNELS")
    if not named:
        return PACKAGED  # whoever can write this folder can also change the package
    require_trusted(Path(named))
    return Path(named)


def cache_folder() -> Path:
    """Return TileLang's cache folder."""
    return Path(os.environ.get("TILELANG_CACHE_DIR") or Path.home() / ".tilelang" / "cache")


def own_cache_folder() -> Path:
    """Return the subfolder of TileLang's cache folder that holds what this package compiles."""
    return cache_folder() / "mhc_ops"


def _own_group(gid: int) -> bool:
    """Say whether a group is the user's private group, which bears the user's name."""
    try:
        return grp.getgrgid(gid).gr_name == pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return False


def _exposure(folder: Path, status: os.stat_result, above: bool) -> str | None:
    """Say who else can put files into a folder; None where nobody can."""
    mode = status.st_mode
    # In a container the folders above often belong to a user that the container does not know.
    if not above and status.st_uid not in (0, os.geteuid()):
        return f"{folder} belongs to another user (uid {status.st_uid})"
    if above and mode & stat.S_ISVTX:
        return None  # in such a folder, /tmp for one, others can rename only their own files
    if mode & stat.S_IWOTH or (mode & stat.S_IWGRP and not _own_group(status.st_gid)):
        return f"{folder} can be written by others (mode {stat.S_IMODE(mode):04o})"
    return None


def exposure(folder: Path) -> str | None:
    """Say who else can bring files to a folder.

    Args:
        folder: the folder. Every existing folder above it is looked at too, because whoever can
            write one of those can replace the folders below it.

    Returns:
        Who can, in words; None where nobody else can.
    """
    found = _exposed(folder)
    return None if found is None else found[1]


def _exposed(folder: Path) -> tuple[Path, str] | None:
    resolved = folder.resolve()
    for path in (resolved, *resolved.parents):
        try:
            status = path.stat()
        except OSError:
            continue  # nothing is loaded from a folder that does not exist
        said = _exposure(path, status, above=path != resolved)
        if said is not None:
            return path, said
    return None


def require_trusted(folder: Path) -> None:
    """Refuse a folder to which others can bring libraries, which would run in this process.

    Args:
        folder: where libraries are loaded from; it is looked at as by :func:`exposure`.

    Raises:
        RuntimeError: others can write the folder. The message says how, and what to do.
    """
    if switch("MHC_OPS_TRUST_CACHE"):
        return
    found = _exposed(folder)
    if found is not None:
        path, said = found
        raise RuntimeError(
            f"mhc: no kernel is loaded from {folder}: {said}, and what lies there would "
            f"run in this process; take the rights of others (chmod go-w {path}), let "
            "TILELANG_CACHE_DIR or MHC_OPS_KERNELS name a folder of your own, or set "
            "MHC_OPS_TRUST_CACHE=1"
        )

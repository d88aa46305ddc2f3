"""Read every environment variable of the package, with one prefix and one table.

::

    variable               default  meaning
    ---------------------  -------  --------------------------------------------------------
    MHC_OPS_FUSE_POST_PRE  0        model wiring runs boundaries, and the ends, as one op each
    MHC_OPS_TILELANG_PRE   1        model wiring runs pre and head on the TileLang kernels
    MHC_OPS_TILELANG_POST  1        model wiring runs post on the TileLang kernels
    MHC_OPS_DISABLE_JIT    0        a kernel that is not there is an error, not compiled
    MHC_OPS_TRUST_CACHE    0        load kernels also from folders that others can write
    MHC_OPS_KERNELS                 folder of kernels built ahead, instead of the package's

Fusing needs all three of the first. They steer the model wiring (``mhc_ops.nn`` and what stands on
it), never a direct call of an op, and are read when a model is wired, not at import. The others are
read when a kernel is first asked for.

What is compiled lies in TileLang's cache folder, which ``TILELANG_CACHE_DIR`` moves. Three more
variables are read by setup.py when a wheel is built: ``MHC_OPS_AOT_ARCHS``, ``MHC_OPS_AOT_HIDDEN``
and ``MHC_OPS_AOT_TORCH``.
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
    """The switches of the model wiring.

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

PACKAGED = Path(__file__).with_name("packaged")  # kernels that the package carries


def switch(name: str) -> bool:
    """Read one switch from the environment.

    Args:
        name: a key of :data:`DEFAULTS`.

    Returns:
        Whether it is on now.

    Raises:
        ValueError: it is neither on (1, true, yes, on) nor off (0, false, no, off).
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
        ValueError: as :func:`switch`.
    """
    return Switches(*map(switch, WIRING))


def unread() -> list[str]:
    """List the variables that bear the package's prefix and that nothing reads."""
    return sorted(name for name in os.environ if name.startswith(PREFIX) and name not in VARIABLES)


def kernels_folder() -> Path:
    """Where the kernels that were built ahead lie: in the package, or as ``MHC_OPS_KERNELS`` says.

    Raises:
        RuntimeError: the variable names a folder that others can write.
    """
    named = os.environ.get("MHC_OPS_KERNELS")
    if not named:
        return PACKAGED  # as safe as the package itself
    require_trusted(Path(named))
    return Path(named)


def cache_folder() -> Path:
    """TileLang's cache folder."""
    return Path(os.environ.get("TILELANG_CACHE_DIR") or Path.home() / ".tilelang" / "cache")


def own_cache_folder() -> Path:
    """The part of TileLang's cache folder where the package keeps what it compiles itself."""
    return cache_folder() / "mhc_ops"


def _own_group(gid: int) -> bool:
    """Whether a group is the one that many systems give each user, of the user's own name."""
    try:
        return grp.getgrgid(gid).gr_name == pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return False


def _exposure(folder: Path, status: os.stat_result, above: bool) -> str | None:
    """Who else can put files into a folder, or None."""
    mode = status.st_mode
    # in a container the folders above often belong to nobody that it knows
    if not above and status.st_uid not in (0, os.geteuid()):
        return f"{folder} belongs to another user (uid {status.st_uid})"
    if above and mode & stat.S_ISVTX:
        return None  # as in /tmp: others cannot rename what is not theirs
    if mode & stat.S_IWOTH or (mode & stat.S_IWGRP and not _own_group(status.st_gid)):
        return f"{folder} can be written by others (mode {stat.S_IMODE(mode):04o})"
    return None


def exposure(folder: Path) -> str | None:
    """Say who else can bring files to a folder.

    Args:
        folder: it and every folder above it that exists is looked at: who can write one of them can
            put another folder in the place of those below.

    Returns:
        In words; None where nobody else can.
    """
    found = _exposed(folder)
    return None if found is None else found[1]


def _exposed(folder: Path) -> tuple[Path, str] | None:
    resolved = folder.resolve()
    for path in (resolved, *resolved.parents):
        try:
            status = path.stat()
        except OSError:
            continue  # nothing is loaded from what is not there
        said = _exposure(path, status, above=path != resolved)
        if said is not None:
            return path, said
    return None


def require_trusted(folder: Path) -> None:
    """Refuse a folder to which others can bring libraries, which would run in this process.

    Args:
        folder: where libraries are loaded from; looked at as by :func:`exposure`.

    Raises:
        RuntimeError: naming the folder, how others can write it, and what to do.
    """
    if switch("MHC_OPS_TRUST_CACHE"):
        return
    found = _exposed(folder)
    if found is not None:
        path, said = found
        raise RuntimeError(
            f"mhc: no kernel is loaded from {folder}: {said}, and what lies there would "
            f"run in this process; take their rights (chmod go-w {path}), let "
            "TILELANG_CACHE_DIR or MHC_OPS_KERNELS name a folder of your own, or set "
            "MHC_OPS_TRUST_CACHE=1"
        )

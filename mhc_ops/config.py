"""Read every environment variable of the package; all have one prefix and stand in one table.

::

    variable               default  meaning
    ---------------------  -------  --------------------------------------------------------
    MHC_OPS_FUSE_POST_PRE  0        model wiring runs boundaries, and the ends, as one op each
    MHC_OPS_TILELANG_PRE   1        model wiring runs pre and head on the TileLang kernels
    MHC_OPS_TILELANG_POST  1        model wiring runs post on the TileLang kernels
    MHC_OPS_DISABLE_JIT    0        a kernel that is not there is an error, not compiled
    MHC_OPS_TRUST_CACHE    0        load kernels also where others can write them
    MHC_OPS_KERNELS                 folder of kernels built ahead, instead of the package's

Fusing needs the first three switches to be on. These three steer the model wiring (``mhc_ops.nn``
and the adapters), never a direct call of an op, and are read when a model is wired, not at import.
The other variables are read when a kernel is first needed. ``MHC_OPS_KERNELS`` has to name a folder
of kernels then. Variables with the prefix that nothing reads are warned of once, at the same times.

Compiled kernels and libraries are kept in TileLang's cache folder, which ``TILELANG_CACHE_DIR``
moves. setup.py reads three more variables when a wheel is built: ``MHC_OPS_AOT_ARCHS``,
``MHC_OPS_AOT_HIDDEN`` and ``MHC_OPS_AOT_TORCH``.
"""

from __future__ import annotations

import difflib
import functools
import logging
import os
import shlex
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger("mhc_ops")

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
VARIABLES = (  # setup.py reads the last three.
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
    warn_of_unread()
    return Switches(*map(switch, WIRING))


def unread() -> list[str]:
    """List the variables that bear the package's prefix and that nothing reads."""
    return sorted(name for name in os.environ if name.startswith(PREFIX) and name not in VARIABLES)


def meant(name: str) -> str:
    """Say that nothing reads a variable, and which one its name is nearly that of."""
    near = difflib.get_close_matches(name, VARIABLES, 1)
    return f"which nothing reads{f'; {near[0]} was meant?' if near else ''}"


@functools.cache
def warn_of_unread() -> None:
    """Warn of the variables of :func:`unread`, once in a process."""
    for name in unread():
        logger.warning("the environment has %s, %s", name, meant(name))


def kernels_folder() -> Path:
    """Return the folder of the kernels built ahead: ``MHC_OPS_KERNELS``, else the package's own.

    Returns:
        The folder, with ``~`` expanded. The package's own need not exist.

    Raises:
        ValueError: the variable names no folder, or a folder without kernels.
    """
    named = os.environ.get("MHC_OPS_KERNELS", "").strip()
    if not named:
        return PACKAGED
    folder = Path(os.path.expanduser(named))
    if not any(folder.glob("*.json")):
        lack = "which has no kernels" if folder.is_dir() else "where there is no folder"
        raise ValueError(
            f"MHC_OPS_KERNELS: expected a folder of kernels built ahead, got {named!r}, {lack}; "
            f"fill it (python -m mhc_ops build --arch ARCH -o {shlex.quote(str(folder))}), name "
            "another one, or unset the variable"
        )
    return folder


def cache_folder() -> Path:
    """Return TileLang's cache folder."""
    return Path(os.environ.get("TILELANG_CACHE_DIR") or Path.home() / ".tilelang" / "cache")


def own_cache_folder() -> Path:
    """Return the subfolder of TileLang's cache folder that holds what this package compiles."""
    return cache_folder() / "mhc_ops"

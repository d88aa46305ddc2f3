"""Every environment variable that the package reads, with one prefix and one table.

| variable                  | default | meaning                                                    |
|---------------------------|---------|------------------------------------------------------------|
| `MHC_OPS_FUSE_POST_PRE`   | `0`     | model wiring runs each boundary as `fused_post_pre`        |
| `MHC_OPS_TILELANG_PRE`    | `1`     | model wiring runs `pre` and `head` on the TileLang kernels |
| `MHC_OPS_TILELANG_POST`   | `1`     | model wiring runs `post` on the TileLang kernels           |

Fusing needs all three. The switches steer the model wiring (``mhc_ops.nn`` and what stands on
it), never a direct call of an op. They are read when a model is wired, not at import.

What is compiled lies in TileLang's cache folder, which ``TILELANG_CACHE_DIR`` moves.
"""

from __future__ import annotations

import os
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
        """Whether a boundary is fused: all three switches are on."""
        return self.fuse_post_pre and self.tilelang_pre and self.tilelang_post


DEFAULTS: dict[str, bool] = {
    "MHC_OPS_FUSE_POST_PRE": False,
    "MHC_OPS_TILELANG_PRE": True,
    "MHC_OPS_TILELANG_POST": True,
}


def _switch(name: str) -> bool:
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
    """Read the switches from the environment.

    Returns:
        The switches as they are now.

    Raises:
        ValueError: a variable is neither on (1, true, yes, on) nor off (0, false, no, off).
    """
    return Switches(*(_switch(name) for name in DEFAULTS))


def cache_folder() -> Path:
    """TileLang's cache folder, where the package keeps what it compiles itself as well."""
    return Path(os.environ.get("TILELANG_CACHE_DIR") or Path.home() / ".tilelang" / "cache")

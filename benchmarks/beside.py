"""Another revision of the package in this process, beside the one that is imported.

Two machines differ by 1 to 2 %, so two revisions are compared in one process. The other one becomes
the package ``mhc_ops_beside``, whose ops are ``torch.ops.mhc_beside.*``. ``git worktree add FOLDER
REVISION`` makes a folder with a checkout of it.
"""

from __future__ import annotations

import importlib
import re
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType

NAME = "mhc_ops_beside"
# (what stands in the sources, what takes its place): the package, its ops, and their library
_RENAMED = ((re.compile(r"\bmhc_ops\b"), NAME), (re.compile(r"\bmhc\b"), "mhc_beside"))


def load(folder: Path) -> ModuleType:
    """Import the package of another checkout.

    Args:
        folder: the checkout, with ``mhc_ops`` and ``csrc_tilelang`` in it.

    Returns:
        The package; its modules are imported from it by ``importlib.import_module``.
    """
    home = Path(tempfile.mkdtemp(prefix="beside-"))
    package = home / NAME
    shutil.copytree(folder / "mhc_ops", package, ignore=shutil.ignore_patterns("__pycache__"))
    for path in package.rglob("*"):
        if path.suffix in (".py", ".cpp", ".c"):
            text = path.read_text()
            for pattern, name in _RENAMED:
                text = pattern.sub(name, text)
            path.write_text(text)
    # the kernels name the package nowhere, and their device functions live in a namespace mhc
    shutil.copytree(folder / "csrc_tilelang", package / "csrc_tilelang", dirs_exist_ok=True)
    sys.path.insert(0, str(home))
    return importlib.import_module(NAME)

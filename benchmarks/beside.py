"""Import another revision of the package beside the installed one.

Times of two machines do not compare precisely ("How to read it" in benchmarks/NOTES.md says how
far), so two revisions are compared in one process. The other revision becomes the package
``mhc_ops_beside``, whose ops are ``torch.ops.mhc_beside.*``. ``git worktree add FOLDER REVISION``
makes a folder with a checkout of the other revision.
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
# These patterns and their replacements rename the package, and the library of its ops.
_RENAMED = ((re.compile(r"\bmhc_ops\b"), NAME), (re.compile(r"\bmhc\b"), "mhc_beside"))


def load(folder: Path) -> ModuleType:
    """Import the package of another checkout.

    Args:
        folder: the checkout, with ``mhc_ops`` and ``csrc_tilelang`` in it.

    Returns:
        The package. Import its modules with ``importlib.import_module``.
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
    # The kernels' sources are not renamed: no kernel names the package, and the namespace mhc of
    # the device functions has to stay.
    shutil.copytree(folder / "csrc_tilelang", package / "csrc_tilelang", dirs_exist_ok=True)
    sys.path.insert(0, str(home))
    return importlib.import_module(NAME)

"""Describe builds of torch to compile the short way for: this environment's, and others as files.

Another torch is never imported. Its headers, its ``version.py`` and the two libraries that the
linker reads are all that a build needs, so one machine builds for every torch.
"""

from __future__ import annotations

import ast
import re
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

# torch's index has several builds of a release, such as 2.14.1, 2.14.1+cpu and 2.14.1+cu130.
RELEASE = re.compile(r"(\d+\.\d+)\.\d+(\+(cpu|cu\d+))?")

HEADERS = "include/torch/library.h"  # where this header exists, the others are taken to exist
LIBRARIES = ("lib/libc10.so", "lib/libtorch_cpu.so")
VERSION = "version.py"


class Torch(NamedTuple):
    """Describe a build of torch.

    Attributes:
        home: package folder of the build.
        version: version, such as ``2.14.1+cu130``.
        commit: commit that the build was made from.
    """

    home: Path
    version: str
    commit: str

    @property
    def series(self) -> str:
        """Return the series of a release, such as ``2.14``, or the version of any other build.

        The releases of a series differ in fixes, none of which changes what the headers declare.
        The builds of a release for a CPU and for any CUDA are compiled from one tree with one C++
        ABI. The next series changes classes whose fields the short way reads, and any commit
        between two releases may do so, too.
        """
        release = RELEASE.fullmatch(self.version)
        return release[1] if release else self.version

    @property
    def facts(self) -> dict[str, str]:
        """Return what a library that is compiled against this build depends on."""
        release = RELEASE.fullmatch(self.version)
        return {"torch": self.series, **({} if release else {"torch_commit": self.commit})}


def here() -> Torch:
    """Return the torch of this environment."""
    return Torch(Path(torch.__file__).parent, torch.__version__, str(torch.version.git_version))


def _assigned(source: str) -> dict[str, object]:
    """Map each name to which a module assigns a constant to the constant."""
    found: dict[str, object] = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Constant):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {t.id: node.value.value for t in targets if isinstance(t, ast.Name)}
    return found


def _of_folder(home: Path, given: Path) -> Torch:
    for name in (VERSION, HEADERS, *LIBRARIES):
        if not (home / name).is_file():
            raise ValueError(
                "mhc_ops.build: expected a package folder of torch or a wheel of it, got "
                f"{given}, which has no {name}"
            )
    try:
        facts = _assigned((home / VERSION).read_text())
        version, commit = facts["__version__"], facts["git_version"]
    except (KeyError, SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(
            f"mhc_ops.build: expected __version__ and git_version in {VERSION} of {given}, got "
            f"{error!r}"
        ) from error
    return Torch(home, str(version), str(commit))


def _unpack(wheel: Path, target: Path) -> None:
    """Put the files of a wheel that a build needs into a folder."""
    needed = (VERSION, *LIBRARIES)
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                inside = name.removeprefix("torch/")
                if inside != name and (inside.startswith("include/") or inside in needed):
                    archive.extract(name, target)
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"mhc_ops.build: expected a wheel of torch, got {wheel}: {error}"
        ) from error


@contextmanager
def opened(path: Path) -> Iterator[Torch]:
    """Give a build of torch from its files, as long as the context lasts.

    Args:
        path: the folder of an installed or unpacked package ``torch``, or a wheel of torch.

    Raises:
        ValueError: the path is neither; the message says what is missing.
    """
    if not path.is_file():
        yield _of_folder(path, path)
        return
    with tempfile.TemporaryDirectory() as scratch:
        _unpack(path, Path(scratch))
        yield _of_folder(Path(scratch) / "torch", path)

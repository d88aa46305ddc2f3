"""Keep what tests lower and compile from one run to the next, shared by processes at once.

An entry is named by a digest of all that it depends on, so none is ever out of date: what changes
gets another name. An entry comes into the folder whole, under a lock that keeps two processes from
making it twice. What nobody has used for a month goes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from filelock import FileLock

UNUSED_SECONDS = 30 * 24 * 3600
PARTIAL = "partial-"


class Kept:
    """Hold a folder of what was made.

    Args:
        folder: the folder, which has to exist.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(
        self, stem: str, suffix: str, depends_on: Iterable[str], make: Callable[[Path], object]
    ) -> Path:
        """Return a file, which is made unless it is there.

        Args:
            stem: what the file is, for people who look into the folder.
            suffix: the end of the file's name.
            depends_on: all that decides what is in the file.
            make: called with the path of a file that it has to write.

        Returns:
            The file.
        """
        digest = hashlib.sha256()
        for text in (stem, *depends_on):
            digest.update(f"{len(text)}\0{text}".encode())
        file = self._folder / f"{stem}-{digest.hexdigest()[:24]}{suffix}"
        if not file.exists():
            with FileLock(f"{file}.lock"):
                if not file.exists():  # Another process may have made the file meanwhile.
                    with tempfile.TemporaryDirectory(dir=self._folder, prefix=PARTIAL) as scratch:
                        partial = Path(scratch) / file.name
                        make(partial)
                        partial.replace(file)
        os.utime(file)
        return file

    def drop_unused(self) -> None:
        """Remove what nobody has used for a month, and what a killed process has left."""
        for path in self._folder.iterdir():
            # Another process may remove the path, too.
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime > time.time() - UNUSED_SECONDS:
                    continue
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()

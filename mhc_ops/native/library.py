"""Find the native libraries as files built ahead with the kernels or cached, or build them.

There are two libraries: the launcher, in C (``launcher.c``), which every kernel needs, and the
short way of eager calls, in C++ (``host.cpp``), without which calls only take longer on the host.
"""

from __future__ import annotations

import logging
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from .. import config, store, trust

logger = logging.getLogger("mhc_ops")

BUILD_SECONDS = 600  # A build on a slow or busy machine stays far below this.


def compile(name: str, command: Sequence[str]) -> bytes:
    """Run a compiler.

    Args:
        name: of the library, for the log.
        command: the compiler's command line, to which ``-o`` and the output are appended.

    Returns:
        The library's bytes.

    Raises:
        OSError, subprocess.SubprocessError: the library cannot be built.
    """
    start = time.perf_counter()
    logger.info("building %s", name)
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / f"{name}.so"
        subprocess.run(
            [*command, "-o", str(output)],
            check=True,
            capture_output=True,
            text=True,
            timeout=BUILD_SECONDS,
        )
        content = output.read_bytes()
    logger.info("built %s in %.1f s", name, time.perf_counter() - start)
    return content


def build(folder: Path, name: str, built_with: Mapping[str, str], command: Sequence[str]) -> None:
    """Build a library into a folder, where it is not there yet.

    Args:
        folder: where to put the library.
        name: the stem of the library's files.
        built_with: what the library depends on.
        command: as of :func:`compile`.

    Raises:
        OSError, subprocess.SubprocessError: the library cannot be built or written.
    """
    if store.find(folder, name, store.LIBRARY, built_with, read=Path.read_bytes) is None:
        store.save(folder, name, store.LIBRARY, built_with, compile(name, command))


def obtain(name: str, built_with: Mapping[str, str], command: Sequence[str]) -> Path:
    """Return the path of a library that was built ahead or cached, or that is built now.

    Args:
        name: the stem of the library's files.
        built_with: what the library depends on.
        command: as of :func:`compile`.

    Returns:
        The path of the library. Only root and the user of this process can put another file there,
        so the path leads to what was looked at until the library is loaded.

    Raises:
        OSError, subprocess.SubprocessError: the library cannot be built or written.
        RuntimeError: others can write the library or its folder.
    """
    ahead = store.find(store.ahead_folder(), name, store.LIBRARY, built_with)
    if ahead is not None:
        return ahead.path
    folder = config.own_cache_folder() / f"{name}-{store.digest(built_with)}"
    trust.require_folder(folder)
    if store.find(folder, name, store.LIBRARY, built_with) is None:
        with store.lock(folder, name):  # Another process may build it meanwhile.
            build(folder, name, built_with, command)
    return folder / f"{name}{store.LIBRARY}"


def reason(error: Exception) -> str:
    """Return what went wrong in a build, in the compiler's words where there are some."""
    said: str = getattr(error, "stderr", None) or str(error)
    return said.strip()

"""Write what a process without Python needs to know of ops and plans to files beside the kernels.

``ops.txt`` says what the ops are, and ``plans-ARCH-HIDDEN.txt`` how calls are served at this
architecture and hidden size; ``standalone.h`` reads both. The first line of each file names the
sources of the native library and the SHA-1 of the other lines, so that a file of another version,
or an incomplete one, is refused.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from .. import compiler, store
from .._arguments import recipe
from .._library import SCHEMAS
from ..routes import Key
from . import host, launcher
from .plan import plans


def _write(path: Path, lines: Iterable[str]) -> None:
    body = "".join(f"{line}\n" for line in lines)
    seal = hashlib.sha1(body.encode()).hexdigest()  # torch's headers have no hash but SHA-1
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        new = Path(scratch) / path.name
        new.write_text(f"{host.source()} {seal}\n{body}")
        new.chmod(0o644)
        os.replace(new, path)


def write_ops(folder: Path) -> None:
    """Write of each op the name, what its calls show of the plan that they need, and the schema.

    Args:
        folder: folder of kernels.

    Raises:
        OSError: the folder cannot be written.
    """
    _write(
        folder / "ops.txt",
        (" ".join(map(str, (op, *host.shown(recipe(op)), SCHEMAS[op]))) for op in SCHEMAS),
    )


def _kernel(key: Key, kernel: compiler.Compiled) -> str:
    facts = (kernel.symbol, kernel.block, kernel.cluster, kernel.shared, int(kernel.pdl))
    sha1 = hashlib.sha1(kernel.cubin).hexdigest()
    return " ".join(map(str, ("kernel", store.file_name(key), *facts, sha1)))


def write_plans(folder: Path, arch: str, hidden: int) -> None:
    """Write the plans for a hidden size on an architecture, with the kernels of the folder.

    Args:
        folder: folder of kernels.
        arch: architecture, such as ``sm_90a``.
        hidden: hidden size.

    Raises:
        OSError: the folder cannot be written.
    """
    known = plans(hidden, arch, None)
    every = dict.fromkeys(step.key for of in known for r in of.ranges for step in r.steps)
    found = {key: store.load_kernel(folder, key, read=Path.read_bytes) for key in every}
    kernels = {key: kernel for key, kernel in found.items() if kernel is not None}
    # In the file each kernel has a number instead of a handle.
    numbered = {key: launcher.Kernel(i, kernel) for i, (key, kernel) in enumerate(kernels.items())}
    lines = [_kernel(key, kernel) for key, kernel in kernels.items()]
    for of in known:
        written = host.words(of, [[numbered.get(s.key) for s in r.steps] for r in of.ranges])
        lines.append(" ".join(map(str, ("plan", of.recipe.op, int(of.norm), *written))))
    _write(folder / f"plans-{arch}-{hidden}.txt", lines)

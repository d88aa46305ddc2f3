"""Compile kernels ahead of time, for any architecture and without a GPU.

``python -m mhc_ops build --arch sm_90a --hidden 4096 -o DIR`` fills a folder that
``MHC_OPS_KERNELS=DIR`` makes the ops load from. What the folder has of these sources is kept;
``--torch`` without ``--arch`` adds the native library for another torch. A wheel built with
``MHC_OPS_AOT_ARCHS`` set carries such a folder.
"""

from __future__ import annotations

import argparse
import functools
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from . import compiler, disk, routes, store, support
from .native import ahead, host, launcher, library, torches
from .prewarm import DEFAULT_MAX_TOKENS, check_sizes, progress_bar, side_by_side

# These are V4-Flash and GLM-5.3; V4.1, whose post step alone is served; and V4-Pro.
DEFAULT_HIDDEN = (4096, 5120, 7168)
ARCH = re.compile(r"sm_(\d+)(\d)(a?)")


class BuildReport(NamedTuple):
    """Tell what :func:`build` did.

    Attributes:
        folder: where the kernels are.
        kernels: the kernels that were asked for.
        compiled: those of the kernels that the folder did not have yet.
        libraries: the native libraries that were asked for, by name.
        seconds: how long the build took.
    """

    folder: Path
    kernels: tuple[routes.Key, ...]
    compiled: tuple[routes.Key, ...]
    libraries: tuple[str, ...]
    seconds: float


def _check_arch(arch: str) -> None:
    match = ARCH.fullmatch(arch)
    if match:
        capability = int(match[1]), int(match[2])
        if capability >= support.LEAST_CAPABILITY and arch == support.arch_name(*capability):
            return
    raise ValueError(
        "mhc_ops.build: expected architectures such as sm_80, sm_90a or sm_120a, from sm_80 on and "
        f"with an a from sm_90a on, got {arch}"
    )


def _build_library(name: str, build: Callable[[], None]) -> str:
    try:
        build()
    except subprocess.SubprocessError as error:
        room = disk.advice(error)
        raise RuntimeError(
            f"mhc_ops.build: the native library {name} cannot be built: {library.reason(error)}"
            f"{f'; {room}' if room else ''}"
        ) from error
    return name


def _build_libraries(folder: Path, given: Sequence[Path]) -> tuple[str, ...]:
    """Build the launcher, and the short way for every torch; return the names of the libraries."""
    names = [_build_library(launcher.NAME, lambda: launcher.build(folder))]
    built: dict[str, torches.Torch] = {}
    for path in given or [torches.here().home]:
        with torches.opened(path) as of:
            other = built.setdefault(of.series, of)
            if other is not of:
                raise ValueError(
                    "mhc_ops.build: expected one torch of each release series, got "
                    f"{other.version} and {of.version}"
                )
            names.append(_build_library(host.name(of), functools.partial(host.build, folder, of)))
    return tuple(names)


def build(
    archs: Sequence[str],
    hidden: Sequence[int],
    folder: Path,
    *,
    torch: Sequence[Path] = (),
    max_tokens: int = DEFAULT_MAX_TOKENS,
    progress: bool = False,
) -> BuildReport:
    """Compile every kernel that these sizes can reach into a folder, without a GPU.

    With the kernels come the native libraries (the launcher, and the short way of eager calls for
    each release series of torch) and what a process without Python needs to know of the ops. What
    the folder has of these sources is kept.

    Args:
        archs: such as ``sm_90a``, as :func:`mhc_ops.is_supported` names a device's; none where
            ``torch`` names some, to add their native libraries alone.
        hidden: hidden sizes, multiples of 256.
        folder: where to put the kernels; a folder that does not exist is made.
        torch: package folders or wheels of the torch to build for, one of a release series; when
            empty the torch of this environment.
        max_tokens: the largest token count of a call.
        progress: show a progress bar on standard error.

    Returns:
        What was done.

    Raises:
        ValueError: an architecture, a hidden size or ``max_tokens`` that cannot be served, a path
            that is no torch, or two of one release series.
        OSError: the folder cannot be written.
        RuntimeError: a kernel or a native library cannot be compiled, with the reason.
    """
    if not archs and not torch:
        raise ValueError(
            "mhc_ops.build: expected an architecture or a torch to build for, got none"
        )
    for arch in archs:
        _check_arch(arch)
    check_sizes("mhc_ops.build", hidden, max_tokens)
    start = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    keys = dict.fromkeys(
        key for arch in archs for size in hidden for key in routes.keys(size, arch, max_tokens)
    )

    libraries = _build_libraries(folder, torch)
    missing = tuple(
        key for key in keys if store.load_kernel(folder, key, read=Path.read_bytes) is None
    )

    def build_one(key: routes.Key) -> None:
        store.save_kernel(folder, key, compiler.compile_kernel(key))

    if missing:
        with progress_bar(progress) as bar:
            side_by_side(bar, f"compiling for {', '.join(archs)}", build_one, missing)
    ahead.write_ops(folder)
    for arch in archs:
        for size in hidden:
            ahead.write_plans(folder, arch, size)
    return BuildReport(folder, tuple(keys), missing, libraries, time.perf_counter() - start)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _paths(text: str) -> list[Path]:
    return [Path(word) for word in _words(text)]


def _sizes(text: str) -> list[int]:
    return [int(word) for word in _words(text)]


def main(argv: Sequence[str]) -> int:
    """Run ``python -m mhc_ops build`` and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mhc_ops build", description=__doc__)
    parser.add_argument("--arch", type=_words, default=[], help="such as sm_90a,sm_100a")
    parser.add_argument("--hidden", type=_sizes, default=list(DEFAULT_HIDDEN), help="4096,7168")
    parser.add_argument("--max-tokens", type=int, default=DEFAULT_MAX_TOKENS)
    parser.add_argument(
        "--torch",
        type=_paths,
        action="extend",
        default=[],
        metavar="PATH",
        help="package folder or wheel of a torch to build the native library for, instead of this "
        "environment's; any number, without --arch for it alone",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args(argv)
    try:
        report = build(
            arguments.arch,
            arguments.hidden,
            arguments.output,
            torch=arguments.torch,
            max_tokens=arguments.max_tokens,
            progress=True,
        )
    except OSError as error:
        room = disk.advice(error, arguments.output)
        print(f"mhc_ops.build: {error}{f'; {room}' if room else ''}", file=sys.stderr)
        return 2
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(
        f"{len(report.kernels)} kernels, {len(report.compiled)} of them new, and "
        f"{', '.join(report.libraries)} in {report.folder} in {report.seconds:.1f} s"
    )
    return 0

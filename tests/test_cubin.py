"""Compile every kernel for every architecture that is served, and without spills for Hopper.

No GPU is needed: the CUDA source that TileLang generates goes through nvcc with the flags that
TileLang gives it. All kernels of a hidden size and an architecture are one file, because nvcc takes
as long to read TileLang's headers as to compile a kernel.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("tilelang", reason="needs TileLang, which lowers the kernels")

from emulated import ARCH, IN_CLUSTERS, lower_key
from emulation.harness import DEVICE_FUNCTIONS
from kept import Kept
from mhc_ops import routes
from mhc_ops.compiler import Lowered
from mhc_ops.routes import Key

MAX_TOKENS = 8192
# Spills are counted at these hidden sizes; elsewhere one size shows that the kernels compile.
CASES = [(ARCH, hidden) for hidden in (4096, 7168)]
CASES += [(arch, 4096) for arch in ("sm_80", "sm_100a", "sm_120a")]
# One more size has the kernels of post_head alone, with one and with two CTAs on an SM: the largest
# kernels, with norm and streams. Without the streams the loop spills 12 to 20 bytes, and 4 at 7168.
POST_HEAD_CASE = (ARCH, 5120)

# The kernels of this architecture are those of Hopper, source by source.
LIKE_HOPPER = "sm_100a"

LONGEST_TO_LOWER = ("fused_post_pre_persistent", "pre")

# These kernels may spill so many bytes. The warps of the first two have two roles with registers to
# match, 184 or 200 to hold fn; they spill addresses above all, and pre some of fn.
# expand_pre and post_head lack one or two registers where two CTAs share an SM.
MAY_SPILL = {"fused_post_pre_persistent": 80, "pre": 96, "expand_pre": 8, "post_head": 8}

WAIT = "cudaGridDependencySynchronize()"
PDL = (WAIT, "cudaTriggerProgrammaticLaunchCompletion()", "griddepcontrol")
USAGE = re.compile(
    r"^ptxas info +: Compiling entry function '(\w+)' for .*\n.*\n"
    r" *(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads$",
    re.MULTILINE,
)


def nvcc() -> str | None:
    """Find the compiler that TileLang would call, if there is one."""
    from tilelang.contrib.nvcc import get_nvcc_compiler

    try:
        path = Path(get_nvcc_compiler())
    except RuntimeError:
        return None
    return str(path) if path.exists() else None


def nvcc_command(arch: str) -> list[str]:
    from tilelang.env import CUTLASS_INCLUDE_DIR, TILELANG_TEMPLATE_PATH

    command = [str(nvcc()), "-cubin", "-O3", "-std=c++20", "-Xptxas", "-v"]
    command += ["-gencode", f"arch=compute_{arch.removeprefix('sm_')},code={arch}"]
    return [*command, "-I", TILELANG_TEMPLATE_PATH, "-I", CUTLASS_INCLUDE_DIR]


@functools.cache
def nvcc_version() -> str:
    """Say which compiler nvcc is."""
    command = [str(nvcc()), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def joined(sources: list[Lowered]) -> tuple[str, list[str]]:
    """Join kernels to one source; return it and the names that the kernels have there."""
    texts, names = [], []
    functions: set[str] = set()
    for i, lowered in enumerate(sources):
        names.append(f"{lowered.symbol}_{i}")
        text = re.sub(rf"\b{lowered.symbol}\b", names[-1], lowered.source)
        (device,) = DEVICE_FUNCTIONS.findall(text) or [""]
        texts.append(DEVICE_FUNCTIONS.sub("", text) if device in functions else text)
        functions.add(device)
    return "\n".join(texts), names


def compile_all(sources: list[Lowered], arch: str, kept: Kept) -> list[list[int]]:
    """Compile kernels to one cubin, unless that was done.

    Returns:
        For each kernel the bytes of its stack frame, of its spill stores and of its spill loads.
    """
    text, names = joined(sources)

    def compile_them(report: Path) -> None:
        source, cubin = report.with_suffix(".cu"), report.with_suffix(".cubin")
        source.write_text(text)
        command = [*nvcc_command(arch), "-o", str(cubin), str(source)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, f"{arch}:\n{result.stderr}"
        assert cubin.read_bytes()[:4] == b"\x7fELF"
        report.write_text(result.stderr)

    # The source includes TileLang's headers.
    versions = (nvcc_version(), importlib.metadata.version("tilelang"))
    depends_on = (*versions, *nvcc_command(arch), text)
    report = kept.get(f"kernels-{arch}", ".ptxas", depends_on, compile_them).read_text()
    usage = {name: [int(n) for n in numbers] for name, *numbers in USAGE.findall(report)}
    assert usage.keys() == set(names), f"expected the usage of {names} in {report!r}"
    return [usage[name] for name in names]


def kernels(arch: str, hidden: int) -> list[Key]:
    """List the kernels to compile of those that a call on this architecture can reach.

    Kernels in clusters take long to lower and differ by the norm or the streams alone: the largest
    is enough in most places.
    """
    return [
        key
        for key in routes.keys(hidden, arch, MAX_TOKENS)
        if (arch, hidden) != POST_HEAD_CASE or key.kernel.startswith("post_head")
        if key.kernel not in IN_CLUSTERS
        or all(value for name, value in key.options if name != "loop")
        or ((arch, hidden) == (ARCH, 4096) and key.kernel not in LONGEST_TO_LOWER)
    ]


@pytest.mark.skipif(nvcc() is None, reason="nvcc is not installed")
@pytest.mark.parametrize(("arch", "hidden"), [*CASES, POST_HEAD_CASE])
def test_every_kernel_compiles(
    arch: str, hidden: int, kept: Kept, lowered: Callable[[Key], Lowered]
) -> None:
    keys = kernels(arch, hidden)
    if arch == LIKE_HOPPER:  # The next test shows that the sources are the same.
        sources = [lowered(key._replace(arch=ARCH)) for key in keys]
    else:
        sources = [lowered(key) for key in keys]
    for key, usage in zip(keys, compile_all(sources, arch, kept), strict=True):
        if arch == ARCH:
            # There is no stack frame either: every local array lies in registers.
            most = MAY_SPILL.get(key.kernel, 0)
            assert all(n <= most for n in usage), f"{key}: stack, spilled: {usage}"


@pytest.mark.parametrize("key", kernels(LIKE_HOPPER, 4096), ids=lambda key: key.kernel)
def test_sources_are_those_that_ship(
    key: Key, kept: Kept, lowered: Callable[[Key], Lowered]
) -> None:
    """Compare what ships for Blackwell with what tests lower for Hopper with a quicker prover."""
    assert lower_key(key, kept, as_shipped=True) == lowered(key._replace(arch=ARCH))


@pytest.mark.parametrize("arch", ["sm_80", ARCH, "sm_120a"])
def test_programmatic_launch_from_hopper_on(arch: str, lowered: Callable[[Key], Lowered]) -> None:
    for key in kernels(arch, 4096):
        source = lowered(key).source
        if arch == "sm_80":
            assert not any(word in source for word in PDL), key
        else:
            # fused_post_pre waits before it reads fn or after that; each role of warps waits.
            waits = {"fused_post_pre": 2, "fused_post_pre_persistent": 4, "pre": 4}
            assert source.count(WAIT) == waits.get(key.kernel, 1), key

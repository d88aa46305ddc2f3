"""Compile every kernel for every architecture that is served, and without spills for Hopper.

No GPU is needed: the CUDA source that TileLang generates goes through nvcc with the flags that
TileLang gives it, two kernels at a time.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("tilelang", reason="needs TileLang, which lowers the kernels")

from emulated import IN_CLUSTERS
from kept import Kept
from mhc_ops import routes
from mhc_ops.compiler import Lowered
from mhc_ops.routes import Key

MAX_TOKENS = 8192
# Spills are counted at these hidden sizes; elsewhere one size shows that the kernels compile.
CASES = [("sm_90a", hidden) for hidden in (4096, 7168)]
CASES += [(arch, 4096) for arch in ("sm_80", "sm_100a", "sm_120a")]
# One more size has the kernels of post_head alone, with one and with two CTAs on an SM: the largest
# kernels, with norm and streams. Without the streams the loop spills 12 to 20 bytes, and 4 at 7168.
POST_HEAD_CASE = ("sm_90a", 5120)

LONGEST_TO_LOWER = ("fused_post_pre_persistent", "pre")

# These kernels may spill so many bytes. The warps of the first two have two roles with registers to
# match, 184 or 200 to hold fn; they spill addresses above all, and pre some of fn.
# expand_pre lacks a register where two CTAs share an SM.
MAY_SPILL = {"fused_post_pre_persistent": 80, "pre": 96, "expand_pre": 8}

WAIT = "cudaGridDependencySynchronize()"
PDL = (WAIT, "cudaTriggerProgrammaticLaunchCompletion()", "griddepcontrol")
USAGE = re.compile(
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", re.M
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


def compile_one(lowered: Lowered, arch: str, kept: Kept) -> str:
    """Compile a kernel to a cubin, unless that was done; return what ptxas said."""

    def compile_it(report: Path) -> None:
        source, cubin = report.with_suffix(".cu"), report.with_suffix(".cubin")
        source.write_text(lowered.source)
        command = [*nvcc_command(arch), "-o", str(cubin), str(source)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, f"{arch}:\n{result.stderr}"
        assert cubin.read_bytes()[:4] == b"\x7fELF"
        report.write_text(result.stderr)

    # The source includes TileLang's headers.
    versions = (nvcc_version(), importlib.metadata.version("tilelang"))
    depends_on = (*versions, *nvcc_command(arch), lowered.source)
    return kept.get(lowered.symbol, ".ptxas", depends_on, compile_it).read_text()


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
        or ((arch, hidden) == ("sm_90a", 4096) and key.kernel not in LONGEST_TO_LOWER)
    ]


@pytest.mark.skipif(nvcc() is None, reason="nvcc is not installed")
@pytest.mark.parametrize(("arch", "hidden"), [*CASES, POST_HEAD_CASE])
def test_every_kernel_compiles(
    arch: str, hidden: int, kept: Kept, lowered: Callable[[Key], Lowered]
) -> None:
    with ThreadPoolExecutor(2) as pool:
        # One kernel is compiled while the next is lowered.
        reports = {
            key: pool.submit(compile_one, lowered(key), arch, kept) for key in kernels(arch, hidden)
        }
    for key, running in reports.items():
        report = running.result()
        usage = USAGE.findall(report)
        assert len(usage) == 1, f"{key}: expected the usage of one kernel in {report!r}"
        if arch == "sm_90a":
            # There is no stack frame either: every local array lies in registers.
            most = MAY_SPILL.get(key.kernel, 0)
            assert all(int(n) <= most for n in usage[0]), f"{key}: stack, spilled: {usage[0]}"


@pytest.mark.parametrize(("arch", "hidden"), [case for case in CASES if case[1] == 4096])
def test_programmatic_launch_from_hopper_on(
    arch: str, hidden: int, lowered: Callable[[Key], Lowered]
) -> None:
    for key in kernels(arch, hidden):
        source = lowered(key).source
        if arch == "sm_80":
            assert not any(word in source for word in PDL), key
        else:
            # fused_post_pre waits before it reads fn or after that; each role of warps waits.
            waits = {"fused_post_pre": 2, "fused_post_pre_persistent": 4, "pre": 4}
            assert source.count(WAIT) == waits.get(key.kernel, 1), key

"""Run every kernel at the small sizes of the GPU suite in one process, for compute-sanitizer.

    compute-sanitizer --tool racecheck --error-exitcode 9 python benchmarks/sanitizer_workload.py

``benchmarks/sanitize.py`` runs this script under all four tools and keeps the verdicts. The inputs
are made and the oracle runs on the CPU, so the only kernels on the GPU are those to be checked.
Compile the kernels before, with ``--compile``, so that the tool does not slow the compiler down.
The most telling cases come first, and after ``--seconds`` no further case is begun.

The exit status is 1 for a wrong result or a kernel that no case has run.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from unittest import mock

import torch

from mhc_ops import jit, routes, support
from mhc_ops.native import host
from mhc_ops.routes import Key
from mhc_ops.testing import OUTPUTS, as_outputs, assert_matches_oracle, make_inputs
from other_routes import other_routes

HIDDEN = (256, 768)  # 256 is the smallest size, and 768 is no power of two
# Each path runs at two of these, one of them odd: few clusters, more clusters, groups of more than
# 16 tokens, kernels that loop, the larger tile of the projection, three launches.
TOKENS = (3, 35, 131, 20, 1, 128, 33)

# Each way makes the table of routes from these constants.
WAYS: dict[str, dict[str, Any]] = {
    "own": {},
    "classical": {"CLUSTER_ARCHS": frozenset()},
    "looping": {"CLUSTERS": 1, "FEW_CLUSTERS_TOKENS": 0, "ONE_ROUND_TOKENS": 0},
    "small": {"CLUSTERS": 2},
}
# These ops go another way than their own, from this many tokens on. expand_pre and fused_post_pre
# launch every kernel of GPUs without clusters except the head's.
OTHER_WAYS = {
    "classical": (("fused_post_pre", "expand_pre"), 1),
    "looping": (("fused_post_pre", "pre"), 129),
    "small": (("post_head", "post_head_streams"), 129),
}


class Case(NamedTuple):
    """Describe one call.

    Attributes:
        op, norm, tokens, hidden: what is called.
        way: how the call is routed. ``own`` is the table's own way. ``classical`` is that of a GPU
            without kernels in clusters. ``looping`` runs the kernels that loop over tiles in one
            cluster, so that the cluster has many tiles. ``small`` is that of a GPU with few
            multiprocessors, on which post_head loops over tiles.
    """

    op: str
    norm: bool
    tokens: int
    hidden: int
    way: str


def _goes(way: str, op: str, tokens: int) -> bool:
    """Say whether a case goes a way."""
    ops, least = OTHER_WAYS.get(way, (OUTPUTS, 1))
    return op in ops and tokens >= least


def cases() -> list[Case]:
    """List all cases, each kernel at its smallest size first."""
    return [
        Case(op, norm, tokens, hidden, way)
        for tokens in TOKENS
        for hidden in HIDDEN
        for op in OUTPUTS
        for norm in ((False,) if op == "post" else (False, True))
        for way in WAYS
        if _goes(way, op, tokens)
    ]


def keys(arch: str) -> set[Key]:
    """Collect every kernel of these hidden sizes on any way, on GPUs without clusters, too."""
    found: set[Key] = set()
    for constants in WAYS.values():
        with other_routes(**constants):
            for hidden in HIDDEN:
                found.update(routes.keys(hidden, arch, max(TOKENS)))
    return found


@torch.no_grad()
def run(case: Case, device: str) -> None:
    """Run a case twice; the second call reads weights that were read before, by the short way.

    Raises:
        AssertionError: a result is wrong, or the second result differs from the first.
    """
    inputs = make_inputs(case.op, case.tokens, case.hidden, norm=case.norm)
    there: dict[str, Any] = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }
    call = getattr(torch.ops.mhc, case.op).default
    with other_routes(**WAYS[case.way]):
        first, second = (
            {name: value.cpu() for name, value in as_outputs(case.op, call(**there)).items()}
            for _ in range(2)
        )
    assert_matches_oracle(case.op, inputs, tuple(first.values()))
    for name, value in first.items():
        if not torch.equal(value, second[name]):
            raise AssertionError(f"{name} of the second call differs")


def compile_all(arch: str) -> None:
    """Compile every kernel into the cache, side by side."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        list(pool.map(jit.compile_key, keys(arch)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compile", action="store_true", help="the kernels alone, run nothing")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="then begin no case")
    arguments = parser.parse_args(argv)
    arch = support.arch(torch.device("cuda", 0))
    if arguments.compile:
        compile_all(arch)
        return 0
    start = time.monotonic()
    launched: set[Key] = set()
    loaded = jit.loaded

    def recorded(key: Key, device: torch.device) -> Any:
        launched.add(key)
        return loaded(key, device)

    right = 0
    host.forget()  # the short way then knows no kernel, so the first call of each is recorded
    with mock.patch.object(jit, "loaded", recorded):
        for case in cases():
            if time.monotonic() - start > arguments.seconds:
                break
            run(case, "cuda")
            right += 1
            print(f"{time.monotonic() - start:6.1f} s  right: {case}", flush=True)
    missing = keys(arch) - launched
    print(f"CASES: {right} of {len(cases())} right, {len(launched)} kernels", flush=True)
    for key in sorted(missing):
        print(f"NOT RUN: {key}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())

"""Every kernel at the small sizes of the GPU suite, for compute-sanitizer, in one process.

    compute-sanitizer --tool racecheck --error-exitcode 9 python benchmarks/sanitizer_workload.py

``benchmarks/sanitize.py`` runs it under all four tools and keeps the verdicts. Inputs come from the
CPU and the oracle runs there, so the only kernels on the GPU are those to be looked at; compile
them before, with ``--compile``, so that the tool does not slow the compiler down. The most telling
cases come first, and after ``--seconds`` no further one is begun.

Exit status: 1 for a wrong result or a kernel that no case has run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from unittest import mock

import torch

from mhc_ops import dispatch, host, jit, support
from mhc_ops.testing import OUTPUTS, as_outputs, assert_matches_oracle, make_inputs

HIDDEN = (256, 768)  # the smallest, and one with no power of two
# Two of each path (one of an odd size): one launch, its groups of more than 16 tokens, the larger
# tile of the projection, three launches.
TOKENS = (3, 35, 131, 20, 1, 128, 33)


class Case(NamedTuple):
    """One call.

    Attributes:
        op, norm, tokens, hidden: what is called.
        way: ``classical``, as on a GPU without kernels of one launch; ``invariant``, as with
            MHC_OPS_BATCH_INVARIANT, which takes the kernels that loop over tiles for few tokens, in
            one cluster, so that they have many; ``small``, as on a GPU with few multiprocessors,
            which takes that of post_head; ``own``.
    """

    op: str
    norm: bool
    tokens: int
    hidden: int
    way: str


def cases() -> list[Case]:
    """All of them: each kernel at its smallest size first."""
    return [
        Case(op, norm, tokens, hidden, way)
        for tokens in TOKENS
        for hidden in HIDDEN
        for op in OUTPUTS
        for norm in ((False,) if op == "post" else (False, True))
        for way in ("own", "classical", "invariant", "small")
        if {
            "own": True,
            "classical": op == "fused_post_pre" and dispatch.takes_post_projection(tokens, hidden),
            "invariant": op in ("fused_post_pre", "pre")
            and tokens > dispatch.ONE_LAUNCH_MAX_TOKENS,
            "small": op.startswith("post_head") and tokens > dispatch.ONE_LAUNCH_MAX_TOKENS,
        }[way]
    ]


def keys(arch: str) -> set[dispatch.Key]:
    """Every kernel of these hidden sizes, those of GPUs without one launch too."""
    return {
        key
        for hidden in HIDDEN
        for key in (
            *dispatch.keys(hidden, arch, max(TOKENS)),
            dispatch.post_projection_plan(1, hidden, arch, 1).key,
            *(dispatch.persistent_key(hidden, arch, norm) for norm in (False, True)),
            *(
                dispatch.post_head_persistent_key(hidden, arch, norm, streams)
                for norm in (False, True)
                for streams in (False, True)
            ),
        )
    }


@contextlib.contextmanager
def path(way: str) -> Iterator[None]:
    """While it lasts, calls go this way of a :class:`Case`."""
    if way == "own":
        yield
        return
    if way == "invariant":
        with (
            mock.patch.dict(os.environ, {"MHC_OPS_BATCH_INVARIANT": "1"}),
            mock.patch.object(dispatch, "CLUSTERS", 1),
        ):
            yield
        return
    if way == "small":
        with mock.patch.object(dispatch, "CLUSTERS", 2):
            yield
        return
    host.forget()  # of the native calls, which know nothing of what follows
    with mock.patch.object(dispatch, "ONE_LAUNCH_ARCHS", frozenset()):
        yield


@torch.no_grad()
def run(case: Case, device: str) -> None:
    """A case twice, the second time with weights that were read before, on the native way.

    Raises:
        AssertionError: a wrong result, or another one the second time.
    """
    inputs = make_inputs(case.op, case.tokens, case.hidden, norm=case.norm)
    there: dict[str, Any] = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }
    call = getattr(torch.ops.mhc, case.op).default
    with path(case.way):
        first, second = (
            {name: value.cpu() for name, value in as_outputs(case.op, call(**there)).items()}
            for _ in range(2)
        )
    assert_matches_oracle(case.op, inputs, tuple(first.values()))
    for name, value in first.items():
        if not torch.equal(value, second[name]):
            raise AssertionError(f"{name} of the second call differs")


def compile_all(arch: str) -> None:
    """Into the cache, side by side."""
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
    launched: set[dispatch.Key] = set()
    launch = jit.launch

    def recorded(key: dispatch.Key, *rest: Any) -> None:
        launched.add(key)
        launch(key, *rest)

    right = 0
    host.forget()  # the first call of each kernel is to be seen here
    with mock.patch.object(jit, "launch", recorded):
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

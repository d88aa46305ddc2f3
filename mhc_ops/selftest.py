"""Check whether this machine, driver, torch and TileLang give right answers, and how fast.

The exit status is 0 where everything asked for was checked and is right, 1 where something is
wrong, 2 for wrong arguments, and 3 where the CPU kernels are right and the GPU kernels could not be
run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from . import bench, config, info, routes, support
from .prewarm import prewarm
from .testing import (
    KINDS,
    OUTPUTS,
    as_outputs,
    assert_matches_oracle,
    make_inputs,
    poisoned_memory,
)

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
STATUS = {PASSED: 0, FAILED: 1, NOT_RUN: 3}

CPU_HIDDEN = 256
GPU_HIDDEN = 4096
GPU_MAX_TOKENS = 300  # every path serves some token count below this one
GPU_KINDS = ("classical", "signed_bases", "large_streams")
CPU_TOKENS = (0, 1, 5)
TIMED_TOKENS = (1, 8, 64)
CPU_CALLS = 20


class Check(NamedTuple):
    """Hold the result of one check.

    Attributes:
        part: ``cpu`` or ``gpu``.
        name: what was checked.
        result: ``passed``, ``failed`` or ``not run``.
        detail: the figure found, what was wrong, or why the check was not run.
        seconds: how long the check took.
    """

    part: str
    name: str
    result: str
    detail: str
    seconds: float


def _numerics(
    op: str, device: str, hidden: int, tokens: Sequence[int], kinds: Sequence[str]
) -> str:
    """Hold an op to the float64 oracle on poisoned memory; report the largest error found."""
    largest, cases = 0.0, 0
    for kind in kinds:
        for count in tokens:
            for norm in (False,) if op == "post" else (False, True):
                inputs = make_inputs(op, count, hidden, device=device, norm=norm, kind=kind)
                with poisoned_memory():
                    result = getattr(torch.ops.mhc, op).default(**inputs)
                errors = assert_matches_oracle(op, inputs, result)
                largest, cases = max(largest, *errors.values()), cases + 1
    return f"{cases} cases, largest error {largest:.2f} of what is allowed"


def _fake_shapes(op: str) -> str:
    """Check that the fake kernel's shapes and dtypes are those of the CPU kernel."""
    inputs = make_inputs(op, 5, CPU_HIDDEN)
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    run = getattr(torch.ops.mhc, op).default
    shown = [
        {name: (tuple(t.shape), t.dtype) for name, t in as_outputs(op, run(**given)).items()}
        for given in (inputs, meta)
    ]
    if shown[0] != shown[1]:
        raise AssertionError(f"expected {shown[0]}, got {shown[1]}")
    return "shapes and dtypes are those of the CPU kernel"


def _cpu_time(tokens: int) -> str:
    inputs = make_inputs("fused_post_pre", tokens, GPU_HIDDEN, norm=True)
    run = torch.ops.mhc.fused_post_pre.default
    run(**inputs)
    start = time.perf_counter()
    for _ in range(CPU_CALLS):
        run(**inputs)
    return f"{(time.perf_counter() - start) / CPU_CALLS * 1e6:.0f} us a boundary"


def _prewarm(device: torch.device) -> str:
    report = prewarm([GPU_HIDDEN], max_tokens=GPU_MAX_TOKENS, device=device)
    return f"{len(report.kernels)} kernels compiled or read, and loaded"


def _graph(device: torch.device) -> str:
    """Check that a graph, replayed on inputs written after capture, gives the eager call's bits."""
    first, second = (
        make_inputs("fused_post_pre", 8, GPU_HIDDEN, device=str(device), norm=True, seed=seed)
        for seed in range(2)
    )
    run = torch.ops.mhc.fused_post_pre.default
    want = run(**second)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        outputs = run(**first)
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            value.copy_(second[name])
    graph.replay()
    torch.cuda.synchronize(device)
    for name, got, expected in zip(OUTPUTS["fused_post_pre"], outputs, want, strict=True):
        if not torch.equal(got, expected):
            raise AssertionError(f"{name} of the graph differs from that of the eager call")
    return "the bits of the eager call"


def _gpu_time(tokens: int, device: torch.device) -> str:
    times = bench.time_case(bench.Case(tokens, GPU_HIDDEN, "fused"), device)
    return f"{times.us_median:.2f} us a boundary, in a chain of {times.chain} in a CUDA graph"


def _cpu_checks() -> Iterator[tuple[str, Callable[[], str]]]:
    for op in OUTPUTS:
        yield (
            f"{op}, hidden {CPU_HIDDEN}, against float64",
            partial(_numerics, op, "cpu", CPU_HIDDEN, CPU_TOKENS, tuple(KINDS)),
        )
        yield f"{op}, fake kernel", partial(_fake_shapes, op)
    yield f"speed, 8 tokens, hidden {GPU_HIDDEN}", partial(_cpu_time, 8)


def _gpu_checks(device: torch.device) -> Iterator[tuple[str, Callable[[], str]]]:
    yield f"prewarm, hidden {GPU_HIDDEN}", partial(_prewarm, device)
    tokens = routes.bounds(GPU_HIDDEN, support.arch(device), GPU_MAX_TOKENS)
    for op in OUTPUTS:
        yield (
            f"{op}, hidden {GPU_HIDDEN}, against float64",
            partial(_numerics, op, str(device), GPU_HIDDEN, tokens, GPU_KINDS),
        )
    yield "fused_post_pre in a CUDA graph", partial(_graph, device)
    for count in TIMED_TOKENS:
        yield (
            f"speed, {count} tokens, hidden {GPU_HIDDEN}",
            partial(_gpu_time, count, device),
        )


def _run(part: str, name: str, check: Callable[[], str]) -> Check:
    start = time.perf_counter()
    try:
        with torch.no_grad():
            result, detail = PASSED, check()
    except Exception as error:  # a selftest reports every failure instead of ending at the first
        result, detail = FAILED, f"{type(error).__name__}: {error}"
    return Check(part, name, result, detail, time.perf_counter() - start)


def run(gpu: bool = True) -> list[Check]:
    """Run all checks.

    Args:
        gpu: whether to check the current CUDA device as well. Where the kernels cannot serve the
            device, this gives one check with the result ``not run``.

    Returns:
        The checks, in the order in which they were run.
    """
    checks = [_run("cpu", name, check) for name, check in _cpu_checks()]
    if gpu:
        supported, reason = support.is_supported()
        if supported:
            device = support.cuda_device()
            checks += [_run("gpu", name, check) for name, check in _gpu_checks(device)]
        else:
            checks.append(Check("gpu", "every check of the GPU", NOT_RUN, reason, 0.0))
    return checks


def judge(checks: Sequence[Check]) -> tuple[str, str]:
    """Return the result of all checks and one sentence that says it.

    The result is failed if any check failed, else not run if any was not run, else passed.
    """
    failed = [check for check in checks if check.result == FAILED]
    if failed:
        return FAILED, f"FAILED: {len(failed)} of {len(checks)} checks"
    for check in checks:
        if check.result == NOT_RUN:
            return NOT_RUN, f"CPU KERNELS RIGHT, GPU NOT CHECKED: {check.detail}"
    if all(check.part == "cpu" for check in checks):
        return PASSED, f"PASSED: {len(checks)} checks of the CPU kernels; no GPU was asked for"
    return PASSED, f"PASSED: {len(checks)} checks of the CPU and GPU kernels"


def _print_table(facts: dict[str, Any], checks: Sequence[Check], sentence: str) -> None:
    from rich.console import Console
    from rich.table import Table

    versions = ", ".join(f"{name} {version or '-'}" for name, version in facts["versions"].items())
    table = Table("", "check", "result", "found", "s")
    for check in checks:
        table.add_row(check.part, check.name, check.result, check.detail, f"{check.seconds:.1f}")
    console = Console(highlight=False, markup=False)
    console.print(versions)
    for device in facts["devices"]:
        console.print(f"{device['device']}: {device['name'] or '-'}: {device['reason']}")
    console.print(table)
    console.print(sentence)


def main(argv: Sequence[str]) -> int:
    """Run ``python -m mhc_ops selftest``, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mhc_ops selftest", description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="ask for the CPU kernels alone")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args(argv)
    try:
        for name in config.DEFAULTS:
            config.switch(name)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    facts = info.collect()
    if not arguments.json:
        import rich.table  # noqa: F401  (a missing rich is noticed before the slow checks)
    start = time.perf_counter()
    checks = run(gpu=not arguments.cpu)
    result, sentence = judge(checks)
    if arguments.json:
        seconds = time.perf_counter() - start
        answer = {
            "result": result,
            "verdict": sentence,
            "seconds": seconds,
            "checks": [check._asdict() for check in checks],
            "versions": facts["versions"],
            "devices": facts["devices"],
        }
        print(json.dumps(answer, indent=2))
    else:
        _print_table(facts, checks, sentence)
    return STATUS[result]

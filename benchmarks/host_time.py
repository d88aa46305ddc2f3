"""Time on the host one eager call of every op, by the short way and by the long way.

    python benchmarks/host_time.py [--beside CHECKOUT] [-o RECORDS]

Each call allocates its outputs. Calls are issued in bursts that fit the queue of the GPU, so no
call waits for the GPU; the time of a call is the median over many bursts. Ways, ops and revisions
take turns in one process. The time of ``torch.empty`` tells how fast the host is.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import beside
import harness
import mhc_ops
import records
from mhc_ops._arguments import recipe
from mhc_ops.native import host
from mhc_ops.native.serve import serve
from mhc_ops.testing import OUTPUTS, make_inputs

HIDDEN = 4096
TOKENS = (1, 192)
BURST_LAUNCHES = 200  # the queue takes 1024, and no op has more than 3 launches
BURSTS = 25

Row = tuple[str, int, str]  # a row is timed for each op, token count and way


def calls_of(op: str, inputs: dict[str, Any], other: str | None) -> dict[str, Callable[[], object]]:
    """Return the ways of a call, by name."""
    keyword_only = ("norm_weight", "norm_eps")
    norm = {name: inputs[name] for name in keyword_only if name in inputs}
    positional = [value for name, value in inputs.items() if name not in norm]
    values = recipe(op).bind((), inputs)
    op_of = getattr(torch.ops.mhc, op).default
    calls: dict[str, Callable[[], object]] = {
        "short": lambda: op_of(*positional, **norm),
        "long": lambda: serve(op, values),
    }
    if other is not None:
        op_beside = getattr(torch.ops.mhc_beside, op).default
        calls[other] = lambda: op_beside(*positional, **norm)
    return calls


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--beside", type=Path, help="checkout of another revision")
    parser.add_argument("--beside-commit", default="beside", help="its name in the records")
    records.add_arguments(parser)
    arguments = parser.parse_args(argv)
    other = None
    if arguments.beside is not None:
        beside.load(arguments.beside)
        importlib.import_module(f"{beside.NAME}.prewarm").prewarm([HIDDEN], max_tokens=max(TOKENS))
        other = arguments.beside_commit
    mhc_ops.prewarm([HIDDEN], max_tokens=max(TOKENS))
    calls: dict[Row, Callable[[], object]] = {
        ("torch.empty", 0, ""): lambda: torch.empty(1, device="cuda")
    }
    for tokens in TOKENS:
        for op in OUTPUTS:
            inputs = make_inputs(op, tokens, HIDDEN, device="cuda", norm=op != "post")
            for way, call in calls_of(op, inputs, other).items():
                calls[op, tokens, way] = call
    before = host.calls()
    us = harness.in_turn(
        {row: harness.burst_us(call, BURST_LAUNCHES) for row, call in calls.items()}, BURSTS
    )
    bursts = BURSTS + harness.WARMUPS
    short = sum(way == "short" for _, _, way in calls) * bursts * BURST_LAUNCHES
    if host.calls() - before != short:
        raise RuntimeError(f"{host.calls() - before} of {short} calls took the short way")
    empty = us["torch.empty", 0, ""]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; torch.empty {empty:.1f} us")
    for tokens in TOKENS:
        for op in OUTPUTS:
            ways = {way: round(t, 2) for (o, n, way), t in us.items() if (o, n) == (op, tokens)}
            print(f"{tokens:4} {op:18}" + "".join(f"  {way} {t:6.2f}" for way, t in ways.items()))
            records.append(
                records.make_record(
                    f"host time of an eager {op}, {tokens} tokens, inference mode, H = {HIDDEN}",
                    f"{ways['short']} us",
                    commit=arguments.commit,
                    command=records.command_line(argv),
                    us=ways,
                    torch_empty_us=round(empty, 2),
                ),
                arguments.output,
            )


if __name__ == "__main__":
    main()

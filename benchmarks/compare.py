"""Time boundaries and ops of this revision and of another in one process; replays take turns.

    python benchmarks/compare.py --beside CHECKOUT --tokens 1 128 --hidden 4096 [-o RECORDS]
    python benchmarks/compare.py --beside CHECKOUT --tokens 1 128 --paths --ops pre post_head

A boundary is a chain of ``python -m mhc_ops bench``; an op, with its norm, is a chain of calls of
that op alone, each with tensors of its own. Chains are captured once each, and a time is the median
over the replays. The exit status is 1 where a row is slower by more than ``--allowed`` per cent.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import beside
import harness
import records
from mhc_ops import bench, timing
from mhc_ops.testing import OUTPUTS, as_outputs, make_inputs

REPLAYS = 21


@torch.no_grad()
def compare(theirs: Any, *, tokens: int, hidden: int, path: str) -> tuple[float, float, bool]:
    """Return this revision's microseconds, the other's, and whether the bits are the same."""
    length = timing.chain_length(tokens)
    # The chains are kept, because a graph reads the tensors that its chain holds.
    chains = [
        module.make_chain(module.Case(tokens, hidden, path), "cuda", length=length)
        for module in (bench, theirs)
    ]
    captured = [timing.capture(chain) for chain in chains]
    us = harness.in_turn(
        {i: harness.gpu_us(graph.replay, length) for i, (graph, _) in enumerate(captured)}, REPLAYS
    )
    (_, ours), (_, others) = captured
    same = all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))
    return us[0], us[1], same


@torch.no_grad()
def compare_op(op: str, *, tokens: int, hidden: int) -> tuple[float, float, bool]:
    """Return the same of one op, with the norm where it has one."""
    length = timing.chain_length(tokens)
    given = make_inputs(op, tokens, hidden, device="cuda", norm=True)
    calls = [
        {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        for _ in range(length)
    ]

    def chain(namespace: Any) -> Callable[[], Any]:
        return lambda: [getattr(namespace, op)(**values) for values in calls][-1]

    captured = [timing.capture(chain(ns)) for ns in (torch.ops.mhc, torch.ops.mhc_beside)]
    us = harness.in_turn(
        {i: harness.gpu_us(graph.replay, length) for i, (graph, _) in enumerate(captured)}, REPLAYS
    )
    ours, others = (as_outputs(op, result) for _, result in captured)
    return us[0], us[1], all(torch.equal(out, others[name]) for name, out in ours.items())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--beside", type=Path, required=True, help="checkout of the other revision")
    parser.add_argument("--beside-commit", default="beside", help="its name in the records")
    parser.add_argument("--tokens", type=int, nargs="+", required=True)
    parser.add_argument("--hidden", type=int, nargs="+", default=[4096, 7168])
    parser.add_argument("--paths", nargs="*", choices=("fused", "unfused"), default=["fused"])
    parser.add_argument("--ops", nargs="+", choices=tuple(OUTPUTS), default=[])
    parser.add_argument("--allowed", type=float, default=1.0, help="per cent")
    records.add_arguments(parser)
    arguments = parser.parse_args(argv)
    beside.load(arguments.beside)
    theirs = importlib.import_module(f"{beside.NAME}.bench")
    boundaries = {path: partial(compare, theirs, path=path) for path in arguments.paths}
    ops = {op: partial(compare_op, op) for op in arguments.ops}
    slower = 0
    for name, run in (boundaries | ops).items():
        what = f"{name} boundary" if name in boundaries else name
        for hidden in arguments.hidden:
            for tokens in arguments.tokens:
                us, us_beside, same = run(tokens=tokens, hidden=hidden)
                change = 100 * (us / us_beside - 1)
                slower += change > arguments.allowed
                outcome = (
                    f"{us:.2f} us, {arguments.beside_commit} {us_beside:.2f}: {change:+.1f} %, "
                    f"{'the same bits' if same else 'OTHER BITS'}"
                )
                print(f"{name} {hidden} {tokens:6}  {outcome}", flush=True)
                records.append(
                    records.make_record(
                        f"{what} in a graph chain, H = {hidden}, {tokens} tokens",
                        outcome,
                        commit=arguments.commit,
                        command=records.command_line(argv),
                        us=round(us, 3),
                        us_beside=round(us_beside, 3),
                        beside=arguments.beside_commit,
                        same_bits=same,
                    ),
                    arguments.output,
                )
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())

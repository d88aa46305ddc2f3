"""Time a boundary of this revision and of another in one process, in which replays take turns.

    python benchmarks/compare.py --beside CHECKOUT --tokens 1 128 --hidden 4096 [-o RECORDS]

Both chains are those of ``python -m mhc_ops bench``, captured once each; a time is the median over
the replays. The exit status is 1 where a row is slower by more than ``--allowed`` per cent.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import beside
import harness
import records
from mhc_ops import bench, timing

REPLAYS = 21


@torch.no_grad()
def compare(theirs: Any, tokens: int, hidden: int, path: str) -> tuple[float, float, bool]:
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--beside", type=Path, required=True, help="checkout of the other revision")
    parser.add_argument("--beside-commit", default="beside", help="its name in the records")
    parser.add_argument("--tokens", type=int, nargs="+", required=True)
    parser.add_argument("--hidden", type=int, nargs="+", default=[4096, 7168])
    parser.add_argument("--paths", nargs="+", choices=("fused", "unfused"), default=["fused"])
    parser.add_argument("--allowed", type=float, default=1.0, help="per cent")
    records.add_arguments(parser)
    arguments = parser.parse_args(argv)
    beside.load(arguments.beside)
    theirs = importlib.import_module(f"{beside.NAME}.bench")
    slower = 0
    for path in arguments.paths:
        for hidden in arguments.hidden:
            for tokens in arguments.tokens:
                us, us_beside, same = compare(theirs, tokens, hidden, path)
                change = 100 * (us / us_beside - 1)
                slower += change > arguments.allowed
                outcome = (
                    f"{us:.2f} us, {arguments.beside_commit} {us_beside:.2f}: {change:+.1f} %, "
                    f"{'the same bits' if same else 'OTHER BITS'}"
                )
                print(f"{path} {hidden} {tokens:6}  {outcome}", flush=True)
                records.append(
                    records.make_record(
                        f"{path} boundary in a graph chain, H = {hidden}, {tokens} tokens",
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

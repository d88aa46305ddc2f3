"""Time the ends of a model: the fused ops, and the calls that the fused ops replace.

    python benchmarks/ends_time.py --output benchmarks/results/nvidia_h100_ends.jsonl

The method is that of ``python -m mhc_ops bench``: a chain of calls runs in one CUDA graph, where
the outputs of each call feed the next. Each call has its own ``fn``, so that weights come from
memory. The floor is the time that the memory needs for the bytes of one pass.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import harness
import mhc_ops
import records
from mhc_ops import geometry, nn, timing
from mhc_ops.testing import EPS, POST_MULT

TOKENS = (1, 8, 32, 64, 128, 129, 512, 2048, 8192)
HIDDEN = (4096, 7168)
PARTS = ("start", "end", "end_with_streams")
PATHS = ("fused", "unfused")
FN_BYTES = 100e6  # the projections of a chain take so many bytes, which is more than an L2 holds


def part_bytes(part: str, tokens: int, hidden: int) -> int:
    """Count the bytes of one pass: x, streams and result in bf16, ``fn`` in fp32, but no mixes."""
    if part == "start":  # x is read, 4 copies and the layer input are written
        return 12 * hidden * tokens + 16 * geometry.MIXES * hidden
    streams = 8 * hidden * tokens if part == "end_with_streams" else 0
    return 12 * hidden * tokens + streams + 16 * geometry.HC_MULT * hidden


def chain_length(part: str, tokens: int, hidden: int) -> int:
    """Choose the number of calls of a chain.

    The number is that of ``python -m mhc_ops bench``. At the end of a model, whose fn is small, it
    is larger for few tokens, so that the fn of all calls do not fit the L2.
    """
    length = timing.chain_length(tokens)
    if part != "start" and tokens <= 128:
        length = max(length, int(FN_BYTES / (16 * geometry.HC_MULT * hidden)))
    return length


def make_chain(
    part: str, path: str, tokens: int, hidden: int, device: torch.device | str, length: int
) -> Callable[[], Tensor]:
    """Make random inputs and the chain that runs on them; the chain returns the last result."""
    n = geometry.HC_MULT
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    rows = geometry.MIXES if part == "start" else n
    fns = [normal(rows, n * hidden) * (n * hidden) ** -0.5 for _ in range(length)]
    x = normal(tokens, hidden).bfloat16()
    norm = {"norm_weight": (1 + 0.1 * normal(hidden)).bfloat16(), "norm_eps": EPS}
    if part == "start":
        rest = (normal(3).abs() + 0.5, normal(rows), EPS, EPS, EPS, POST_MULT, 20)

        def step(x: Tensor, fn: Tensor) -> Tensor:
            if path == "fused":
                return mhc_ops.expand_pre(x, fn, *rest, **norm).layer_input
            return mhc_ops.pre(nn.expand(x), fn, *rest, **norm).layer_input

    else:
        state = (
            normal(tokens, n, hidden).bfloat16(),
            normal(tokens, n, 1).sigmoid() * POST_MULT,
            normal(tokens, n, n).softmax(-1),
        )
        rest = (normal(1).abs() + 0.5, normal(n), EPS, EPS)

        def step(x: Tensor, fn: Tensor) -> Tensor:
            if path == "unfused":
                return mhc_ops.head(mhc_ops.post(x, *state), fn, *rest, **norm)
            if part == "end":
                return mhc_ops.post_head(x, *state, fn, *rest, **norm)
            return mhc_ops.post_head_streams(x, *state, fn, *rest, **norm).hidden

    def run() -> Tensor:
        y = x
        for fn in fns:
            y = step(y, fn)
        return y

    return run


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--hidden", type=int, nargs="+", default=list(HIDDEN))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    records.add_arguments(parser)
    arguments = parser.parse_args(argv)
    print(
        f"{'hidden':>6} {'tokens':>6} {'part':18}{'fused':>9}{'unfused':>9}{'ratio':>7}{'floor':>9}"
    )
    for hidden, tokens, copy_tb_s in harness.sweep(arguments.tokens, arguments.hidden):
        for part in arguments.parts:
            floor = part_bytes(part, tokens, hidden) / (copy_tb_s * 1e6)
            length = chain_length(part, tokens, hidden)
            us = {}
            for path in PATHS:
                times = timing.time_chain(
                    make_chain(part, path, tokens, hidden, "cuda", length),
                    length,
                    harness.require_finite(f"{part} {path}, {tokens} tokens, hidden {hidden}"),
                )
                torch.cuda.empty_cache()
                us[path] = times.us_median
                records.append(
                    records.make_record(
                        f"{part} of a model, {path}", "timed", commit=arguments.commit,
                        command=records.command_line(argv), part=part, path=path, tokens=tokens,
                        hidden=hidden, **harness.figures(times, floor, copy_tb_s),
                    ),
                    arguments.output,
                )  # fmt: skip
            print(
                f"{hidden:6} {tokens:6} {part:18}{us['fused']:9.2f}{us['unfused']:9.2f}"
                f"{us['unfused'] / us['fused']:7.2f}{floor:9.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()

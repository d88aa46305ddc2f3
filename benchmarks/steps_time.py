"""Time ``pre`` and ``post`` by themselves, beside the time that the memory needs for their bytes.

    python benchmarks/steps_time.py --output benchmarks/results/nvidia_h100_steps.jsonl

The method is that of ``python -m mhc_ops bench``: a chain of calls runs in one CUDA graph. Each
``pre`` has its own ``fn``. The streams of consecutive ``pre`` differ, and where the tokens are many
the streams of a ``pre`` are no longer in the L2. Each ``post`` has the streams of the ``post``
before. The floor is the time that the memory needs for the bytes of one pass at the copy bandwidth
measured in the same run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import harness
import mhc_ops
import records
from mhc_ops import geometry, timing
from mhc_ops.testing import EPS, POST_MULT

TOKENS = (1, 8, 32, 48, 64, 128, 256, 320, 512, 1024, 2048, 8192, 32768)
HIDDEN = (4096, 7168)
STEPS = ("pre", "post")
STREAMS_BYTES = 300e6  # the streams of a chain take so many bytes, which is several times an L2


def step_bytes(step: str, tokens: int, hidden: int) -> int:
    """Count the bytes of one pass: streams, x and result in bf16, ``fn`` in fp32, but no mixes."""
    if step == "post":  # x and the streams are read, the new streams are written
        return 18 * hidden * tokens
    return 10 * hidden * tokens + 16 * geometry.MIXES * hidden


def make_chain(
    step: str, tokens: int, hidden: int, device: torch.device | str, length: int
) -> Callable[[], Tensor]:
    """Make random inputs and the chain that runs on them; the chain returns the last result."""
    n = geometry.HC_MULT
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    if step == "post":
        x, streams = normal(tokens, hidden).bfloat16(), normal(tokens, n, hidden).bfloat16()
        mixes = normal(tokens, n, 1).sigmoid(), normal(tokens, n, n).softmax(-1)

        def run() -> Tensor:
            out = streams
            for _ in range(length):
                out = mhc_ops.post(x, out, *mixes)
            return out

        return run

    count = min(length, 1 + int(STREAMS_BYTES / (8 * hidden * tokens)))
    residuals = [normal(tokens, n, hidden).bfloat16() for _ in range(count)]
    rows = geometry.MIXES
    fns = [normal(rows, n * hidden) * (n * hidden) ** -0.5 for _ in range(length)]
    rest = (normal(3).abs() + 0.5, normal(rows), EPS, EPS, EPS, POST_MULT, 20)
    norm = {"norm_weight": (1 + 0.1 * normal(hidden)).bfloat16(), "norm_eps": EPS}

    def run() -> Tensor:
        for i, fn in enumerate(fns):
            out = mhc_ops.pre(residuals[i % count], fn, *rest, **norm).layer_input
        return out

    return run


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--hidden", type=int, nargs="+", default=list(HIDDEN))
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    records.add_arguments(parser)
    arguments = parser.parse_args(argv)
    print(f"{'hidden':>6} {'tokens':>6} {'step':6}{'us':>9}{'floor':>9}{'times':>7}")
    for hidden, tokens, copy_tb_s in harness.sweep(arguments.tokens, arguments.hidden):
        for step in arguments.steps:
            length = timing.chain_length(tokens)
            times = timing.time_chain(
                make_chain(step, tokens, hidden, "cuda", length),
                length,
                harness.require_finite(f"{step}, {tokens} tokens, hidden {hidden}"),
            )
            torch.cuda.empty_cache()
            floor = step_bytes(step, tokens, hidden) / (copy_tb_s * 1e6)
            records.append(
                records.make_record(
                    f"{step} by itself", "timed", commit=arguments.commit,
                    command=records.command_line(argv), step=step, tokens=tokens, hidden=hidden,
                    **harness.figures(times, floor, copy_tb_s),
                ),
                arguments.output,
            )  # fmt: skip
            us = times.us_median
            print(
                f"{hidden:6} {tokens:6} {step:6}{us:9.2f}{floor:9.2f}{us / floor:7.2f}", flush=True
            )


if __name__ == "__main__":
    main()

"""Time of a model's ends: the fused ops against the calls that they replace.

    python benchmarks/ends_time.py --output benchmarks/results/nvidia_h100_ends.jsonl

The method is that of ``python -m mhc_ops bench``: a chain in one CUDA graph, whose outputs feed the
next call and whose ``fn`` is another one in each, so that weights come from memory. The floor is
what the memory needs for the bytes of one pass.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

import mhc_ops
import records
from mhc_ops import bench, geometry, nn

TOKENS = (1, 8, 32, 64, 128, 129, 512, 2048, 8192)
HIDDEN = (4096, 7168)
PARTS = ("start", "end", "end_with_streams")
PATHS = ("fused", "unfused")
FN_BYTES = 100e6  # of a chain's projections: more than an L2 holds
EPS = bench.EPS


def part_bytes(part: str, tokens: int, hidden: int) -> int:
    """Bytes of one pass: x, streams and the result in bf16, ``fn`` in fp32; mixes left out."""
    if part == "start":  # x read, 4 copies and the layer input written
        return 12 * hidden * tokens + 16 * geometry.MIXES * hidden
    streams = 8 * hidden * tokens if part == "end_with_streams" else 0
    return 12 * hidden * tokens + streams + 16 * geometry.HC_MULT * hidden


def chain_length(part: str, tokens: int, hidden: int) -> int:
    """As the benchmark's, and at the end, whose fn is small, more where tokens move little."""
    length = bench.chain_length(tokens)
    if part != "start" and tokens <= 128:
        length = max(length, int(FN_BYTES / (16 * geometry.HC_MULT * hidden)))
    return length


def make_chain(
    part: str, path: str, tokens: int, hidden: int, device: torch.device | str, length: int
) -> Callable[[], Tensor]:
    """Random inputs, and the chain that runs over them; it returns the last result."""
    n = geometry.HC_MULT
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    rows = geometry.MIXES if part == "start" else n
    fns = [normal(rows, n * hidden) * (n * hidden) ** -0.5 for _ in range(length)]
    x = normal(tokens, hidden).bfloat16()
    norm = {"norm_weight": (1 + 0.1 * normal(hidden)).bfloat16(), "norm_eps": EPS}
    if part == "start":
        rest = (normal(3).abs() + 0.5, normal(rows), EPS, EPS, EPS, bench.POST_MULT, 20)

        def step(x: Tensor, fn: Tensor) -> Tensor:
            if path == "fused":
                return mhc_ops.expand_pre(x, fn, *rest, **norm).layer_input
            return mhc_ops.pre(nn.expand(x), fn, *rest, **norm).layer_input

    else:
        state = (
            normal(tokens, n, hidden).bfloat16(),
            normal(tokens, n, 1).sigmoid() * bench.POST_MULT,
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
def time_part(part: str, path: str, tokens: int, hidden: int) -> tuple[float, float, float]:
    """(10th percentile, median, 90th percentile) microseconds of a call."""
    length = chain_length(part, tokens, hidden)
    graph, last = bench._capture(make_chain(part, path, tokens, hidden, "cuda", length))
    times, _ = bench._event_times(graph.replay, bench.REPLAYS)
    if not last.isfinite().all():
        raise RuntimeError(f"{part} {path}, {tokens} tokens, hidden {hidden}: not finite")
    low, middle, high = (value / length for value in bench.percentiles(times))
    return low, middle, high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--hidden", type=int, nargs="+", default=list(HIDDEN))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    records.add_arguments(parser)
    arguments = parser.parse_args()
    mhc_ops.prewarm(arguments.hidden, max_tokens=max(arguments.tokens))
    copy_tb_s = round(bench.copy_bandwidth(torch.device("cuda", 0)), 3)
    print(
        f"{'hidden':>6} {'tokens':>6} {'part':18}{'fused':>9}{'unfused':>9}{'ratio':>7}{'floor':>9}"
    )
    for hidden in arguments.hidden:
        for tokens in arguments.tokens:
            for part in arguments.parts:
                floor = part_bytes(part, tokens, hidden) / (copy_tb_s * 1e6)
                medians = {}
                for path in PATHS:
                    low, medians[path], high = time_part(part, path, tokens, hidden)
                    torch.cuda.empty_cache()
                    record = records.make_record(
                        f"{part} of a model, {path}", "timed", commit=arguments.commit,
                        command=records.command_line(), part=part, path=path, tokens=tokens,
                        hidden=hidden, us_median=round(medians[path], 3), us_p10=round(low, 3),
                        us_p90=round(high, 3), floor_us=round(floor, 3), copy_tb_s=copy_tb_s,
                        chain=chain_length(part, tokens, hidden),
                    )  # fmt: skip
                    records.append(record, arguments.output)
                fused, unfused = medians["fused"], medians["unfused"]
                print(
                    f"{hidden:6} {tokens:6} {part:18}{fused:9.2f}{unfused:9.2f}"
                    f"{unfused / fused:7.2f}{floor:9.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()

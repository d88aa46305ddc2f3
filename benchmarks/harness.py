"""Add to ``mhc_ops.timing``, with which every script of this folder times, what they share.

A *sampler* gives the microseconds of one try. Two things are compared by samplers that take turns
in one process, because times of two machines, and of two moments on one machine, do not compare
precisely ("How to read it" in benchmarks/NOTES.md says how far).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

import mhc_ops
from mhc_ops import timing

WARMUPS = timing.WARMUPS

Name = TypeVar("Name")
Sampler = Callable[[], float]


def in_turn(samplers: Mapping[Name, Sampler], rounds: int) -> dict[Name, float]:
    """Take ``rounds`` samples of each sampler in turn, after some that do not count.

    Returns:
        Name of each sampler to the median of its samples.
    """
    samples: dict[Name, list[float]] = {name: [] for name in samplers}
    for number in range(WARMUPS + rounds):
        for name, sampler in samplers.items():
            us = sampler()
            if number >= WARMUPS:
                samples[name].append(us)
    return {name: median(found) for name, found in samples.items()}


def gpu_us(run: Callable[[], object], calls: int = 1) -> Sampler:
    """Make a sampler of one call on the GPU: the time of ``run`` divided by its calls."""
    return lambda: timing.sample_us(run)[0] / calls


def burst_us(call: Callable[[], object], calls: int) -> Sampler:
    """Make a sampler of a call on the host: the mean over a burst that fits the GPU's queue."""

    def sample() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        us = (time.perf_counter() - start) / calls * 1e6
        torch.cuda.synchronize()
        return us

    return sample


def wall_us(call: Callable[[], object], device: str) -> Sampler:
    """Make a sampler of a call by the host's clock, from an idle device until it is idle again."""

    def sample() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e6

    return sample


def require_finite(what: str) -> Callable[[Tensor], None]:
    """Make a check that refuses the last result of a chain where a value is not finite."""

    def check(last: Tensor) -> None:
        if not last.isfinite().all():
            raise RuntimeError(f"{what}: the result is not finite")

    return check


def sweep(tokens: Sequence[int], hidden: Sequence[int]) -> Iterator[tuple[int, int, float]]:
    """Prewarm, measure the copy bandwidth, and go through the sizes.

    Yields:
        (hidden, tokens, copy bandwidth in TB/s); all token counts of a hidden size in a row.
    """
    mhc_ops.prewarm(hidden, max_tokens=max(tokens))
    copy_tb_s = round(timing.copy_bandwidth(torch.device("cuda", torch.cuda.current_device())), 3)
    for size in hidden:
        for count in tokens:
            yield size, count, copy_tb_s


def figures(times: timing.Timing, floor_us: float, copy_tb_s: float) -> dict[str, Any]:
    """Return the figures that are recorded of a chain."""
    return {
        "us_median": round(times.us_median, 3),
        "us_p10": round(times.us_p10, 3),
        "us_p90": round(times.us_p90, 3),
        "floor_us": round(floor_us, 3),
        "copy_tb_s": copy_tb_s,
        "chain": times.chain,
    }

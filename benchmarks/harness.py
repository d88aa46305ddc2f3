"""What the scripts of this folder add to ``mhc_ops.timing``, with which all of them time.

A *sampler* gives the microseconds of one try. Two things are compared by samplers that take turns
in one process: two machines, and two moments of one, differ by 1 to 2 %.
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

WARMUPS = 3

Name = TypeVar("Name")
Sampler = Callable[[], float]


def in_turn(samplers: Mapping[Name, Sampler], rounds: int) -> dict[Name, float]:
    """Take so many samples of each in turn, after some that are not counted; return the medians."""
    samples: dict[Name, list[float]] = {name: [] for name in samplers}
    for number in range(WARMUPS + rounds):
        for name, sampler in samplers.items():
            us = sampler()
            if number >= WARMUPS:
                samples[name].append(us)
    return {name: median(found) for name, found in samples.items()}


def gpu_us(run: Callable[[], object], calls: int = 1) -> Sampler:
    """Make a sampler of one of the calls that ``run`` makes, between two CUDA events."""
    return lambda: timing.sample_us(run)[0] / calls


def burst_us(call: Callable[[], object], calls: int) -> Sampler:
    """Make a sampler of a call on the host: the mean of a burst that fits the queue of the GPU."""

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
    """Make a sampler of a call from an idle device to an idle one, on the clock of the host."""

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
        (hidden, tokens, copy bandwidth in TB/s), tokens fastest.
    """
    mhc_ops.prewarm(hidden, max_tokens=max(tokens))
    copy_tb_s = round(timing.copy_bandwidth(torch.device("cuda", torch.cuda.current_device())), 3)
    for size in hidden:
        for count in tokens:
            yield size, count, copy_tb_s


def figures(times: timing.Timing, floor_us: float, copy_tb_s: float) -> dict[str, Any]:
    """Return what is recorded of a chain, beside what it ran."""
    return {
        "us_median": round(times.us_median, 3),
        "us_p10": round(times.us_p10, 3),
        "us_p90": round(times.us_p90, 3),
        "floor_us": round(floor_us, 3),
        "copy_tb_s": copy_tb_s,
        "chain": times.chain,
    }

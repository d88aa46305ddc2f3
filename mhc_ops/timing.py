"""Time chains of calls, in a CUDA graph or call by call; everything here is timed in this way.

A chain is one function that makes several calls, whose inputs are not all in the L2. CUDA events
take the time of the chain, replay after replay. The time of a call is the time of the chain divided
by its length.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch

REPLAYS = 15
WARMUPS = 3
COPY_BYTES = 1 << 31

# Each entry is (most tokens, calls). A chain has fewer calls where each moves more bytes. Every
# chain of boundaries moves several times the 50 to 126 MB of an L2 between two uses of an fn.
_CHAIN_LENGTHS = ((64, 64), (512, 32), (2048, 16))
_LONGEST_CHAIN_LENGTH = 8

Result = TypeVar("Result")


class Timing(NamedTuple):
    """Hold the microseconds of one call of a chain.

    Attributes:
        us_median, us_p10, us_p90: time on the GPU: median, 10th and 90th percentile of the replays.
        host_us: median of the time that the host takes to issue a call.
        chain: number of calls of the chain.
    """

    us_median: float
    us_p10: float
    us_p90: float
    host_us: float
    chain: int


def chain_length(tokens: int) -> int:
    """Choose the number of calls of a chain: 64 up to 64 tokens, fewer for more tokens."""
    for most, length in _CHAIN_LENGTHS:
        if tokens <= most:
            return length
    return _LONGEST_CHAIN_LENGTH


def percentiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Return the 10th, 50th and 90th percentile, with linear interpolation between samples."""
    points = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    low, middle, high = torch.tensor(samples, dtype=torch.float64).quantile(points).tolist()
    return low, middle, high


def capture(
    run: Callable[[], Result], *, warmups: int = WARMUPS
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Warm up on a side stream, then capture on it.

    The graph holds its memory, so the outputs stay valid as long as the graph lives. The inputs and
    weights that the closure ``run`` holds must live as long, too.

    Args:
        run: the function to capture.
        warmups: number of calls before the capture.

    Returns:
        (graph, what ``run`` returned during the capture). Each replay writes these outputs.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmups):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = run()
    return graph, result


def sample_us(run: Callable[[], object]) -> tuple[float, float]:
    """Time one call that begins on an idle GPU and is waited for: (GPU, host) microseconds."""
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    issued = time.perf_counter()
    start.record()
    run()
    end.record()
    host_us = (time.perf_counter() - issued) * 1e6
    end.synchronize()
    return start.elapsed_time(end) * 1e3, host_us


def samples_us(
    run: Callable[[], object], repeats: int = REPLAYS
) -> tuple[list[float], list[float]]:
    """Time ``repeats`` calls after some that are not counted: (GPU, host) microseconds of each."""
    for _ in range(WARMUPS):
        run()
    samples = [sample_us(run) for _ in range(repeats)]
    return [device for device, _ in samples], [host for _, host in samples]


def time_chain(
    run: Callable[[], Result],
    length: int,
    check: Callable[[Result], None],
    *,
    graph: bool = True,
    replays: int = REPLAYS,
) -> Timing:
    """Time one call of a chain on the current CUDA device.

    Args:
        run: the chain.
        length: number of calls of the chain.
        check: function that takes what the chain returned at the end, and raises where a result is
            wrong, so that no time of wrong results is reported.
        graph: whether to capture the chain and replay it instead of running it call by call.
        replays: number of samples that median and percentiles are taken from.

    Returns:
        The times of one call.
    """
    if graph:
        captured, result = capture(run)
        device_us, host_us = samples_us(captured.replay, replays)
        check(result)  # the result lies in memory of the graph, which still lives here
    else:
        device_us, host_us = samples_us(run, replays)
        check(run())
    low, middle, high = (value / length for value in percentiles(device_us))
    return Timing(middle, low, high, percentiles(host_us)[1] / length, length)


def copy_bandwidth(device: torch.device) -> float:
    """Measure the bandwidth of a large device-to-device copy in TB/s, bytes read plus written.

    Args:
        device: a CUDA device.

    Returns:
        The bandwidth of the median of 15 copies.
    """
    with torch.cuda.device(device):
        free, _ = torch.cuda.mem_get_info()
        size = min(COPY_BYTES, free // 4)
        source = torch.empty(size, dtype=torch.uint8, device=device).random_()
        target = torch.empty_like(source)
        times, _ = samples_us(lambda: target.copy_(source))
    _, median, _ = percentiles(times)
    return 2 * size / (median * 1e6)

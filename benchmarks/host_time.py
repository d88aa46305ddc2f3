"""Host time of one eager ``fused_post_pre``, all four outputs allocated: native and in Python.

    python benchmarks/host_time.py

Calls are issued in bursts that fit the queue of the GPU, so none waits for it; the time of a call
is that of the fastest of many bursts and the median over them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from unittest import mock

import torch

import mhc_ops
from mhc_ops import host
from mhc_ops.testing import make_inputs

OP = torch.ops.mhc.fused_post_pre.default
BURST = 200  # launches; the queue takes 1024
BURSTS = 50
TOKENS = (1, 8, 64, 128)


def host_us(call: Callable[[], object]) -> tuple[float, float]:
    """(least, median) microseconds of a call."""
    times = []
    for _ in range(BURSTS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(BURST):
            call()
        times.append((time.perf_counter() - start) / BURST * 1e6)
    torch.cuda.synchronize()
    return min(times), median(times)


@torch.no_grad()
def main() -> None:
    mhc_ops.prewarm([4096], max_tokens=max(TOKENS))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; µs: least, median")
    for tokens in TOKENS:
        inputs = make_inputs("fused_post_pre", tokens, 4096, device="cuda", norm=True)
        norm = {name: inputs[name] for name in ("norm_weight", "norm_eps")}
        positional = [value for name, value in inputs.items() if name not in norm]
        calls = {
            "positional": lambda args=positional, norm=norm: OP(*args, **norm),
            "keyword": lambda inputs=inputs: OP(**inputs),
            "mhc_ops.fused_post_pre": lambda inputs=inputs: mhc_ops.fused_post_pre(**inputs),
        }
        for name, call in calls.items():
            call()  # after a turn in Python the kernel is remembered again
            before = host.calls()
            native = host_us(call)
            way = "native" if host.calls() - before == BURST * BURSTS else "NOT native"
            host.forget()
            with mock.patch.object(host, "remember"):
                python = host_us(call)
            print(
                f"{tokens:4} tokens, {name:22} {way} {native[0]:6.2f} {native[1]:6.2f}"
                f"   python {python[0]:6.2f} {python[1]:6.2f}"
            )


if __name__ == "__main__":
    main()

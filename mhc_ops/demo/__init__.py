"""Run ``python -m mhc_ops demo``: a small DeepSeek-V4 of transformers, stock against these ops.

The demo uses random weights and real text, on the CPU or a GPU. Every claim that the demo prints is
checked, and the exit status is 1 where a claim does not hold:

1. Teacher-forced logits of stock bf16 and of mhc-ops bf16 (unfused and fused) are compared with
   those of the stock model in float32. The error of mhc-ops is at most ``ERROR_RATIO`` times the
   error of stock bf16, and the top token is float32's wherever float32's margin exceeds the largest
   error of stock bf16.
2. A greedy continuation with the KV cache takes tokens that float32 ranks first, or almost.
3. ``torch.compile(fullgraph=True)`` makes one graph.
4. On a GPU a CUDA graph is replayed on new input, and a boundary is timed.

The comparison is made twice (:mod:`mhc_ops.demo.models` says why). In the first both runs are given
the choices of the float32 run, so that the error comes from the arithmetic alone; this error is
checked seed by seed. In the second every run chooses for itself, as in use; the error over all
seeds together is checked.

The demo ends with a table, and with a picture where matplotlib is installed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .. import geometry
from ..prewarm import prewarm
from ..support import is_supported
from . import steps, summary
from .models import readme

PICTURE = Path("mhc_ops_demo.png")


@torch.no_grad()
def run(report: summary.Report, device: str, picture: Path = PICTURE) -> None:
    """Run all parts of the demo on one device, then show the table and the picture."""
    source, text = readme()
    report.step(f"{steps.SEEDS} random DeepSeek-V4 models on {device}; text: {source}")
    if device == "cuda":
        report.step("compiling the kernels")
        prewarm(
            [geometry.HIDDEN_MULTIPLE], max_tokens=steps.SEQUENCES * steps.LENGTH, device=device
        )
    cases = [steps.make_case(seed, text, device) for seed in range(steps.SEEDS)]
    compared = steps.compare_logits(report, cases)
    steps.continue_greedily(report, cases[0], summary.outcomes_of(compared)[0].own_error)
    # One pair of layers takes Inductor half the time of two.
    steps.compile_model(report, steps.make_case(0, text, device, pairs=1))
    times: list[dict[str, Any]] = []
    if device == "cuda":
        steps.replay_cuda_graph(report, cases[0])
        times = steps.time_boundaries(report, device)
    summary.summarise(report, compared, times)
    summary.show_picture(report, compared, times, picture)


def main(argv: Sequence[str]) -> int:
    """Run ``python -m mhc_ops demo``.

    Args:
        argv: ``--device auto`` (a GPU that the ops support, else the CPU), ``cpu`` or ``cuda``;
            ``--picture FILE``.

    Returns:
        0 where every check holds, 1 where one does not, 2 where the demo cannot run.
    """
    parser = argparse.ArgumentParser(
        prog="python -m mhc_ops demo",
        description="A small DeepSeek-V4 of transformers, stock against mhc-ops.",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="where it goes: .png or .svg")
    arguments = parser.parse_args(argv)
    device = arguments.device
    report = summary.Report(Console(highlight=False))
    supported, reason = is_supported("cuda")
    if device == "cuda" and not supported:
        report.console.print(f"--device cuda: expected a GPU that the ops support: {reason}")
        return 2
    if device == "auto":
        device = "cuda" if supported else "cpu"
        report.console.print(f"device: {device} ({reason})")
    try:
        import transformers
    except ImportError:
        report.console.print("expected transformers: pip install 'mhc-ops[transformers]'")
        return 2
    transformers.utils.logging.set_verbosity_error()
    run(report, device, arguments.picture)
    if report.failures:
        report.console.print(f"[red]checks that FAILED: {len(report.failures)}[/]")
        for failure in report.failures:
            report.console.print(f"  {failure}")
        return 1
    report.step("[green]every check holds[/]")
    return 0

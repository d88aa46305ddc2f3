"""Show the demo's results: a line for each part and check, and at the end a table and a picture."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from .models import PATHS, Errors


class Report:
    """Print what is done, and remember what failed."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.failures: list[str] = []
        self.start = time.monotonic()

    def step(self, text: str) -> None:
        seconds = time.monotonic() - self.start
        self.console.print(f"[bold]{seconds:5.1f} s  {text}[/]", soft_wrap=True)

    def say(self, text: str, mark: str = "") -> None:
        self.console.print(f"         {mark:6}  {text}", soft_wrap=True)

    def check(self, holds: bool, text: str) -> None:
        self.say(text, "[green]ok[/]    " if holds else "[red]FAILED[/]")
        if not holds:
            self.failures.append(text)


class Comparison(NamedTuple):
    """Compare the logits of one path of one model with float32's.

    Attributes:
        seed, path: which model and which path.
        pinned: errors with float32's choices.
        own: errors with the path's own choices.
    """

    seed: int
    path: str
    pinned: Errors
    own: Errors


class Outcome(NamedTuple):
    """Hold the row of a path in the table at the end.

    Attributes:
        path: name of the path.
        error, own_error: mean errors of the logits over all seeds, with float32's choices and with
            the path's own.
        agreement: share of positions whose top token is float32's, with float32's choices.
    """

    path: str
    error: float
    own_error: float
    agreement: float


def outcomes_of(compared: Sequence[Comparison]) -> list[Outcome]:
    """Take the means over the seeds, stock first."""
    outcomes = []
    for name in ("stock", *PATHS):
        rows = [row for row in compared if row.path == name]
        means = (
            sum(values) / len(rows)
            for values in (
                [row.pinned.mean for row in rows],
                [row.own.mean for row in rows],
                [row.pinned.agreement for row in rows],
            )
        )
        outcomes.append(Outcome(name, *means))
    return outcomes


def summarise(
    report: Report, compared: Sequence[Comparison], times: Sequence[dict[str, Any]]
) -> None:
    """Print the table at the end, with one row for each path.

    The columns are the mean error of the logits with float32's choices, the same in units of
    stock's error, the error in units of stock's where each run makes its own choices, the share of
    positions with float32's top token, and on a GPU the times of a boundary.
    """
    outcomes = outcomes_of(compared)
    stock = outcomes[0]
    hidden = max((row["hidden"] for row in times), default=0)
    timed = f"; µs of a boundary, H = {hidden}" if times else ""
    table = Table(title=f"all seeds: bf16 logits against float32{timed}", box=box.SIMPLE_HEAD)
    for column in ("path", "error", "of stock's", "own choices", "top token"):
        table.add_column(column, justify="left" if column == "path" else "right")
    counts = [1, 512] if times else []
    for tokens in counts:
        table.add_column(f"T = {tokens}", justify="right")
    routes = {"stock": "eager", "mhc-ops unfused": "unfused", "mhc-ops fused": "fused"}
    us = {(row["path"], row["hidden"], row["tokens"]): row["us_median"] for row in times}
    for row in outcomes:
        table.add_row(
            row.path,
            f"{row.error:.5f}",
            f"{row.error / stock.error:.3f}",
            f"{row.own_error / stock.own_error:.3f}",
            f"{row.agreement:.2%}",
            *(f"{us[routes[row.path], hidden, tokens]:.2f}" for tokens in counts),
        )
    report.console.print(table)


def draw(compared: Sequence[Comparison], times: Sequence[dict[str, Any]], output: Path) -> None:
    """Draw the errors seed by seed on the left, the times or the top tokens on the right.

    Raises:
        ImportError: there is no matplotlib.
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    seeds = sorted({row.seed for row in compared})
    for index, name in enumerate(("stock", *PATHS)):
        rows = [row for row in compared if row.path == name]
        places = [row.seed + 0.27 * (index - 1) for row in rows]
        left.bar(places, [row.pinned.mean for row in rows], 0.25, label=name)
        if not times:
            right.bar(places, [100 * row.pinned.agreement for row in rows], 0.25, label=name)
    left.set_ylabel("mean error of the logits against float32")
    left.set_title("a small DeepSeek-V4 in bf16, float32's choices")
    if times:
        sizes = sorted({row["hidden"] for row in times})
        for hidden, colour in zip(sizes, ("C0", "C1"), strict=True):
            for route, style in (("fused", "-"), ("unfused", "--"), ("eager", ":")):
                points = [
                    (row["tokens"], row["us_median"])
                    for row in times
                    if (row["hidden"], row["path"]) == (hidden, route)
                ]
                label = f"H = {hidden}, {'torch' if route == 'eager' else route}"
                x, y = zip(*points, strict=True)
                right.plot(x, y, style, marker="o", color=colour, label=label)
        right.set_xscale("log", base=2)
        right.set_yscale("log")
        right.set_xlabel("tokens")
        right.set_ylabel("µs")
        right.set_title("one boundary in a CUDA graph")
    else:
        right.set_ylim(top=100)
        least = min(100 * row.pinned.agreement for row in compared)
        right.set_ylim(bottom=max(0.0, least - (100 - least)))
        right.set_ylabel("positions with float32's top token, %")
        right.set_title("top tokens")
    for axes in (left, right) if not times else (left,):
        axes.set_xticks(seeds)
        axes.set_xlabel("seed")
    for axes in (left, right):
        # Below the axes, no legend covers a bar or a line.
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)


def show_picture(
    report: Report,
    compared: Sequence[Comparison],
    times: Sequence[dict[str, Any]],
    output: Path,
) -> None:
    """Draw the picture, and say where the file is, or why there is none."""
    try:
        draw(compared, times, output)
    except ImportError:
        report.say("no picture: matplotlib is not installed (pip install 'mhc-ops[plot]')")
    except OSError as error:
        report.say(f"no picture: {error}")
    else:
        report.say(f"picture: {output.resolve()}")

"""Make the tables of figures that pages show from the records, and the table of routes from itself.

    python tests/figures.py README.md docs/*.md

writes the tables of these pages anew; a test compares the pages with the records.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mhc_ops import routes

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # This file is a script, too.

from figure import read_records  # noqa: E402
from records import read_baseline  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
BASELINE = ROOT / "benchmarks" / "baselines" / "h200_sglang_0.5.23.json"

TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192, 32768)
FEW = (1, 32, 128, 512, 2048, 8192)


def records(name: str) -> list[dict[str, Any]]:
    """Read a file of records."""
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Write a table in Markdown; numbers are aligned to the right."""
    columns, rows = list(columns), [[str(cell) for cell in row] for row in rows]
    numbers = [all(row[i][0].isdigit() for row in rows) for i in range(len(columns))]
    rule = ["---:" if right else "---" for right in numbers]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, rule, *rows))


def _boundaries() -> dict[tuple[int, int], dict[str, Any]]:
    rows = read_records(RESULTS / "nvidia_h200.jsonl")
    return {(row["hidden"], row["tokens"]): row for row in rows}


def boundary() -> str:
    """Show the boundary at every size, beside both paths of SGLang."""
    ours, theirs = _boundaries(), read_baseline(BASELINE)
    columns = ("hidden", "tokens", "µs", "times the floor", "SGLang fused µs", "SGLang unfused µs",
               "times faster")  # fmt: skip
    return table(columns, (
        (hidden, tokens, f"{row['us_median']:.2f}", f"{row['us_median'] / row['floor_us']:.2f}",
         f"{fused:.2f}", f"{unfused:.2f}", f"{min(fused, unfused) / row['us_median']:.2f}")
        for hidden in (4096, 7168) for tokens in TOKENS
        for row in [ours[hidden, tokens]]
        for fused, unfused in [[theirs[tokens, hidden, path] for path in ("fused", "unfused")]]
    ))  # fmt: skip


def short_boundary() -> str:
    """Show the boundary at few sizes, beside the better path of SGLang."""
    ours, theirs = _boundaries(), read_baseline(BASELINE)

    def cells(hidden: int, tokens: int) -> list[str]:
        us = ours[hidden, tokens]["us_median"]
        best = min(theirs[tokens, hidden, path] for path in ("fused", "unfused"))
        return [f"{us:.2f}", f"{best:.2f}", f"{best / us:.2f}"]

    columns = ["tokens"]
    for hidden in (4096, 7168):
        columns += [f"{hidden}: µs", "SGLang µs", "times faster"]
    return table(columns, ((tokens, *cells(4096, tokens), *cells(7168, tokens)) for tokens in FEW))


def boundary_5120() -> str:
    """Show the boundary at the hidden size of V4.1."""
    ours = _boundaries()
    tokens = (*TOKENS[:8], 2048, 8192)
    us = (f"{ours[5120, count]['us_median']:.2f}" for count in tokens)
    return table(("tokens", *map(str, tokens)), [("µs", *us)])


def steps() -> str:
    """Show ``pre`` and ``post`` by themselves."""
    found = {(r["step"], r["hidden"], r["tokens"]): r for r in records("nvidia_h100_steps.jsonl")}

    def cells(step: str, hidden: int, tokens: int) -> tuple[str, str]:
        row = found[step, hidden, tokens]
        return f"{row['us_median']:.1f}", f"{row['us_median'] / row['floor_us']:.2f}"

    return table(
        ("hidden", "tokens", "`pre` µs", "times the floor", "`post` µs", "times the floor"),
        (
            (hidden, tokens, *cells("pre", hidden, tokens), *cells("post", hidden, tokens))
            for hidden in (4096, 7168)
            for tokens in (1024, 2048, 8192, 32768)
        ),
    )


def ends() -> str:
    """Show the ends of a model against the calls that they replace."""
    parts = ("start", "end", "end_with_streams")
    found = {
        (r["part"], r["path"], r["hidden"], r["tokens"]): r["us_median"]
        for r in records("nvidia_h100_ends.jsonl")
        if " of a model, " in r["what"]
    }

    def cells(hidden: int, tokens: int) -> list[str]:
        said = []
        for part in parts:
            fused, calls = (found[part, path, hidden, tokens] for path in ("fused", "unfused"))
            said += [f"{fused:.1f}", f"{calls / fused:.2f}"]
        return said

    return table(
        ("hidden", "tokens", "`expand_pre` µs", "times faster", "`post_head` µs", "times faster",
         "`post_head_streams` µs", "times faster"),
        ((hidden, tokens, *cells(hidden, tokens))
         for hidden in (4096, 7168) for tokens in (1, 32, 128, 512, 2048, 8192)),
    )  # fmt: skip


def host() -> str:
    """Show the host's time of an eager call, by the short and the long way, on the slower host."""
    slower = 4.95  # torch.empty takes so many us on that host.
    found = {}
    for row in records("nvidia_h200_host.jsonl"):
        said = re.match(r"host time of an eager (\w+), (\d+) tokens", row["what"])
        if said and row["torch_empty_us"] == slower:
            found[said[1], int(said[2])] = row
    ops = dict.fromkeys(op for op, _ in found)
    return table(
        ("op", "tokens", "short way µs", "long way µs", "at 9166b6a µs"),
        (
            (f"`{op}`", tokens, *(f"{row['us'][way]:.1f}" for way in ("short", "long", "9166b6a")))
            for op in ops
            for tokens in (1, 192)
            for row in [found[op, tokens]]
        ),
    )


def decoding() -> str:
    """Show a decoding step of two layers in transformers, as a CUDA graph."""
    (run,) = (
        row
        for row in records("nvidia_h100_checks.jsonl")
        if "time of a decoding step" in row["what"]
    )
    us = {(row["batch"], row["path"]): row["graph_us"] for row in run["rows"]}
    paths = ("stock", "mhc-ops unfused", "mhc-ops fused")
    return table(
        ("batch", *(f"{path} µs" for path in paths)),
        ((batch, *(f"{us[batch, path]:.0f}" for path in paths)) for batch in (1, 8, 32)),
    )


def paths() -> str:
    """Show the kernels of every op at each range of token counts, on an H100 or H200."""
    rows = []
    for op in routes.ops():
        least, path = 1, routes.path(op, 4096, "sm_90a", 1)
        starts = routes.bounds(4096, "sm_90a", 10**6)[1:]
        for start in starts:
            other = routes.path(op, 4096, "sm_90a", start)
            if other != path:
                rows.append((f"`{op}`", f"{least} to {start - 1}", path))
                least, path = start, other
        rows.append((f"`{op}`", f"from {least} on", path))
    return table(
        ("op", "tokens", "kernels"),
        ((op, tokens, " + ".join(f"`{k}`" for k in path.split("+"))) for op, tokens, path in rows),
    )


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (boundary, short_boundary, boundary_5120, steps, ends, host, decoding, paths)
}

_MARK = re.compile(r"(?<=<!-- table: )(\w+) -->\n\n(?:\|[^\n]*\n)*")


def renewed(page: str) -> str:
    """Put every table that a page marks as ``<!-- table: NAME -->`` in the place of the old one."""
    return _MARK.sub(lambda mark: f"{mark[1]} -->\n\n{TABLES[mark[1]]()}\n", page)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(renewed(path.read_text()))

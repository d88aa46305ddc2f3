"""Time boundaries as ``python -m mhc_ops bench`` does, record them, and show a baseline beside.

    python benchmarks/boundary_time.py --baseline benchmarks/baselines/h200_sglang_0.5.23.json

Each row is appended to ``benchmarks/results/<gpu>.jsonl``, or to the file of ``-o``, with the
command, the commit and the clocks. ``benchmarks/figure.py`` draws such a file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import records
from mhc_ops import bench

Baseline = dict[tuple[int, int, str], float]


def beside(row: dict[str, Any], baseline: Baseline) -> float | None:
    """Look up the baseline's microseconds for a row that was measured like the baseline."""
    if row["mode"] != "graph" or not row["norm"] or row["sinkhorn_repeat"] != 20:
        return None
    return baseline.get((row["tokens"], row["hidden"], row["path"]))


def _default_output(gpu: str) -> Path:
    return records.RESULTS / f"{'_'.join(gpu.lower().split())}.jsonl"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    bench.add_arguments(parser)
    parser.add_argument("--baseline", type=Path, help="JSON of other figures to show beside")
    records.add_arguments(parser)
    arguments = parser.parse_args(argv)
    commit = records.source_commit() if arguments.commit is None else arguments.commit
    rows = []
    try:
        baseline = None if arguments.baseline is None else records.read_baseline(arguments.baseline)
        for row in bench.run_arguments(arguments):
            record = row | records.stamp(commit, records.command_line(argv))
            records.append(record, arguments.output or _default_output(row["gpu"]))
            rows.append(row)
    except (OSError, RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    others = None if baseline is None else [beside(row, baseline) for row in rows]
    Console(highlight=False).print(bench.make_table(rows, others))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Draw records of boundaries as a figure, with a baseline beside them.

    python benchmarks/figure.py benchmarks/results/nvidia_h200.svg \\
        --records benchmarks/results/nvidia_h200.jsonl \\
        --baseline benchmarks/baselines/h200_sglang_0.5.23.json

The left panel shows the time of a boundary, the right panel the bandwidth that the boundary
reaches: the bytes of one pass over the data, divided by the time. The dashed lines show what the
memory allows at the copy bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mhc_ops import bench
from records import read_baseline

# Each hidden size has a colour of Okabe and Ito's, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
MARKERS = {"fused": "s", "unfused": "x"}  # each path of the baseline has a marker
# The size of the letters suits a README column, which is 800 to 900 pixels wide.
INCHES = (10.0, 4.3)
# The background is opaque, because dark lines and letters would vanish on a dark page.
STYLE = {
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "font.size": 11,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "svg.hashsalt": "mhc-ops",  # with a fixed salt the same records make the same file
}


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a results file that belong into the figure, the last of each size.

    These are the rows of ``fused`` in graph mode with the norm and 20 rounds of Sinkhorn, as in the
    baseline.

    Args:
        path: JSON lines as ``boundary_time.py`` writes them.

    Returns:
        The rows, by hidden size and then tokens.

    Raises:
        ValueError: the file is not of that form, or no row is left.
    """
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    try:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if (row["path"], row["mode"], row["norm"], row["sinkhorn_repeat"]) == (
                "fused", "graph", True, 20,
            ):  # fmt: skip
                rows[row["hidden"], row["tokens"]] = row
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected lines as boundary_time.py writes them, got {error!r}"
        ) from error
    if not rows:
        raise ValueError(f"{path}: expected rows of fused in graph mode, got none")
    return [rows[size] for size in sorted(rows)]


def _each(values: Iterable[Any]) -> str:
    return ", ".join(sorted({str(value) for value in values}))


def describe(
    records: Sequence[dict[str, Any]], baseline: dict[tuple[int, int, str], float] | None
) -> str:
    """Describe what a figure is made from; the file keeps this text, which tells an old figure.

    Args:
        records: as :func:`read_records` gives them.
        baseline: as :func:`records.read_baseline` gives it, or None.

    Returns:
        One line with GPU, commit and a hash of every figure drawn.
    """
    drawn = [(r["hidden"], r["tokens"], r["us_median"], r["copy_tb_s"]) for r in records]
    text = json.dumps([drawn, sorted((baseline or {}).items())])
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return (
        f"{_each(r['gpu'] for r in records)}, driver {_each(r['driver'] for r in records)}, "
        f"commit {_each(r['commit'] for r in records)}, {len(records)} records, figures {digest}"
    )


def draw(
    records: Sequence[dict[str, Any]],
    baseline: dict[tuple[int, int, str], float] | None,
    output: Path,
    *,
    name: str = "SGLang",
) -> None:
    """Draw the figure.

    Args:
        records: as :func:`read_records` gives them.
        baseline: as :func:`records.read_baseline` gives it; with a baseline only the baseline's
            hidden sizes are drawn.
        output: the file, ``.svg`` or ``.png``.
        name: name of the baseline.

    Raises:
        ValueError: the file is of another kind, or there are more hidden sizes than colours.
    """
    if output.suffix not in (".svg", ".png"):
        raise ValueError(f"expected a figure in .svg or .png, got {output}")
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import FuncFormatter

    sizes = sorted({hidden for _, hidden, _ in baseline or ()} or {r["hidden"] for r in records})
    if len(sizes) > len(COLOURS):
        raise ValueError(f"expected at most {len(COLOURS)} hidden sizes, got {sizes}")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=INCHES, layout=ConstrainedLayoutEngine(w_pad=0.1))
        times, speeds = figure.subplots(1, 2)
        for hidden, colour in zip(sizes, COLOURS, strict=False):
            rows = [r for r in records if r["hidden"] == hidden]
            lines = {"mhc-ops": [(r["tokens"], r["us_median"]) for r in rows]}
            floor = [(r["tokens"], r["floor_us"]) for r in rows]
            for path in MARKERS if baseline else ():
                lines[path] = [
                    (tokens, us)
                    for (tokens, h, p), us in sorted((baseline or {}).items())
                    if (h, p) == (hidden, path)
                ]
            for label, points in lines.items():
                if not points:
                    continue
                ours = label == "mhc-ops"
                look: dict[str, Any] = {
                    "color": colour,
                    "label": f"mhc-ops, H = {hidden}" if ours else f"{name} {label}, H = {hidden}",
                    "marker": "o" if ours else MARKERS[label],
                    "linestyle": "-" if ours else "none",
                    "markersize": 3.5 if ours else 6.5,
                    "markerfacecolor": colour if ours else "none",
                    "zorder": 2 if ours else 3,
                }
                tokens = [t for t, _ in points]
                times.plot(tokens, [us for _, us in points], **look)
                reached = [bench.boundary_bytes(t, hidden) / us / 1e6 for t, us in points]
                speeds.plot(tokens, reached, **look)
            times.plot(*zip(*floor, strict=True), color=colour, linestyle="--", linewidth=0.9)
        copy = max(r["copy_tb_s"] for r in records)
        speeds.axhline(copy, color="#444444", linestyle="--", linewidth=0.9)
        speeds.annotate(
            "copy", (1, copy), textcoords="offset points", xytext=(2, 4), color="#444444", size=9.5
        )
        for axes in (times, speeds):
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.set_xlabel("tokens")
        times.set_yscale("log")
        times.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        times.set_ylabel("time of a boundary, µs")
        times.set_title("latency (dashed: floor of the memory)", fontsize=11)
        speeds.set_ylim(0, 1.12 * copy)
        speeds.set_ylabel("bytes of one pass / time, TB/s")
        speeds.set_title("bandwidth", fontsize=11)
        times.legend(loc="upper left")
        figure.supxlabel(
            f"{_each(r['gpu'] for r in records)}, commit "
            f"{_each(r['commit'][:7] for r in records)}; boundary with RMSNorm in a CUDA graph",
            fontsize=9.5,
            color="#444444",
        )
        text = describe(records, baseline)
        svg = output.suffix == ".svg"
        metadata = {"Description": text, "Date": None} if svg else {"Description": text}
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, metadata=metadata, dpi=180)
    if svg:  # matplotlib ends lines in blanks, which git reports as mistakes
        text = output.read_text()
        output.write_text("".join(line.rstrip() + "\n" for line in text.splitlines()))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="the .svg or .png to draw")
    parser.add_argument("--records", type=Path, required=True, help="of boundary_time.py")
    parser.add_argument("--baseline", type=Path, help="JSON of other figures to show beside")
    arguments = parser.parse_args(argv)
    try:
        baseline = None if arguments.baseline is None else read_baseline(arguments.baseline)
        rows = read_records(arguments.records)
        draw(rows, baseline, arguments.output)
    except ImportError:
        print("expected matplotlib: pip install 'mhc-ops[plot]'", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{arguments.output}: {describe(rows, baseline)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Write the results of this folder's scripts, one JSON line each, and read their baselines."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import mhc_ops
from mhc_ops import info

RESULTS = Path("benchmarks/results")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``-o`` and ``--commit``, which every script takes."""
    parser.add_argument("-o", "--output", type=Path, help="file that the records are appended to")
    parser.add_argument("--commit", help="of the source, where git cannot tell")


def command_line(argv: Sequence[str] | None = None) -> str:
    """Return the command line with which the script was called, without folders of one machine."""
    script = Path(sys.argv[0]).name
    given = sys.argv[1:] if argv is None else argv
    arguments = [Path(word).name if os.path.isabs(word) else word for word in given]
    return shlex.join(["python", f"benchmarks/{script}", *arguments])


def source_commit() -> str:
    """Ask git for the commit of the package's checkout.

    Files under ``benchmarks/results`` do not count as changes, because a run writes there.

    Returns:
        The commit, with ``-dirty`` behind it if the checkout is changed; ``unknown`` where git
        cannot tell.
    """
    root = Path(mhc_ops.__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return "unknown"  # the package is installed inside a folder of another repository
        changed = git(
            "status", "--porcelain", "--untracked-files=no", "--", ".", f":(exclude){RESULTS}"
        )
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def stamp(commit: str | None, command: str) -> dict[str, str]:
    """Return the fields at the end of every record; git is asked for a commit that is None."""
    return {
        "commit": source_commit() if commit is None else commit,
        "command": command,
        "utc": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def make_record(
    what: str, outcome: str, *, commit: str | None, command: str, **more: Any
) -> dict[str, Any]:
    """Make one record.

    Args:
        what: what was run.
        outcome: the outcome in words, for a reader.
        commit: commit of the source; None to ask git.
        command: command line that made the record.
        more: figures, which stand between the words and the machine.
    """
    gpu = driver = None
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
        index = torch.cuda.current_device()
        driver = info.nvidia_smi(index, "driver_version")["driver_version"]
    return {
        "what": what,
        "outcome": outcome,
        **more,
        "gpu": gpu,
        "driver": driver,
        "torch": torch.__version__,
        "tilelang": info.installed_version("tilelang"),
        **stamp(commit, command),
    }


def append(record: dict[str, Any], output: Path | None) -> None:
    """Append a record to a file if there is one."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("a") as file:
            file.write(json.dumps(record) + "\n")


def write(record: dict[str, Any], output: Path | None) -> None:
    """Print a record, and append it to a file if there is one."""
    print(json.dumps(record))
    append(record, output)


def read_baseline(path: Path) -> dict[tuple[int, int, str], float]:
    """Read a file of ``benchmarks/baselines``: (tokens, hidden, path) to microseconds.

    Args:
        path: JSON with ``rows``, each with ``tokens``, ``hidden``, and the microseconds of
            ``fused`` and ``unfused``: graph mode, norm fused, 20 rounds of Sinkhorn.

    Raises:
        ValueError: the file is not of that form.
    """
    try:
        rows = json.loads(path.read_text())["rows"]
        return {
            (row["tokens"], row["hidden"], name): float(row[name])
            for row in rows
            for name in ("fused", "unfused")
        }
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected JSON with rows of tokens, hidden, fused and unfused, got {error!r}"
        ) from error

"""What the scripts of this folder write down: one JSON line a result, with machine and commit."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mhc_ops import bench, info


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``-o`` and ``--commit``, which every script takes."""
    parser.add_argument("-o", "--output", type=Path, help="file that the records are appended to")
    parser.add_argument("--commit", help="of the source, where git cannot tell")


def command_line(argv: Sequence[str] | None = None) -> str:
    """How a script was called."""
    script = Path(sys.argv[0]).name
    arguments = sys.argv[1:] if argv is None else argv
    return shlex.join(["python", f"benchmarks/{script}", *arguments])


def make_record(
    what: str, outcome: str, *, commit: str | None, command: str, **more: Any
) -> dict[str, Any]:
    """One line.

    Args:
        what: was run.
        outcome: in words, as somebody reads it.
        commit: of the source; asked from git when None.
        command: that made it.
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
        "commit": bench.source_commit() if commit is None else commit,
        "command": command,
        "utc": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
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

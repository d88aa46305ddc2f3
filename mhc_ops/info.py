"""What this installation is and what it can run: ``python -m mhc_ops info``."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

from . import __version__, config, support


def installed_version(package: str) -> str | None:
    """Version of an installed package without importing it, or None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def nvidia_smi(index: int, *fields: str) -> dict[str, str | None]:
    """Ask ``nvidia-smi`` about one GPU.

    Args:
        index: torch's index of a CUDA device; its UUID finds it whatever devices are visible.
        fields: names that ``nvidia-smi --help-query-gpu`` lists.

    Returns:
        Field to its text; None for each that is not available, all where there is no tool.
    """
    answers: dict[str, str | None] = dict.fromkeys(fields)
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return answers
    uuid = torch.cuda.get_device_properties(index).uuid
    try:
        line = subprocess.run(
            [
                tool,
                f"--id=GPU-{uuid}",
                f"--query-gpu={','.join(fields)}",
                "--format=csv,noheader,nounits",
            ],
            check=True,
            capture_output=True,
            text=True,
            timeout=30,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return answers
    values = [value.strip() for value in line.strip().split(",")]
    if len(values) == len(fields):
        answers.update(
            (field, value)
            for field, value in zip(fields, values, strict=True)
            if not value.startswith("[")  # [N/A], [Not Supported]
        )
    return answers


def _devices() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        supported, reason = support.is_supported("cuda")
        return [{"device": "cuda", "name": None, "supported": supported, "reason": reason}]
    devices = []
    for index in range(torch.cuda.device_count()):
        supported, reason = support.is_supported(index)
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": torch.cuda.get_device_name(index),
                "supported": supported,
                "reason": reason,
            }
        )
    return devices


def collect() -> dict[str, Any]:
    """Everything that ``info`` shows, ready for JSON.

    Returns:
        ``versions`` (package or tool to version, None where absent), ``devices`` (a list of
        device, name, supported, reason), ``cache_folder`` (TileLang's), ``switches`` (variable
        to value).

    Raises:
        ValueError: an environment variable of the package has a value that it cannot have.
    """
    driver = None
    if torch.cuda.is_available():
        driver = nvidia_smi(torch.cuda.current_device(), "driver_version")["driver_version"]
    return {
        "versions": {
            "mhc_ops": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "tilelang": installed_version("tilelang"),
            "transformers": installed_version("transformers"),
            "cuda": torch.version.cuda,
            "driver": driver,
        },
        "devices": _devices(),
        "cache_folder": str(config.cache_folder()),
        "switches": {name: config.switch(name) for name in config.DEFAULTS},
    }


def _print_table(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, version in facts["versions"].items():
        table.add_row(name, version or "-")
    table.add_section()
    for device in facts["devices"]:
        name = f"{device['name']}: " if device["name"] else ""
        verdict = "supported" if device["supported"] else "not supported"
        table.add_row(device["device"], f"{name}{verdict}: {device['reason']}")
    table.add_section()
    table.add_row("kernel cache", facts["cache_folder"])
    table.add_section()
    for variable, value in facts["switches"].items():
        table.add_row(variable, str(int(value)))
    Console(highlight=False, markup=False).print(table)


def main(argv: Sequence[str]) -> int:
    """``python -m mhc_ops info``; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mhc_ops info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object in place of a table")
    arguments = parser.parse_args(argv)
    try:
        facts = collect()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        _print_table(facts)
    return 0

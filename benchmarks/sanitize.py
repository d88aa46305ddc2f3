"""Run compute-sanitizer's four tools over every kernel at small sizes, and record the verdicts.

    python benchmarks/sanitize.py -o benchmarks/results/nvidia_h100_checks.jsonl

Each tool runs ``benchmarks/sanitizer_workload.py``. Every tensor there is an allocation of the
driver's, because torch caches none, so that memcheck sees the end of each tensor.

The exit status is 0 where every tool has found nothing in every kernel, 1 otherwise, and 2 where
there is no compute-sanitizer.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import records
import sanitizer_workload

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
WORKLOAD = Path(__file__).with_name("sanitizer_workload.py")
SECONDS = 40.0  # the cases of a tool have this long
GRACE_SECONDS = 60.0  # the start under a tool and the last case have so much time on top
TAIL = 30  # so many last lines of a run that went wrong are printed


class Verdict(NamedTuple):
    """Hold the verdict of one tool.

    Attributes:
        tool: name of the tool.
        clean: whether the tool found no error or hazard, every case that was begun is right, and
            every kernel was run.
        summary: the tool's summary line, without the frame.
        cases: (right cases, all cases) of the workload; None where the workload did not end.
        seconds: time of the whole process.
    """

    tool: str
    clean: bool
    summary: str
    cases: tuple[int, int] | None
    seconds: float


def judge(tool: str, status: int | None, output: str, seconds: float) -> Verdict:
    """Make the verdict from the exit status, None for a run that was cut off, and the output."""
    summaries = re.findall(r"^=+ (?:\w+ )?SUMMARY: (.*)$", output, re.MULTILINE)
    found = re.search(r"^CASES: (\d+) of (\d+) right", output, re.MULTILINE)
    missing = re.findall(r"^NOT RUN: .*$", output, re.MULTILINE)
    cases = (int(found[1]), int(found[2])) if found else None
    said = summaries[-1].strip() if summaries else "no summary"
    counts = [int(count) for count in re.findall(r"\b(\d+) (?:errors?|hazards?|warnings?)\b", said)]
    clean = bool(status == 0 and summaries and counts and not any(counts) and cases and not missing)
    if status is None:
        said = f"cut off after {seconds:.0f} s, {said}"
    elif status and not any(counts):
        said = f"{said}, exit status {status}"
    if missing:
        said = f"{said}, {len(missing)} kernels not run"
    return Verdict(tool, clean, said, cases, seconds)


def find_tool(given: str | None) -> str | None:
    """Find compute-sanitizer as given, on the path, or where CUDA puts it."""
    places = [os.environ.get("PATH", ""), os.path.join(os.environ.get("CUDA_HOME", ""), "bin")]
    return shutil.which(given or "compute-sanitizer", path=os.pathsep.join((*places, *PLACES)))


def run(sanitizer: str, tool: str, seconds: float) -> tuple[Verdict, str]:
    """Run one tool over the workload; return the verdict and everything that was printed."""
    command = [
        sanitizer, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20",
        # The workload starts no process that has to be checked, and a tool would follow into a
        # compiler.
        "--target-processes", "application-only",
        *(("--racecheck-report", "all") if tool == "racecheck" else ()),
        sys.executable, str(WORKLOAD), "--seconds", str(seconds),
    ]  # fmt: skip
    start = time.monotonic()
    status: int | None
    try:
        done = subprocess.run(
            command,
            env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds + GRACE_SECONDS,
            check=False,
        )
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        status, output = None, (error.stdout or b"").decode(errors="replace")
    return judge(tool, status, output, time.monotonic() - start), output


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for the cases of a tool")
    parser.add_argument("--compute-sanitizer", help="where it is, if not on the path")
    records.add_arguments(parser)
    arguments = parser.parse_args(argv)
    sanitizer = find_tool(arguments.compute_sanitizer)
    if sanitizer is None:
        print("expected compute-sanitizer on the path or with CUDA, found none", file=sys.stderr)
        return 2
    subprocess.run([sys.executable, str(WORKLOAD), "--compile"], check=True)
    sizes = (
        f"every kernel, H = {', '.join(map(str, sanitizer_workload.HIDDEN))}, "
        f"{', '.join(map(str, sorted(sanitizer_workload.TOKENS)))} tokens, against the oracle"
    )
    verdicts = []
    for tool in arguments.tools:
        verdict, output = run(sanitizer, tool, arguments.seconds)
        verdicts.append(verdict)
        if not verdict.clean:
            print("\n".join(output.splitlines()[-TAIL:]), file=sys.stderr)
        records.write(
            records.make_record(
                f"{tool}: {sizes}",
                verdict.summary,
                commit=arguments.commit,
                command=records.command_line(argv),
                clean=verdict.clean,
                cases=verdict.cases,
                seconds=round(verdict.seconds, 1),
            ),
            arguments.output,
        )
    for verdict in verdicts:
        right, of = verdict.cases or (0, len(sanitizer_workload.cases()))
        mark = "clean" if verdict.clean else "NOT CLEAN"
        print(f"{verdict.tool:10} {mark:10} {right}/{of} cases, {verdict.summary}")
    return 0 if all(verdict.clean for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())

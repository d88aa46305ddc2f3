"""Make environments with SGLang and with vLLM, install the wheel in both, and run their tests.

``make test-engines`` calls this script. SGLang is installed whole, with the torch, TileLang and
tvm-ffi that SGLang pins; vLLM stands on top of SGLang, with what vLLM's imports need of other
versions. Both take about 14 GB of disk and, the first time, 15 minutes. pip has to say that it
would install the wheel and nothing else, and finds no more conflicts with the wheel than without.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent
SGLANG, VLLM = "sglang==0.5.23", "vllm==0.33.0"
TOOLS = ("pytest>=8",)
# vLLM imports these, which SGLang does not have, or has in a version that vLLM cannot use.
VLLM_NEEDS = ("cachetools", "cbor2", "openai>=2.25", "py-cpuinfo")


def run(*command: str | Path, cwd: Path, check: bool = True, **environment: str) -> str:
    """Run a command; show and return what it says."""
    print("+", *command, flush=True)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=cwd,
        env=env | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        print(line, end="", flush=True)
    if process.wait() and check:
        sys.exit(f"{command[0]} ended with {process.returncode}")
    return "".join(said)


class Environment:
    """Make a virtual environment, perhaps on top of another one's packages."""

    def __init__(self, folder: Path, below: Environment | None = None) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        if not self.python.exists():
            venv.create(folder, with_pip=True, symlinks=True)
            if below is not None:
                (self.site / "below.pth").write_text(f"{below.site}\n")

    @property
    def site(self) -> Path:
        (found,) = self.folder.glob("lib/python*/site-packages")
        return found

    def pip(self, *words: str | Path, check: bool = True) -> str:
        """Run pip."""
        return run(self.python, "-m", "pip", *words, cwd=self.folder, check=check)

    def conflicts(self) -> set[str]:
        """List what ``pip check`` complains of, without the word that all is well."""
        said = self.pip("check", check=False).splitlines()
        return {line for line in said if not line.startswith("No broken requirements")}


def would_install(said: str) -> list[str]:
    """Say what pip's dry run would install, each as name-version."""
    found = re.search(r"^Would install (.+)$", said, re.MULTILINE)
    return found[1].split() if found else []


def install_wheel(into: Environment, wheel: Path) -> None:
    """Install the wheel as a user does, and see to it that nothing else changes."""
    into.pip("uninstall", "--yes", "mhc-ops")
    before = into.conflicts()
    planned = would_install(into.pip("install", "--dry-run", wheel))
    if len(planned) != 1 or not planned[0].startswith("mhc-ops-"):
        sys.exit(f"pip would install {planned}, expected mhc-ops alone")
    into.pip("install", wheel)
    more = into.conflicts() - before
    if more:
        sys.exit(f"pip check complains of {sorted(more)}, and did not without the wheel")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheel", type=Path, required=True, help="the wheel to test")
    parser.add_argument("--folder", type=Path, required=True, help="where the environments are")
    parser.add_argument("pytest", nargs="*", help="more arguments of pytest")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)

    sglang = Environment(folder / "sglang")
    sglang.pip("install", "--quiet", SGLANG, *TOOLS)
    vllm = Environment(folder / "vllm", below=sglang)
    vllm.pip("install", "--quiet", "--no-deps", VLLM, *VLLM_NEEDS)
    install_wheel(sglang, arguments.wheel.absolute())

    for name, environment in (("sglang", sglang), ("vllm", vllm)):
        run(
            environment.python, "-P", "-m", "pytest", "--config-file", HERE / "pytest.ini",
            "--confcutdir", HERE, HERE / f"test_{name}.py", *arguments.pytest, cwd=folder,
        )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())

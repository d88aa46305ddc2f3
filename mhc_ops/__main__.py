"""Run a command of ``python -m mhc_ops``; its module is imported when the command is asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from . import __version__

# Each command maps to its module, which has main(argv) -> exit status, and to its line of help.
COMMANDS = {
    "info": ("info", "what a bug report needs: versions, GPUs, compilers, switches, kernels"),
    "prewarm": ("prewarm", "compile and load the kernels of the given hidden sizes"),
    "build": (
        "build",
        "compile kernels ahead of time, for machines without a compiler",
    ),
    "selftest": ("selftest", "whether this machine gives right answers, and how fast"),
    "bench": ("bench", "how fast one boundary is on this machine's GPU"),
    "demo": ("demo", "a small DeepSeek-V4 model, stock against mhc-ops, on the CPU or a GPU"),
}


def main(argv: Sequence[str]) -> int:
    """Run one command.

    Args:
        argv: the command, then the arguments of the command.

    Returns:
        The exit status: 0 when the command worked, 2 for wrong arguments or where the command
        cannot run. A command may have others, which the docstring of its ``main`` or module lists.
    """
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="python -m mhc_ops",
        description="DeepSeek-V4's hyper-connections as PyTorch ops.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n"
        + "\n".join(f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items())
        + "\n\n'python -m mhc_ops COMMAND --help' shows the arguments of a command.",
    )
    parser.add_argument("--version", action="version", version=f"mhc_ops {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="see below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its arguments")
    chosen = parser.parse_args(argv)
    try:
        module = importlib.import_module(f"mhc_ops.{COMMANDS[chosen.command][0]}")
        status: int = module.main(chosen.arguments)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "rich":
            raise
        print(
            f"python -m mhc_ops {chosen.command}: expected rich, which draws the tables, got none; "
            "pip install 'rich>=13,<16'",
            file=sys.stderr,
        )
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

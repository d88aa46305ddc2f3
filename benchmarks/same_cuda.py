"""Say which kernels have other CUDA than at an earlier revision; ``make same-cuda BASE=REVISION``.

Restructuring a kernel must not change what it does nor how fast it is, and the CUDA that TileLang
generates proves both without a GPU. Every kernel of the hidden sizes and architectures below is
lowered at both revisions. Two sources are the same if their tokens are, apart from comments, line
breaks, device functions that the kernel does not call, and the names of what the source itself
declares: parameters, variables, the kernel and its device functions. Renamed parameters may stand
in another order, since TileLang sorts a signature by name; the launcher reads the order from the
manifest.

With ``--machine-code`` nvcc compiles the sources that differ. A kernel whose machine code is the
same is named, and counts as the same.

The exit status is 1 if a kernel differs or is there at one revision alone.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import machine_code

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "build" / "same-cuda"
ARCHS = ("sm_80", "sm_90a")
HIDDEN = (256, 4096, 5120, 7168)

# Each revision runs this script on itself; the script prints one JSON line for each kernel.
LOWER = """
import json, sys
from concurrent.futures import ProcessPoolExecutor
from mhc_ops import compiler, routes, store

def lowered(key):
    return store.file_name(key), compiler.lower(compiler.program(key), key.arch).source

archs, hidden = json.loads(sys.argv[1])
keys = dict.fromkeys(k for a in archs for h in hidden for k in routes.keys(h, a, sys.maxsize))
with ProcessPoolExecutor() as pool:
    for name, source in pool.map(lowered, keys):
        print(json.dumps([name, source]), flush=True)
"""

_TOKEN = re.compile(
    r"""
    "(?:\\.|[^"\\])*"                       # a string
    | '(?:\\.|[^'\\])+'                     # a character
    | [A-Za-z_]\w*                          # a name
    | \.?\d(?:[eEpP][+-]|[\w.'])*           # a number
    | ::|->|<<=?|>>=?|[-+*/%&|^=!<>]=|&&|\|\||\+\+|--|\#\#?
    | \S
    """,
    re.VERBOSE,
)
_COMMENT = re.compile(r"""("(?:\\.|[^"\\])*")|//[^\n]*|/\*.*?\*/""", re.DOTALL)
_NAME = re.compile(r"[A-Za-z_]\w*")
_SIGNATURE = re.compile(r"__global__[^;{]*?(\w+)\s*\(([^()]*)\)\s*[;{]")
_NO_TYPES = {"return", "else", "case", "goto", "throw", "delete", "sizeof", "typename", "operator"}
_AFTER_A_DECLARED_NAME = set(",)=;[({:")


_DEVICE_FUNCTION = re.compile(
    r"(?:template\s*<[^>]*>\s*)?__device__[^{};()]*?(\w+)\s*\([^{};]*?\)\s*(?=\{)", re.DOTALL
)


class Source(NamedTuple):
    """Hold a kernel's CUDA as it is compared.

    Attributes:
        tokens: all tokens but those of the signatures' parameters.
        declared: names that the source declares.
        parameters: name to type of the kernel's parameters.
    """

    tokens: tuple[str, ...]
    declared: frozenset[str]
    parameters: dict[str, str]


def _tokens(text: str) -> tuple[str, ...]:
    return tuple(_TOKEN.findall(_COMMENT.sub(lambda match: match[1] or " ", text)))


def _declared(tokens: Sequence[str]) -> frozenset[str]:
    """Find the names behind a type: ``float x``, ``float* x``, ``#define x``."""
    found = set()
    for before_last, last, name, after in zip(
        ("", "", *tokens), ("", *tokens), tokens, (*tokens[1:], ";"), strict=False
    ):
        if not _NAME.fullmatch(name):
            continue
        of_type = _NAME.fullmatch(last) and last not in _NO_TYPES
        of_pointer = last in ("*", "&") and before_last in _POINTED_AT
        if last == "define" or ((of_type or of_pointer) and after in _AFTER_A_DECLARED_NAME):
            found.add(name)
    return frozenset(found)


# ``a * b`` looks like a pointer b to an a, so only pointers to these types count.
_POINTED_AT = {
    "bfloat16_t", "char", "double", "float", "float2", "float4", "half_t", "int", "int32_t",
    "int64_t", "uchar", "uint", "uint2", "uint4", "uint32_t", "uint64_t", "unsigned", "void",
}  # fmt: skip


def _end_of_body(text: str, start: int) -> int:
    """Find the end of the braces that open at ``start``; braces in strings do not count."""
    depth = 0
    for token in _TOKEN.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if not depth:
            return token.end()
    return len(text)


def called(text: str) -> str:
    """Take out of a source comments, and the device functions that nothing in the source calls."""
    bare = _COMMENT.sub(lambda match: match[1] or " ", text)
    bodies = {}
    rest = ""
    end = 0
    for match in _DEVICE_FUNCTION.finditer(bare):
        rest += bare[end : match.start()]
        end = _end_of_body(bare, match.end())
        bodies[match[1]] = (match.start(), end)
    rest += bare[end:]
    needed: set[str] = set()
    new = set(_NAME.findall(rest)) & bodies.keys()
    while new:
        needed |= new
        inside = {name for n in new for name in _NAME.findall(bare[slice(*bodies[n])])}
        new = (inside & bodies.keys()) - needed
    for name in reversed(bodies):
        if name not in needed:
            start, end = bodies[name]
            bare = bare[:start] + bare[end:]
    return bare


def parse(text: str) -> Source:
    """Take a CUDA source apart.

    Args:
        text: the source of one kernel.

    Returns:
        What is compared of it.
    """
    parameters: dict[str, str] = {}
    kernels = set()
    bare = called(text)
    for kernel, listed in _SIGNATURE.findall(bare):
        kernels.add(kernel)
        for parameter in filter(None, map(str.strip, listed.split(","))):
            kind, name = re.fullmatch(r"(.*?)(\w+)", parameter, re.DOTALL).groups()
            parameters[name] = "".join(_tokens(kind))
    without = _SIGNATURE.sub(lambda match: match[0].replace(match[2], ""), bare)
    tokens = _tokens(without)
    return Source(tokens, _declared(tokens) | parameters.keys() | kernels, parameters)


def renamed(base: Source, new: Source) -> dict[str, str] | None:
    """Find the names of the base in the new source.

    Returns:
        Name to name if the two are the same but for these; None if they are not.
    """
    if len(base.tokens) != len(new.tokens):
        return None
    there: dict[str, str] = {}
    back: dict[str, str] = {}
    for old, now in zip(base.tokens, new.tokens, strict=True):
        if old in base.declared and now in new.declared:
            if there.setdefault(old, now) != now or back.setdefault(now, old) != old:
                return None
        elif old != now:
            return None
    if len(base.parameters) != len(new.parameters):
        return None
    for name, kind in base.parameters.items():
        now = there.get(name, name)
        # The launcher binds parameters by name, so one that keeps its name keeps its role.
        if new.parameters.get(now) != kind or (now != name and name in new.parameters):
            return None
    return there


def difference(base: str, new: str, lines: int = 12) -> list[str] | None:
    """Compare two sources of a kernel.

    Args:
        base: CUDA at the earlier revision.
        new: CUDA now.
        lines: how many changed lines are shown.

    Returns:
        None if they are the same; otherwise the first lines that differ.
    """
    if renamed(parse(base), parse(new)) is not None:
        return None
    both = [[line.rstrip() for line in called(t).splitlines() if line.strip()] for t in (base, new)]
    changed = [
        line
        for line in difflib.unified_diff(*both, n=0, lineterm="")
        if not line.startswith(("---", "+++"))
    ]
    rest = len(changed) - lines
    return changed[:lines] + ([f"… and {rest} lines more"] if rest > 0 else [])


def _checkout(revision: str) -> Path:
    """Put the sources of a revision into a folder of their own."""
    folder = KEPT / "sources" / revision
    if not (folder / "mhc_ops" / "csrc_tilelang").exists():
        folder.mkdir(parents=True, exist_ok=True)
        archive = subprocess.run(
            ["git", "archive", revision, "mhc_ops", "csrc_tilelang"],
            cwd=ROOT, check=True, capture_output=True,
        ).stdout  # fmt: skip
        subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
        (folder / "mhc_ops" / "csrc_tilelang").symlink_to(folder / "csrc_tilelang")
    return folder


def _lower(folder: Path, archs: Sequence[str], hidden: Sequence[int]) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", LOWER, json.dumps([archs, hidden])],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        sys.exit(f"the kernels of {folder} cannot be lowered, see above")
    return dict(map(json.loads, done.stdout.splitlines()))


def sources_at(revision: str, archs: Sequence[str], hidden: Sequence[int]) -> dict[str, str]:
    """Lower every kernel at a revision, or take what an earlier run kept.

    Args:
        revision: any name that git knows.
        archs: such as ``sm_90a``.
        hidden: hidden sizes.

    Returns:
        Name of a kernel to its CUDA.
    """
    commit = subprocess.run(
        ["git", "rev-parse", "--verify", f"{revision}^{{commit}}"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if commit.returncode:
        sys.exit(f"expected a revision that git knows, got {revision}")
    name = commit.stdout.strip()
    sizes = "-".join((*archs, *map(str, hidden)))
    kept = KEPT / f"{name}-{sizes}.json"
    if not kept.exists():
        lowered = _lower(_checkout(name), archs, hidden)
        scratch = kept.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(lowered))
        scratch.replace(kept)
    found: dict[str, str] = json.loads(kept.read_text())
    return found


def compare(base: dict[str, str], new: dict[str, str]) -> dict[str, list[str]]:
    """Compare all kernels of two revisions.

    Returns:
        Name of a kernel to what to print of the kernel, for each that differs.
    """
    said = {}
    for name in sorted(base.keys() | new.keys()):
        if name not in new or name not in base:
            said[name] = [f"{name}: only {'at the base' if name in base else 'now'}"]
            continue
        lines = difference(base[name], new[name])
        if lines is not None:
            said[name] = [f"{name}: differs", *(f"    {line}" for line in lines)]
    return said


def compare_code(
    names: Sequence[str], base: dict[str, str], new: dict[str, str]
) -> dict[str, str | None]:
    """Compare the machine code of these kernels, side by side.

    Returns:
        Name of a kernel to what ``machine_code.compare`` says.
    """
    archs = [name.split("-")[1] for name in names]  # store.file_name makes these names.
    pairs = [[sources[name] for name in names] for sources in (base, new)]
    with ProcessPoolExecutor() as pool:
        return dict(zip(names, pool.map(machine_code.compare, archs, *pairs), strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    """Compare the checkout with a revision; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", help="the revision to compare with")
    parser.add_argument("--arch", nargs="+", default=list(ARCHS), help="default: %(default)s")
    parser.add_argument(
        "--hidden", nargs="+", type=int, default=list(HIDDEN), help="default: %(default)s"
    )
    parser.add_argument(
        "--machine-code", action="store_true",
        help="compile what differs in CUDA, and compare the machine code",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    base = sources_at(arguments.base, arguments.arch, arguments.hidden)
    new = _lower(ROOT, arguments.arch, arguments.hidden)
    said = compare(base, new)
    same = len(new) - len(said.keys() & new.keys())
    if arguments.machine_code:
        both = [name for name in said if name in base and name in new]
        for name, differs in compare_code(both, base, new).items():
            if differs is None:
                print(f"{name}: same machine code")
                del said[name]
            else:
                said[name][0] += f": {differs}"
    for lines in said.values():
        print("\n".join(lines))
    print(f"{same} of {len(new)} kernels have the same CUDA")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())

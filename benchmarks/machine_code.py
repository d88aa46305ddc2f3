"""Compare the machine code of CUDA sources, which says more than the sources themselves.

A cubin is an ELF file. Besides the code of the kernel and what the driver has to know of the kernel
it holds what a debugger shows: lines, the PTX. Two cubins are compared without the latter.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

INSTRUCTION = 16  # bytes
NO_BITS = 8  # The type of sections that have a size alone.
FRAME_SIZE = 0x11  # The attribute that says how many bytes of stack a function takes.
VALUE_FOLLOWS = 4  # The format of attributes with a value of some bytes behind them.

_KERNEL = re.compile(r'extern "C" __global__ void __launch_bounds__\([^()]*\) (\w+)\(')
_FOR_DEBUGGERS = re.compile(r"(\.rel)?\.(debug|nv_debug)|\.note\.nv\.tkinfo")


class Section(NamedTuple):
    """Hold a section of a cubin.

    Attributes:
        kind: the type of the section.
        info: a number whose meaning depends on the kind.
        size: the size in bytes.
        content: the bytes; none where the section has a size alone.
    """

    kind: int
    info: int
    size: int
    content: bytes


def sections(cubin: bytes) -> dict[str, Section]:
    """Take a cubin apart.

    Returns:
        Name to section.
    """
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, of_names = struct.unpack_from("<HHH", cubin, 58)
    heads = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + i * size) for i in range(count)]
    found = {}
    for name, kind, _, _, start, length, _, info, _, _ in heads:
        first = heads[of_names][4] + name
        title = cubin[first : cubin.index(b"\0", first)].decode()
        content = b"" if kind == NO_BITS else cubin[start : start + length]
        found[title] = Section(kind, info, length, content)
    return found


def code(cubin: bytes) -> dict[str, Section]:
    """Return the sections of a cubin that are for the GPU and its driver."""
    found = sections(cubin)
    return {name: found[name] for name in found if not _FOR_DEBUGGERS.match(name)}


def describe(cubin: bytes) -> str:
    """Say how long the code of a cubin with one kernel is, and what a thread takes."""
    found = sections(cubin)
    ((_, kernel),) = ((n, s) for n, s in found.items() if n.startswith(".text."))
    attributes = found[".nv.info"].content
    stack = at = 0
    while at < len(attributes):
        form, attribute, length = struct.unpack_from("<BBH", attributes, at)
        if (form, attribute) == (VALUE_FOLLOWS, FRAME_SIZE):
            stack += struct.unpack_from("<II", attributes, at + 4)[1]
        at += 4 + (length if form == VALUE_FOLLOWS else 0)
    # The highest byte of this number is the registers of a thread.
    instructions, registers = kernel.size // INSTRUCTION, kernel.info >> 24
    return f"{instructions} instructions, {registers} registers, {stack} bytes of stack"


def compare(arch: str, base: str, new: str) -> str | None:
    """Compile two sources of a kernel, and compare what nvcc makes of them.

    Args:
        arch: architecture, such as ``sm_90a``.
        base: CUDA at the earlier revision.
        new: CUDA now.

    Returns:
        None if the machine code is the same; otherwise what the two are like.
    """
    from mhc_ops import compiler

    (old_name,), (new_name,) = (set(_KERNEL.findall(source)) for source in (base, new))
    base = re.sub(rf"\b{old_name}\b", new_name, base)  # The name of the kernel is in the cubin.
    old, now = (compiler.machine_code(source, arch) for source in (base, new))
    return None if code(old) == code(now) else f"{describe(old)}; now {describe(now)}"

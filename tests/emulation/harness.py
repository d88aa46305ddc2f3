"""Build and run generated CUDA source on the CPU.

Every run is a process of its own: a fault, a deadlock or a race ends that process and becomes an
:class:`EmulationError` here.
"""

from __future__ import annotations

import functools
import math
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kept import Kept
from mhc_ops.compiler import Argument, Lowered

INCLUDE = Path(__file__).parent / "include"
RUNTIME = Path(__file__).parent / "runtime"
DEVICE_FUNCTIONS = re.compile(
    r"^// mhc device functions: begin$.*?^// mhc device functions: end$", re.DOTALL | re.MULTILINE
)
KERNEL = re.compile(r'extern "C" __global__ void __launch_bounds__\(.*?\) (\w+)\((.*?)\) \{')

DEPENDENCY = "cudaGridDependencySynchronize()"

FLAGS = (
    "-std=c++20", "-fno-strict-aliasing", "-Wno-unknown-pragmas",
    # Reports need lines, but no variables, whose debug information takes g++ the longest.
    "-g1",
    # Every machine rounds once an operation.
    "-ffp-contract=off",
    # A variable that is read before it is written gets a wild value, always the same.
    "-ftrivial-auto-var-init=pattern",
)  # fmt: skip
# The fibers jump between stacks, which glibc's fortified longjmp takes for an error.
FIBER_FLAGS = (
    "-O1", "-U_FORTIFY_SOURCE", "-fsanitize=undefined", "-fno-sanitize=vptr",
    "-fno-sanitize-recover=all",
)  # fmt: skip
THREAD_FLAGS = ("-O1", "-DEMULATION_THREADS", "-fsanitize=thread", "-pthread")
TIMEOUT = 900  # A run that takes more seconds hangs; no slow machine is the cause.
PATIENCE = 300  # An OS thread that waits longer, in seconds, reports a deadlock.
# ThreadSanitizer would wait a second at the end of a run for threads that have all been joined.
THREAD_OPTIONS = "halt_on_error=1 atexit_sleep_ms=0"
MAX_OS_THREADS = 6000  # ThreadSanitizer holds 8128, couriers of inboxes among them.


class EmulationError(RuntimeError):
    """Tell that the emulated kernel did what no kernel may; the text says what and where."""


def missing() -> str | None:
    """Return why kernels cannot be emulated here, or None."""
    return None if shutil.which("g++") else "g++ is not installed"


def translate(source: str) -> str:
    """Translate CUDA source into C++ against the headers in ``include``.

    PTX and preprocessor lines go; what C++ cannot say by macros is rewritten: declarations of
    shared memory, and local arrays, which nvcc aligns for the vector accesses to them.
    """
    source = DEVICE_FUNCTIONS.sub("", source)
    source = re.sub(r"^#(?!pragma unroll).*\n", "", source, flags=re.MULTILINE)
    source = re.sub(
        r"^( *)extern __shared__ __align__\(\d+\) (\w+) (\w+)\[\];$",
        r"\1EMULATION_DYNAMIC_SHARED(\2, \3);",
        source,
        flags=re.MULTILINE,
    )
    source = re.sub(
        r"^( *)__shared__ __align__\(\d+\) (\w+) (\w+)\[(\d+)\];$",
        r"\1EMULATION_STATIC_SHARED(\2, \3, \4);",
        source,
        flags=re.MULTILINE,
    )
    source = re.sub(r"^( +)(\w+ \w+\[\d+\];)$", r"\1alignas(16) \2", source, flags=re.MULTILINE)
    name = _kernel(source).group(1)
    return f'#include "emulation.h"\n\n{source}\nEMULATION_MAIN({name})\n'


def _kernel(source: str) -> re.Match[str]:
    kernels = list(KERNEL.finditer(source))
    if len(kernels) != 1:
        raise ValueError(f"expected one kernel in the generated source, got {len(kernels)}")
    return kernels[0]


@functools.cache
def _gpp() -> str:
    """Return which compiler g++ is: version, target and configuration."""
    return subprocess.run(["g++", "-v"], capture_output=True, text=True, check=True).stderr


@functools.cache
def _texts() -> tuple[str, ...]:
    """Return the harness' own sources."""
    files = (*sorted(INCLUDE.iterdir()), *sorted(RUNTIME.iterdir()))
    return tuple(f"{path.name}\n{path.read_text()}" for path in files)


def _run_gpp(inputs: Sequence[Path], flags: Sequence[str], output: Path) -> None:
    command = ["g++", *flags, "-o", str(output), *map(str, inputs)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise EmulationError(f"g++ failed:\n{result.stderr}")


def _build(lowered: Lowered, mode: tuple[str, ...], kept: Kept) -> Path:
    """Return the program of a kernel, built once a source and mode; the runtime once a mode."""
    code = translate(lowered.source)
    flags = (*FLAGS, *mode)
    common = (_gpp(), *flags, *_texts())

    def compile_runtime(output: Path) -> None:
        _run_gpp([RUNTIME / "runtime.cpp"], (*flags, "-c"), output)

    def compile_program(output: Path) -> None:
        runtime = kept.get("runtime", ".o", common, compile_runtime)
        # The text is kept, too, because reports name its lines.
        text = kept.get(lowered.symbol, ".cpp", (code,), lambda output: output.write_text(code))
        _run_gpp([text, runtime], (*flags, "-I", str(INCLUDE)), output)

    return kept.get(lowered.symbol, ".program", (*common, code), compile_program)


class Kernel:
    """Launch a lowered kernel on CPU tensors.

    Args:
        lowered: what to run.
        kept: where programs are kept.
        sanitize_threads: run every CUDA thread as an OS thread under ThreadSanitizer.
        resident: CTAs that run side by side, rounded up to whole clusters.
        early: parameters that may be read before the previous kernel has finished.
        waits: whether memory is closed until the threads wait for the previous kernel; if left out,
            memory is closed where the source has the call that waits.

    Attributes:
        lowered, early: as above.
    """

    def __init__(
        self,
        lowered: Lowered,
        kept: Kept,
        *,
        sanitize_threads: bool = False,
        resident: int = 1,
        early: Collection[str] = (),
        waits: bool | None = None,
    ) -> None:
        self.lowered = lowered
        self.early = early
        self._sanitize_threads = sanitize_threads
        self._resident = resident
        self._waits = DEPENDENCY in lowered.source if waits is None else waits
        flags = THREAD_FLAGS if sanitize_threads else FIBER_FLAGS
        self._program = _build(lowered, flags, kept)
        self._signature = [
            (word.split()[-1].lstrip("*"), "*" in word, word.lstrip().startswith("const "))
            for word in _kernel(lowered.source).group(2).split(",")
        ]

    def __call__(self, grid: Sequence[int], values: Mapping[str, Any]) -> None:
        """Run the kernel.

        Args:
            grid: CTAs along x, y and z; the last ones may be left out.
            values: by name what the CUDA signature asks for, contiguous CPU tensors and numbers;
                sizes and other arguments of the program have to fit where they are given, and
                values that the program does not know are ignored. Tensors that the kernel writes
                are changed in place.

        Raises:
            ValueError: values that do not fit the program, a grid that is empty or not of whole
                clusters, or more CUDA threads side by side than ThreadSanitizer can hold.
            EmulationError: the kernel failed.
        """
        bound = self._bind(values)
        if 0 in grid:
            raise ValueError(f"expected a grid with CTAs, got {grid}")
        cluster = self.lowered.cluster
        if grid[0] % cluster:
            raise ValueError(f"expected a grid of whole clusters of {cluster} CTAs, got {grid}")
        resident = min(-(-self._resident // cluster) * cluster, math.prod(grid))
        threads = resident * math.prod(self.lowered.block)
        if self._sanitize_threads and threads > MAX_OS_THREADS:
            raise ValueError(
                f"expected at most {MAX_OS_THREADS} OS threads, got {threads}: lower the kernel "
                "with fewer threads or a smaller cluster"
            )
        # Global memory is closed to one cluster at a time, which ends before the next begins.
        waits = self._waits and not self._sanitize_threads and resident == cluster
        with tempfile.TemporaryDirectory() as folder:
            words, written = [], []
            for name, is_pointer, is_const in self._signature:
                value = bound[name]
                if not is_pointer:
                    words.append(f"{name}:{value.hex() if isinstance(value, float) else value}")
                    continue
                file = Path(folder) / name
                file.write_bytes(value.view(torch.uint8).numpy().tobytes())
                if not is_const:
                    written.append((value, file))
                kind = ("+" if name in self.early else "=") if is_const else "@"
                words.append(f"{name}{kind}{file}")
            command = [
                str(self._program),
                "grid={},{},{}".format(*grid, *(1,) * (3 - len(grid))),
                "block={},{},{}".format(*self.lowered.block),
                f"shared={self.lowered.shared}",
                f"cluster={cluster}",
                f"resident={resident}",
                f"pdl={waits:d}",
                f"patience={PATIENCE}",
                *words,
            ]
            self._execute(command)
            for tensor, file in written:
                data = torch.frombuffer(bytearray(file.read_bytes()), dtype=tensor.dtype)
                tensor.copy_(data.view(tensor.shape))

    def _bind(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the program asks for, as it asks for it, and the sizes of its tensors."""
        arguments = {argument.name: argument for argument in self.lowered.arguments}
        sizes = {size for a in arguments.values() for size in a.shape or () if type(size) is str}
        if sizes & arguments.keys():
            raise ValueError(f"arguments and sizes are both called {sizes & arguments.keys()}")
        bound: dict[str, Any] = {name: int(values[name]) for name in sizes & values.keys()}
        for name in arguments.keys() & values.keys():
            bound[name] = self._take(arguments[name], values[name], bound)
        missing = [name for name, _, _ in self._signature if name not in bound]
        if missing:
            raise ValueError(f"expected values of {missing} too")
        return bound

    @staticmethod
    def _take(argument: Argument, value: Any, sizes: dict[str, Any]) -> Any:
        """Return a value that fits the argument; add sizes that its shape tells to ``sizes``."""
        if argument.shape is None:
            return (float if argument.dtype.startswith("float") else int)(value)
        if not isinstance(value, Tensor) or str(value.dtype) != f"torch.{argument.dtype}":
            raise ValueError(f"{argument.name}: expected {argument.dtype}, got {value}")
        expected = argument.shape
        if not value.is_contiguous() or value.dim() != len(expected):
            raise ValueError(f"{argument.name}: expected contiguous {expected}")
        for size, got in zip(expected, value.shape, strict=True):
            if sizes.setdefault(size, got) != got if isinstance(size, str) else size != got:
                raise ValueError(
                    f"{argument.name}: expected shape {expected}, got {tuple(value.shape)}"
                )
        return value

    def _execute(self, command: list[str]) -> None:
        result = self._process(command)
        if "unexpected memory mapping" in result.stderr:
            # g++ 12's ThreadSanitizer wants less address-space randomisation than newer kernels
            # use.
            result = self._process(["setarch", "-R", *command])
        if result.returncode:
            raise EmulationError(
                f"{self._program.name} exited with {result.returncode}:\n{result.stderr[:6000]}"
            )

    def _process(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
                env={"TSAN_OPTIONS": THREAD_OPTIONS, "PATH": os.environ["PATH"]},
            )
        except subprocess.TimeoutExpired as error:
            raise EmulationError(f"{command[0]} did not end within {TIMEOUT} s") from error

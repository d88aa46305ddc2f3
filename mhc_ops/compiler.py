"""From a kernel's key to its cubin: the one module that talks to TileLang and nvcc.

Importing TileLang takes seconds, so that happens at the first compile. Nothing here is needed to
run a kernel: what a launch has to know of it stands in :class:`Compiled`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from . import disk
from .formula import Formula, apply, constant, evaluate
from .formula import name as size_of
from .routes import Key

TILELANG = "0.1.15"  # whose language the kernels are written in; others compile few of them
LEAST_PDL_ARCH = 90  # programmatic dependent launch exists from Hopper on

_PACKAGE = Path(__file__).parent
_SIGNATURE = re.compile(r'extern "C" __global__ void __launch_bounds__\(.*?\) (\w+)\((.*?)\) \{')
_KINDS = {"int": "int32", "int64_t": "int64", "float": "float32"}  # of scalars in CUDA
_INFIX = {"Add": "+", "Sub": "-", "Mul": "*", "FloorDiv": "//", "FloorMod": "%"}
_INFIX |= {"Min": "min", "Max": "max"}


class Argument(NamedTuple):
    """An argument of a TileLang program, in the order of the program.

    Attributes:
        name: its name there and in the CUDA source.
        dtype: TileLang's name of its type.
        shape: numbers and names of sizes; None for a scalar.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...] | None


class Lowered(NamedTuple):
    """A program as nvcc and the launch need it.

    Attributes:
        source: the CUDA source.
        symbol: the kernel's name in it.
        parameters: in the order of its CUDA signature: name and kind, which is ``pointer``,
            ``int32``, ``int64`` or ``float32``.
        arguments: in the order of the program.
        grid: CTAs along x, y and z, as formulas of the scalars.
        block: threads along x, y and z.
        cluster: CTAs of a cluster, along x.
        shared: bytes of dynamic shared memory.
        pdl: whether it is launched with programmatic stream serialisation.
    """

    source: str
    symbol: str
    parameters: tuple[tuple[str, str], ...]
    arguments: tuple[Argument, ...]
    grid: tuple[Formula, Formula, Formula]
    block: tuple[int, int, int]
    cluster: int
    shared: int
    pdl: bool


class Compiled(NamedTuple):
    """A kernel that can be loaded and launched: its cubin, and what its manifest says.

    Attributes:
        cubin: machine code for one architecture.
        symbol: the kernel's name in it.
        parameters, grid, block, cluster, shared, pdl: as in :class:`Lowered`, with one number of
            threads and a grid of two dimensions.
        compiled_with: versions of TileLang and nvcc, a record that decides nothing.
    """

    cubin: bytes
    symbol: str
    parameters: tuple[tuple[str, str], ...]
    grid: tuple[Formula, Formula]
    block: int
    cluster: int
    shared: int
    pdl: bool
    compiled_with: Mapping[str, str]


def sources() -> list[Path]:
    """The files that decide what a kernel is: factories, sizes, and how they are compiled."""
    package = importlib.util.find_spec("mhc_ops.csrc_tilelang")
    folders = package.submodule_search_locations if package else None
    factories = [path for folder in folders or () for path in Path(folder).glob("*.py")]
    return [*sorted(factories), _PACKAGE / "geometry.py", Path(__file__)]


def _arch_number(arch: str) -> int:
    return int(arch.removeprefix("sm_").rstrip("af"))


def program(key: Key) -> Any:
    """The TileLang program of a key, before any lowering."""
    factory = getattr(importlib.import_module(f"mhc_ops.csrc_tilelang.{key.kernel}"), key.kernel)
    options = {name: bool(v) if name in ("norm", "streams") else v for name, v in key.options}
    return factory(key.hidden, pdl=_arch_number(key.arch) >= LEAST_PDL_ARCH, **options)


def pass_configs() -> dict[Any, bool]:
    """What TileLang's compiler is told about every kernel."""
    import tilelang

    flags = tilelang.PassConfigKey
    return {
        # barriers are written out in the kernels: the pass knows nothing of their named ones
        flags.TL_DISABLE_THREAD_STORAGE_SYNC: True,
        # without that pass nothing orders two buffers that share memory: finish and head would
        # write the norm's sums over partial sums that a slower warp still reads
        flags.TL_DISABLE_SHARED_MEMORY_REUSE: True,
        # the kernels guard their own bounds; the pass doubles the address arithmetic
        flags.TL_DISABLE_SAFE_MEMORY_ACCESS: True,
    }


def _formula(expression: Any) -> Formula:
    """An extent of TileLang's as a formula."""
    if isinstance(expression, int):
        return constant(expression)
    kind = type(expression).__name__
    if kind == "Cast":
        return _formula(expression.value)
    if kind == "IntImm":
        return constant(int(expression.value))
    if kind == "Var":
        return size_of(expression.name)
    if kind in _INFIX:
        return apply(_INFIX[kind], _formula(expression.a), _formula(expression.b))
    raise ValueError(f"expected integer arithmetic in the extent of a grid, got {expression}")


def _kind(declaration: str) -> tuple[str, str]:
    """A parameter of the CUDA signature as (name, kind)."""
    *words, last = declaration.replace("__restrict__", " ").split()
    pointer = "*" in declaration
    return last.lstrip("*"), "pointer" if pointer else _KINDS[words[-1]]


def _arguments(program: Any) -> tuple[Argument, ...]:
    def size(extent: Any) -> int | str:
        return str(extent.name) if hasattr(extent, "name") else int(extent)

    found = []
    for var in program.params:
        if var in program.buffer_map:
            buffer = program.buffer_map[var]
            shape = tuple(map(size, buffer.shape))
            found.append(Argument(buffer.name, str(buffer.dtype), shape))
        else:
            found.append(Argument(var.name, str(var.dtype), None))
    return tuple(found)


@contextmanager
def _target(arch: str) -> Iterator[Any]:
    from tilelang import tvm

    target = tvm.target.Target({"kind": "cuda", "arch": arch})
    configs = {getattr(key, "value", key): value for key, value in pass_configs().items()}
    with tvm.transform.PassContext(opt_level=3, config=configs), target:
        yield target


def lower(program: Any, arch: str) -> Lowered:
    """Lower a TileLang program as ``tilelang.compile`` does, up to the CUDA source; needs no nvcc.

    Args:
        program: a TileLang prim_func of one kernel.
        arch: such as ``sm_90a``.

    Raises:
        ValueError: it is no program that the launcher can launch.
    """
    import tilelang

    with _target(arch) as target:
        artifact = tilelang.lower(program, target=target)
    (function,) = artifact.device_mod.functions.values()
    signatures = _SIGNATURE.findall(artifact.kernel_source)
    if len(signatures) != 1:
        raise ValueError(f"expected one kernel in the CUDA source, got {len(signatures)}")
    ((symbol, parameters),) = signatures
    extents = {axis: _formula(extent) for axis, extent in function.attrs["thread_extent"].items()}
    cluster, *others = (int(n) for n in function.attrs.get("cluster_dims", (1, 1, 1)))
    if others != [1, 1]:
        raise ValueError(f"expected clusters along x, got {(cluster, *others)}")
    grid = [extents.get(f"blockIdx.{axis}", constant(1)) for axis in "xyz"]
    block = [evaluate(extents.get(f"threadIdx.{axis}", constant(1)), {}) for axis in "xyz"]
    return Lowered(
        source=artifact.kernel_source,
        symbol=symbol,
        parameters=tuple(map(_kind, parameters.split(","))),
        arguments=_arguments(program),
        grid=(grid[0], grid[1], grid[2]),
        block=(block[0], block[1], block[2]),
        cluster=cluster,
        shared=int(function.attrs.get("dyn_shared_memory_buf", 0)),
        # TileLang sets the attribute for every cluster launch, too
        pdl=cluster > 1 or "cudaGridDependencySynchronize()" in artifact.kernel_source,
    )


def _nvcc() -> str | None:
    from tilelang.contrib.nvcc import get_nvcc_compiler

    try:
        return shutil.which(get_nvcc_compiler())
    except RuntimeError:
        return None


def _nvcc_version() -> str:
    try:
        said = subprocess.run([_nvcc() or "nvcc", "--version"], capture_output=True, text=True)
    except OSError:
        return "unknown"
    found = re.search(r"\bV(\d[\d.]*)", said.stdout)
    return found[1] if found else "unknown"


def _compile(key: Key) -> Compiled:
    from tilelang.cuda.backend import tilelang_callback_cuda_compile

    lowered = lower(program(key), key.arch)
    if lowered.block[1:] != (1, 1) or str(lowered.grid[2]) != "1":
        raise ValueError(f"expected blocks along x and a grid of two dimensions of {key}")
    with _target(key.arch) as target:
        cubin = tilelang_callback_cuda_compile(lowered.source, target, pass_configs())
    return Compiled(
        bytes(cubin),
        lowered.symbol,
        lowered.parameters,
        lowered.grid[:2],
        lowered.block[0],
        lowered.cluster,
        lowered.shared,
        lowered.pdl,
        {"tilelang": importlib.metadata.version("tilelang"), "nvcc": _nvcc_version()},
    )


def describe(key: Key) -> str:
    """A kernel in words, for messages."""
    return f"kernel {key.kernel} for hidden size {key.hidden} on {key.arch}"


def build_commands(key: Key) -> str:
    """What a user types to have a kernel built ahead and used."""
    return (
        f"python -m mhc_ops build --arch {key.arch} --hidden {key.hidden} -o DIR, "
        "then MHC_OPS_KERNELS=DIR"
    )


def _advice(error: BaseException) -> str:
    """What helps against a failed compile, by what went wrong first."""
    full = disk.advice(error)
    if full is not None:
        return full
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.filename is not None:
            return "let TILELANG_CACHE_DIR name a folder that this process can write"
        cause = cause.__cause__ or cause.__context__
    found = _nvcc()
    if found is None:
        return "there is no nvcc: install the CUDA toolkit and let CUDA_HOME name it"
    nvcc = f"nvcc is {found}; TILELANG_VERBOSE=1 shows what it says"
    return disk.advice(error, suspected=True) or nvcc


def _failure(key: Key, reason: str, advice: str) -> RuntimeError:
    return RuntimeError(
        f"mhc: {describe(key)} cannot be compiled: {reason}\n"
        f"{advice}; or build it on another machine: {build_commands(key)}"
    )


def _require_tilelang(key: Key) -> None:
    advice = f"install it (pip install tilelang=={TILELANG})"
    try:
        installed = importlib.metadata.version("tilelang")
    except importlib.metadata.PackageNotFoundError:
        raise _failure(key, "TileLang is not installed", advice) from None
    if installed != TILELANG:
        reason = f"it is written for TileLang {TILELANG}, and {installed} is installed"
        raise _failure(key, reason, f"{advice}, in an environment of its own where another is used")


def compile_kernel(key: Key) -> Compiled:
    """Compile a kernel with TileLang and nvcc; needs no GPU.

    Args:
        key: what to compile, for whichever architecture it names.

    Returns:
        The cubin, and what a launch has to know of it.

    Raises:
        RuntimeError: it cannot be compiled, with the reason and what to do.
    """
    _require_tilelang(key)
    try:
        import tilelang  # noqa: F401  (makes its cache folder)
    except OSError as error:
        raise _failure(key, f"{type(error).__name__}: {error}", _advice(error)) from error
    try:
        return _compile(key)
    except Exception as error:
        _, mark, said = str(error).rpartition("\nCompilation error:\n")
        if mark:  # TileLang puts the whole CUDA source before what nvcc says.
            error.args = (said.strip(),)
        raise _failure(key, f"{type(error).__name__}: {error}", _advice(error)) from error

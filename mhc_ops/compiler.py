"""Compile a kernel: the one module that talks to TileLang and nvcc.

A kernel is named by a :class:`~mhc_ops.routes.Key`. Three steps lead from the key to machine code:

1. :func:`program` calls the kernel's factory in ``csrc_tilelang``, which returns a program in
   TileLang's language, made for one hidden size and one set of options.
2. :func:`lower` has TileLang turn the program into CUDA source, and reads off what a launch has to
   know: the parameters, the grid as a formula of the scalars, threads, shared memory. The tests run
   that source on a CPU, and ``benchmarks/same_cuda.py`` compares it between revisions.
3. :func:`machine_code` has nvcc turn the source into a cubin for one architecture.

:func:`compile_kernel` does all three and puts reason and advice into one error where a step fails.
The result, :class:`Compiled`, holds all that running the kernel needs: neither TileLang nor nvcc is
needed where a kernel was compiled before. Importing TileLang takes seconds, so TileLang is imported
at the first compile and not with this module.
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

TILELANG = "0.1.15"  # Other versions compile few of the kernels.
LEAST_PDL_ARCH = 90  # Programmatic dependent launch exists from Hopper on.

_FLAGS = ("norm", "streams", "loop")  # options that are true or false
_PACKAGE = Path(__file__).parent
_SIGNATURE = re.compile(r'extern "C" __global__ void __launch_bounds__\(.*?\) (\w+)\((.*?)\) \{')
# The kinds of scalars, by their type in CUDA.
_KINDS = {"int": "int32", "int64_t": "int64", "float": "float32"}
_INFIX = {"Add": "+", "Sub": "-", "Mul": "*", "FloorDiv": "//", "FloorMod": "%"}
_INFIX |= {"Min": "min", "Max": "max"}


class Argument(NamedTuple):
    """Describe an argument of a TileLang program.

    Attributes:
        name: the argument's name in the program and in the CUDA source.
        dtype: TileLang's name of the type.
        shape: numbers and names of sizes; None for a scalar.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...] | None


class Lowered(NamedTuple):
    """Hold a program as nvcc and the launch need it.

    Attributes:
        source: the CUDA source.
        symbol: the kernel's name in the source.
        parameters: name and kind of each parameter, in the order of the CUDA signature; the kind is
            ``pointer``, ``int32``, ``int64`` or ``float32``. Arguments that the kernel does not use
            are no parameters.
        arguments: the arguments, in the order of the program.
        grid: CTAs along x, y and z, as formulas of the scalars.
        block: threads along x, y and z.
        cluster: CTAs of a cluster, along x.
        shared: bytes of dynamic shared memory.
        pdl: whether the kernel is launched with programmatic stream serialisation.
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
    """Hold a kernel that can be loaded and launched: its cubin, and what its manifest says.

    Attributes:
        cubin: machine code for one architecture.
        symbol: the kernel's name in the cubin.
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


def sources() -> dict[str, Path]:
    """List the files that decide what a kernel is.

    Returns:
        Name in the package to file: kernels, their steps and device functions, sizes, and this
        module.
    """
    package = importlib.util.find_spec("mhc_ops.csrc_tilelang")
    folders = package.submodule_search_locations if package else None
    found = {
        path.relative_to(folder).as_posix(): path
        for folder in map(Path, folders or ())
        for pattern in ("**/*.py", "**/*.cuh")
        for path in folder.glob(pattern)
    }
    kernels = {f"csrc_tilelang/{name}": found[name] for name in sorted(found)}
    return kernels | {"geometry.py": _PACKAGE / "geometry.py", "compiler.py": Path(__file__)}


def _arch_number(arch: str) -> int:
    return int(arch.removeprefix("sm_").rstrip("af"))


def program(key: Key) -> Any:
    """Make the TileLang program of a key."""
    factory = getattr(importlib.import_module(f"mhc_ops.csrc_tilelang.{key.kernel}"), key.kernel)
    options = {name: bool(v) if name in _FLAGS else v for name, v in key.options}
    return factory(key.hidden, pdl=_arch_number(key.arch) >= LEAST_PDL_ARCH, **options)


def pass_configs() -> dict[Any, bool]:
    """Return what TileLang's compiler is told about every kernel."""
    import tilelang

    flags = tilelang.PassConfigKey
    return {
        # Barriers are written out in the kernels: the pass knows nothing of named barriers.
        flags.TL_DISABLE_THREAD_STORAGE_SYNC: True,
        # Without that pass nothing orders two buffers that share memory: finish and head would
        # write the norm's sums over partial sums that a slower warp still reads.
        flags.TL_DISABLE_SHARED_MEMORY_REUSE: True,
        # The kernels guard their own bounds; the pass doubles the address arithmetic.
        flags.TL_DISABLE_SAFE_MEMORY_ACCESS: True,
    }


def _formula(expression: Any) -> Formula:
    """Turn an extent of TileLang's into a formula."""
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
    """Return name and kind of a parameter of the CUDA signature."""
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
        arch: architecture, such as ``sm_90a``.

    Returns:
        The source, and what a launch has to know.

    Raises:
        ValueError: the launcher cannot launch such a program.
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
        # TileLang sets the attribute for every launch in clusters, too.
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


def machine_code(source: str, arch: str) -> bytes:
    """Compile CUDA source that :func:`lower` made, unless TileLang's cache has its cubin.

    Args:
        source: the CUDA source.
        arch: architecture, such as ``sm_90a``.

    Returns:
        The cubin.
    """
    from tilelang.cuda.backend import tilelang_callback_cuda_compile

    with _target(arch) as target:
        return bytes(tilelang_callback_cuda_compile(source, target, pass_configs()))


def _compile(key: Key) -> Compiled:
    lowered = lower(program(key), key.arch)
    if lowered.block[1:] != (1, 1) or str(lowered.grid[2]) != "1":
        raise ValueError(f"expected blocks along x and a grid of two dimensions of {key}")
    return Compiled(
        machine_code(lowered.source, key.arch),
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
    """Describe a kernel in words, for messages."""
    return f"kernel {key.kernel} for hidden size {key.hidden} on {key.arch}"


def build_commands(key: Key) -> str:
    """Return what a user types to have a kernel built ahead and used."""
    return (
        f"python -m mhc_ops build --arch {key.arch} --hidden {key.hidden} -o DIR, "
        "then MHC_OPS_KERNELS=DIR"
    )


def _advice(error: BaseException) -> str:
    """Say what helps against a failed compile, by what went wrong first."""
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
        RuntimeError: the kernel cannot be compiled; the text says why, and what to do.
    """
    _require_tilelang(key)
    try:
        import tilelang  # noqa: F401  (The import makes TileLang's cache folder.)
    except OSError as error:
        raise _failure(key, f"{type(error).__name__}: {error}", _advice(error)) from error
    try:
        return _compile(key)
    except Exception as error:
        _, mark, said = str(error).rpartition("\nCompilation error:\n")
        if mark:  # TileLang puts the whole CUDA source before what nvcc says.
            error.args = (said.strip(),)
        raise _failure(key, f"{type(error).__name__}: {error}", _advice(error)) from error

"""Build and load the short way of eager calls, and give it plans and the table of early reading.

The head of ``host.cpp`` says what the short way does and how a call gets there; the headers beside
that file are its parts. Where the library was not built ahead with the kernels, the host's C++
compiler builds the library when the first kernel is loaded, and the result is kept beside the
kernels in the cache folder. Where there is no compiler, every call takes the long way instead.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import disk, formula, jit
from .._arguments import MIX, Recipe, TensorSpec, recipe
from .._library import SCHEMAS
from ..formula import Formula
from . import early, launcher, library, torches
from .plan import Plan, Range, Step

logger = logging.getLogger("mhc_ops")

SOURCE = Path(__file__).with_name("host.cpp")
FLAGS = (
    *("-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden"),
    "-D_GLIBCXX_USE_CXX11_ABI=1",  # Every torch since 2.7 has this ABI.
)

# plan.h gives these numbers to the kinds of arguments and to the sources of a kernel's parameters.
_TENSOR, _FLOAT, _INT, _NONE = range(4)
_ARGUMENT, _OUTPUT, _MEMORY, _FLOAT32, _INT32, _FORMULA32, _FORMULA64, _EARLY = range(8)
_STACK = 32  # plan.h has room for so many numbers of a formula at a time.

_Place = tuple[str, torch.device, int, bool]

_lock = threading.Lock()
_tried = False
_library: ctypes.CDLL | None = None
_ops: dict[str, int] = {}
_remembered: dict[_Place, tuple[int | None, ...]] = {}


class Reads(Protocol):
    """Hold what was read: :class:`mhc_ops.native.early.Table` does, or the library's table."""

    def look(self, fn: Tensor, capture: Callable[[], int]) -> tuple[bool, Any]: ...

    def add(self, read: Any) -> None: ...

    def __len__(self) -> int: ...


class _Read(ctypes.Structure):
    _fields_ = (
        ("version", ctypes.c_uint32),
        ("data", ctypes.c_void_p),
        ("capture", ctypes.c_uint64),
    )


class _NativeReads:
    """Look into the library's table, which the short way uses too."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self._library = loaded

    def look(self, fn: Tensor, capture: Callable[[], int]) -> tuple[bool, Any]:
        news, read = ctypes.c_int32(), _Read()
        allowed = self._library.mhc_early_look(
            fn._cdata, capture(), ctypes.byref(news), ctypes.byref(read)
        )
        return bool(allowed), (fn, read) if news.value else None

    def add(self, read: tuple[Tensor, _Read]) -> None:
        self._library.mhc_early_add(read[0]._cdata, ctypes.byref(read[1]))

    def __len__(self) -> int:
        size: int = self._library.mhc_early_size()
        return size


_reads: Reads = early.Table()


def source() -> str:
    """Return a digest of the library's sources."""
    texts = hashlib.sha256()
    for path in (SOURCE, *sorted(SOURCE.parent.glob("*.h"))):
        texts.update(f"{path.name}\0{path.read_text()}\0".encode())
    return texts.hexdigest()[:16]


def name(of: torches.Torch) -> str:
    """Return the stem of the library's files beside kernels built ahead, as in host-torch2.14."""
    return f"host-torch{of.series}"


def built_with(of: torches.Torch) -> dict[str, str]:
    """Return what the library depends on, which names no Python: it uses the stable interface."""
    return {
        **of.facts,
        "machine": platform.machine(),
        "flags": " ".join(FLAGS),
        "source": source(),
    }


def command(of: torches.Torch) -> list[str]:
    """Return the compiler's command line.

    The libraries that the line names are loaded before the result is, so the result holds no path
    to them.
    """
    return [
        *shlex.split(os.environ.get("CXX", "g++")),
        *FLAGS,
        f'-DMHC_SOURCE="{source()}"',
        # The library then holds no path of the machine that it was built on.
        f"-ffile-prefix-map={of.home / 'include'}=torch",
        f"-ffile-prefix-map={SOURCE.parent}=mhc_ops/native",
        f"-I{of.home / 'include'}",
        str(SOURCE),
        f"-L{of.home / 'lib'}",
        *("-ltorch_cpu", "-lc10"),
    ]


def build(folder: Path, of: torches.Torch) -> None:
    """Build the library into a folder, where it is not there yet.

    Args:
        folder: where to put the library.
        of: the torch that the library is for.

    Raises:
        OSError, subprocess.SubprocessError: the library cannot be built or written.
    """
    library.build(folder, name(of), built_with(of), command(of))


def _load() -> ctypes.CDLL:
    of = torches.here()
    loaded = ctypes.CDLL(str(library.obtain(name(of), built_with(of), command(of))))
    words = ctypes.POINTER(ctypes.c_int64)
    number = ctypes.c_int64
    loaded.mhc_use_launcher.argtypes = (ctypes.c_void_p,) * 3
    loaded.mhc_use_launcher.restype = None
    loaded.mhc_define.argtypes = (ctypes.c_char_p, number, number, number, number)
    loaded.mhc_define.restype = number
    loaded.mhc_remember.argtypes = (
        *(number, ctypes.c_int32, ctypes.c_int32, number, ctypes.c_int32, words),
    )
    loaded.mhc_remember.restype = None
    loaded.mhc_forget.restype = None
    loaded.mhc_calls.restype = number
    loaded.mhc_early_look.argtypes = (
        *(ctypes.c_void_p, ctypes.c_uint64, ctypes.POINTER(ctypes.c_int32), ctypes.c_void_p),
    )
    loaded.mhc_early_add.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    loaded.mhc_early_add.restype = None
    loaded.mhc_early_size.restype = number
    return loaded


def use_launcher(loaded: ctypes.CDLL, kernels: ctypes.CDLL) -> None:
    """Give the library the addresses of the launcher's functions."""
    functions = (kernels.mhc_launch, kernels.mhc_capture, kernels.mhc_explain_launch)
    loaded.mhc_use_launcher(*(ctypes.cast(f, ctypes.c_void_p) for f in functions))


def shown(of: Recipe) -> tuple[int, int, int, int]:
    """Return where a call of an op shows which plan serves the call.

    Returns:
        (number of arguments, index of the streams, number of the streams' dimensions behind those
        of the tokens, index of ``norm_weight`` or -1).
    """
    names = list(of.arguments)
    norm_weight = names.index("norm_weight") if "norm_weight" in names else -1
    return len(names), names.index(of.streams), len(of.tensors[of.streams].tail), norm_weight


def _define(loaded: ctypes.CDLL, of: Recipe) -> int:
    number: int = loaded.mhc_define(of.op.encode(), *shown(of))
    if number < 0:
        raise RuntimeError(f"mhc::{of.op} has more arguments than host.cpp has room for")
    return number


def load() -> bool:
    """Load the library, and build it first where it is missing; its calls take the short way.

    One try is made in a process. A failure is logged, and every call takes the long way then.

    Returns:
        Whether the library is there.
    """
    global _library, _tried, _reads
    if _tried:
        return _library is not None
    with _lock:
        if not _tried:
            try:
                kernels = launcher.get()
                loaded = _load()
                use_launcher(loaded, kernels)
                _ops.update((op, _define(loaded, recipe(op))) for op in SCHEMAS)
                _library, _reads = loaded, _NativeReads(loaded)
            except (OSError, RuntimeError, subprocess.SubprocessError) as error:
                room = disk.advice(error)
                logger.warning(
                    "no short way of eager calls, which take longer on the host: %s%s",
                    library.reason(error),
                    f"; {room}" if room else "",
                )
            _tried = True
        return _library is not None


def early_reads() -> Reads:
    """Return the table of what was read, which both ways of a call use."""
    return _reads


# --------------------------------------------------------- These functions write what plan.h reads.


def _list(items: Sequence[list[int]]) -> list[int]:
    return [len(items), *(word for item in items for word in item)]


def _formula(value: Formula) -> list[int]:
    if formula.depth(value) > _STACK:
        raise ValueError(f"expected a formula that needs a stack of {_STACK}, got {value}")
    code = formula.code(value)
    return [len(code), *code]


def _dtype(dtype: torch.dtype) -> int:
    return int(dtype == MIX)


def _argument(of: Plan, name: str) -> list[int]:
    spec = of.recipe.arguments[name]
    if name in ("norm_weight", "norm_eps") and not of.norm:
        return [_NONE]
    if isinstance(spec, TensorSpec):
        tail = of.sizes.tail(spec)
        flags = (spec.per_token, spec.rows, spec.may_drop_last)
        return [_TENSOR, _dtype(spec.dtypes[0]), *map(int, flags), len(tail), *tail]
    if spec.integer:
        return [_INT, int(spec.least), int(spec.most)]
    return [_FLOAT, int(spec.least == 0)]


def _parameter(of: Plan, served: Range, step: Step, name: str, kind: str) -> list[int]:
    arguments, outputs = list(of.recipe.arguments), list(of.recipe.outputs)
    source = step.source(name)
    if name == "early":
        return [_EARLY, arguments.index("fn")]
    if name in step.scalars:
        source_kind = _FORMULA64 if kind == "int64" else _FORMULA32
        return [source_kind, *_formula(step.scalars[name])]
    if source in arguments:
        kinds = {"pointer": _ARGUMENT, "float32": _FLOAT32, "int32": _INT32}
        return [kinds[kind], arguments.index(source)]
    if source in outputs:
        return [_OUTPUT, outputs.index(source)]
    return [_MEMORY, list(served.memory).index(source)]


def _step(of: Plan, served: Range, step: Step, kernel: launcher.Kernel) -> list[int]:
    parameters = [
        _parameter(of, served, step, name, kind) for name, kind in kernel.compiled.parameters
    ]
    grid = [formula.given(extent, step.scalars) for extent in kernel.compiled.grid]
    return [
        kernel.handle,
        *_list(parameters),
        *(word for extent in grid for word in _formula(extent)),
    ]


def _range(of: Plan, served: Range, kernels: Sequence[launcher.Kernel | None]) -> list[int]:
    memory = [
        [_dtype(needed.dtype), *_list([_formula(size) for size in needed.shape])]
        for needed in served.memory.values()
    ]
    steps = [
        _step(of, served, step, kernel)
        for step, kernel in zip(served.steps, kernels, strict=True)
        if kernel is not None
    ]
    ready = len(steps) == len(served.steps)
    most = -1 if served.max_tokens is None else served.max_tokens
    return [most, *_list(memory), *_list(steps if ready else [])]


def words(of: Plan, kernels: Sequence[Sequence[launcher.Kernel | None]]) -> list[int]:
    """Return a plan as the numbers that plan.h reads.

    Args:
        of: the plan.
        kernels: for each range of the plan the kernels of the range's launches, None where a
            kernel is not loaded.
    """
    arguments = [_argument(of, name) for name in of.recipe.arguments]
    outputs = [
        [_dtype(spec.dtypes[0]), len(spec.tail), *of.sizes.tail(spec)]
        for spec in of.recipe.outputs.values()
    ]
    ranges = [_range(of, r, loaded) for r, loaded in zip(of.ranges, kernels, strict=True)]
    return [*_list(arguments), *_list(outputs), *_list(ranges)]


def remember(of: Plan, device: torch.device) -> None:
    """Let calls that this plan can serve with the loaded kernels take the short way from now on.

    Args:
        of: the plan.
        device: where the plan's kernels are loaded; a GPU with its index.
    """
    if _library is None:
        return
    kernels = [
        [jit.loaded_already(step.key, device) for step in served.steps] for served in of.ranges
    ]
    handles = tuple(None if k is None else k.handle for loaded in kernels for k in loaded)
    place = (of.recipe.op, device, of.sizes.hidden, of.norm)
    with _lock:
        if _remembered.get(place) == handles:
            return
        _remembered[place] = handles
        written = words(of, kernels)
        _library.mhc_remember(
            _ops[of.recipe.op],
            device.type == "cuda",
            -1 if device.index is None else device.index,
            of.sizes.hidden,
            of.norm,
            (ctypes.c_int64 * len(written))(*written),
        )


def forget() -> None:
    """Forget all plans: an op's calls take the long way until one of them has been served."""
    if _library is not None:
        with _lock:
            _remembered.clear()
            _library.mhc_forget()


def calls() -> int:
    """Return how many calls took the short way in this process."""
    return 0 if _library is None else _library.mhc_calls()

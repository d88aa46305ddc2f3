"""Run kernels without a GPU: a stand-in for the CUDA driver, with the reference as its kernels.

The launcher opens ``fake_cuda.c`` instead of the driver, and a launch calls back into
:class:`FakeDriver`, which looks at the arguments as a kernel would, keeps them, and works on the
memory that they point to. So a call on CPU tensors goes through the launcher, by the short way or
the long way, as one on a GPU does.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mhc_ops import compiler, formula, geometry, jit, reference, routes, support
from mhc_ops.native import host, launcher, serve
from mhc_ops.native.plan import Plan, plan

SOURCE = Path(__file__).with_name("fake_cuda.c")
ARCH, SMS = "sm_90a", 132
CPU = torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32

_POST = ("x", "residual", "post_layer_mix", "comb_res_mix")
_MIXING = ("fn", "hc_scale", "hc_base")
_MIXES = ("post_mix", "comb_mix", "layer_input")
_PRE_NUMBERS = ("hc_pre_eps", "hc_sinkhorn_eps", "hc_post_mult_value", "rms_eps")
_HEAD_NUMBERS = ("hc_eps", "rms_eps")

# A kernel leads to (pointers, floats, 32-bit integers) of its signature, which test_launcher.py
# compares with that of the real kernel. ``tokens`` comes besides, with 64 bits where the kernel has
# 64.
SIGNATURES: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "post": ((*_POST, "residual_out"), (), ()),
    "expand": (("x", "residual_out"), (), ()),
    "pre": (
        ("residual", *_MIXING, *_MIXES),
        _PRE_NUMBERS,
        ("early", "group_tokens", "larger_groups", "sinkhorn_repeat"),
    ),
    "fused_post_pre": (
        (*_POST, *_MIXING, "residual_out", *_MIXES),
        _PRE_NUMBERS,
        ("early", "group_tokens", "sinkhorn_repeat"),
    ),
    "fused_post_pre_persistent": (
        (*_POST, *_MIXING, "residual_out", *_MIXES),
        _PRE_NUMBERS,
        ("early", "group_tokens", "larger_groups", "sinkhorn_repeat"),
    ),
    "expand_pre": (
        ("x", *_MIXING, "residual_out", *_MIXES),
        _PRE_NUMBERS,
        ("group_tokens", "sinkhorn_repeat"),
    ),
    "projection": (("residual", "fn", "partials"), (), ("blocks_per_split", "splits")),
    "post_projection": ((*_POST, "fn", "residual_out", "partials"), (), ("tiles",)),
    "finish": (
        ("residual", "partials", "hc_scale", "hc_base", *_MIXES),
        _PRE_NUMBERS,
        ("sinkhorn_repeat", "splits"),
    ),
    "head": (
        ("residual", "partials", "hc_scale", "hc_base", "out"),
        _HEAD_NUMBERS,
        ("splits",),
    ),
    "post_head": ((*_POST, *_MIXING, "out"), _HEAD_NUMBERS, ("clusters", "unit")),
}
CLUSTERED = ("pre", "fused_post_pre", "fused_post_pre_persistent", "expand_pre", "post_head")


def signature(key: routes.Key) -> tuple[tuple[str, str], ...]:
    """Return the parameters of a kernel: pointers by name, then numbers by name."""
    options = dict(key.options)
    pointers, floats, integers = SIGNATURES[key.kernel]
    if options.get("streams"):
        pointers = (*pointers, "residual_out")
    if options.get("norm"):
        pointers, floats = (*pointers, "norm_weight"), (*floats, "norm_eps")
    numbers = dict.fromkeys(floats, "float32") | dict.fromkeys(integers, "int32")
    numbers["tokens"] = "int32"
    return (*((name, "pointer") for name in sorted(pointers)), *sorted(numbers.items()))


def compiled(key: routes.Key) -> compiler.Compiled:
    """Make a kernel that the stand-in for the driver loads."""
    name = "-".join(map(str, (key.kernel, key.hidden, *(v for _, v in key.options))))
    cluster = 16 if key.kernel.startswith(CLUSTERED) else 1
    grid = {
        "post_head": formula.name("clusters") * 16,
        "projection": formula.name("splits"),
    }.get(key.kernel, formula.name("tokens") * cluster)
    return compiler.Compiled(
        cubin=f"{name}\0".encode(),
        symbol=name,
        parameters=signature(key),
        grid=(grid, formula.constant(1)),
        block=256,
        cluster=cluster,
        shared=1000 if cluster > 1 else 0,
        pdl=True,
        compiled_with={},
    )


class Launch(NamedTuple):
    """Hold a launch as the driver was asked for it.

    Attributes:
        key: the kernel.
        device: index of the device whose context was current.
        grid, block, cluster, shared, pdl, stream: its configuration.
        arguments: parameter to number, or to a tensor over the memory that a pointer points to.
    """

    key: routes.Key
    device: int
    grid: tuple[int, int]
    block: int
    cluster: int
    shared: int
    pdl: int
    stream: int | None
    arguments: dict[str, Any]


def _shape(
    key: routes.Key, name: str, numbers: dict[str, Any]
) -> tuple[torch.dtype, tuple[int, ...]]:
    tokens, hidden, n = numbers["tokens"], key.hidden, geometry.HC_MULT
    rows = dict(key.options).get("rows", n if "head" in key.kernel else geometry.MIXES)
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "x": (BF16, (tokens, hidden)),
        "out": (BF16, (tokens, hidden)),
        "layer_input": (BF16, (tokens, hidden)),
        "residual": (BF16, (tokens, n, hidden)),
        "residual_out": (BF16, (tokens, n, hidden)),
        "post_layer_mix": (FP32, (tokens, n, 1)),
        "post_mix": (FP32, (tokens, n, 1)),
        "comb_res_mix": (FP32, (tokens, n, n)),
        "comb_mix": (FP32, (tokens, n, n)),
        "fn": (FP32, (rows, n * hidden)),
        "hc_scale": (FP32, (1 if "head" in key.kernel else 3,)),
        "hc_base": (FP32, (rows,)),
        "norm_weight": (BF16, (hidden,)),
        "partials": (
            FP32,
            (
                numbers.get("splits", hidden // geometry.POST_PROJECTION_SLICE),
                tokens,
                geometry.PARTIAL_WIDTH,
            ),
        ),
    }
    return shapes[name]


def _tensor(address: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Return the memory at an address as a tensor."""
    size = math.prod(shape) * dtype.itemsize
    memory = (ctypes.c_byte * size).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def work(launch: Launch) -> None:
    """Do what the kernel does, by the reference."""
    a = launch.arguments
    kernel = launch.key.kernel
    norm = {name: a[name] for name in ("norm_weight", "norm_eps") if name in a}
    mixing = [a[name] for name in ("hc_pre_eps", "hc_sinkhorn_eps") if name in a]
    if kernel in ("projection", "post_projection"):
        a["partials"].fill_(7)
    if kernel in ("finish", "head"):
        assert (a["partials"] == 7).all(), "the projection has not been made"
        return  # The outputs take fn, which these kernels do not get.
    streams = a.get("residual")
    if "post" in kernel:
        streams = reference.post(*(a[name] for name in _POST)).contiguous()
    elif "expand" in kernel:
        streams = reference.expand(a["x"], geometry.HC_MULT)
    if "residual_out" in a:
        a["residual_out"].copy_(streams)
    weights = [a[name] for name in _MIXING if name in a]
    if "layer_input" in a:
        outputs = reference.pre(
            streams, *weights, a["rms_eps"], *mixing, a["hc_post_mult_value"],
            a["sinkhorn_repeat"], **norm,
        )  # fmt: skip
        for name, value in zip(_MIXES, outputs, strict=True):
            a[name].copy_(value)
    elif "out" in a:
        a["out"].copy_(reference.head(streams, *weights, a["rms_eps"], a["hc_eps"], **norm))


_CALLBACK = ctypes.CFUNCTYPE(
    *(ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint),
    *(ctypes.c_uint, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p),
    ctypes.POINTER(ctypes.c_void_p),
)
_CTYPES = {
    "pointer": ctypes.c_void_p,
    "int32": ctypes.c_int32,
    "int64": ctypes.c_int64,
    "float32": ctypes.c_float,
}


def build_driver(folder: Path) -> Path:
    """Build the stand-in as a library."""
    target = folder / "libfake_cuda.so"
    command = ["cc", "-O1", "-shared", "-fPIC", str(SOURCE), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


class Listener:
    """Keep what a driver is asked to launch.

    Args:
        path: the driver.

    Attributes:
        launches: what it was asked to launch.
        run: called with each of them; what it returns, if not None, is the driver's result.
        library: the driver.
        keys: symbol to kernel.
    """

    def __init__(self, path: Path) -> None:
        self.launches: list[Launch] = []
        self.run: Callable[[Launch], int | None] = work
        self.keys: dict[str, routes.Key] = {}
        self.library = ctypes.CDLL(str(path))
        self.library.fake_capture.argtypes = (ctypes.c_uint64,)
        self._callback = _CALLBACK(self._launch)  # The attribute keeps the callback alive.
        self.library.fake_callback(self._callback)

    def _launch(self, name: bytes, device: int, *rest: Any) -> int:
        *config, stream, addresses = rest
        grid_x, grid_y, block, cluster, shared, pdl = config
        key = self.keys[name.decode()]
        raw = {
            parameter: (kind, _CTYPES[kind].from_address(addresses[i]).value)
            for i, (parameter, kind) in enumerate(signature(key))
        }
        numbers = {n: value for n, (kind, value) in raw.items() if kind != "pointer"}
        arguments = {
            n: _tensor(value, *_shape(key, n, numbers)) if kind == "pointer" else value
            for n, (kind, value) in raw.items()
        }
        grid = (grid_x, grid_y)
        launch = Launch(key, device, grid, block, cluster, shared, pdl, stream, arguments)
        self.launches.append(launch)
        return self.run(launch) or 0


class FakeDriver(Listener):
    """Open a driver that keeps every launch, with a launcher of its own.

    Args:
        folder: where it builds.

    Attributes:
        launcher: the launcher.
    """

    def __init__(self, folder: Path) -> None:
        path = build_driver(folder)
        super().__init__(path)
        # A copy is loaded, as the launcher that is loaded already may have opened the real driver.
        copy = folder / "launcher_of_its_own.so"
        shutil.copy(str(launcher.get()._name), copy)
        self.launcher = launcher.declare(ctypes.CDLL(str(copy)))
        assert self.launcher.mhc_open(str(path).encode()) == 0

    def reset(self) -> None:
        """Put the driver back as it was at first, but for the kernels that are loaded."""
        self.launches.clear()
        self.run = work
        self.library.fake_capture(0)

    def load(self, key: routes.Key, device: int = 0) -> launcher.Kernel:
        """Load a kernel with the launcher of this driver, which must be in use."""
        kernel = compiled(key)
        self.keys[kernel.symbol] = key
        return launcher.load(compiler.describe(key), kernel, device)

    def plan(self, op: str, hidden: int, norm: bool, arch: str = ARCH) -> Plan:
        """Make the plan of an op on this device."""
        return plan(op, hidden, arch, SMS, norm)


def install(monkeypatch: Any, driver: FakeDriver) -> None:
    """Serve CPU tensors with this driver as if on a GPU, by the short and by the long way."""
    loaded: dict[tuple[routes.Key, torch.device], launcher.Kernel] = {}

    def load(key: routes.Key, device: torch.device) -> launcher.Kernel:
        if (key, device) not in loaded:
            loaded[key, device] = driver.load(key)
        return loaded[key, device]

    monkeypatch.setattr(launcher, "_library", driver.launcher)
    monkeypatch.setattr(jit, "loaded", load)
    monkeypatch.setattr(jit, "loaded_already", lambda key, device: loaded.get((key, device)))
    monkeypatch.setattr(support, "arch", lambda device: ARCH)
    monkeypatch.setattr(support, "sm_count", lambda device: SMS)
    monkeypatch.setattr(support, "require", lambda op, device: None)
    monkeypatch.setattr(serve, "current_stream", lambda device: 0)
    host.load()
    host.forget()
    if host._library is not None:
        host.use_launcher(host._library, driver.launcher)


def restore() -> None:
    """Have the short way use the launcher of the process again."""
    host.forget()
    if host._library is not None:
        host.use_launcher(host._library, launcher.get())

"""Load cubins on a device and launch them, through ``launcher.c``."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import disk
from ..compiler import Compiled
from . import library

NAME = "launcher"  # the library has this stem beside the kernels that are built ahead
SOURCE = Path(__file__).with_name("launcher.c")
FLAGS = ("-std=c11", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread")
DRIVER = "libcuda.so.1"

_MESSAGE_BYTES = 1024
_CTYPES: dict[str, Any] = {
    "pointer": ctypes.c_void_p,
    "int32": ctypes.c_int32,
    "int64": ctypes.c_int64,
    "float32": ctypes.c_float,
}

_lock = threading.Lock()
_library: ctypes.CDLL | None = None


@dataclass(frozen=True)
class Kernel:
    """Hold a kernel that is loaded on a device, and stays loaded as long as the process lives.

    Attributes:
        handle: address of the kernel in launcher.c.
        compiled: the compiled kernel.
    """

    handle: int
    compiled: Compiled

    def takes(self, parameter: str) -> bool:
        """Say whether the kernel has a parameter of this name."""
        return any(name == parameter for name, _ in self.compiled.parameters)


def built_with() -> dict[str, str]:
    """Return what the launcher depends on: its source, flags and machine, but no version."""
    return {
        "machine": platform.machine(),
        "flags": " ".join(FLAGS),
        "source": hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16],
    }


def command() -> list[str]:
    """Return the compiler's command line."""
    return [*shlex.split(os.environ.get("CC", "cc")), *FLAGS, str(SOURCE), "-ldl"]


def build(folder: Path) -> None:
    """Build the launcher into a folder that does not have it yet.

    Args:
        folder: where to put the launcher.

    Raises:
        OSError, subprocess.SubprocessError: the launcher cannot be built or written.
    """
    library.build(folder, NAME, built_with(), command())


def declare(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes the types of the launcher's functions, and return the library."""
    loaded.mhc_open.argtypes = (ctypes.c_char_p,)
    loaded.mhc_load.argtypes = (
        *(ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p),
        *(ctypes.c_uint, ctypes.c_uint, ctypes.c_uint, ctypes.c_int),
        ctypes.POINTER(ctypes.c_void_p),
    )
    loaded.mhc_launch.argtypes = (
        *(ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p),
        ctypes.POINTER(ctypes.c_void_p),
    )
    loaded.mhc_capture.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    loaded.mhc_capture.restype = ctypes.c_uint64
    loaded.mhc_explain.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t)
    loaded.mhc_explain.restype = None
    loaded.mhc_explain_launch.argtypes = (
        *(ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_int),
        *(ctypes.c_char_p, ctypes.c_size_t),
    )
    loaded.mhc_explain_launch.restype = None
    return loaded


def get() -> ctypes.CDLL:
    """Return the library; the first call loads it, and builds it where it is not built yet.

    Raises:
        RuntimeError: the library cannot be built; the message says what to do.
    """
    global _library
    with _lock:
        if _library is None:
            try:
                _library = declare(ctypes.CDLL(str(library.obtain(NAME, built_with(), command()))))
            except (OSError, subprocess.SubprocessError) as error:
                advice = disk.advice(error) or "install a C compiler, or let CC name one"
                raise RuntimeError(
                    f"mhc: the launcher of kernels cannot be built: {library.reason(error)}\n"
                    f"{advice}; or build it on another machine: "
                    "python -m mhc_ops build --arch ARCH -o DIR, then MHC_OPS_KERNELS=DIR"
                ) from error
        return _library


def _explain(result: int) -> str:
    text = ctypes.create_string_buffer(_MESSAGE_BYTES)
    get().mhc_explain(result, text, len(text))
    return text.value.decode(errors="replace")


def load(name: str, compiled: Compiled, device_index: int) -> Kernel:
    """Load a kernel in the primary context of a device.

    Args:
        name: name of the kernel, for messages.
        compiled: the compiled kernel.
        device_index: index of a CUDA device.

    Raises:
        RuntimeError: there is no driver, or the driver refuses the kernel; the message repeats the
            driver's words.
    """
    launcher = get()
    result = launcher.mhc_open(DRIVER.encode())
    handle = ctypes.c_void_p()
    if result == 0:
        result = launcher.mhc_load(
            device_index,
            compiled.cubin,
            compiled.symbol.encode(),
            name.encode(),
            compiled.block,
            compiled.cluster,
            compiled.shared,
            compiled.pdl,
            ctypes.byref(handle),
        )
    if result or handle.value is None:
        raise RuntimeError(
            f"mhc: {name} cannot be loaded on cuda:{device_index} ({len(compiled.cubin)} bytes of "
            f"machine code, block {compiled.block}, clusters of {compiled.cluster}, "
            f"{compiled.shared} bytes of shared memory): {_explain(result)}"
        )
    return Kernel(handle.value, compiled)


def launch(
    op: str,
    kernel: Kernel,
    grid: Sequence[int],
    values: Mapping[str, Tensor | int | float],
    stream: int,
) -> None:
    """Launch a kernel.

    Args:
        op: op that launches the kernel, for the message.
        kernel: kernel that is loaded on the device of the stream.
        grid: CTAs along x and y.
        values: parameter to tensor or number.
        stream: handle of a CUDA stream.

    Raises:
        RuntimeError: the driver refuses the launch; the message gives the kernel, its configuration
            and the driver's words.
    """
    held: list[Any] = []
    for name, kind in kernel.compiled.parameters:
        value = values[name]
        held.append(_CTYPES[kind](value.data_ptr() if isinstance(value, Tensor) else value))
    arguments = (ctypes.c_void_p * len(held))(*map(ctypes.addressof, held))
    result = get().mhc_launch(kernel.handle, *grid, stream, arguments)
    if result:
        text = ctypes.create_string_buffer(_MESSAGE_BYTES)
        get().mhc_explain_launch(kernel.handle, *grid, result, text, len(text))
        raise RuntimeError(f"mhc::{op}: {text.value.decode(errors='replace')}")


def capture(kernel: Kernel, stream: int) -> int:
    """Return the number of the capture that a stream of the kernel's device is in; 0 for none."""
    number: int = get().mhc_capture(kernel.handle, stream)
    return number

"""A host function of tvm-ffi in place of a compiled kernel, for tensors of the CPU."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import torch
import tvm_ffi

INT, FLOAT, DLTENSOR = 1, 3, 7  # TVMFFITypeIndex
DTYPES = {(4, 16): torch.bfloat16, (2, 32): torch.float32}  # (DLDataTypeCode, bits)


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Value(ctypes.Union):
    _fields_ = (
        ("int64", ctypes.c_int64),
        ("float64", ctypes.c_double),
        ("tensor", ctypes.POINTER(_DLTensor)),
    )


class _Any(ctypes.Structure):
    _fields_ = (("type_index", ctypes.c_int32), ("padding", ctypes.c_uint32), ("value", _Value))


_SafeCall = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(_Any), ctypes.c_int32, ctypes.POINTER(_Any)
)


def _as_tensor(view: _DLTensor) -> torch.Tensor:
    """The same memory as a torch tensor."""
    assert (view.device_type, view.device_id, view.byte_offset, view.lanes) == (1, 0, 0, 1)
    shape, strides = view.shape[: view.ndim], view.strides[: view.ndim]
    size = math.prod(shape) * view.bits // 8
    memory = (ctypes.c_byte * size).from_address(view.data)
    flat = torch.frombuffer(memory, dtype=DTYPES[view.code, view.bits])
    return flat.as_strided(shape, strides)


def _decode(argument: _Any) -> Any:
    assert argument.padding == 0
    value = argument.value
    return {
        INT: lambda: value.int64,
        FLOAT: lambda: value.float64,
        DLTENSOR: lambda: _as_tensor(value.tensor.contents),
    }[argument.type_index]()


class FakeKernel:
    """Stands for a tvm-ffi function; keeps what each call gave it, as torch would show it.

    Args:
        run: called with the arguments of each call; what it raises is what the kernel raises.
    """

    def __init__(self, run: Callable[..., None] = lambda *arguments: None) -> None:
        self.calls: list[list[Any]] = []
        self._run = run
        self._library = ctypes.CDLL(tvm_ffi.libinfo.find_libtvm_ffi())
        self._safe_call = _SafeCall(self._call)
        self._handle = ctypes.c_void_p()
        self._library.TVMFFIFunctionCreate(None, self._safe_call, None, ctypes.byref(self._handle))

    def _call(self, _self: Any, arguments: Any, count: int, _result: Any) -> int:
        try:
            call: list[Any] = []
            self.calls.append(call)  # also where what follows fails
            call += [_decode(arguments[i]) for i in range(count)]
            self._run(*call)
        except Exception as error:
            self._library.TVMFFIErrorSetRaisedFromCStr(
                type(error).__name__.encode(), str(error).encode()
            )
            return -1
        return 0

    def __chandle__(self) -> int:
        return self._handle.value

"""Check the ops' arguments; the fake, the CPU and the CUDA implementations call the same check.

Every refusal is a ``ValueError`` that names the op, the argument, what was expected and what came,
and is raised before anything is allocated or launched. Symbolic sizes are compared with
``torch._check_value``, which ties two symbols together instead of guarding on their values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import geometry
from ._arguments import NumberSpec, Sizes, TensorSpec, recipe, streams_of

ALIGNMENT = 16  # each thread of a kernel loads and stores 16 bytes at once

# The kernels of these device types need aligned addresses; the CPU kernels take any address.
ALIGNED_DEVICES = ("cuda",)

_PLAIN = (torch.Tensor, torch.nn.Parameter)  # the sizes of these types are plain integers


def _fail(op: str, argument: str, expected: str, got: Any) -> NoReturn:
    raise ValueError(f"mhc::{op}: expected {argument} {expected}, got {got}")


def _shape_text(shape: Any) -> str:
    sizes = [str(size) for size in shape]
    return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"


def _check_given(op: str, argument: str, tensor: Tensor | None) -> None:
    """Refuse None, which torch lets pass where the schema has a tensor."""
    if tensor is None:
        _fail(op, argument, "to be a tensor", None)


def _check_shape(op: str, argument: str, tensor: Tensor, expected: tuple[Any, ...]) -> None:
    shape = tensor.shape
    if len(shape) != len(expected):
        _fail(op, argument, f"of shape {_shape_text(expected)}", _shape_text(shape))
    for got, want in zip(shape, expected, strict=True):
        if type(got) is int and type(want) is int:
            if got != want:
                _fail(op, argument, f"of shape {_shape_text(expected)}", _shape_text(shape))
        else:
            torch._check_value(
                got == want,
                lambda: (
                    f"mhc::{op}: expected {argument} of shape {_shape_text(expected)}, "
                    f"got {_shape_text(shape)}"
                ),
            )


def _beyond_alignment(tensor: Tensor) -> int:
    """Count the bytes from a multiple of 16 to the first element; 0 where any address will do.

    A fake tensor has no address, so a misaligned tensor is refused only when the op runs.
    """
    if type(tensor) not in _PLAIN or tensor.device.type not in ALIGNED_DEVICES:
        return 0
    return tensor.data_ptr() % ALIGNMENT


def _check_tensor(
    op: str,
    argument: str,
    tensor: Tensor,
    device: torch.device,
    spec: TensorSpec,
    expected: tuple[Any, ...],
) -> None:
    """Check dtype, device, memory layout and shape of one tensor.

    The first test passes the tensors of nearly every call at little cost (benchmarks/NOTES.md,
    "Cost of the checks"). Fake tensors, whose sizes may be symbols, go through the other tests.
    """
    if (
        type(tensor) in _PLAIN
        and tensor.dtype in spec.dtypes
        and tensor.shape == expected
        and tensor.device == device
        and tensor.is_contiguous()
        and not (spec.rows and _beyond_alignment(tensor))
    ):
        return
    _check_given(op, argument, tensor)
    _check_layout(op, argument, tensor, device, spec)
    _check_shape(op, argument, tensor, expected)


def _check_layout(
    op: str, argument: str, tensor: Tensor, device: torch.device, spec: TensorSpec
) -> None:
    if tensor.dtype not in spec.dtypes:
        wanted = " or ".join(str(dtype) for dtype in spec.dtypes)
        _fail(op, argument, f"of dtype {wanted}", tensor.dtype)
    if tensor.device != device:
        _fail(op, argument, f"on {device}", tensor.device)
    if tensor.layout is not torch.strided:
        _fail(op, argument, "to be a strided tensor", tensor.layout)
    if not spec.rows:
        return
    if any(type(size) is int and size == 0 for size in tensor.shape):
        return  # no element is read, and torch calls an empty tensor contiguous with any strides
    stride = tensor.stride()
    if stride and type(stride[-1]) is int and stride[-1] != 1 and tensor.shape[-1] != 1:
        _fail(op, argument, "with a contiguous last dimension", f"strides {_shape_text(stride)}")
    beyond = _beyond_alignment(tensor)
    if beyond:
        _fail(
            op,
            argument,
            f"to start at a multiple of {ALIGNMENT} bytes",
            f"an address {beyond} bytes beyond one",
        )


def _check_number(op: str, argument: str, value: Any, spec: NumberSpec) -> None:
    """Refuse a number out of its range.

    A symbolic number passes: the call that has its value checks it.
    """
    if type(value) in (float, int):
        expected = spec.fault(value)
        if expected is not None:
            _fail(op, argument, expected, value)


def _check_hidden(op: str, argument: str, tensor: Tensor, hidden: Any) -> None:
    if hidden < 1:
        _fail(op, argument, "with a hidden size of at least 1", hidden)
    if tensor.is_cuda and hidden % geometry.HIDDEN_MULTIPLE != 0:
        _fail(
            op,
            argument,
            f"with a hidden size that is a multiple of {geometry.HIDDEN_MULTIPLE} on CUDA",
            hidden,
        )


def _is_one_token(shape: tuple[Any, ...], values: Mapping[str, Any]) -> bool:
    """Tell a token without token dimensions from tokens whose dimension of streams was forgotten.

    The sublayer's output has the hidden size alone then; without it, ``fn`` tells.
    """
    x, fn = values.get("x"), values.get("fn")
    if "x" in values:
        return x is not None and x.dim() == 1
    return fn is not None and fn.dim() == 2 and bool(fn.shape[1] == shape[0] * shape[1])


def _check_residual(op: str, values: Mapping[str, Any], spec: TensorSpec) -> tuple[Any, ...]:
    """Check the streams, and return their shape."""
    residual = values["residual"]
    _check_given(op, "residual", residual)
    shape = tuple(residual.shape)
    if len(shape) < 2 or (len(shape) == 2 and not _is_one_token(shape, values)):
        _fail(op, "residual", "of shape (..., hc_mult, hidden)", _shape_text(shape))
    _check_tensor(op, "residual", residual, residual.device, spec, shape)
    hc_mult, hidden = shape[-2:]
    if hc_mult < 1:
        _fail(op, "residual", "with hc_mult of at least 1", hc_mult)
    if hidden < 1:
        _fail(op, "residual", "with a hidden size of at least 1", hidden)
    if residual.is_cuda and hc_mult != geometry.HC_MULT:
        _fail(op, "residual", f"with hc_mult {geometry.HC_MULT} on CUDA", hc_mult)
    _check_hidden(op, "residual", residual, hidden)
    return shape


def _check_embedding(op: str, x: Tensor, fn: Tensor, spec: TensorSpec) -> tuple[Any, ...]:
    """Check an embedding that is to be expanded, and return the shape of its streams.

    The rows of ``fn`` tell how many streams there are.
    """
    _check_given(op, "x", x)
    shape = tuple(x.shape)
    if len(shape) < 1:
        _fail(op, "x", "of shape (..., hidden)", _shape_text(shape))
    _check_tensor(op, "x", x, x.device, spec, shape)
    if shape[-1] < 1:
        _fail(op, "x", "with a hidden size of at least 1", shape[-1])
    _check_given(op, "fn", fn)
    if fn.dim() != 2:
        _fail(op, "fn", "with two dimensions", _shape_text(fn.shape))
    hc_mult = streams_of(int(fn.shape[0]))
    if hc_mult is None:
        _fail(op, "fn", "with hc_mult * (hc_mult + 2) rows", fn.shape[0])
    if x.is_cuda and hc_mult != geometry.HC_MULT:
        _fail(op, "fn", f"for hc_mult {geometry.HC_MULT} on CUDA", hc_mult)
    _check_hidden(op, "x", x, shape[-1])
    return (*shape[:-1], hc_mult, shape[-1])


def _check_together(op: str, norm_weight: Tensor | None, norm_eps: float | None) -> None:
    if (norm_weight is None) != (norm_eps is None):
        alone = "norm_weight" if norm_eps is None else "norm_eps"
        _fail(op, "norm_weight and norm_eps together", "or neither", f"{alone} alone")


def check(op: str, values: Mapping[str, Any]) -> Sizes:
    """Refuse arguments that an op cannot serve.

    Args:
        op: name of the op.
        values: every argument of the op's schema by name; None for one that was left out.

    Returns:
        The sizes of the call.

    Raises:
        ValueError: naming the op, the argument, what was expected and what came.
    """
    of = recipe(op)
    streams, spec = values[of.streams], of.tensors[of.streams]
    if of.streams == "residual":
        shape = _check_residual(op, values, spec)
    else:
        shape = _check_embedding(op, streams, values["fn"], spec)
    *leading, hc_mult, hidden = shape
    sizes = Sizes(tuple(leading), hc_mult, hidden, of.rows(hc_mult))

    for name, spec_of in of.arguments.items():
        value = values[name]
        if name == "norm_weight":
            _check_together(op, value, values["norm_eps"])
        if name == of.streams or (value is None and name in ("norm_weight", "norm_eps")):
            continue
        if isinstance(spec_of, NumberSpec):
            _check_number(op, name, value, spec_of)
            continue
        expected = sizes.shape(spec_of)
        if spec_of.may_drop_last:
            _check_given(op, name, value)
            if value.dim() == len(expected) - 1:
                expected = expected[:-1]
        _check_tensor(op, name, value, streams.device, spec_of, expected)
    return sizes

"""Argument checks of the ops: the fake, the CPU and the CUDA implementations call the same ones.

Every refusal is a ``ValueError`` that names the op, the argument, what was expected and what
came, and is raised before anything is allocated or launched. Sizes may be symbolic: they are
compared with ``torch._check_value``, which ties two symbols together in place of guarding on
their values.
"""

from __future__ import annotations

import math
import sys
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import dispatch

ALIGNMENT = 16  # bytes: the kernels load and store 16 bytes a thread

ACTIVATION = torch.bfloat16
MIX = torch.float32

LARGEST = sys.float_info.max  # any finite number is at most this

# Sinkhorn has long converged; without a bound a wrong number keeps a CPU or GPU busy for hours.
# mhc_ops/_host.cpp has the same.
MOST_ROUNDS = 10_000

_PLAIN = (torch.Tensor, torch.nn.Parameter)  # types whose sizes are plain integers


def mixes(hc_mult: int) -> int:
    """Rows of ``fn``: hc_mult pre, hc_mult post and hc_mult squared comb weights."""
    return hc_mult * (hc_mult + 2)


def _fail(op: str, argument: str, expected: str, got: Any) -> NoReturn:
    raise ValueError(f"mhc::{op}: expected {argument} {expected}, got {got}")


def _shape_text(shape: Any) -> str:
    sizes = [str(size) for size in shape]
    return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"


def _check_given(op: str, argument: str, tensor: Tensor | None) -> None:
    """Torch lets None pass for a tensor of the schema."""
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


def _check_tensor(
    op: str,
    argument: str,
    tensor: Tensor,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    expected: tuple[Any, ...],
    *,
    rows: bool,
) -> None:
    """Dtype, device, memory layout and shape; ``rows`` are read 16 bytes at a time.

    The first test passes what nearly every call brings, at a third of the cost of the others; it
    leaves fake tensors, whose sizes may be symbols, to them.
    """
    if (
        type(tensor) in _PLAIN
        and tensor.dtype in dtypes
        and tensor.shape == expected
        and tensor.device == device
        and tensor.is_contiguous()
        and tensor.storage_offset() == 0
    ):
        return
    _check_given(op, argument, tensor)
    _check_layout(op, argument, tensor, device, dtypes, rows=rows)
    _check_shape(op, argument, tensor, expected)


def _check_layout(
    op: str,
    argument: str,
    tensor: Tensor,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    *,
    rows: bool,
) -> None:
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        _fail(op, argument, f"of dtype {wanted}", tensor.dtype)
    if tensor.device != device:
        _fail(op, argument, f"on {device}", tensor.device)
    if tensor.layout is not torch.strided:
        _fail(op, argument, "to be a strided tensor", tensor.layout)
    if not rows:
        return
    if any(type(size) is int and size == 0 for size in tensor.shape):
        return  # nothing is read, and torch calls it contiguous whatever its strides
    stride = tensor.stride()
    if stride and type(stride[-1]) is int and stride[-1] != 1 and tensor.shape[-1] != 1:
        _fail(op, argument, "with a contiguous last dimension", f"strides {_shape_text(stride)}")
    offset = tensor.storage_offset()
    if type(offset) is int and offset * tensor.element_size() % ALIGNMENT != 0:
        _fail(
            op,
            argument,
            f"to start at a multiple of {ALIGNMENT} bytes",
            f"a storage offset of {offset * tensor.element_size()} bytes",
        )


def _check_scalar(op: str, argument: str, value: Any, least: float = -LARGEST) -> None:
    """Finite and at least ``least``; a symbolic number is left to the call that has its value."""
    if type(value) in (float, int) and not least <= value <= LARGEST:  # NaN is neither
        kind = "to be finite" if least == -LARGEST else f"to be finite and at least {least}"
        _fail(op, argument, kind, value)


def _check_streams(op: str, residual: Tensor) -> tuple[int, int]:
    """The checks on ``residual`` alone; returns (hc_mult, hidden)."""
    _check_given(op, "residual", residual)
    shape = residual.shape
    if len(shape) < 3:
        _fail(op, "residual", "of shape (..., hc_mult, hidden)", _shape_text(shape))
    _check_tensor(op, "residual", residual, residual.device, (ACTIVATION,), shape, rows=True)
    hc_mult, hidden = shape[-2], shape[-1]
    if hc_mult < 1:
        _fail(op, "residual", "with hc_mult of at least 1", hc_mult)
    if hidden < 1:
        _fail(op, "residual", "with a hidden size of at least 1", hidden)
    if residual.is_cuda:
        if hc_mult != dispatch.HC_MULT:
            _fail(op, "residual", f"with hc_mult {dispatch.HC_MULT} on CUDA", hc_mult)
        _check_hidden_on_cuda(op, "residual", hidden)
    return hc_mult, hidden


def _check_hidden_on_cuda(op: str, argument: str, hidden: int) -> None:
    if hidden % dispatch.HIDDEN_MULTIPLE != 0:
        _fail(
            op,
            argument,
            f"with a hidden size that is a multiple of {dispatch.HIDDEN_MULTIPLE} on CUDA",
            hidden,
        )


def _check_norm(
    op: str, device: torch.device, hidden: int, norm_weight: Tensor | None, norm_eps: float | None
) -> None:
    if norm_weight is None:
        if norm_eps is not None:
            _fail(op, "norm_weight and norm_eps together", "or neither", "norm_eps alone")
        return
    if norm_eps is None:
        _fail(op, "norm_weight and norm_eps together", "or neither", "norm_weight alone")
    _check_tensor(op, "norm_weight", norm_weight, device, (ACTIVATION, MIX), (hidden,), rows=True)
    _check_scalar(op, "norm_eps", norm_eps, 0)


def check_post(
    op: str, x: Tensor, residual: Tensor, post_layer_mix: Tensor, comb_res_mix: Tensor
) -> tuple[int, int]:
    """Refuse arguments that the post step cannot serve.

    Args:
        op: name of the op, for the message.
        x, residual, post_layer_mix, comb_res_mix: as in :func:`mhc_ops.post`.

    Returns:
        (hc_mult, hidden).

    Raises:
        ValueError: naming the op, the argument, what was expected and what came.
    """
    hc_mult, hidden = _check_streams(op, residual)
    leading = tuple(residual.shape[:-2])
    device = residual.device
    _check_tensor(op, "x", x, device, (ACTIVATION,), (*leading, hidden), rows=True)
    _check_given(op, "post_layer_mix", post_layer_mix)
    tail = (hc_mult,) if post_layer_mix.dim() == len(leading) + 1 else (hc_mult, 1)
    _check_tensor(
        op, "post_layer_mix", post_layer_mix, device, (MIX,), (*leading, *tail), rows=True
    )
    _check_tensor(
        op, "comb_res_mix", comb_res_mix, device, (MIX,), (*leading, hc_mult, hc_mult), rows=True
    )
    return hc_mult, hidden


def check_pre(
    op: str,
    residual: Tensor,
    fn: Tensor,
    hc_scale: Tensor,
    hc_base: Tensor,
    rms_eps: float,
    hc_pre_eps: float,
    hc_sinkhorn_eps: float,
    hc_post_mult_value: float,
    sinkhorn_repeat: int,
    norm_weight: Tensor | None,
    norm_eps: float | None,
) -> None:
    """Refuse arguments that the pre step cannot serve.

    Args:
        op: name of the op, for the message.
        residual, fn, hc_scale, hc_base, rms_eps, hc_pre_eps, hc_sinkhorn_eps,
            hc_post_mult_value, sinkhorn_repeat, norm_weight, norm_eps: as in
            :func:`mhc_ops.pre`.

    Raises:
        ValueError: naming the op, the argument, what was expected and what came.
    """
    hc_mult, hidden = _check_streams(op, residual)
    check_mixing(
        op, residual, hc_mult, hidden, fn, hc_scale, hc_base, rms_eps, hc_pre_eps,
        hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat, norm_weight, norm_eps,
    )  # fmt: skip


def check_mixing(
    op: str,
    residual: Tensor,
    hc_mult: int,
    hidden: int,
    fn: Tensor,
    hc_scale: Tensor,
    hc_base: Tensor,
    rms_eps: float,
    hc_pre_eps: float,
    hc_sinkhorn_eps: float,
    hc_post_mult_value: float,
    sinkhorn_repeat: int,
    norm_weight: Tensor | None,
    norm_eps: float | None,
) -> None:
    """:func:`check_pre` for streams that are checked already.

    Args:
        op: name of the op, for the message.
        residual: the streams, checked, or what they are copies of.
        hc_mult, hidden: their sizes.
        fn, hc_scale, hc_base, rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value,
            sinkhorn_repeat, norm_weight, norm_eps: as in :func:`mhc_ops.pre`.

    Raises:
        ValueError: naming the op, the argument, what was expected and what came.
    """
    device = residual.device
    _check_tensor(op, "fn", fn, device, (MIX,), (mixes(hc_mult), hc_mult * hidden), rows=True)
    _check_tensor(op, "hc_scale", hc_scale, device, (MIX,), (3,), rows=False)
    _check_tensor(op, "hc_base", hc_base, device, (MIX,), (mixes(hc_mult),), rows=False)
    _check_scalar(op, "rms_eps", rms_eps, 0)
    _check_scalar(op, "hc_pre_eps", hc_pre_eps, 0)
    _check_scalar(op, "hc_sinkhorn_eps", hc_sinkhorn_eps, 0)
    _check_scalar(op, "hc_post_mult_value", hc_post_mult_value)
    if type(sinkhorn_repeat) is int and not 1 <= sinkhorn_repeat <= MOST_ROUNDS:
        _fail(op, "sinkhorn_repeat", f"from 1 to {MOST_ROUNDS}", sinkhorn_repeat)
    _check_norm(op, device, hidden, norm_weight, norm_eps)


def check_expand(op: str, x: Tensor, fn: Tensor) -> tuple[int, int]:
    """Refuse an embedding that cannot be expanded, to as many streams as ``fn`` is made for.

    Args:
        op: name of the op, for the message.
        x, fn: as in :func:`mhc_ops.expand_pre`.

    Returns:
        (hc_mult, hidden).

    Raises:
        ValueError: naming the op, the argument, what was expected and what came.
    """
    _check_given(op, "x", x)
    shape = x.shape
    if len(shape) < 2:
        _fail(op, "x", "of shape (..., hidden)", _shape_text(shape))
    _check_tensor(op, "x", x, x.device, (ACTIVATION,), shape, rows=True)
    hidden = shape[-1]
    if hidden < 1:
        _fail(op, "x", "with a hidden size of at least 1", hidden)
    _check_given(op, "fn", fn)
    if fn.dim() != 2:
        _fail(op, "fn", "with two dimensions", _shape_text(fn.shape))
    rows = int(fn.shape[0])
    hc_mult = math.isqrt(rows + 1) - 1
    if hc_mult < 1 or mixes(hc_mult) != rows:
        _fail(op, "fn", "with hc_mult * (hc_mult + 2) rows", rows)
    if x.is_cuda:
        if hc_mult != dispatch.HC_MULT:
            _fail(op, "fn", f"for hc_mult {dispatch.HC_MULT} on CUDA", hc_mult)
        _check_hidden_on_cuda(op, "x", hidden)
    return hc_mult, hidden


def check_head(
    op: str,
    residual: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    rms_eps: float,
    hc_eps: float,
    norm_weight: Tensor | None,
    norm_eps: float | None,
) -> None:
    """Refuse arguments that the head cannot serve.

    Args:
        op: name of the op, for the message.
        residual, fn, scale, base, rms_eps, hc_eps, norm_weight, norm_eps: as in
            :func:`mhc_ops.head`.

    Raises:
        ValueError: naming the op, the argument, what was expected and what came.
    """
    hc_mult, hidden = _check_streams(op, residual)
    check_collapse(
        op, residual, hc_mult, hidden, fn, scale, base, rms_eps, hc_eps, norm_weight, norm_eps
    )


def check_collapse(
    op: str,
    residual: Tensor,
    hc_mult: int,
    hidden: int,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    rms_eps: float,
    hc_eps: float,
    norm_weight: Tensor | None,
    norm_eps: float | None,
) -> None:
    """:func:`check_head` for streams that are checked already.

    Args:
        op: name of the op, for the message.
        residual: the streams, checked.
        hc_mult, hidden: their sizes.
        fn, scale, base, rms_eps, hc_eps, norm_weight, norm_eps: as in :func:`mhc_ops.head`.

    Raises:
        ValueError: naming the op, the argument, what was expected and what came.
    """
    device = residual.device
    _check_tensor(op, "fn", fn, device, (MIX,), (hc_mult, hc_mult * hidden), rows=True)
    _check_tensor(op, "scale", scale, device, (MIX,), (1,), rows=False)
    _check_tensor(op, "base", base, device, (MIX,), (hc_mult,), rows=False)
    _check_scalar(op, "rms_eps", rms_eps, 0)
    _check_scalar(op, "hc_eps", hc_eps, 0)
    _check_norm(op, device, hidden, norm_weight, norm_eps)

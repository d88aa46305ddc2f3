"""Define ``mhc::post_head``: the last post step and the head as one op, without the streams."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._define import define


def _cpu(
    x: Tensor, residual: Tensor, post_layer_mix: Tensor, comb_res_mix: Tensor, **collapse: Any
) -> Tensor:
    streams = reference.post(x, residual, post_layer_mix, comb_res_mix)
    return reference.head(streams, **collapse)


# The checks and the fake, CUDA and autograd implementations follow from the recipe.
define("post_head", cpu=_cpu)


def post_head(
    x: Tensor,
    residual: Tensor,
    post_layer_mix: Tensor,
    comb_res_mix: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    rms_eps: float,
    hc_eps: float,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float | None = None,
) -> Tensor:
    """End a model: the last post step, then the head of its result::

        streams = post(x, residual, post_layer_mix, comb_res_mix)
        hidden  = head(streams, fn, scale, base, ...)

    The formulas are those of :func:`mhc_ops.post` and :func:`mhc_ops.head`. The new streams are
    rounded as :func:`mhc_ops.post` rounds them, but not written to memory. Where a draft layer
    needs the streams, :func:`mhc_ops.post_head_streams` returns them.

    The sum of the squares of the new streams has to stay within fp32, which it does up to a root
    mean square of 1.8e19 / sqrt(n * H), 1.1e17 at H = 7168. Beyond, the weights are finite and
    wrong.

    Source: mHC (Xie et al., 2026); ``DeepseekV4Model.forward`` of transformers.

    Args:
        x: [..., H] bf16, output of the last sublayer.
        residual: [..., n, H] bf16, the n residual streams before it; n = 4 and H a multiple of
            256 on CUDA.
        post_layer_mix: [..., n, 1] or [..., n] fp32, weight of x in each new stream.
        comb_res_mix: [..., n, n] fp32, stream mixing, indexed [old stream, new stream].
        fn: [n, n * H] fp32, projection of the head; column index = stream * H + h.
        scale: [1] fp32, scale of the weights.
        base: [n] fp32, their biases.
        rms_eps: added to the mean square of the new streams; at least 0.
        hc_eps: added to the weights; at least 0.
        norm_weight: [H] bf16 (fp32 is cast), weight of the final RMSNorm; None for none.
        norm_eps: its epsilon; given exactly when ``norm_weight`` is.

    Returns:
        [..., H] bf16, the hidden state, in memory of its own.

    Raises:
        ValueError: an argument of a wrong dtype, shape, device, memory layout or value, or only
            one of ``norm_weight`` and ``norm_eps``.
        RuntimeError: the CUDA kernels cannot serve the device, or a backward is asked for.

    Example:
        >>> import torch, mhc_ops
        >>> x, residual = (torch.ones(1, *s, dtype=torch.bfloat16) for s in ((256,), (4, 256)))
        >>> post_mix, comb_mix = torch.ones(1, 4), torch.full((1, 4, 4), 0.25)
        >>> fn, scale, base = torch.zeros(4, 1024), torch.ones(1), torch.zeros(4)
        >>> mhc_ops.post_head(
        ...     x, residual, post_mix, comb_mix, fn, scale, base, 1e-6, 0.0
        ... ).unique()
        tensor([4.], dtype=torch.bfloat16)
    """
    return torch.ops.mhc.post_head.default(
        x, residual, post_layer_mix, comb_res_mix, fn, scale, base, rms_eps, hc_eps,
        norm_weight=norm_weight, norm_eps=norm_eps,
    )  # fmt: skip

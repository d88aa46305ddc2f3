"""Define ``mhc::fused_post_pre``: the boundary between two sublayers as one op."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from .._exportable import exportable
from ._define import define


def _cpu(
    x: Tensor, residual: Tensor, post_layer_mix: Tensor, comb_res_mix: Tensor, **mixing: Any
) -> tuple[Tensor, ...]:
    streams = reference.post(x, residual, post_layer_mix, comb_res_mix).contiguous()
    return streams, *reference.pre(streams, **mixing)


# The checks and the fake, CUDA and autograd implementations follow from the recipe.
define("fused_post_pre", cpu=_cpu)


@exportable
class FusedPostPreOutput(NamedTuple):
    """Hold what :func:`fused_post_pre` returns.

    Attributes:
        residual_out: [..., n, H] bf16, the new residual streams.
        post_mix: [..., n, 1] fp32, weight of the next sublayer's output in each new stream.
        comb_mix: [..., n, n] fp32, its stream mixing, indexed [old stream, new stream].
        layer_input: [..., H] bf16, input of the next sublayer.
    """

    residual_out: Tensor
    post_mix: Tensor
    comb_mix: Tensor
    layer_input: Tensor


def fused_post_pre(
    x: Tensor,
    residual: Tensor,
    post_layer_mix: Tensor,
    comb_res_mix: Tensor,
    fn: Tensor,
    hc_scale: Tensor,
    hc_base: Tensor,
    rms_eps: float,
    hc_pre_eps: float,
    hc_sinkhorn_eps: float,
    hc_post_mult_value: float,
    sinkhorn_repeat: int,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float | None = None,
) -> FusedPostPreOutput:
    """Run the boundary between two sublayers, the post of one and the pre of the next::

        residual_out = post(x, residual, post_layer_mix, comb_res_mix)
        post_mix, comb_mix, layer_input = pre(residual_out, fn, hc_scale, hc_base, ...)

    The formulas are those of :func:`mhc_ops.post` and :func:`mhc_ops.pre`. The new streams are
    equal to those of :func:`mhc_ops.post` bit for bit.

    The sum of the squares of the new streams has to stay within fp32, which it does up to a root
    mean square of 1.8e19 / sqrt(n * H), 1.1e17 at H = 7168. Beyond, the mixes are finite and wrong.

    Source: mHC (Xie et al., 2026); ``DeepseekV4DecoderLayer.forward`` of transformers.

    Args:
        x: [..., H] bf16, output of the sublayer that just ran.
        residual: [..., n, H] bf16, the n residual streams before it; n = 4 and H a multiple of
            256 on CUDA.
        post_layer_mix: [..., n, 1] or [..., n] fp32, weight of x in each new stream.
        comb_res_mix: [..., n, n] fp32, stream mixing, indexed [old stream, new stream].
        fn: [n * (n + 2), n * H] fp32, projection of the next sublayer's hyper-connection; column
            index = stream * H + h.
        hc_scale: [3] fp32, its scales (pre, post, comb).
        hc_base: [n * (n + 2)] fp32, its biases.
        rms_eps: added to the mean square of the new streams; at least 0.
        hc_pre_eps: added to the collapse weights; at least 0.
        hc_sinkhorn_eps: added to the softmax and to every row and column sum; at least 0.
        hc_post_mult_value: factor of the post weights; 2.0 in DeepSeek-V4.
        sinkhorn_repeat: rounds of Sinkhorn, counting the first; 1 to 10000, 20 in DeepSeek-V4.
        norm_weight: [H] bf16 (fp32 is cast), weight of the next RMSNorm; None for no norm.
        norm_eps: its epsilon; given exactly when ``norm_weight`` is.

    Returns:
        (residual_out [..., n, H] bf16, post_mix [..., n, 1] fp32, comb_mix [..., n, n] fp32,
        layer_input [..., H] bf16).

    Raises:
        ValueError: an argument of a wrong dtype, shape, device, memory layout or value, or only
            one of ``norm_weight`` and ``norm_eps``.
        RuntimeError: the CUDA kernels cannot serve the device, or a backward is asked for.

    Example:
        >>> import torch, mhc_ops
        >>> x, residual = (torch.ones(1, *s, dtype=torch.bfloat16) for s in ((256,), (4, 256)))
        >>> post_mix, comb_mix = torch.ones(1, 4), torch.full((1, 4, 4), 0.25)
        >>> fn, scale, base = torch.zeros(24, 1024), torch.ones(3), torch.zeros(24)
        >>> out = mhc_ops.fused_post_pre(
        ...     x, residual, post_mix, comb_mix, fn, scale, base, 1e-6, 0.0, 1e-6, 2.0, 20
        ... )
        >>> out.residual_out.unique(), out.layer_input.unique()
        (tensor([2.], dtype=torch.bfloat16), tensor([4.], dtype=torch.bfloat16))
    """
    # A program that torch.fx traces can be unpacked by names, and not otherwise.
    residual_out, post_mix, comb_mix, layer_input = torch.ops.mhc.fused_post_pre.default(
        x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, rms_eps, hc_pre_eps,
        hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat,
        norm_weight=norm_weight, norm_eps=norm_eps,
    )  # fmt: skip
    return FusedPostPreOutput(residual_out, post_mix, comb_mix, layer_input)

"""Define ``mhc::expand_pre``: the streams that a model starts from, and the first pre step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from .._arguments import streams_of
from .._exportable import exportable
from ._define import define


def _cpu(x: Tensor, fn: Tensor, **mixing: Any) -> tuple[Tensor, ...]:
    hc_mult = streams_of(fn.shape[0])
    assert hc_mult is not None  # the check refuses other numbers of rows
    streams = reference.expand(x, hc_mult)
    return streams, *reference.pre(streams, fn, **mixing)


# The checks and the fake, CUDA and autograd implementations follow from the recipe.
define("expand_pre", cpu=_cpu)


@exportable
class ExpandPreOutput(NamedTuple):
    """Hold what :func:`expand_pre` returns.

    Attributes:
        residual_out: [..., n, H] bf16, the residual streams: n copies of the embedding.
        post_mix: [..., n, 1] fp32, weight of the first sublayer's output in each new stream.
        comb_mix: [..., n, n] fp32, its stream mixing, indexed [old stream, new stream].
        layer_input: [..., H] bf16, input of the first sublayer.
    """

    residual_out: Tensor
    post_mix: Tensor
    comb_mix: Tensor
    layer_input: Tensor


def expand_pre(
    x: Tensor,
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
) -> ExpandPreOutput:
    """Start a model: its residual streams from the embedding, and the first pre step::

        residual_out[j] = x
        post_mix, comb_mix, layer_input = pre(residual_out, fn, hc_scale, hc_base, ...)

    The formula is that of :func:`mhc_ops.pre`. The number n of streams is the one that ``fn`` is
    made for.

    The sum of the squares of the streams has to stay within fp32, which it does up to a root mean
    square of 1.8e19 / sqrt(n * H), 1.1e17 at H = 7168. Beyond, the mixes are finite and wrong.

    Source: mHC (Xie et al., 2026); ``DeepseekV4Model.forward`` of transformers.

    Args:
        x: [..., H] bf16, the embedding; H a multiple of 256 on CUDA.
        fn: [n * (n + 2), n * H] fp32, projection of the first sublayer's hyper-connection; column
            index = stream * H + h; n = 4 on CUDA.
        hc_scale: [3] fp32, its scales (pre, post, comb).
        hc_base: [n * (n + 2)] fp32, its biases.
        rms_eps: added to the mean square of the streams; at least 0.
        hc_pre_eps: added to the collapse weights; at least 0.
        hc_sinkhorn_eps: added to the softmax and to every row and column sum; at least 0.
        hc_post_mult_value: factor of the post weights; 2.0 in DeepSeek-V4.
        sinkhorn_repeat: rounds of Sinkhorn, counting the first; 1 to 10000, 20 in DeepSeek-V4.
        norm_weight: [H] bf16 (fp32 is cast), weight of the first RMSNorm; None for no norm.
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
        >>> x = torch.ones(1, 256, dtype=torch.bfloat16)
        >>> fn, scale, base = torch.zeros(24, 1024), torch.ones(3), torch.zeros(24)
        >>> out = mhc_ops.expand_pre(x, fn, scale, base, 1e-6, 0.0, 1e-6, 2.0, 20)
        >>> out.residual_out.shape, out.layer_input.unique()
        (torch.Size([1, 4, 256]), tensor([2.], dtype=torch.bfloat16))
    """
    # A program that torch.fx traces can be unpacked by names, and not otherwise.
    residual_out, post_mix, comb_mix, layer_input = torch.ops.mhc.expand_pre.default(
        x, fn, hc_scale, hc_base, rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value,
        sinkhorn_repeat, norm_weight=norm_weight, norm_eps=norm_eps,
    )  # fmt: skip
    return ExpandPreOutput(residual_out, post_mix, comb_mix, layer_input)

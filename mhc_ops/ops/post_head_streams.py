"""Define ``mhc::post_head_streams``: ``post_head``, which returns the new streams as well."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from .._exportable import exportable
from ._define import define


def _cpu(
    x: Tensor, residual: Tensor, post_layer_mix: Tensor, comb_res_mix: Tensor, **collapse: Any
) -> tuple[Tensor, Tensor]:
    streams = reference.post(x, residual, post_layer_mix, comb_res_mix).contiguous()
    return streams, reference.head(streams, **collapse)


# The checks and the fake, CUDA and autograd implementations follow from the recipe.
define("post_head_streams", cpu=_cpu)


@exportable
class PostHeadOutput(NamedTuple):
    """Hold what :func:`post_head_streams` returns.

    Attributes:
        residual_out: [..., n, H] bf16, the new residual streams.
        hidden: [..., H] bf16, the hidden state.
    """

    residual_out: Tensor
    hidden: Tensor


def post_head_streams(
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
) -> PostHeadOutput:
    """End a model whose streams are needed as well, since a draft layer starts from them::

        residual_out = post(x, residual, post_layer_mix, comb_res_mix)
        hidden       = head(residual_out, fn, scale, base, ...)

    The formulas are those of :func:`mhc_ops.post` and :func:`mhc_ops.head`. The new streams are
    equal to those of :func:`mhc_ops.post` bit for bit, and the hidden state to that of
    :func:`mhc_ops.post_head`.

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
        (residual_out [..., n, H] bf16, hidden [..., H] bf16), each in memory of its own.

    Raises:
        ValueError: an argument of a wrong dtype, shape, device, memory layout or value, or only
            one of ``norm_weight`` and ``norm_eps``.
        RuntimeError: the CUDA kernels cannot serve the device, or a backward is asked for.

    Example:
        >>> import torch, mhc_ops
        >>> x, residual = (torch.ones(1, *s, dtype=torch.bfloat16) for s in ((256,), (4, 256)))
        >>> post_mix, comb_mix = torch.ones(1, 4), torch.full((1, 4, 4), 0.25)
        >>> fn, scale, base = torch.zeros(4, 1024), torch.ones(1), torch.zeros(4)
        >>> out = mhc_ops.post_head_streams(
        ...     x, residual, post_mix, comb_mix, fn, scale, base, 1e-6, 0.0
        ... )
        >>> out.residual_out.unique(), out.hidden.unique()
        (tensor([2.], dtype=torch.bfloat16), tensor([4.], dtype=torch.bfloat16))
    """
    # A program that torch.fx traces can be unpacked by names, and not otherwise.
    residual_out, hidden = torch.ops.mhc.post_head_streams.default(
        x, residual, post_layer_mix, comb_res_mix, fn, scale, base, rms_eps, hc_eps,
        norm_weight=norm_weight, norm_eps=norm_eps,
    )  # fmt: skip
    return PostHeadOutput(residual_out, hidden)

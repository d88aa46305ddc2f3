"""Define ``mhc::pre``, which collapses the streams into the input of the next sublayer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from .._exportable import exportable
from ._define import define

# The CPU implementation is reference.pre.


# The checks and the fake, CUDA and autograd implementations follow from the recipe.
define("pre", cpu=reference.pre)


@exportable
class PreOutput(NamedTuple):
    """Hold what :func:`pre` returns.

    Attributes:
        post_mix: [..., n, 1] fp32, weight of the sublayer's output in each new stream.
        comb_mix: [..., n, n] fp32, stream mixing, indexed [old stream, new stream].
        layer_input: [..., H] bf16, input of the sublayer.
    """

    post_mix: Tensor
    comb_mix: Tensor
    layer_input: Tensor


def pre(
    residual: Tensor,
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
) -> PreOutput:
    """Collapse the residual streams into a sublayer's input and make the weights of its post::

        m           = (sum_k r[k] * fn[:, k]) * rsqrt(mean_k(r[k]^2) + rms_eps)
        w           = sigmoid(m[0:n] * hc_scale[0] + hc_base[0:n]) + hc_pre_eps
        post_mix    = sigmoid(m[n:2n] * hc_scale[1] + hc_base[n:2n]) * hc_post_mult_value
        C           = softmax_rows(m[2n:] * hc_scale[2] + hc_base[2n:]) + hc_sinkhorn_eps
        C          /= sum of each column + hc_sinkhorn_eps
        sinkhorn_repeat - 1 times:
            C      /= sum of each row + hc_sinkhorn_eps
            C      /= sum of each column + hc_sinkhorn_eps
        comb_mix    = C
        v           = sum_j w[j] * residual[j]
        layer_input = bf16(v), or with a norm
                      bf16(bf16(v) * rsqrt(mean_h(v^2) + norm_eps) * norm_weight)

    All of it is computed in fp32. r is ``residual`` as one row of n * H elements, k counts these
    elements, h those of one stream, i and j the streams; C is n by n, [old stream, new stream].

    The sum of the squares of r has to stay within fp32, which it does up to a root mean square of
    1.8e19 / sqrt(n * H), 1.1e17 at H = 7168. Beyond, the mixes are finite and wrong.

    Source: mHC (Xie et al., 2026); ``DeepseekV4HyperConnection.forward`` of transformers.

    Args:
        residual: [..., n, H] bf16, the residual streams; n = 4 and H a multiple of 256 on CUDA.
        fn: [n * (n + 2), n * H] fp32, projection; column index = stream * H + h; rows are n pre,
            n post, n * n comb (row-major, [old stream, new stream]).
        hc_scale: [3] fp32, scales of the pre, post and comb weights.
        hc_base: [n * (n + 2)] fp32, biases.
        rms_eps: added to the mean square of the streams; at least 0.
        hc_pre_eps: added to the collapse weights w; at least 0.
        hc_sinkhorn_eps: added to the softmax and to every row and column sum; at least 0.
        hc_post_mult_value: factor of the post weights; 2.0 in DeepSeek-V4.
        sinkhorn_repeat: rounds of Sinkhorn, counting the first; 1 to 10000, 20 in DeepSeek-V4.
        norm_weight: [H] bf16 (fp32 is cast), weight of the RMSNorm that follows; None for none.
        norm_eps: its epsilon; given exactly when ``norm_weight`` is.

    Returns:
        (post_mix [..., n, 1] fp32, comb_mix [..., n, n] fp32, layer_input [..., H] bf16).

    Raises:
        ValueError: an argument of a wrong dtype, shape, device, memory layout or value, or only
            one of ``norm_weight`` and ``norm_eps``.
        RuntimeError: the CUDA kernels cannot serve the device, or a backward is asked for.

    Example:
        With a projection of zeros every stream weighs sigmoid(0) = 1/2 and the mixing is even:

        >>> import torch, mhc_ops
        >>> residual = torch.ones(1, 4, 256, dtype=torch.bfloat16)
        >>> fn, scale, base = torch.zeros(24, 1024), torch.ones(3), torch.zeros(24)
        >>> out = mhc_ops.pre(residual, fn, scale, base, 1e-6, 0.0, 1e-6, 2.0, 20)
        >>> out.layer_input.unique(), out.post_mix.unique()
        (tensor([2.], dtype=torch.bfloat16), tensor([1.]))
        >>> out.comb_mix[0, 0]
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    # A program that torch.fx traces can be unpacked by names, and not otherwise.
    post_mix, comb_mix, layer_input = torch.ops.mhc.pre.default(
        residual, fn, hc_scale, hc_base, rms_eps, hc_pre_eps, hc_sinkhorn_eps,
        hc_post_mult_value, sinkhorn_repeat, norm_weight=norm_weight, norm_eps=norm_eps,
    )  # fmt: skip
    return PreOutput(post_mix, comb_mix, layer_input)

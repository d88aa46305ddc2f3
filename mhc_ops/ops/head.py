"""Define ``mhc::head``, which collapses the streams into the model's last hidden state."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ._define import define

# The CPU implementation is reference.head.


# The checks and the fake, CUDA and autograd implementations follow from the recipe.
define("head", cpu=reference.head)


def head(
    residual: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    rms_eps: float,
    hc_eps: float,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float | None = None,
) -> Tensor:
    """Collapse the residual streams after the last layer::

        m      = (sum_k r[k] * fn[:, k]) * rsqrt(mean_k(r[k]^2) + rms_eps)
        w      = sigmoid(m * scale + base) + hc_eps
        v      = sum_j w[j] * residual[j]
        hidden = bf16(v), or with a norm
                 bf16(bf16(v) * rsqrt(mean_h(v^2) + norm_eps) * norm_weight)

    All of it is computed in fp32. r is ``residual`` as one row of n * H elements, k counts these
    elements, h those of one stream, j the streams.

    The sum of the squares of r has to stay within fp32, which it does up to a root mean square of
    1.8e19 / sqrt(n * H), 1.1e17 at H = 7168. Beyond, the weights are finite and wrong.

    Source: ``DeepseekV4HyperHead.forward`` of transformers.

    Args:
        residual: [..., n, H] bf16, the residual streams; n = 4 and H a multiple of 256 on CUDA.
        fn: [n, n * H] fp32, projection; column index = stream * H + h.
        scale: [1] fp32, scale of the weights.
        base: [n] fp32, their biases.
        rms_eps: added to the mean square of the streams; at least 0.
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
        >>> residual = torch.ones(1, 4, 256, dtype=torch.bfloat16)
        >>> fn, scale, base = torch.zeros(4, 1024), torch.ones(1), torch.zeros(4)
        >>> mhc_ops.head(residual, fn, scale, base, 1e-6, 0.0).unique()
        tensor([2.], dtype=torch.bfloat16)
    """
    return torch.ops.mhc.head.default(
        residual, fn, scale, base, rms_eps, hc_eps, norm_weight=norm_weight, norm_eps=norm_eps
    )

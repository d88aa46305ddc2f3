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
    r"""Collapse the residual streams after the last layer.

    .. math::
        \begin{aligned}
        m &= \Big(\sum_k r_k\,\mathrm{fn}_{:,k}\Big)\,
             \mathrm{rsqrt}\big(\mathrm{mean}_k(r_k^2) + \mathrm{rms\_eps}\big) \\
        v &= \sum_j \big(\sigma(m_j\,s + b_j) + \mathrm{hc\_eps}\big)\,r_j,\qquad
        h = \mathrm{bf16}(v)\ \text{or}\
            \mathrm{bf16}\big(\mathrm{bf16}(v)\,
            \mathrm{rsqrt}(\mathrm{mean}_h(v^2) + \mathrm{norm\_eps})\,g\big)
        \end{aligned}

    in fp32, with k over all n * H elements of a token's streams; no Sinkhorn.

    Source: ``DeepseekV4HyperHead.forward`` of transformers.

    Args:
        residual: [..., n, H] bf16, the residual streams; n = 4 and H a multiple of 256 on CUDA.
        fn: [n, n * H] fp32, projection; column index = stream * H + h.
        scale: [1] fp32, scale s of the weights.
        base: [n] fp32, their biases b.
        rms_eps: added to the mean square of the streams; at least 0.
        hc_eps: added to the weights; at least 0.
        norm_weight: [H] bf16 (fp32 is cast), weight g of the final RMSNorm; None for none.
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

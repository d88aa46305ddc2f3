"""Define ``mhc::post``, which writes the output of a sublayer back into the streams."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ._define import define


def _cpu(x: Tensor, residual: Tensor, post_layer_mix: Tensor, comb_res_mix: Tensor) -> Tensor:
    return reference.post(x, residual, post_layer_mix, comb_res_mix).contiguous()


# The checks and the fake, CUDA and autograd implementations follow from the recipe.
define("post", cpu=_cpu)


def post(x: Tensor, residual: Tensor, post_layer_mix: Tensor, comb_res_mix: Tensor) -> Tensor:
    """Write a sublayer's output back into the residual streams::

        residual_out[j] = bf16(post_layer_mix[j] * x + sum_i comb_res_mix[i, j] * residual[i])

    The sum over the old streams i is computed in fp32 and rounded once. The two mixes are those
    that the pre step of the same sublayer returned.

    Source: mHC (Xie et al., 2026); ``DeepseekV4DecoderLayer.forward`` of transformers.

    Args:
        x: [..., H] bf16, output of the sublayer that just ran.
        residual: [..., n, H] bf16, the n residual streams before it; n = 4 and H a multiple of
            256 on CUDA.
        post_layer_mix: [..., n, 1] or [..., n] fp32, weight of x in each new stream.
        comb_res_mix: [..., n, n] fp32, stream mixing, indexed [old stream, new stream].

    Returns:
        The new streams, [..., n, H] bf16, contiguous, in memory of their own.

    Raises:
        ValueError: an argument of a wrong dtype, shape, device or memory layout (the last
            dimension must be contiguous and, on CUDA, the first element lie at an address that is
            a multiple of 16).
        RuntimeError: the CUDA kernels cannot serve the device, or a backward is asked for.

    Example:
        One token whose old streams are all 1, mixed evenly, and whose x is 2:

        >>> import torch, mhc_ops
        >>> x = torch.full((1, 256), 2.0, dtype=torch.bfloat16)
        >>> residual = torch.ones(1, 4, 256, dtype=torch.bfloat16)
        >>> streams = mhc_ops.post(x, residual, torch.ones(1, 4), torch.full((1, 4, 4), 0.25))
        >>> streams.shape, streams.unique()
        (torch.Size([1, 4, 256]), tensor([3.], dtype=torch.bfloat16))
    """
    return torch.ops.mhc.post.default(x, residual, post_layer_mix, comb_res_mix)

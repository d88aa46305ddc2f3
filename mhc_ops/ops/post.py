"""``mhc::post``: the output of a sublayer written back into the residual streams."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch, jit, reference, support
from .._checks import check_post
from .._library import register

# checks: _checks.check_post


# fake
def _fake(x: Tensor, residual: Tensor, post_layer_mix: Tensor, comb_res_mix: Tensor) -> Tensor:
    check_post("post", x, residual, post_layer_mix, comb_res_mix)
    return residual.new_empty(residual.shape)


# CUDA
def launch_post(
    x: Tensor, residual: Tensor, post_layer_mix: Tensor, comb_res_mix: Tensor
) -> Tensor:
    """One launch of the ``post`` kernel on checked arguments; returns the new streams."""
    hc_mult, hidden = residual.shape[-2:]
    residual_out = residual.new_empty(residual.shape)
    tokens = residual.numel() // (hc_mult * hidden)
    if tokens:
        jit.launch(
            dispatch.post_key(hidden, support.arch(residual.device)),
            residual.device,
            x.reshape(tokens, hidden).contiguous(),
            residual.reshape(tokens, hc_mult, hidden).contiguous(),
            post_layer_mix.reshape(tokens, hc_mult).contiguous(),
            comb_res_mix.reshape(tokens, hc_mult, hc_mult).contiguous(),
            residual_out.view(tokens, hc_mult, hidden),
        )
    return residual_out


def _cuda(x: Tensor, residual: Tensor, post_layer_mix: Tensor, comb_res_mix: Tensor) -> Tensor:
    check_post("post", x, residual, post_layer_mix, comb_res_mix)
    support.require("post", residual.device)
    return launch_post(x, residual, post_layer_mix, comb_res_mix)


# CPU
def _cpu(x: Tensor, residual: Tensor, post_layer_mix: Tensor, comb_res_mix: Tensor) -> Tensor:
    check_post("post", x, residual, post_layer_mix, comb_res_mix)
    return reference.post(x, residual, post_layer_mix, comb_res_mix).contiguous()


# autograd: forward only, registered for every op by _library.register
register("post", fake=_fake, cuda=_cuda, cpu=_cpu)


# public function
def post(x: Tensor, residual: Tensor, post_layer_mix: Tensor, comb_res_mix: Tensor) -> Tensor:
    r"""Write a sublayer's output back into the residual streams.

    .. math::
        r'_j = \mathrm{bf16}\Big(p_j\,x + \sum_i C_{ij}\,r_i\Big)

    computed in fp32 with one rounding. x is the sublayer's output, r the streams before it,
    p and C the weights that the pre step of the same sublayer made.

    Source: mHC (Xie et al., 2026); ``DeepseekV4DecoderLayer.forward`` of transformers.

    Args:
        x: [..., H] bf16, output of the sublayer that just ran.
        residual: [..., n, H] bf16, the n residual streams before it; n = 4 and H a multiple of
            256 on CUDA.
        post_layer_mix: [..., n, 1] or [..., n] fp32, weight of x in each new stream (p).
        comb_res_mix: [..., n, n] fp32, stream mixing C, indexed [old stream, new stream].

    Returns:
        The new streams: [..., n, H] bf16, contiguous, in memory of their own.

    Raises:
        ValueError: an argument of a wrong dtype, shape, device or memory layout (the last
            dimension must be contiguous and start at a multiple of 16 bytes).
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

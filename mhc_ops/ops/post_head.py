"""``mhc::post_head``: the last post step and the head as one op; the streams are not written."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch, jit, reference, support
from .._checks import check_collapse, check_post
from .._library import register
from .head import launch_head
from .post import launch_post


# checks: _checks.check_post, then _checks.check_collapse
def check_post_head(
    op: str,
    x: Tensor,
    residual: Tensor,
    post_layer_mix: Tensor,
    comb_res_mix: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    rms_eps: float,
    hc_eps: float,
    norm_weight: Tensor | None,
    norm_eps: float | None,
) -> None:
    """The checks of ``op``, which is this one or ``post_head_streams``."""
    check_collapse(
        op, residual, *check_post(op, x, residual, post_layer_mix, comb_res_mix),
        fn, scale, base, rms_eps, hc_eps, norm_weight, norm_eps,
    )  # fmt: skip


# fake
def _fake(
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
    check_post_head(
        "post_head", x, residual, post_layer_mix, comb_res_mix, fn, scale, base, rms_eps, hc_eps,
        norm_weight, norm_eps,
    )  # fmt: skip
    return residual.new_empty((*residual.shape[:-2], residual.shape[-1]))


# CUDA
def launch_post_head(
    x: Tensor,
    residual: Tensor,
    post_layer_mix: Tensor,
    comb_res_mix: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    rms_eps: float,
    hc_eps: float,
    norm_weight: Tensor | None,
    norm_eps: float | None,
    residual_out: Tensor | None,
    out: Tensor,
) -> None:
    """One launch of a ``post_head`` kernel, which writes ``out``, and the streams where asked."""
    hc_mult, hidden = residual.shape[-2:]
    tokens = residual.numel() // (hc_mult * hidden)
    streams = residual.reshape(tokens, hc_mult, hidden).contiguous()
    one_round = dispatch.takes_one_round(tokens, hidden)
    key = dispatch.post_head_key if one_round else dispatch.post_head_persistent_key
    jit.launch(
        key(
            hidden, support.arch(residual.device), norm_weight is not None, residual_out is not None
        ),
        residual.device,
        x.reshape(tokens, hidden).contiguous(),
        streams,
        post_layer_mix.reshape(tokens, hc_mult).contiguous(),
        comb_res_mix.reshape(tokens, hc_mult, hc_mult).contiguous(),
        fn.contiguous(),
        scale.contiguous(),
        base.contiguous(),
        *(() if norm_weight is None else (norm_weight.to(residual.dtype),)),
        streams if residual_out is None else residual_out.view(tokens, hc_mult, hidden),
        out.view(tokens, hidden),
        rms_eps,
        hc_eps,
        *(() if norm_weight is None else (norm_eps,)),
        *dispatch.post_head_share(tokens, hidden),
    )


def _cuda(
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
    check_post_head(
        "post_head", x, residual, post_layer_mix, comb_res_mix, fn, scale, base, rms_eps, hc_eps,
        norm_weight, norm_eps,
    )  # fmt: skip
    support.require("post_head", residual.device)
    hidden = residual.shape[-1]
    out = residual.new_empty((*residual.shape[:-2], hidden))
    if not residual.numel():
        return out
    if dispatch.takes_one_launch_end(hidden, support.arch(residual.device)):
        launch_post_head(
            x, residual, post_layer_mix, comb_res_mix, fn, scale, base, rms_eps, hc_eps,
            norm_weight, norm_eps, None, out,
        )  # fmt: skip
    else:
        streams = launch_post(x, residual, post_layer_mix, comb_res_mix)
        launch_head(streams, fn, scale, base, rms_eps, hc_eps, norm_weight, norm_eps, out)
    return out


# CPU
def _cpu(
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
    check_post_head(
        "post_head", x, residual, post_layer_mix, comb_res_mix, fn, scale, base, rms_eps, hc_eps,
        norm_weight, norm_eps,
    )  # fmt: skip
    return reference.head(
        reference.post(x, residual, post_layer_mix, comb_res_mix), fn, scale, base, rms_eps, hc_eps,
        norm_weight=norm_weight, norm_eps=norm_eps,
    )  # fmt: skip


# autograd: forward only, registered for every op by _library.register
register("post_head", fake=_fake, cuda=_cuda, cpu=_cpu)


# public function
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
    r"""The end of a model: the last post step, then the head of its result.

    .. math::
        h = \mathrm{head}\big(\mathrm{post}(x, r, p, C), \mathrm{fn}, s, b, \dots\big)

    with the formulas of :func:`mhc_ops.post` and :func:`mhc_ops.head`; the new streams are rounded
    as :func:`mhc_ops.post` rounds them, but not written. Where they are needed too, as for a draft
    layer, :func:`mhc_ops.post_head_streams` returns them.

    Source: mHC (Xie et al., 2026); ``DeepseekV4Model.forward`` of transformers.

    Args:
        x: [..., H] bf16, output of the last sublayer.
        residual: [..., n, H] bf16, the n residual streams before it; n = 4 and H a multiple of
            256 on CUDA.
        post_layer_mix: [..., n, 1] or [..., n] fp32, weight of x in each new stream (p).
        comb_res_mix: [..., n, n] fp32, stream mixing C, indexed [old stream, new stream].
        fn: [n, n * H] fp32, projection of the head; column index = stream * H + h.
        scale: [1] fp32, scale s of the weights.
        base: [n] fp32, their biases b.
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

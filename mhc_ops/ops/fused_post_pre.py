"""``mhc::fused_post_pre``: the boundary between two sublayers as one op."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import config, dispatch, host, jit, reference, support
from .._checks import check_mixing, check_post
from .._library import register
from .post import launch_post
from .pre import empty_outputs, launch_finish, launch_pre


# checks: _checks.check_post, then _checks.check_mixing; mhc_ops/_host.cpp serves a call without
# them where it is sure that they pass
def _check(
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
    norm_weight: Tensor | None,
    norm_eps: float | None,
) -> None:
    check_mixing(
        "fused_post_pre", residual,
        *check_post("fused_post_pre", x, residual, post_layer_mix, comb_res_mix),
        fn, hc_scale, hc_base, rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value,
        sinkhorn_repeat, norm_weight, norm_eps,
    )  # fmt: skip


# fake
def _fake(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(
        x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, rms_eps, hc_pre_eps,
        hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat, norm_weight, norm_eps,
    )  # fmt: skip
    return (residual.new_empty(residual.shape), *empty_outputs(residual))


# CUDA
# for the native way of the calls that follow, whatever their number of tokens
_GROUP_TOKENS = tuple(
    dispatch.group_tokens(tokens) for tokens in range(1, dispatch.ONE_LAUNCH_MAX_TOKENS + 1)
)


def launch_fused(
    x: Tensor,
    streams: Tensor,
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
    norm_weight: Tensor | None,
    norm_eps: float | None,
    streams_out: Tensor,
    outputs: tuple[Tensor, Tensor, Tensor],
) -> None:
    """The whole op as one launch, which writes the outputs.

    For few tokens, ``mhc_ops/_host.cpp`` does the same for the calls that follow.
    """
    tokens, hc_mult, hidden = streams.shape
    post_mix, comb_mix, layer_input = outputs
    fn = fn.contiguous()
    norm, arch = norm_weight is not None, support.arch(streams.device)
    few = dispatch.takes_one_launch(tokens, hidden, arch)
    if few:
        key = dispatch.fused_post_pre_key(hidden, arch, norm)
        share: tuple[int, ...] = (dispatch.group_tokens(tokens),)
    else:
        key = dispatch.persistent_key(hidden, arch, norm)
        share = dispatch.persistent_share(tokens, hidden)
    entry_point = jit.entry_point(key, streams.device)  # first: the table of what was read is there
    jit.launch(
        key,
        streams.device,
        x.reshape(tokens, hidden).contiguous(),
        streams,
        post_layer_mix.reshape(tokens, hc_mult, 1).contiguous(),
        comb_res_mix.reshape(tokens, hc_mult, hc_mult).contiguous(),
        fn,
        hc_scale.contiguous(),
        hc_base.contiguous(),
        *(() if norm_weight is None else (norm_weight.to(streams.dtype),)),
        streams_out,
        post_mix.view(tokens, hc_mult, 1),
        comb_mix.view(tokens, hc_mult, hc_mult),
        layer_input.view(tokens, hidden),
        rms_eps,
        hc_pre_eps,
        hc_sinkhorn_eps,
        hc_post_mult_value,
        sinkhorn_repeat,
        *(() if norm_weight is None else (norm_eps,)),
        *share,
        int(host.may_read_early(fn)),
    )
    if few:
        host.remember(streams.device, hidden, norm, entry_point, _GROUP_TOKENS)


def launch_post_projection(
    x: Tensor,
    streams: Tensor,
    post_layer_mix: Tensor,
    comb_res_mix: Tensor,
    fn: Tensor,
    streams_out: Tensor,
) -> Tensor:
    """One launch of the ``post_projection`` kernel, which writes ``streams_out``.

    Returns:
        [slices, tokens, PARTIAL_WIDTH] fp32, as ``launch_projection`` returns it.
    """
    tokens, hc_mult, hidden = streams.shape
    plan = dispatch.post_projection_plan(
        tokens, hidden, support.arch(streams.device), support.sm_count(streams.device)
    )
    partials = fn.new_empty((plan.slices, tokens, dispatch.PARTIAL_WIDTH))
    jit.launch(
        plan.key,
        streams.device,
        x.reshape(tokens, hidden).contiguous(),
        streams,
        post_layer_mix.reshape(tokens, hc_mult).contiguous(),
        comb_res_mix.reshape(tokens, hc_mult, hc_mult).contiguous(),
        fn.contiguous(),
        streams_out,
        partials,
        plan.tiles,
    )
    return partials


def _cuda(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(
        x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, rms_eps, hc_pre_eps,
        hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat, norm_weight, norm_eps,
    )  # fmt: skip
    support.require("fused_post_pre", residual.device)
    outputs = empty_outputs(residual)
    streams = residual.flatten(0, -3)
    if not streams.numel():
        return (residual.new_empty(residual.shape), *outputs)
    tokens, _, hidden = streams.shape
    size = tokens, hidden, support.arch(residual.device)
    if dispatch.takes_one_launch(*size) or dispatch.takes_persistent(
        *size, config.switch("MHC_OPS_BATCH_INVARIANT")
    ):
        residual_out = residual.new_empty(residual.shape)
        launch_fused(
            x, streams.contiguous(), post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, rms_eps,
            hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat, norm_weight, norm_eps,
            residual_out.view(streams.shape), outputs,
        )  # fmt: skip
    elif dispatch.takes_post_projection(tokens, hidden):
        residual_out = residual.new_empty(residual.shape)
        streams_out = residual_out.view(streams.shape)
        partials = launch_post_projection(
            x, streams.contiguous(), post_layer_mix, comb_res_mix, fn, streams_out
        )
        launch_finish(
            streams_out, partials, hc_scale, hc_base, rms_eps, hc_pre_eps, hc_sinkhorn_eps,
            hc_post_mult_value, sinkhorn_repeat, norm_weight, norm_eps, outputs,
        )  # fmt: skip
    else:
        residual_out = launch_post(x, residual, post_layer_mix, comb_res_mix)
        launch_pre(
            residual_out.view(streams.shape), fn, hc_scale, hc_base, rms_eps, hc_pre_eps,
            hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat, norm_weight, norm_eps, outputs,
        )  # fmt: skip
    return (residual_out, *outputs)


# CPU
def _cpu(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(
        x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, rms_eps, hc_pre_eps,
        hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat, norm_weight, norm_eps,
    )  # fmt: skip
    residual_out = reference.post(x, residual, post_layer_mix, comb_res_mix).contiguous()
    return (
        residual_out,
        *reference.pre(
            residual_out, fn, hc_scale, hc_base, rms_eps, hc_pre_eps, hc_sinkhorn_eps,
            hc_post_mult_value, sinkhorn_repeat, norm_weight=norm_weight, norm_eps=norm_eps,
        ),
    )  # fmt: skip


# autograd: forward only, registered for every op by _library.register
register("fused_post_pre", fake=_fake, cuda=_cuda, cpu=_cpu)


# public function
class FusedPostPreOutput(NamedTuple):
    """What :func:`fused_post_pre` returns.

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
    r"""The boundary between two sublayers: the post step of one and the pre step of the next.

    .. math::
        r' = \mathrm{post}(x, r, p, C),\qquad
        (p', C', y) = \mathrm{pre}(r', \mathrm{fn}, s, b, \dots)

    with the formulas of :func:`mhc_ops.post` and :func:`mhc_ops.pre`; the new streams are equal
    to those of :func:`mhc_ops.post` bit for bit.

    Source: mHC (Xie et al., 2026); ``DeepseekV4DecoderLayer.forward`` of transformers.

    Args:
        x: [..., H] bf16, output of the sublayer that just ran.
        residual: [..., n, H] bf16, the n residual streams before it; n = 4 and H a multiple of
            256 on CUDA.
        post_layer_mix: [..., n, 1] or [..., n] fp32, weight of x in each new stream (p).
        comb_res_mix: [..., n, n] fp32, stream mixing C, indexed [old stream, new stream].
        fn: [n * (n + 2), n * H] fp32, projection of the next sublayer's hyper-connection; column
            index = stream * H + h.
        hc_scale: [3] fp32, its scales s (pre, post, comb).
        hc_base: [n * (n + 2)] fp32, its biases b.
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
    """
    return FusedPostPreOutput(
        *torch.ops.mhc.fused_post_pre.default(
            x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, rms_eps, hc_pre_eps,
            hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat,
            norm_weight=norm_weight, norm_eps=norm_eps,
        )
    )  # fmt: skip

"""The programs of the kernels for ``fused_post_pre`` in clusters: one signature for both."""

import tilelang.language as T

from ..dispatch import CLUSTER
from ._device import HC_MULT, MIXES


def boundary_program(name: str, boundary, threads: int, hidden: int, *, norm: bool):
    """A kernel whose clusters take ``group_tokens`` tokens each.

    Args:
        name: of the kernel, before "_norm".
        boundary: macro of one CTA; takes what is asked for below, None for what is not there.
        threads: of a CTA.
        hidden: H, a multiple of 256 up to 7168.
        norm: whether the RMSNorm follows; adds the arguments norm_weight and norm_eps.

    Returns:
        The TileLang program: (x [n, H] bf16, residual [n, 4, H] bf16, post_layer_mix [n, 4, 1]
        fp32, comb_res_mix [n, 4, 4] fp32, fn [24, 4 * H] fp32, hc_scale [3] fp32, hc_base [24]
        fp32, norm_weight [H] bf16 if norm, residual_out [n, 4, H] bf16, post_mix [n, 4, 1] fp32,
        comb_mix [n, 4, 4] fp32, layer_input [n, H] bf16, rms_eps, hc_pre_eps, hc_sinkhorn_eps,
        hc_post_mult_value fp32, sinkhorn_repeat int32, norm_eps fp32 if norm, group_tokens int32:
        tokens of a cluster; early int32: whether fn may be read before the previous kernel has
        finished).
    """
    tokens = T.dynamic("tokens", "int32")

    @T.prim_func
    def plain(
        x: T.Tensor((tokens, hidden), "bfloat16"),
        residual: T.Tensor((tokens, HC_MULT, hidden), "bfloat16"),
        post_layer_mix: T.Tensor((tokens, HC_MULT, 1), "float32"),
        comb_res_mix: T.Tensor((tokens, HC_MULT, HC_MULT), "float32"),
        fn: T.Tensor((MIXES, HC_MULT * hidden), "float32"),
        hc_scale: T.Tensor((3,), "float32"),
        hc_base: T.Tensor((MIXES,), "float32"),
        residual_out: T.Tensor((tokens, HC_MULT, hidden), "bfloat16"),
        post_mix: T.Tensor((tokens, HC_MULT, 1), "float32"),
        comb_mix: T.Tensor((tokens, HC_MULT, HC_MULT), "float32"),
        layer_input: T.Tensor((tokens, hidden), "bfloat16"),
        rms_eps: T.float32,
        hc_pre_eps: T.float32,
        hc_sinkhorn_eps: T.float32,
        hc_post_mult_value: T.float32,
        sinkhorn_repeat: T.int32,
        group_tokens: T.int32,
        early: T.int32,
    ):
        with T.Kernel(
            T.ceildiv(tokens, group_tokens) * CLUSTER,
            threads=threads,
            cluster_dims=(CLUSTER, 1, 1),
        ) as i_c:
            boundary(
                x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, None,
                residual_out, post_mix, comb_mix, layer_input, rms_eps, hc_pre_eps,
                hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat, None, group_tokens, early,
                tokens, i_c, hidden, False,
            )  # fmt: skip

    @T.prim_func
    def with_norm(
        x: T.Tensor((tokens, hidden), "bfloat16"),
        residual: T.Tensor((tokens, HC_MULT, hidden), "bfloat16"),
        post_layer_mix: T.Tensor((tokens, HC_MULT, 1), "float32"),
        comb_res_mix: T.Tensor((tokens, HC_MULT, HC_MULT), "float32"),
        fn: T.Tensor((MIXES, HC_MULT * hidden), "float32"),
        hc_scale: T.Tensor((3,), "float32"),
        hc_base: T.Tensor((MIXES,), "float32"),
        norm_weight: T.Tensor((hidden,), "bfloat16"),
        residual_out: T.Tensor((tokens, HC_MULT, hidden), "bfloat16"),
        post_mix: T.Tensor((tokens, HC_MULT, 1), "float32"),
        comb_mix: T.Tensor((tokens, HC_MULT, HC_MULT), "float32"),
        layer_input: T.Tensor((tokens, hidden), "bfloat16"),
        rms_eps: T.float32,
        hc_pre_eps: T.float32,
        hc_sinkhorn_eps: T.float32,
        hc_post_mult_value: T.float32,
        sinkhorn_repeat: T.int32,
        norm_eps: T.float32,
        group_tokens: T.int32,
        early: T.int32,
    ):
        with T.Kernel(
            T.ceildiv(tokens, group_tokens) * CLUSTER,
            threads=threads,
            cluster_dims=(CLUSTER, 1, 1),
        ) as i_c:
            boundary(
                x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, norm_weight,
                residual_out, post_mix, comb_mix, layer_input, rms_eps, hc_pre_eps,
                hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat, norm_eps, group_tokens,
                early, tokens, i_c, hidden, True,
            )  # fmt: skip

    program = with_norm if norm else plain
    return program.with_attr("global_symbol", f"{name}_norm" if norm else name)

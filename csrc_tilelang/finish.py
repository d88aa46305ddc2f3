"""finish: mixes, Sinkhorn, collapse and RMSNorm of one token from its projection.

Algorithm: one CTA a token. All warps add up the token's partial rows; after the only CTA-wide
barrier each knows all 25 sums, lane c the sum of column c. The collapse warps then work out the 4
collapse weights and the layer input from streams that are already in registers; the norm needs one
barrier among them. Meanwhile the last warp makes the post weights and runs Sinkhorn, the long pole,
on the 4 x 4 matrix in registers; it waits for nobody and nobody waits for it.
"""

import tilelang.language as T

from ._collapse import (
    add_partials,
    collapse,
    collapse_threads,
    ctas_per_sm,
    load_gain,
    load_streams,
    logits,
    normalise,
    repetitions,
    sigmoid,
    store_values,
)
from ._device import DEVICE_SOURCE, HC_MULT, MIXES, PARTIAL_WIDTH, VECTOR, WARP
from ._sinkhorn import COMB, sinkhorn, softmax_row


@T.macro
def finish_token(
    residual, partials, splits, hc_scale, hc_base, gain, post_mix, comb_mix, layer_input,
    rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat, norm_eps,
    i_t, hidden, norm, pdl,
):  # fmt: skip
    """The whole of one token; ``gain`` and ``norm_eps`` are read when ``norm`` is true."""
    T.import_source(DEVICE_SOURCE)
    T.annotate_min_blocks_per_sm(ctas_per_sm(hidden))
    threads = collapse_threads(hidden)
    reps = repetitions(hidden)
    warps = threads // WARP + 1
    tx = T.get_thread_binding()
    lane = tx % WARP
    warp = tx // WARP
    streams_local = T.alloc_local((reps * HC_MULT * VECTOR,), "bfloat16")
    value_local = T.alloc_local((reps * VECTOR,), "bfloat16")
    gain_local = T.alloc_local((reps * VECTOR,), "bfloat16")
    total = T.alloc_local((1,), "float32")
    scale_local = T.alloc_local((1,), "float32")
    base_local = T.alloc_local((1,), "float32")
    logit = T.alloc_local((1,), "float32")
    mix = T.alloc_local((1,), "float32")
    squares = T.alloc_local((1,), "float32")
    comb_local = T.alloc_local((HC_MULT * HC_MULT,), "float32")
    sums_shared = T.alloc_shared((warps, PARTIAL_WIDTH), "float32")
    norm_shared = T.alloc_shared((warps,), "float32")

    if pdl:
        T.pdl_sync()
        T.pdl_trigger()
    if tx < threads:
        load_streams(residual, i_t, tx, threads, reps, hidden, streams_local)
        if norm:
            load_gain(gain, tx, threads, reps, hidden, gain_local)

    # loaded ahead of the barrier, where they would cost a trip to L2
    scale_local[0] = 0.0
    base_local[0] = 0.0
    if lane < MIXES:
        scale_local[0] = hc_scale[
            T.if_then_else(lane < HC_MULT, 0, T.if_then_else(lane < COMB, 1, 2))
        ]
        base_local[0] = hc_base[lane]

    # m = projection * rsqrt(mean square + rms_eps), one column a lane; then scale and base
    add_partials(partials, splits, MIXES, i_t, warp, warps, lane, sums_shared, total)
    logits(total, HC_MULT * hidden, rms_eps, scale_local, base_local, logit)

    if tx < threads:
        # collapse: v = sum_j (sigmoid(m_j) + hc_pre_eps) * r_j, then the RMSNorm
        sigmoid(logit[0], mix)
        mix[0] = mix[0] + hc_pre_eps
        collapse(streams_local, mix, tx, threads, reps, hidden, value_local, squares)
        if norm:
            normalise(
                value_local, gain_local, squares, tx, threads, reps, hidden, norm_eps, norm_shared
            )
        store_values(value_local, i_t, tx, threads, reps, hidden, layer_input)
    else:
        # post' = sigmoid(m) * hc_post_mult_value
        sigmoid(logit[0], mix)
        if lane >= HC_MULT and lane < COMB:
            post_mix[i_t, lane - HC_MULT] = mix[0] * hc_post_mult_value
        # comb' = Sinkhorn(softmax_rows(m))
        softmax_row(logit, hc_sinkhorn_eps, mix)
        for q in T.unroll(HC_MULT * HC_MULT):
            comb_local[q] = T.shfl_sync(mix[0], COMB + q)
        sinkhorn(comb_local, hc_sinkhorn_eps, sinkhorn_repeat)
        if lane == 0:
            for i in T.unroll(HC_MULT):
                for j in T.vectorized(HC_MULT):
                    comb_mix[i_t, i, j] = comb_local[i * HC_MULT + j]


def finish(hidden: int, *, norm: bool, pdl: bool):
    """Build the finish kernel.

    Args:
        hidden: H, a multiple of 256.
        norm: whether the RMSNorm follows; adds the arguments norm_weight and norm_eps.
        pdl: take part in programmatic dependent launch (sm_90 and later).

    Returns:
        The TileLang program: (residual [n, 4, H] bf16, partials [splits, n, 32] fp32, hc_scale [3]
        fp32, hc_base [24] fp32, norm_weight [H] bf16 if norm, post_mix [n, 4] fp32, comb_mix
        [n, 4, 4] fp32, layer_input [n, H] bf16, rms_eps, hc_pre_eps, hc_sinkhorn_eps,
        hc_post_mult_value fp32, sinkhorn_repeat int32, norm_eps fp32 if norm).
    """
    tokens = T.dynamic("tokens", "int64")
    splits = T.dynamic("splits", "int32")
    threads = collapse_threads(hidden) + WARP

    @T.prim_func
    def mhc_finish(
        residual: T.Tensor((tokens, HC_MULT, hidden), "bfloat16"),
        partials: T.Tensor((splits, tokens, PARTIAL_WIDTH), "float32"),
        hc_scale: T.Tensor((3,), "float32"),
        hc_base: T.Tensor((MIXES,), "float32"),
        post_mix: T.Tensor((tokens, HC_MULT), "float32"),
        comb_mix: T.Tensor((tokens, HC_MULT, HC_MULT), "float32"),
        layer_input: T.Tensor((tokens, hidden), "bfloat16"),
        rms_eps: T.float32,
        hc_pre_eps: T.float32,
        hc_sinkhorn_eps: T.float32,
        hc_post_mult_value: T.float32,
        sinkhorn_repeat: T.int32,
    ):
        with T.Kernel(tokens, threads=threads) as i_t:
            finish_token(
                residual, partials, splits, hc_scale, hc_base, None, post_mix, comb_mix,
                layer_input, rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value,
                sinkhorn_repeat, None, i_t, hidden, False, pdl,
            )  # fmt: skip

    @T.prim_func
    def mhc_finish_norm(
        residual: T.Tensor((tokens, HC_MULT, hidden), "bfloat16"),
        partials: T.Tensor((splits, tokens, PARTIAL_WIDTH), "float32"),
        hc_scale: T.Tensor((3,), "float32"),
        hc_base: T.Tensor((MIXES,), "float32"),
        norm_weight: T.Tensor((hidden,), "bfloat16"),
        post_mix: T.Tensor((tokens, HC_MULT), "float32"),
        comb_mix: T.Tensor((tokens, HC_MULT, HC_MULT), "float32"),
        layer_input: T.Tensor((tokens, hidden), "bfloat16"),
        rms_eps: T.float32,
        hc_pre_eps: T.float32,
        hc_sinkhorn_eps: T.float32,
        hc_post_mult_value: T.float32,
        sinkhorn_repeat: T.int32,
        norm_eps: T.float32,
    ):
        with T.Kernel(tokens, threads=threads) as i_t:
            finish_token(
                residual, partials, splits, hc_scale, hc_base, norm_weight, post_mix, comb_mix,
                layer_input, rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value,
                sinkhorn_repeat, norm_eps, i_t, hidden, True, pdl,
            )  # fmt: skip

    return mhc_finish_norm if norm else mhc_finish

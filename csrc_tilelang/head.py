"""head: the last collapse of the streams, and the final RMSNorm, from their projection.

Algorithm: as ``finish`` without post weights and Sinkhorn. One CTA a token adds up the token's
partial rows, works out the 4 collapse weights and collapses streams already in registers.
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
from ._device import DEVICE_SOURCE, HC_MULT, PARTIAL_WIDTH, VECTOR, WARP


@T.macro
def head_token(
    residual, partials, splits, hc_scale, hc_base, gain, out, rms_eps, hc_eps, norm_eps,
    i_t, hidden, norm, pdl,
):  # fmt: skip
    """The whole of one token; ``gain`` and ``norm_eps`` are read when ``norm`` is true."""
    T.import_source(DEVICE_SOURCE)
    T.annotate_min_blocks_per_sm(ctas_per_sm(hidden))
    threads = collapse_threads(hidden)
    reps = repetitions(hidden)
    warps = threads // WARP
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
    sums_shared = T.alloc_shared((warps, PARTIAL_WIDTH), "float32")
    norm_shared = T.alloc_shared((warps,), "float32")

    if pdl:
        T.pdl_sync()
        T.pdl_trigger()
    load_streams(residual, i_t, tx, threads, reps, hidden, streams_local)
    if norm:
        load_gain(gain, tx, threads, reps, hidden, gain_local)
    scale_local[0] = hc_scale[0]
    base_local[0] = 0.0
    if lane < HC_MULT:
        base_local[0] = hc_base[lane]

    # m = projection * rsqrt(mean square + rms_eps), one column a lane; then scale and base
    add_partials(partials, splits, HC_MULT, i_t, warp, warps, lane, sums_shared, total)
    logits(total, HC_MULT * hidden, rms_eps, scale_local, base_local, logit)

    # collapse: v = sum_j (sigmoid(m_j) + hc_eps) * r_j, then the RMSNorm
    sigmoid(logit[0], mix)
    mix[0] = mix[0] + hc_eps
    collapse(streams_local, mix, tx, threads, reps, hidden, value_local, squares)
    if norm:
        normalise(
            value_local, gain_local, squares, tx, threads, reps, hidden, norm_eps, norm_shared
        )
    store_values(value_local, i_t, tx, threads, reps, hidden, out)


def head(hidden: int, *, norm: bool, pdl: bool):
    """Build the head kernel.

    Args:
        hidden: H, a multiple of 256.
        norm: whether the RMSNorm follows; adds the arguments norm_weight and norm_eps.
        pdl: take part in programmatic dependent launch (sm_90 and later).

    Returns:
        The TileLang program: (residual [n, 4, H] bf16, partials [splits, n, 32] fp32, scale [1]
        fp32, base [4] fp32, norm_weight [H] bf16 if norm, out [n, H] bf16, rms_eps, hc_eps fp32,
        norm_eps fp32 if norm).
    """
    tokens = T.dynamic("tokens", "int64")
    splits = T.dynamic("splits", "int32")
    threads = collapse_threads(hidden)

    @T.prim_func
    def mhc_head(
        residual: T.Tensor((tokens, HC_MULT, hidden), "bfloat16"),
        partials: T.Tensor((splits, tokens, PARTIAL_WIDTH), "float32"),
        hc_scale: T.Tensor((1,), "float32"),
        hc_base: T.Tensor((HC_MULT,), "float32"),
        out: T.Tensor((tokens, hidden), "bfloat16"),
        rms_eps: T.float32,
        hc_eps: T.float32,
    ):
        with T.Kernel(tokens, threads=threads) as i_t:
            head_token(
                residual, partials, splits, hc_scale, hc_base, None, out, rms_eps, hc_eps, None,
                i_t, hidden, False, pdl,
            )  # fmt: skip

    @T.prim_func
    def mhc_head_norm(
        residual: T.Tensor((tokens, HC_MULT, hidden), "bfloat16"),
        partials: T.Tensor((splits, tokens, PARTIAL_WIDTH), "float32"),
        hc_scale: T.Tensor((1,), "float32"),
        hc_base: T.Tensor((HC_MULT,), "float32"),
        norm_weight: T.Tensor((hidden,), "bfloat16"),
        out: T.Tensor((tokens, hidden), "bfloat16"),
        rms_eps: T.float32,
        hc_eps: T.float32,
        norm_eps: T.float32,
    ):
        with T.Kernel(tokens, threads=threads) as i_t:
            head_token(
                residual, partials, splits, hc_scale, hc_base, norm_weight, out, rms_eps, hc_eps,
                norm_eps, i_t, hidden, True, pdl,
            )  # fmt: skip

    return mhc_head_norm if norm else mhc_head

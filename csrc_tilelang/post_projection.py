"""post_projection: post, the pre-norm projection and the sum of squares in one launch.

Algorithm, for small batches: a CTA owns 32 hidden elements in all 4 streams, 128 columns of fn.
Its warp j owns stream j: it keeps a 24 x 32 block of fn in registers, split in three bf16 terms,
and walks over tiles of 16 tokens. It computes the new elements of its stream in the layout of an
mma.m16n8k16 A fragment: they go from the post step to the tensor cores without shared memory.
The contraction index is permuted to make 16-byte loads of both operands fragments: logical k of
steps 0 and 1 at position q of a lane quad is physical 8 q to 8 q + 7. bf16 streams times a
three-term fn is exact to fp32. The 4 warps add up through shared memory and write one partial row a
token.

A fixed slice of hidden elements is summed in a fixed order: a token's partials are the same bits in
any batch.
"""

import tilelang.language as T

from ..geometry import POST_PROJECTION_SLICE as SLICE
from ._device import (
    DEVICE_SOURCE,
    HC_MULT,
    MIXES,
    MMA_COLUMNS,
    MMA_HALF,
    MMA_TOKENS,
    PARTIAL_WIDTH,
    SQUARES,
    SUMS_STRIDE,
    TILE_TERMS,
    VECTOR,
    WARP,
)
from ._steps import (
    add_projection,
    add_squares,
    clear_sums,
    load_weights,
    mix_stream,
    split_weights,
    store_sums,
    tile_sums,
)

THREADS = HC_MULT * WARP
COLUMN_TILES = MIXES // MMA_COLUMNS


def post_projection(hidden: int, *, pdl: bool):
    """Build the post_projection kernel.

    Args:
        hidden: H, a multiple of 32.
        pdl: take part in programmatic dependent launch (sm_90 and later).

    Returns:
        The TileLang program: (x [n, H] bf16, residual [n, 4, H] bf16, post_layer_mix [n, 4] fp32,
        comb_res_mix [n, 4, 4] fp32, fn [24, 4 * H] fp32, residual_out [n, 4, H] bf16, partials
        [H / 32, n, 32] fp32, tiles int32: token tiles of 16 that a CTA takes one after another).
    """
    tokens = T.dynamic("tokens", "int64")
    slices = hidden // SLICE

    @T.prim_func
    def mhc_post_projection(
        x: T.Tensor((tokens, hidden), "bfloat16"),
        residual: T.Tensor((tokens, HC_MULT, hidden), "bfloat16"),
        post_layer_mix: T.Tensor((tokens, HC_MULT), "float32"),
        comb_res_mix: T.Tensor((tokens, HC_MULT, HC_MULT), "float32"),
        fn: T.Tensor((MIXES, HC_MULT * hidden), "float32"),
        residual_out: T.Tensor((tokens, HC_MULT, hidden), "bfloat16"),
        partials: T.Tensor((slices, tokens, PARTIAL_WIDTH), "float32"),
        tiles: T.int32,
    ):
        with T.Kernel(slices, T.ceildiv(tokens, MMA_TOKENS * tiles), threads=THREADS) as (
            i_s,
            group,
        ):
            T.import_source(DEVICE_SOURCE)
            tx = T.get_thread_binding()
            lane = tx % WARP
            stream = tx // WARP
            row = lane // 4
            h = i_s * SLICE + (lane % 4) * VECTOR
            k = stream * hidden + h

            weights_local = T.alloc_local((COLUMN_TILES * VECTOR,), "float32")
            terms_local = T.alloc_local((COLUMN_TILES * TILE_TERMS,), "uint32")
            x_local = T.alloc_local((2 * VECTOR,), "bfloat16")
            streams_local = T.alloc_local((2 * HC_MULT * VECTOR,), "bfloat16")
            post_local = T.alloc_local((2,), "float32")
            comb_local = T.alloc_local((2 * HC_MULT,), "float32")
            new_local = T.alloc_local((2 * VECTOR,), "bfloat16")
            words_local = T.view(new_local, (VECTOR,), "uint32")
            sums_local = T.alloc_local((tile_sums(COLUMN_TILES),), "float32")
            sums_shared = T.alloc_shared((HC_MULT, MMA_TOKENS, SUMS_STRIDE), "float32")

            # fn is a weight: on its way to L2 while the previous kernel still runs. It is read
            # after the sync only, in case that kernel has just written it.
            if pdl:
                for n in T.unroll(COLUMN_TILES):
                    T.call_extern(
                        "handle",
                        "mhc::prefetch_l2",
                        T.access_ptr(fn[n * MMA_COLUMNS + row, k], "r"),
                    )
                T.pdl_sync()
                T.pdl_trigger()
            load_weights(fn, row, k, COLUMN_TILES, MIXES, weights_local)
            for n in T.unroll(COLUMN_TILES):
                split_weights(weights_local, n, terms_local, n * TILE_TERMS)

            for tile in T.serial(tiles):
                t0 = (T.cast(group, "int64") * tiles + tile) * MMA_TOKENS
                for half in T.unroll(2):
                    i_t = T.min(t0 + half * MMA_HALF + row, tokens - 1)
                    for v in T.vectorized(VECTOR):
                        x_local[half * VECTOR + v] = x[i_t, h + v]
                    for i in T.unroll(HC_MULT):
                        for v in T.vectorized(VECTOR):
                            streams_local[(half * HC_MULT + i) * VECTOR + v] = residual[
                                i_t, i, h + v
                            ]
                    post_local[half] = post_layer_mix[i_t, stream]
                    for i in T.unroll(HC_MULT):
                        comb_local[half * HC_MULT + i] = comb_res_mix[i_t, i, stream]

                # post: r'[j] = bf16(post[j] * x + sum_i comb[i, j] * r[i]), j = this warp's stream
                for half in T.unroll(2):
                    mix_stream(
                        x_local, half * VECTOR, streams_local, half * HC_MULT * VECTOR,
                        post_local[half], comb_local, half * HC_MULT, 1,
                        new_local, half * VECTOR, VECTOR,
                    )  # fmt: skip
                    if t0 + half * MMA_HALF + row < tokens:
                        for v in T.vectorized(VECTOR):
                            residual_out[t0 + half * MMA_HALF + row, stream, h + v] = new_local[
                                half * VECTOR + v
                            ]

                # projection and sum of squares over this warp's 32 columns, then over the 4 warps
                clear_sums(sums_local, 1, COLUMN_TILES)
                for n in T.unroll(COLUMN_TILES):
                    add_projection(
                        words_local, 1, terms_local, n * TILE_TERMS, n, COLUMN_TILES, sums_local
                    )
                add_squares(words_local, 1, COLUMN_TILES, sums_local)
                store_sums(sums_local, 0, COLUMN_TILES, lane, sums_shared, stream, 0)
                T.sync_threads()
                for q in T.unroll(MMA_TOKENS // HC_MULT):
                    t = q * HC_MULT + stream
                    if t0 + t < tokens and lane <= SQUARES:
                        total = T.alloc_var("float32", init=0.0)
                        total = sums_shared[0, t, lane]
                        for j in T.unroll(HC_MULT - 1):
                            total = total + sums_shared[j + 1, t, lane]
                        partials[i_s, t0 + t, lane] = total
                T.sync_threads()

    return mhc_post_projection

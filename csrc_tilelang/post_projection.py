"""post_projection: post, the pre-norm projection and the sum of squares in one launch.

Algorithm, for small batches: a CTA owns 32 hidden elements in all 4 streams, 128 columns of fn.
Warp j of the CTA owns stream j: the warp keeps a 24 x 32 block of fn in registers, split in three
bf16 terms, and walks over tiles of 16 tokens. The warp computes the new elements of its stream in
the layout of an A fragment (steps/rows.py), so these go from the post step to the tensor cores
without shared memory.

A fixed slice of hidden elements is summed in a fixed order: a token's partials are the same bits in
any batch.
"""

import tilelang.language as T

from .arguments import Post
from .device import SOURCE
from .layout import (
    HC_MULT,
    MIXES,
    MMA_TOKENS,
    PARTIAL_WIDTH,
    POST_PROJECTION_SLICE,
    VECTOR,
    WARP,
)
from .steps import rows as steps
from .steps.post import Comb, Old, load_old, mix_stream

THREADS = HC_MULT * WARP
COLUMN_TILES = steps.column_tiles(MIXES)


def old_of(half, x_local, streams_local) -> Old:
    """What a lane holds of its token row ``half`` of a tile."""
    return Old(x_local, streams_local, VECTOR, half * VECTOR, half * HC_MULT * VECTOR)


@T.macro
def load_column(post, t, stream, half, post_local, comb_local):
    """The post weight of new stream ``stream`` of token ``t``, and the column of its comb."""
    post_local[half] = post.post_layer_mix[t, stream]
    for i in T.unroll(HC_MULT):
        comb_local[half * HC_MULT + i] = post.comb_res_mix[t, i, stream]


def post_projection(hidden: int, *, pdl: bool):
    """Build the post_projection kernel.

    Args:
        hidden: H, a multiple of 32.
        pdl: take part in programmatic dependent launch (sm_90 and later).

    Returns:
        The TileLang program, whose ``tiles`` is the number of token tiles that a CTA takes one
        after another.
    """
    tokens = T.dynamic("tokens", "int32")
    slices = hidden // POST_PROJECTION_SLICE

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
            i0_h,
            i0_t,
        ):
            T.import_source(SOURCE)
            tx = T.get_thread_binding()
            lane = tx % WARP
            stream = tx // WARP
            row = lane // 4
            h = i0_h * POST_PROJECTION_SLICE + lane % 4 * VECTOR
            post = Post(x, residual, post_layer_mix, comb_res_mix, residual_out)

            weights_local = T.alloc_local((COLUMN_TILES * VECTOR,), "float32")
            terms_local = T.alloc_local((COLUMN_TILES * steps.TILE_TERMS,), "uint32")
            x_local = T.alloc_local((2 * VECTOR,), "bfloat16")
            streams_local = T.alloc_local((2 * HC_MULT * VECTOR,), "bfloat16")
            post_local = T.alloc_local((2,), "float32")
            comb_local = T.alloc_local((2 * HC_MULT,), "float32")
            new_local = T.alloc_local((2 * VECTOR,), "bfloat16")
            new_tiles = steps.tiles_of_warp(new_local, MIXES)
            sums_shared = T.alloc_shared((HC_MULT, MMA_TOKENS, steps.SUMS_STRIDE), "float32")

            if pdl:
                steps.prefetch_weights(fn, row, stream * hidden + h)
                T.pdl_sync()
                T.pdl_trigger()
            steps.load_weights(fn, row, stream * hidden + h, weights_local)
            for n in T.unroll(COLUMN_TILES):
                steps.split_weights(weights_local, n, terms_local, n * steps.TILE_TERMS)

            for i1_t in T.serial(tiles):
                t0 = (i0_t * tiles + i1_t) * MMA_TOKENS
                for half in T.unroll(2):
                    t = T.min(t0 + steps.token_row(lane, half), tokens - 1)
                    load_old(post, t, h, old_of(half, x_local, streams_local))
                    load_column(post, t, stream, half, post_local, comb_local)
                for half in T.unroll(2):
                    mix_stream(
                        old_of(half, x_local, streams_local), post_local[half],
                        Comb(comb_local, half * HC_MULT, 1), new_local, half * VECTOR,
                    )  # fmt: skip
                    t = t0 + steps.token_row(lane, half)
                    if t < tokens:
                        for v in T.vectorized(VECTOR):
                            residual_out[t, stream, h + v] = new_local[half * VECTOR + v]

                steps.clear_sums(new_tiles)
                for n in T.unroll(COLUMN_TILES):
                    steps.add_projection(new_tiles, terms_local, n * steps.TILE_TERMS, n)
                steps.add_squares(new_tiles)
                steps.store_sums(new_tiles, 0, lane, sums_shared, stream)
                T.sync_threads()
                steps.store_partials(sums_shared, partials, i0_h, t0, stream, lane, MIXES)
                T.sync_threads()

    return mhc_post_projection

"""projection: the split-K pre-norm projection of the streams, with their sum of squares.

Algorithm: skinny matrix product [n, 4 H] x [4 H, rows], rows = 24 (pre) or 4 (head), by the steps
of steps/rows.py. K is cut into blocks of 32 columns. A CTA takes one split, which is a run of
blocks, and one run of token tiles; the 4 warps of the CTA take the blocks of the split in turn, so
that the CTA reads 256 consecutive bytes of a token's streams at a time. Both operands go from
global memory straight into fragments, and no shared memory is in the loop: bytes in flight come
from the number of warps. The split count is the first dimension of ``partials`` and is not compiled
in.
"""

import tilelang.language as T

from .device import SOURCE
from .layout import (
    HC_MULT,
    MMA_TOKENS,
    PARTIAL_WIDTH,
    PROJECTION_BLOCK,
    PROJECTION_WARPS,
    VECTOR,
    WARP,
)
from .steps import rows as steps

THREADS = PROJECTION_WARPS * WARP


@T.macro
def load_streams(residual, t0, lane, k, streams_local):
    """8 columns from ``k`` on of a lane's token rows; past the last token that token's again."""
    for half in T.unroll(streams_local.shape[0] // VECTOR):
        t = T.min(t0 + steps.token_row(lane, half), residual.shape[0] - 1)
        for v in T.vectorized(VECTOR):
            streams_local[half * VECTOR + v] = residual[t, k + v]


def projection(hidden: int, *, rows: int, token_tiles: int, ctas_per_sm: int, pdl: bool):
    """Build the projection kernel.

    Args:
        hidden: H, a multiple of 8.
        rows: rows of fn, at most 24.
        token_tiles: tiles of 16 tokens a CTA; more of them read and split fn less often.
        ctas_per_sm: CTAs that the register count must allow on an SM.
        pdl: take part in programmatic dependent launch (sm_90 and later).

    Returns:
        The TileLang program, whose ``blocks_per_split`` is the number of blocks that a split takes.
    """
    tokens = T.dynamic("tokens", "int32")
    splits = T.dynamic("splits", "int32")
    columns = HC_MULT * hidden
    column_tiles = steps.column_tiles(rows)
    cta_tokens = token_tiles * MMA_TOKENS

    @T.prim_func
    def mhc_projection(
        residual: T.Tensor((tokens, columns), "bfloat16"),
        fn: T.Tensor((rows, columns), "float32"),
        partials: T.Tensor((splits, tokens, PARTIAL_WIDTH), "float32"),
        blocks_per_split: T.int32,
    ):
        with T.Kernel(splits, T.ceildiv(tokens, cta_tokens), threads=THREADS) as (split, i0_t):
            T.import_source(SOURCE)
            T.annotate_min_blocks_per_sm(ctas_per_sm)
            tx = T.get_thread_binding()
            lane = tx % WARP
            warp = tx // WARP
            row = lane // 4
            t0 = i0_t * cta_tokens
            first = split * blocks_per_split + warp
            last = T.min((split + 1) * blocks_per_split, columns // PROJECTION_BLOCK)

            weights_local = T.alloc_local((column_tiles * VECTOR,), "float32")
            terms_local = T.alloc_local((steps.TILE_TERMS,), "uint32")
            streams_local = T.alloc_local((token_tiles * 2 * VECTOR,), "bfloat16")
            tiles = steps.tiles_of_warp(streams_local, rows)
            sums_shared = T.alloc_shared(
                (PROJECTION_WARPS, cta_tokens, steps.SUMS_STRIDE), "float32"
            )

            steps.clear_sums(tiles)
            if pdl:
                k = first * PROJECTION_BLOCK + lane % 4 * VECTOR
                steps.prefetch_weights(fn, row, k, first < last)
                T.pdl_sync()
                T.pdl_trigger()
            for i in T.serial(T.ceildiv(last - first, PROJECTION_WARPS)):
                k = (first + i * PROJECTION_WARPS) * PROJECTION_BLOCK + lane % 4 * VECTOR
                load_streams(residual, t0, lane, k, streams_local)
                steps.load_weights(fn, row, k, weights_local)
                for n in T.unroll(column_tiles):
                    steps.split_weights(weights_local, n, terms_local, 0)
                    steps.add_projection(tiles, terms_local, 0, n)
                steps.add_squares(tiles)

            for tile in T.unroll(token_tiles):
                steps.store_sums(tiles, tile, lane, sums_shared, warp)
            T.sync_threads()
            steps.store_partials(sums_shared, partials, split, t0, warp, lane, rows)

    return mhc_projection

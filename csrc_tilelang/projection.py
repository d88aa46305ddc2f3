"""projection: the split-K pre-norm projection of the streams, with their sum of squares.

Algorithm: skinny matrix product [n, 4 H] x [4 H, rows], rows = 24 (pre) or 4 (head), on bf16
tensor cores with fn split in registers into three bf16 terms, which is exact to fp32 for bf16
streams. K is cut into blocks of 32 columns; a CTA takes one split, a run of blocks, and one tile of
tokens; its 4 warps take the blocks of the split in turn, so that a CTA reads 256 consecutive bytes
of a token's streams at a time. Both operands go from global memory straight into fragments: the
contraction index is permuted as in post_projection. No shared memory in the loop; bytes in flight
come from the number of warps. The split count is the first dimension of ``partials``: it is not
compiled in.
"""

import tilelang.language as T

from ..geometry import PROJECTION_BLOCK as BLOCK
from ..geometry import PROJECTION_WARPS as WARPS
from ._device import (
    DEVICE_SOURCE,
    HC_MULT,
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
    split_weights,
    store_sums,
    tile_sums,
)

THREADS = WARPS * WARP


def projection(hidden: int, *, rows: int, token_tiles: int, ctas_per_sm: int, pdl: bool):
    """Build the projection kernel.

    Args:
        hidden: H, a multiple of 8.
        rows: rows of fn, at most 24.
        token_tiles: tiles of 16 tokens a CTA; more of them read and split fn less often.
        ctas_per_sm: CTAs that the register count must allow on an SM.
        pdl: take part in programmatic dependent launch (sm_90 and later).

    Returns:
        The TileLang program: (residual [n, 4 * H] bf16, fn [rows, 4 * H] fp32, partials
        [splits, n, 32] fp32, blocks_per_split int32: blocks of 32 columns that a split takes).
    """
    tokens = T.dynamic("tokens", "int64")
    splits = T.dynamic("splits", "int32")
    columns = HC_MULT * hidden
    blocks = columns // BLOCK
    column_tiles = -(-rows // MMA_COLUMNS)
    token_tile = token_tiles * MMA_TOKENS

    @T.prim_func
    def mhc_projection(
        residual: T.Tensor((tokens, columns), "bfloat16"),
        fn: T.Tensor((rows, columns), "float32"),
        partials: T.Tensor((splits, tokens, PARTIAL_WIDTH), "float32"),
        blocks_per_split: T.int32,
    ):
        with T.Kernel(splits, T.ceildiv(tokens, token_tile), threads=THREADS) as (i_s, i0_t):
            T.import_source(DEVICE_SOURCE)
            T.annotate_min_blocks_per_sm(ctas_per_sm)
            tx = T.get_thread_binding()
            lane = tx % WARP
            warp = tx // WARP
            row = lane // 4
            t0 = T.cast(i0_t, "int64") * token_tile
            first = i_s * blocks_per_split + warp
            last = T.min((i_s + 1) * blocks_per_split, blocks)

            weights_local = T.alloc_local((column_tiles * VECTOR,), "float32")
            terms_local = T.alloc_local((TILE_TERMS,), "uint32")
            streams_local = T.alloc_local((token_tiles * 2 * VECTOR,), "bfloat16")
            words_local = T.view(streams_local, (token_tiles * VECTOR,), "uint32")
            sums_local = T.alloc_local((token_tiles * tile_sums(column_tiles),), "float32")
            sums_shared = T.alloc_shared((WARPS, token_tile, SUMS_STRIDE), "float32")

            clear_sums(sums_local, token_tiles, column_tiles)
            if pdl:
                # fn is a weight: on its way to L2 while the previous kernel still runs
                for n in T.unroll(column_tiles):
                    if n * MMA_COLUMNS + row < rows and first < last:
                        T.call_extern(
                            "handle",
                            "mhc::prefetch_l2",
                            T.access_ptr(
                                fn[n * MMA_COLUMNS + row, first * BLOCK + lane % 4 * VECTOR], "r"
                            ),
                        )
                T.pdl_sync()
                T.pdl_trigger()

            # projection: m = sum_k r_k * fn[:, k], and the sum of squares for its RMS
            for step in T.serial(T.ceildiv(last - first, WARPS)):
                k = (first + step * WARPS) * BLOCK + lane % 4 * VECTOR
                for half in T.unroll(token_tiles * 2):
                    i_t = T.min(t0 + half * MMA_HALF + row, tokens - 1)
                    for v in T.vectorized(VECTOR):
                        streams_local[half * VECTOR + v] = residual[i_t, k + v]
                load_weights(fn, row, k, column_tiles, rows, weights_local)
                for n in T.unroll(column_tiles):
                    split_weights(weights_local, n, terms_local, 0)
                    add_projection(
                        words_local, token_tiles, terms_local, 0, n, column_tiles, sums_local
                    )
                add_squares(words_local, token_tiles, column_tiles, sums_local)

            # the 4 warps of the split added up, one partial row a token
            for tile in T.unroll(token_tiles):
                store_sums(
                    sums_local, tile * tile_sums(column_tiles), column_tiles, lane,
                    sums_shared, warp, tile * MMA_TOKENS,
                )  # fmt: skip
            T.sync_threads()
            for q in T.serial(token_tile // WARPS):
                t = q * WARPS + warp
                if t0 + t < tokens and (lane < rows or lane == SQUARES):
                    total = T.alloc_var("float32", init=0.0)
                    total = sums_shared[0, t, lane]
                    for j in T.unroll(WARPS - 1):
                        total = total + sums_shared[j + 1, t, lane]
                    partials[i_s, t0 + t, lane] = total

    return mhc_projection

"""project: streams times fn on tensor cores, where the rows of A are the tokens; on a grid.

    m[t, c] = sum_k r[t, k] * fn[c, k]   and   s[t] = sum_k r[t, k]^2

Of mma.m16n8k16, A is 16 tokens and B 8 rows of fn, each split into three bf16 terms, which is exact
to fp32 for bf16 streams. A warp takes 32 columns k at a time, in two mma steps. The contraction
index is permuted, so that 8 columns which a lane loads at once are its entries of the fragments of
both steps: logical k of both steps at position q of a lane quad is physical 8 q to 8 q + 7.

The warps of a CTA take different columns; their sums meet in shared memory and become one partial
row a token.
"""

from typing import Any, NamedTuple

import tilelang.language as T

from ..device import mma_bf16, prefetch_l2, split3
from ..layout import MMA_COLUMNS, MMA_TOKENS, SPLIT_TERMS, SQUARES, VECTOR

MMA_HALF = MMA_TOKENS // 2  # A lane has two token rows of a tile, this far apart.
TILE_TERMS = VECTOR // 2 * SPLIT_TERMS  # packed pairs of a lane's 8 columns of fn, in three terms
SUMS_STRIDE = 40  # floats of a row of sums in shared memory: 8 rows of float2 on different banks


def column_tiles(rows: int) -> int:
    """Tiles of the product's columns, which are the ``rows`` rows of fn."""
    return -(-rows // MMA_COLUMNS)


def token_row(lane, half):
    """The token row of a tile that a lane has as its first or its second, ``half`` 0 or 1."""
    return half * MMA_HALF + lane // 4


class Tiles(NamedTuple):
    """What a lane holds of the token tiles of its warp.

    Attributes:
        count: token tiles, of 16 tokens each.
        column_tiles: tiles of the product's columns, of 8 rows of fn each.
        words_local: of each tile 8 stream elements of the lane's first token row as 4 words, then
            those of the second.
        sums_local: of each tile 4 sums a column tile, then 4 of the squares, as an accumulator of
            mma has them.
    """

    count: int
    column_tiles: int
    words_local: Any
    sums_local: Any

    def sums(self, tile, n):
        """Where the sums of column tile ``n`` begin."""
        return (tile * (self.column_tiles + 1) + n) * 4

    def squares(self, tile):
        """Where the sums of the squares begin."""
        return self.sums(tile, self.column_tiles)


def tiles_of_warp(streams_local, rows: int) -> Tiles:
    """Make room for the sums of the token tiles whose elements a lane has in ``streams_local``."""
    count = streams_local.shape[0] // (2 * VECTOR)
    words_local = T.view(streams_local, (count * VECTOR,), "uint32")
    sums_local = T.alloc_local((count * (column_tiles(rows) + 1) * 4,), "float32")
    return Tiles(count, column_tiles(rows), words_local, sums_local)


@T.macro
def prefetch_weights(fn, row, k, wanted=True):
    """Row ``row`` of each column tile, from column ``k`` on, on its way to L2, if ``wanted``.

    fn is a weight, so this may run while the previous kernel still runs.
    """
    for n in T.unroll(column_tiles(fn.shape[0])):
        if n * MMA_COLUMNS + row < fn.shape[0] and wanted:
            prefetch_l2(fn[n * MMA_COLUMNS + row, k])


@T.macro
def load_weights(fn, row, k, weights_local):
    """8 columns of fn from ``k`` on, row ``row`` of each column tile; zeros past the last row."""
    for n in T.unroll(column_tiles(fn.shape[0])):
        if n * MMA_COLUMNS + row < fn.shape[0]:
            for v in T.vectorized(VECTOR // 2):
                weights_local[n * VECTOR + v] = fn[n * MMA_COLUMNS + row, k + v]
            for v in T.vectorized(VECTOR // 2):
                weights_local[n * VECTOR + VECTOR // 2 + v] = fn[
                    n * MMA_COLUMNS + row, k + VECTOR // 2 + v
                ]
        else:
            for v in T.unroll(VECTOR):
                weights_local[n * VECTOR + v] = 0.0


@T.macro
def split_weights(weights_local, n, terms_local, t0):
    """Column tile ``n`` of the weights as bf16 pairs: terms_local[t0 + pair * 3 + term]."""
    for pair in T.unroll(VECTOR // 2):
        split3(
            weights_local[n * VECTOR + pair * 2],
            weights_local[n * VECTOR + pair * 2 + 1],
            terms_local[t0 + pair * SPLIT_TERMS],
        )


@T.macro
def clear_sums(tiles):
    """All sums zero."""
    for q in T.unroll(tiles.sums_local.shape[0]):
        tiles.sums_local[q] = 0.0


@T.macro
def load_fragment(tiles, tile, step, fragment_local):
    """The A fragment of one token tile and mma step."""
    for pair in (0, 1):
        for half in (0, 1):
            fragment_local[pair * 2 + half] = tiles.words_local[
                tile * VECTOR + step * 2 + pair + half * (VECTOR // 2)
            ]


@T.macro
def add_projection(tiles, terms_local, t0, n):
    """sums += streams . fn of 32 columns k and column tile ``n``.

    Tensor cores truncate as they accumulate (NOTES.md, "fn in three bf16 terms"). So the products
    of 32 columns start from zero and are added to the sums in fp32, rounded to nearest.
    """
    fragment_local = T.alloc_local((4,), "uint32")
    part_local = T.alloc_local((tiles.count * 4,), "float32")
    for q in T.unroll(tiles.count * 4):
        part_local[q] = 0.0
    for term in T.unroll(SPLIT_TERMS):  # The small terms come first.
        for step in T.unroll(2):
            for tile in T.unroll(tiles.count):
                load_fragment(tiles, tile, step, fragment_local)
                mma_bf16(
                    part_local[tile * 4],
                    fragment_local[0],
                    terms_local[t0 + (step * 2) * SPLIT_TERMS + SPLIT_TERMS - 1 - term],
                    terms_local[t0 + (step * 2 + 1) * SPLIT_TERMS + SPLIT_TERMS - 1 - term],
                )
    for tile in T.unroll(tiles.count):
        for q in T.unroll(4):
            tiles.sums_local[tiles.sums(tile, n) + q] = (
                tiles.sums_local[tiles.sums(tile, n) + q] + part_local[tile * 4 + q]
            )


@T.macro
def add_squares(tiles):
    """sums += squares of 32 columns k: the diagonal of streams . streams^T of each tile.

    The B fragment of streams^T is the A fragment's own registers, so 4 tensor-core instructions do
    the work of 64 others.
    """
    fragment_local = T.alloc_local((4,), "uint32")
    part_local = T.alloc_local((2 * 4,), "float32")
    for tile in T.unroll(tiles.count):
        for q in T.unroll(2 * 4):
            part_local[q] = 0.0
        for step in T.unroll(2):
            load_fragment(tiles, tile, step, fragment_local)
            for half in T.unroll(2):
                mma_bf16(
                    part_local[half * 4],
                    fragment_local[0],
                    fragment_local[half],
                    fragment_local[half + 2],
                )
        # Rows 0 to 7 against themselves are in the first product, rows 8 to 15 in the second.
        for q in T.unroll(4):
            tiles.sums_local[tiles.squares(tile) + q] = (
                tiles.sums_local[tiles.squares(tile) + q] + part_local[q // 2 * 4 + q]
            )


@T.macro
def store_sums(tiles, tile, lane, sums_shared, part):
    """The sums of one token tile to sums_shared[part, token row of the CTA]."""
    for half in T.unroll(2):
        for n in T.unroll(tiles.column_tiles):
            for v in T.vectorized(2):
                sums_shared[
                    part,
                    tile * MMA_TOKENS + token_row(lane, half),
                    n * MMA_COLUMNS + lane % 4 * 2 + v,
                ] = tiles.sums_local[tiles.sums(tile, n) + half * 2 + v]
        if lane % 4 == lane // 8:  # This lane holds the diagonal element of its token row.
            sums_shared[part, tile * MMA_TOKENS + token_row(lane, half), SQUARES] = T.if_then_else(
                lane // 4 % 2 == 0,
                tiles.sums_local[tiles.squares(tile) + half * 2],
                tiles.sums_local[tiles.squares(tile) + half * 2 + 1],
            )


@T.macro
def store_partials(sums_shared, partials, split, t0, warp, lane, rows):
    """The sums of all warps added up: one partial row for each token of the CTA, from ``t0`` on."""
    warps, tokens_of_cta = sums_shared.shape[0], sums_shared.shape[1]
    for q in T.unroll(tokens_of_cta // warps):
        t = q * warps + warp
        if t0 + t < partials.shape[1] and (lane < rows or lane == SQUARES):
            total = T.alloc_var("float32", init=0.0)
            total = sums_shared[0, t, lane]
            for j in T.unroll(warps - 1):
                total = total + sums_shared[j + 1, t, lane]
            partials[split, t0 + t, lane] = total

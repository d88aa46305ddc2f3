"""Steps that several kernels share, as TileLang macros: one arithmetic, so one result in bits."""

import tilelang.language as T

from ._device import HC_MULT, MMA_COLUMNS, MMA_HALF, SPLIT_TERMS, SQUARES, VECTOR


def tile_sums(column_tiles: int) -> int:
    """Registers of a lane for the sums of one token tile: accumulators, then squares."""
    return column_tiles * 4 + 4


@T.macro
def widen(values_local, v0, width, wide_local):
    """``width`` bf16 elements in fp32, one instruction each where a cast takes one and a half."""
    words_local = T.view(values_local, (values_local.shape[0] // 2,), "uint32")
    for v in T.unroll(width // 2):
        wide_local[v * 2] = T.reinterpret(words_local[v0 // 2 + v] << 16, "float32")
        wide_local[v * 2 + 1] = T.reinterpret(
            words_local[v0 // 2 + v] & T.uint32(0xFFFF0000), "float32"
        )


@T.macro
def mix_stream(
    x_local, x0, streams_local, s0, post_weight, comb_local, c0, c_stride, new_local, n0, width
):
    """post for ``width`` elements of one stream; comb[i] is comb_local[c0 + i * c_stride].

    The order x, stream 0, 1, 2, 3 and the single rounding are what makes fused and unfused
    streams equal in every bit.
    """
    total_local = T.alloc_local((width,), "float32")
    value_local = T.alloc_local((width,), "float32")
    widen(x_local, x0, width, value_local)
    for v in T.unroll(width):
        total_local[v] = post_weight * value_local[v]
    for i in T.unroll(HC_MULT):
        widen(streams_local, s0 + i * width, width, value_local)
        for v in T.unroll(width):
            total_local[v] = total_local[v] + comb_local[c0 + i * c_stride] * value_local[v]
    for v in T.vectorized(width):
        new_local[n0 + v] = T.cast(total_local[v], "bfloat16")


@T.macro
def load_weights(fn, row, k, column_tiles, rows, weights_local):
    """8 columns of fn from ``k`` on, row ``row`` of each column tile; zeros past the last row."""
    for n in T.unroll(column_tiles):
        if n * MMA_COLUMNS + row < rows:
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
def clear_sums(sums_local, tiles, column_tiles):
    """Zero the sums of ``tiles`` token tiles."""
    for q in T.unroll(tiles * tile_sums(column_tiles)):
        sums_local[q] = 0.0


@T.macro
def split_weights(weights_local, n, terms_local, t0):
    """Column tile ``n`` of the weights as bf16 pairs: terms_local[t0 + pair * 3 + term]."""
    for pair in T.unroll(VECTOR // 2):
        T.call_extern(
            "handle",
            "mhc::split3",
            weights_local[n * VECTOR + pair * 2],
            weights_local[n * VECTOR + pair * 2 + 1],
            T.access_ptr(terms_local[t0 + pair * SPLIT_TERMS], "w"),
        )


@T.macro
def load_fragment(words_local, tile, step, fragment):
    """The A fragment of one token tile and k step.

    ``words_local`` holds, a tile, 8 stream elements of token row lane // 4 as 4 words, then those
    of row lane // 4 + 8.
    """
    fragment[0] = words_local[tile * VECTOR + step * 2]
    fragment[1] = words_local[tile * VECTOR + step * 2 + VECTOR // 2]
    fragment[2] = words_local[tile * VECTOR + step * 2 + 1]
    fragment[3] = words_local[tile * VECTOR + step * 2 + 1 + VECTOR // 2]


@T.macro
def add_projection(words_local, tiles, terms_local, t0, n, column_tiles, sums_local):
    """sums += streams . fn for ``tiles`` tiles of 16 tokens, 32 columns and column tile ``n``.

    Tensor cores truncate as they accumulate: over 60 steps a projection lost 1e-6 of itself. So the
    products of a block start from zero and are added to the sums in fp32, rounded to nearest.
    """
    fragment = T.alloc_local((4,), "uint32")
    part = T.alloc_local((tiles * 4,), "float32")
    for q in T.unroll(tiles * 4):
        part[q] = 0.0
    for term in T.unroll(SPLIT_TERMS):  # the small terms first
        for step in T.unroll(2):
            for tile in T.unroll(tiles):
                load_fragment(words_local, tile, step, fragment)
                T.call_extern(
                    "handle",
                    "mhc::mma_bf16",
                    T.access_ptr(part[tile * 4], "rw"),
                    T.access_ptr(fragment[0], "r"),
                    terms_local[t0 + (step * 2) * SPLIT_TERMS + SPLIT_TERMS - 1 - term],
                    terms_local[t0 + (step * 2 + 1) * SPLIT_TERMS + SPLIT_TERMS - 1 - term],
                )
    for tile in T.unroll(tiles):
        for q in T.unroll(4):
            sums_local[tile * tile_sums(column_tiles) + n * 4 + q] = (
                sums_local[tile * tile_sums(column_tiles) + n * 4 + q] + part[tile * 4 + q]
            )


@T.macro
def add_squares(words_local, tiles, column_tiles, sums_local):
    """sums += squares: the diagonal of streams . streams^T of each tile.

    The B fragment of streams^T is the A fragment's own registers, so 4 tensor-core instructions do
    the work of 64 others.
    """
    fragment = T.alloc_local((4,), "uint32")
    part = T.alloc_local((2 * 4,), "float32")
    for tile in T.unroll(tiles):
        for q in T.unroll(2 * 4):
            part[q] = 0.0
        for step in T.unroll(2):
            load_fragment(words_local, tile, step, fragment)
            for half in T.unroll(2):
                T.call_extern(
                    "handle",
                    "mhc::mma_bf16",
                    T.access_ptr(part[half * 4], "rw"),
                    T.access_ptr(fragment[0], "r"),
                    fragment[half],
                    fragment[half + 2],
                )
        # rows 0 to 7 against themselves are in the first product, rows 8 to 15 in the second
        for q in T.unroll(4):
            sums_local[tile * tile_sums(column_tiles) + column_tiles * 4 + q] = (
                sums_local[tile * tile_sums(column_tiles) + column_tiles * 4 + q]
                + part[q // 2 * 4 + q]
            )


@T.macro
def store_sums(sums_local, s0, column_tiles, lane, sums_shared, part, row0):
    """The sums of one tile of 16 tokens into sums_shared[part, row0 ..]."""
    for half in T.unroll(2):
        for n in T.unroll(column_tiles):
            for v in T.vectorized(2):
                sums_shared[
                    part,
                    row0 + half * MMA_HALF + lane // 4,
                    n * MMA_COLUMNS + lane % 4 * 2 + v,
                ] = sums_local[s0 + n * 4 + half * 2 + v]
        if lane % 4 == lane // 8:  # this lane holds the diagonal element of its row
            sums_shared[part, row0 + half * MMA_HALF + lane // 4, SQUARES] = T.if_then_else(
                lane // 4 % 2 == 0,
                sums_local[s0 + column_tiles * 4 + half * 2],
                sums_local[s0 + column_tiles * 4 + half * 2 + 1],
            )

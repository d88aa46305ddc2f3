"""Steps that several kernels share, as TileLang macros: one arithmetic, so one result in bits."""

import tilelang.language as T

from ._device import HC_MULT, MMA_COLUMNS, MMA_TOKENS, SPLIT_TERMS, SQUARES, VECTOR


@T.macro
def load_post_weights(post_layer_mix, comb_res_mix, i_t, post_local, comb_local):
    """All 4 post and 16 comb weights of token ``i_t``."""
    for j in T.vectorized(HC_MULT):
        post_local[j] = post_layer_mix[i_t, j]
    for i in T.unroll(HC_MULT):
        for j in T.vectorized(HC_MULT):
            comb_local[i * HC_MULT + j] = comb_res_mix[i_t, i, j]


@T.macro
def mix_stream(
    x_local, x0, streams_local, s0, post_weight, comb_local, c0, c_stride, new_local, n0
):
    """post for 8 elements of one stream; comb[i] is comb_local[c0 + i * c_stride].

    The order x, stream 0, 1, 2, 3 and the single rounding are what makes fused and unfused
    streams equal in every bit.
    """
    for v in T.unroll(VECTOR):
        total = T.alloc_var("float32", init=0.0)
        total = post_weight * T.cast(x_local[x0 + v], "float32")
        for i in T.unroll(HC_MULT):
            total = total + comb_local[c0 + i * c_stride] * T.cast(
                streams_local[s0 + i * VECTOR + v], "float32"
            )
        new_local[n0 + v] = T.cast(total, "bfloat16")


@T.macro
def load_weights(fn, row, k, column_tiles, rows, weights_local):
    """8 columns of fn from ``k`` on for row ``row`` of each column tile; zeros past the last row."""
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
def split_weights(weights_local, column_tiles, terms_local):
    """fp32 weights as bf16 pairs in three terms: terms_local[(tile * 4 + pair) * 3 + term]."""
    for pair in T.unroll(column_tiles * VECTOR // 2):
        T.call_extern(
            "handle",
            "mhc::split3",
            weights_local[pair * 2],
            weights_local[pair * 2 + 1],
            T.access_ptr(terms_local[pair * SPLIT_TERMS], "w"),
        )


@T.macro
def add_projection(words_local, low, high, terms_local, column_tiles, acc, a0, fragment):
    """acc += streams * fn for 32 columns: 2 k steps, the small terms first.

    ``words_local`` holds 8 stream elements as 4 words for token row lane // 4 from ``low`` on and
    for row lane // 4 + 8 from ``high`` on.
    """
    for step in T.unroll(2):
        fragment[0] = words_local[low + step * 2]
        fragment[1] = words_local[high + step * 2]
        fragment[2] = words_local[low + step * 2 + 1]
        fragment[3] = words_local[high + step * 2 + 1]
        for n in T.unroll(column_tiles):
            for term in T.unroll(SPLIT_TERMS):
                T.call_extern(
                    "handle",
                    "mhc::mma_bf16",
                    T.access_ptr(acc[a0 + n * 4], "rw"),
                    T.access_ptr(fragment[0], "r"),
                    terms_local[(n * 4 + step * 2) * SPLIT_TERMS + SPLIT_TERMS - 1 - term],
                    terms_local[(n * 4 + step * 2 + 1) * SPLIT_TERMS + SPLIT_TERMS - 1 - term],
                )


@T.macro
def store_fragment(acc, a0, squares, q0, column_tiles, lane, sums_shared, part, row0):
    """One accumulator tile of 16 tokens, and its squares, into sums_shared[part, row0 ..]."""
    for half in T.unroll(2):
        for n in T.unroll(column_tiles):
            for v in T.vectorized(2):
                sums_shared[
                    part,
                    row0 + half * MMA_TOKENS // 2 + lane // 4,
                    n * MMA_COLUMNS + lane % 4 * 2 + v,
                ] = acc[a0 + n * 4 + half * 2 + v]
        quad = T.alloc_var("float32", init=0.0)
        quad = squares[q0 + half]
        quad = quad + T.shfl_xor(quad, 1)
        quad = quad + T.shfl_xor(quad, 2)
        if lane % 4 == 0:
            sums_shared[part, row0 + half * MMA_TOKENS // 2 + lane // 4, SQUARES] = quad

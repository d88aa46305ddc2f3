"""collapse: v = sum_j weight_j * r_j in fp32, rounded to y = bf16(v); then perhaps the RMSNorm,

    y = bf16(float(bf16(v)) * rsqrt(mean(v^2) + norm_eps) * norm_weight)

on 8 elements of a thread at a time. Who adds up the squares of v depends on the kernel.
"""

import tilelang.language as T

from ..layout import HC_MULT, VECTOR
from .post import widen


@T.macro
def collapse(streams_local, s0, weights_local, w0, total_local):
    """v of 8 elements; the streams' elements are one after the other, from ``s0`` on."""
    wide_local = T.alloc_local((VECTOR,), "float32")
    widen(streams_local, s0, VECTOR, wide_local)
    for v in T.unroll(VECTOR):
        total_local[v] = weights_local[w0] * wide_local[v]
    for j in T.unroll(HC_MULT - 1):
        widen(streams_local, s0 + (j + 1) * VECTOR, VECTOR, wide_local)
        for v in T.unroll(VECTOR):
            total_local[v] = total_local[v] + weights_local[w0 + j + 1] * wide_local[v]


@T.macro
def add_squares(total_local, squares_local, k):
    """The squares of 8 elements of v, added to squares_local[k]."""
    for v in T.unroll(VECTOR):
        squares_local[k] = squares_local[k] + total_local[v] * total_local[v]


@T.macro
def round_values(total_local, value_local, v0):
    """bf16(v), or bf16 of what the norm made of it, from value_local[v0] on."""
    for v in T.vectorized(VECTOR):
        value_local[v0 + v] = T.cast(total_local[v], "bfloat16")


def norm_factor(squares, hidden, norm_eps):
    """Return rsqrt(mean(v^2) + norm_eps)."""
    return T.rsqrt(squares * (1.0 / hidden) + norm_eps)


@T.macro
def normalise(value_local, v0, factor, gain_local, g0, total_local):
    """float(bf16(v)) * factor * norm_weight of 8 elements, before the rounding."""
    wide_local = T.alloc_local((VECTOR,), "float32")
    widen(value_local, v0, VECTOR, wide_local)
    widen(gain_local, g0, VECTOR, total_local)
    for v in T.unroll(VECTOR):
        total_local[v] = wide_local[v] * factor * total_local[v]

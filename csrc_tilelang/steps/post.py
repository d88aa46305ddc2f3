"""post: r'[j] = bf16(post[j] * x + sum_i comb[i, j] * r[i]), the one formula of all kernels."""

from typing import Any, NamedTuple

import tilelang.language as T

from ..layout import HC_MULT


@T.macro
def widen(values_local, v0, width, wide_local):
    """``width`` bf16 elements in fp32, one instruction each where a cast takes one and a half."""
    words_local = T.view(values_local, (values_local.shape[0] // 2,), "uint32")
    for v in T.unroll(width // 2):
        wide_local[v * 2] = T.reinterpret(words_local[v0 // 2 + v] << 16, "float32")
        wide_local[v * 2 + 1] = T.reinterpret(
            words_local[v0 // 2 + v] & T.uint32(0xFFFF0000), "float32"
        )


class Old(NamedTuple):
    """What a thread holds of one token: ``width`` elements of x and of each old stream.

    Attributes:
        x_local: x, from element ``x0`` on.
        streams_local: the old streams one after the other, from element ``s0`` on.
        width: elements of x, and of each stream.
    """

    x_local: Any
    streams_local: Any
    width: int
    x0: Any = 0
    s0: Any = 0


@T.macro
def load_old(post, t, h, old):
    """What a thread holds of token ``t``, from hidden element ``h`` on."""
    for v in T.vectorized(old.width):
        old.x_local[old.x0 + v] = post.x[t, h + v]
    for i in T.unroll(HC_MULT):
        for v in T.vectorized(old.width):
            old.streams_local[old.s0 + i * old.width + v] = post.residual[t, i, h + v]


class Comb(NamedTuple):
    """The column of a comb that belongs to one new stream: entry i at ``first + i * stride``."""

    values_local: Any
    first: Any
    stride: int


@T.macro
def mix_stream(old, post_weight, comb, new_local, n0):
    """The elements of one new stream, from new_local[n0] on.

    The order x, stream 0, 1, 2, 3 and the single rounding are what makes fused and unfused
    streams equal in every bit.
    """
    total_local = T.alloc_local((old.width,), "float32")
    value_local = T.alloc_local((old.width,), "float32")
    widen(old.x_local, old.x0, old.width, value_local)
    for v in T.unroll(old.width):
        total_local[v] = post_weight * value_local[v]
    for i in T.unroll(HC_MULT):
        widen(old.streams_local, old.s0 + i * old.width, old.width, value_local)
        for v in T.unroll(old.width):
            total_local[v] = (
                total_local[v] + comb.values_local[comb.first + i * comb.stride] * value_local[v]
            )
    for v in T.vectorized(old.width):
        new_local[n0 + v] = T.cast(total_local[v], "bfloat16")

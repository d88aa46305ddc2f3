"""Clusters that share the hidden dimension of a group of tokens: ``post_head`` and ``expand_pre``.

A CTA owns a slice of the hidden dimension, each of its column warps 32 columns of it. A lane owns 8
of these columns of one token in 8, which is a B fragment of two mma steps: logical k of both steps
at position q of a lane quad is physical 8 q to 8 q + 7.
"""

import tilelang.language as T

from ..geometry import CLUSTER
from ._collapse import sigmoid
from ._device import HC_MULT, VECTOR
from ._operands import SLICE_TREE, add_tree, slice_size

COLUMNS = 4 * VECTOR  # of a warp: a quad of lanes
# floats from token to token of what other CTAs sent: 8 tokens on different banks
SUMS_IN_PITCH = CLUSTER * HC_MULT + 4
SQUARES_IN_PITCH = CLUSTER + 4
SENT_FLOATS = HC_MULT + 1  # of each CTA and token: collapse projections and squares
SUMS_INBOX = 0
COLUMN_BARRIER = 1  # named barrier of the column warps; 0 is the whole CTA's


def column_warps(hidden: int) -> int:
    """Warps that own columns; the last one only 16 where the slice is not a multiple of 32."""
    return -(-slice_size(hidden) // COLUMNS)


@T.macro
def prefetch_rows(fn, rows, rank, tx, threads, hidden):
    """This CTA's columns of fn on their way to L2."""
    for i in T.unroll(-(-rows * HC_MULT // threads)):
        segment = i * threads + tx
        if segment < rows * HC_MULT:
            T.call_extern(
                "handle",
                "mhc::prefetch_l2_bulk",
                T.access_ptr(
                    fn[segment // HC_MULT, segment % HC_MULT * hidden + rank * slice_size(hidden)],
                    "r",
                ),
                slice_size(hidden) * 4,
            )


@T.macro
def send_sums(token, rank, lane, mixes_local, squares, sums_in_shared, squares_in_shared, inbox):
    """A CTA's 4 collapse projections and sum of squares of a token, by one warp to all CTAs."""
    if lane < CLUSTER:
        T.call_extern(
            "handle",
            "mhc::send4",
            T.access_ptr(sums_in_shared[token, rank * HC_MULT], "w"),
            T.access_ptr(inbox[SUMS_INBOX], "w"),
            lane,
            T.access_ptr(mixes_local[0], "r"),
        )
    elif lane < 2 * CLUSTER:
        T.call_extern(
            "handle",
            "mhc::send",
            T.access_ptr(squares_in_shared[token, rank], "w"),
            T.access_ptr(inbox[SUMS_INBOX], "w"),
            lane - CLUSTER,
            squares,
        )


@T.macro
def add_slices(slices_shared, token, squares):
    """squares[0] = the sum over the CTAs, in an order that nothing changes."""
    slices_local = T.alloc_local((CLUSTER,), "float32")
    for c in T.unroll(CLUSTER):
        slices_local[c] = slices_shared[token, c]
    add_tree(slices_local, SLICE_TREE)
    squares[0] = slices_local[0]


@T.macro
def collapse_weight(sums_in_shared, token, stream, squares, columns, rms_eps, scale, base, mix):
    """mix[0] = sigmoid(m * scale + base), m = projection * rsqrt(mean square + rms_eps)."""
    slices_local = T.alloc_local((CLUSTER,), "float32")
    for c in T.unroll(CLUSTER):
        slices_local[c] = sums_in_shared[token, c * HC_MULT + stream]
    add_tree(slices_local, SLICE_TREE)
    mix[0] = T.rsqrt(squares[0] * (1.0 / columns) + rms_eps)
    sigmoid(slices_local[0] * mix[0] * scale[0] + base[0], mix)


@T.macro
def apply_gain(value_local, factor, gain_local):
    """RMSNorm of 8 elements: v = bf16(bf16(v) * factor * g)."""
    for v in T.unroll(VECTOR):
        value_local[v] = T.cast(
            T.cast(value_local[v], "float32") * factor * T.cast(gain_local[v], "float32"),
            "bfloat16",
        )

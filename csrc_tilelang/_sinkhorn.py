"""Sinkhorn of 4 x 4 matrices: the softmax on 16 lanes, the rounds in one thread's registers."""

import tilelang.language as T

from ._device import HC_MULT

COMB = 2 * HC_MULT  # first column of the comb logits
ROWS, COLUMNS = HC_MULT, 1  # strides of the matrix: from row to row, from column to column
NEAR = 2.0**-6  # where the fourth power, which rescale_near drops, is half a unit in the last place


@T.macro
def softmax_row(logit, eps, out):
    """out[0] = softmax over 4 aligned lanes of logit[0], plus eps."""
    other = T.alloc_var("float32", init=0.0)
    total = T.alloc_var("float32", init=0.0)
    other = T.max(logit[0], T.shfl_xor(logit[0], 1))
    other = T.max(other, T.shfl_xor(other, 2))
    out[0] = T.exp(logit[0] - other)
    total = out[0] + T.shfl_xor(out[0], 1)
    total = total + T.shfl_xor(total, 2)
    out[0] = out[0] * T.call_extern("float32", "mhc::rcp", total) + eps


@T.macro
def rescale(c, outer, inner, eps, others, scales, furthest):
    """scale /= sum + eps, sum = scale * (c . others); ``furthest``: the largest |sum + eps - 1|."""
    for i in T.unroll(HC_MULT):
        total = T.alloc_var("float32", init=0.0)
        total = (c[i * outer] * others[0] + c[i * outer + inner] * others[1]) + (
            c[i * outer + 2 * inner] * others[2] + c[i * outer + 3 * inner] * others[3]
        )
        total = scales[i] * total + eps
        furthest[0] = T.max(furthest[0], T.abs(total - 1.0))
        scales[i] = scales[i] * T.call_extern("float32", "mhc::rcp", total)


@T.macro
def rescale_near(c, outer, inner, eps, others, scales):
    """``rescale`` near 1: with r = 1 - (sum + eps), 1 / (1 - r) = (1 + r)(1 + r^2) to r^4."""
    for i in T.unroll(HC_MULT):
        total = T.alloc_var("float32", init=0.0)
        rest = T.alloc_var("float32", init=0.0)
        total = (c[i * outer] * others[0] + c[i * outer + inner] * others[1]) + (
            c[i * outer + 2 * inner] * others[2] + c[i * outer + 3 * inner] * others[3]
        )
        rest = (1.0 - eps) - scales[i] * total
        total = scales[i] * rest + scales[i]
        scales[i] = total * (rest * rest) + total


@T.macro
def sinkhorn(c, eps, repeat):
    """C /= column sums + eps, then (repeat - 1) times row sums + eps and column sums + eps.

    The matrix is kept as u_i c_ij v_j, so that nothing is rounded in the entries and the error does
    not grow with the rounds. A round with reciprocals takes 158 cycles on Hopper, most of them
    waiting for the special-function unit; once all sums are near 1, where they stay (a sum is a
    mean of the reciprocals of those before it), 70 instructions do the same.
    """
    rows = T.alloc_local((HC_MULT,), "float32")
    columns = T.alloc_local((HC_MULT,), "float32")
    furthest = T.alloc_local((1,), "float32")
    for i in T.unroll(HC_MULT):
        rows[i] = 1.0
        columns[i] = 1.0
    furthest[0] = 0.0
    rescale(c, COLUMNS, ROWS, eps, rows, columns, furthest)
    rounds = T.alloc_var("int32", init=repeat - 1)
    for _ in T.serial(repeat - 1):
        furthest[0] = 0.0
        rescale(c, ROWS, COLUMNS, eps, columns, rows, furthest)
        rescale(c, COLUMNS, ROWS, eps, rows, columns, furthest)
        rounds = rounds - 1
        if furthest[0] <= NEAR:
            T.loop_break()
    for _ in T.serial(rounds):
        rescale_near(c, ROWS, COLUMNS, eps, columns, rows)
        rescale_near(c, COLUMNS, ROWS, eps, rows, columns)
    for i in T.unroll(HC_MULT):
        for j in T.unroll(HC_MULT):
            c[i * HC_MULT + j] = c[i * HC_MULT + j] * (rows[i] * columns[j])

"""Sinkhorn of 4 x 4 matrices: the softmax on 16 lanes, the rounds in one thread's registers.

In what is said of a formula, ``eps`` is ``hc_sinkhorn_eps``.
"""

import tilelang.language as T

from ..device import multiply, rcp
from ..layout import HC_MULT

ROWS, COLUMNS = HC_MULT, 1  # strides of the matrix: from row to row, from column to column
NEAR = 2.0**-3  # where the eighth power, which rescale_near drops, is half a unit in the last place
LINEAR = 2.0**-12  # where the second powers that rescale_linearly drops add up to less than 3e-7
ALL = tuple(range(HC_MULT))


@T.macro
def softmax_row(logit, hc_sinkhorn_eps, out):
    """out[0] = softmax over 4 aligned lanes of logit[0], plus eps."""
    other = T.alloc_var("float32", init=0.0)
    total = T.alloc_var("float32", init=0.0)
    other = T.max(logit[0], T.shfl_xor(logit[0], 1))
    other = T.max(other, T.shfl_xor(other, 2))
    out[0] = T.exp(logit[0] - other)
    total = out[0] + T.shfl_xor(out[0], 1)
    total = total + T.shfl_xor(total, 2)
    out[0] = out[0] * rcp(total) + hc_sinkhorn_eps


@T.macro
def softmax_rows(c, hc_sinkhorn_eps):
    """The rows of a matrix in one thread's registers: the bits of :func:`softmax_row`."""
    for i in T.unroll(HC_MULT):
        most = T.alloc_var("float32", init=0.0)
        total = T.alloc_var("float32", init=0.0)
        most = T.max(
            T.max(c[i * HC_MULT], c[i * HC_MULT + 1]), T.max(c[i * HC_MULT + 2], c[i * HC_MULT + 3])
        )
        for j in T.unroll(HC_MULT):
            c[i * HC_MULT + j] = T.exp(c[i * HC_MULT + j] - most)
        total = (c[i * HC_MULT] + c[i * HC_MULT + 1]) + (c[i * HC_MULT + 2] + c[i * HC_MULT + 3])
        total = rcp(total)
        for j in T.unroll(HC_MULT):
            c[i * HC_MULT + j] = c[i * HC_MULT + j] * total + hc_sinkhorn_eps


@T.macro
def rescale(c, outer, inner, hc_sinkhorn_eps, others, scales, furthest):
    """scale /= sum + eps, sum = scale * (c . others); ``furthest``: the largest |sum + eps - 1|."""
    for i in T.unroll(HC_MULT):
        total = T.alloc_var("float32", init=0.0)
        total = multiply(c[i * outer], others[0])
        for j in T.unroll(HC_MULT - 1):
            total = total + c[i * outer + (j + 1) * inner] * others[j + 1]
        total = scales[i] * total + hc_sinkhorn_eps
        furthest[0] = T.max(furthest[0], T.abs(total - 1.0))
        scales[i] = scales[i] * rcp(total)


@T.macro
def rescale_near(c, outer, inner, hc_sinkhorn_eps, others, scales, furthest):
    """``rescale`` near 1: with r = 1 - (sum + eps), 1 / (1 - r) = (1 + r)(1 + r^2)(1 + r^4)."""
    for i in T.unroll(HC_MULT):
        total = T.alloc_var("float32", init=0.0)
        rest = T.alloc_var("float32", init=0.0)
        square = T.alloc_var("float32", init=0.0)
        total = multiply(c[i * outer], others[0])
        for j in T.unroll(HC_MULT - 1):
            total = total + c[i * outer + (j + 1) * inner] * others[j + 1]
        rest = (1.0 - hc_sinkhorn_eps) - scales[i] * total
        square = rest * rest
        furthest[0] = T.max(furthest[0], T.abs(rest))
        total = scales[i] * rest + scales[i]
        total = total * square + total
        scales[i] = total * (square * square) + total


def symmetric(i: int, j: int) -> int:
    """Where a symmetric matrix keeps entry (i, j)."""
    return max(i, j) * (max(i, j) + 1) // 2 + min(i, j)


@T.macro
def rescale_linearly(c, hc_sinkhorn_eps, rounds, rows, columns):
    """``rounds`` rounds, at least 1, where only first powers count.

    With P = u c v, whose columns add up to 1 - eps, and r = 1 - eps - its row sums, a round scales
    row i by 1 + r_i and leaves r' = P P^T r: n rounds scale it by 1 + (r + P P^T r + ...), n terms.
    The last scaling of the columns is made in full.
    """
    product = T.alloc_local((HC_MULT * HC_MULT,), "float32")
    gram = T.alloc_local((HC_MULT * (HC_MULT + 1) // 2,), "float32")
    rest = T.alloc_local((HC_MULT,), "float32")
    total = T.alloc_local((HC_MULT,), "float32")
    old = T.alloc_local((HC_MULT,), "float32")
    ignored = T.alloc_local((1,), "float32")
    ignored[0] = 0.0
    for i in ALL:
        for j in ALL:
            product[i * HC_MULT + j] = multiply(c[i * HC_MULT + j], rows[i] * columns[j])
        rest[i] = 1.0 - hc_sinkhorn_eps
        for j in ALL:
            rest[i] = rest[i] - product[i * HC_MULT + j]
        total[i] = rest[i]
    for i in ALL:
        for j in ALL[: i + 1]:
            gram[symmetric(i, j)] = multiply(product[i * HC_MULT], product[j * HC_MULT])
            for k in ALL[1:]:
                gram[symmetric(i, j)] = (
                    gram[symmetric(i, j)] + product[i * HC_MULT + k] * product[j * HC_MULT + k]
                )
    for _ in T.serial(rounds - 1):
        for i in ALL:
            old[i] = total[i]
        for i in ALL:
            total[i] = rest[i]
            for j in ALL:
                total[i] = total[i] + gram[symmetric(i, j)] * old[j]
    for i in ALL:
        rows[i] = rows[i] * total[i] + rows[i]
    rescale_near(c, COLUMNS, ROWS, hc_sinkhorn_eps, rows, columns, ignored)


@T.macro
def sinkhorn(c, hc_sinkhorn_eps, sinkhorn_repeat):
    """C /= column sums + eps, then, sinkhorn_repeat - 1 times, row sums + eps, column sums + eps.

    The matrix is kept as u_i c_ij v_j, so that nothing is rounded in the entries and the error does
    not grow with the rounds. A round with reciprocals took 158 cycles on Hopper, most of them
    waiting for the special-function unit. Once the column sums are near 1, so are all that follow:
    a sum is a mean of the reciprocals of those before it. Then 88 instructions do the same, and
    soon after 20. No round is left out: a matrix that converges slowly takes the long way.
    """
    rows = T.alloc_local((HC_MULT,), "float32")
    columns = T.alloc_local((HC_MULT,), "float32")
    furthest = T.alloc_local((1,), "float32")
    ignored = T.alloc_local((1,), "float32")
    for i in T.unroll(HC_MULT):
        rows[i] = 1.0
        columns[i] = 1.0
    furthest[0] = hc_sinkhorn_eps
    ignored[0] = 0.0
    rescale(c, COLUMNS, ROWS, hc_sinkhorn_eps, rows, columns, ignored)
    rounds = T.alloc_var("int32", init=sinkhorn_repeat - 1)
    # eps counts as a distance: rescale_linearly drops its products with others too
    for _ in T.serial(sinkhorn_repeat - 1):
        furthest[0] = hc_sinkhorn_eps
        rescale(c, ROWS, COLUMNS, hc_sinkhorn_eps, columns, rows, ignored)
        rescale(c, COLUMNS, ROWS, hc_sinkhorn_eps, rows, columns, furthest)
        rounds = rounds - 1
        if furthest[0] <= NEAR:
            T.loop_break()
    for _ in T.serial(sinkhorn_repeat - 1):
        if rounds == 0 or furthest[0] <= LINEAR:
            T.loop_break()
        furthest[0] = hc_sinkhorn_eps
        rescale_near(c, ROWS, COLUMNS, hc_sinkhorn_eps, columns, rows, ignored)
        rescale_near(c, COLUMNS, ROWS, hc_sinkhorn_eps, rows, columns, furthest)
        rounds = rounds - 1
    if rounds > 0:
        rescale_linearly(c, hc_sinkhorn_eps, rounds, rows, columns)
    for i in T.unroll(HC_MULT):
        for j in T.unroll(HC_MULT):
            c[i * HC_MULT + j] = c[i * HC_MULT + j] * (rows[i] * columns[j])

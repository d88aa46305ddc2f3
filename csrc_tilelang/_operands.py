"""fn as the A operand of mma.m16n8k16, 24 rows in three bf16 terms, and 8 tokens as B.

What the kernels in clusters have in common: a CTA's slice, where a lane keeps its terms, and how
sums are stored and added up.
"""

import tilelang.language as T

from ..geometry import CLUSTER
from ._device import MIXES, MMA_COLUMNS, SPLIT_TERMS, SQUARES

CHUNK = 4  # columns of a lane in one step
STEPS = 2  # of 16 columns in a block of 32
ROW_TILES = MIXES // MMA_COLUMNS  # row groups of 8 of fn
UNIT_WEIGHTS = ROW_TILES * STEPS * CHUNK  # weights of a lane in one block of one stream
UNIT_TERMS = UNIT_WEIGHTS * SPLIT_TERMS // 2  # and packed pairs of their terms
SUMS = SQUARES + 1  # what is summed up for a token: 24 projections, the squares
SUMS_PITCH = 28  # floats from token to token: the lanes' sums on different banks

# The A operands of a step, 5 for the 72 rows of fn's terms and 8 tokens: (row tile, term) above and
# below, where term 0 is the largest and None the tokens themselves, whose squares are the diagonal.
OPERANDS = (
    ((0, 2), (1, 2)),
    ((0, 1), (1, 1)),
    ((0, 0), (1, 0)),
    ((2, 2), (2, 1)),
    ((2, 0), None),
)
# tuples: what a kernel loops over at trace time
ALL_OPERANDS = tuple(range(len(OPERANDS)))
ALL_STEPS = tuple(range(STEPS))
ALL_PAIRS = (0, 1)
SLICE_TREE = tuple(CLUSTER >> i for i in range(1, CLUSTER.bit_length()))
PLACES = tuple(  # of a row tile: (term, operand, half)
    tuple(
        (half[1], operand, i)
        for operand in ALL_OPERANDS
        for i, half in enumerate(OPERANDS[operand])
        if half is not None and half[0] == n
    )
    for n in range(ROW_TILES)
)


def slice_size(hidden: int) -> int:
    """Hidden elements of a CTA, a multiple of 16."""
    return hidden // CLUSTER


def term(operand: int, half: int, step: int, pair: int) -> int:
    """Where a lane keeps a packed pair: 4 registers an operand and step, in the order of mma."""
    index = operand * STEPS * 4 + step * 4 + pair * 2 + half
    # the last operand has no lower half of its own
    return index if operand < 4 else 4 * STEPS * 4 + step * 2 + pair


@T.macro
def split_unit(weights_local, w0, terms_local, t0):
    """The three bf16 terms of a lane's weights of one unit, as :func:`term` places them."""
    split_local = T.alloc_local((SPLIT_TERMS,), "uint32")
    for step in ALL_STEPS:
        for n in (0, 1, 2):
            for pair in ALL_PAIRS:
                w = w0 + (n * STEPS + step) * CHUNK + pair * 2
                T.call_extern(
                    "handle",
                    "mhc::split3",
                    weights_local[w],
                    weights_local[w + 1],
                    T.access_ptr(split_local[0], "w"),
                )
                for i_term, operand, half in PLACES[n]:
                    terms_local[t0 + term(operand, half, step, pair)] = split_local[i_term]


@T.macro
def add_parts(part, p0, sums_local, s0):
    """The products of one unit, of all operands from ``p0`` on, added to 8 tokens' sums."""
    for v in T.unroll(2):
        # rows 0 to 7, 8 to 15 and 16 to 23, the small terms first; then the squares
        for half in T.unroll(2):
            sums_local[s0 + half * 2 + v] = sums_local[s0 + half * 2 + v] + (
                (part[p0 + half * 2 + v] + part[p0 + 4 + half * 2 + v])
                + part[p0 + 8 + half * 2 + v]
            )
        sums_local[s0 + 4 + v] = sums_local[s0 + 4 + v] + (
            (part[p0 + 12 + v] + part[p0 + 14 + v]) + part[p0 + 16 + v]
        )
        sums_local[s0 + 6 + v] = sums_local[s0 + 6 + v] + part[p0 + 18 + v]


@T.macro
def multiply(words_local, lane, terms_local, t0, terms_shared, slot, fragment, part, sums_local):
    """sums += fn . tokens of one unit; ``words_local`` are this lane's columns of its token.

    The terms are in registers from ``t0`` on, or in ``slot`` of shared memory if that is given;
    ``part``, of zeros, and ``fragment`` are the caller's. Tensor cores truncate as they accumulate,
    so each unit and each term starts from zero and is added in fp32, rounded to nearest.
    """
    for step in ALL_STEPS:
        for operand in ALL_OPERANDS:
            if slot is not None and operand < 4:
                for q in T.vectorized(4):
                    fragment[q] = terms_shared[slot, operand * STEPS + step, lane, q]
            else:
                for pair in ALL_PAIRS:
                    if slot is None:
                        fragment[pair * 2] = terms_local[t0 + term(operand, 0, step, pair)]
                    else:
                        fragment[pair * 2] = terms_shared[slot, 4 * STEPS, lane, step * 2 + pair]
                    if operand < 4:
                        fragment[pair * 2 + 1] = terms_local[t0 + term(operand, 1, step, pair)]
                    else:
                        fragment[pair * 2 + 1] = words_local[step * 2 + pair]
            T.call_extern(
                "handle",
                "mhc::mma_bf16",
                T.access_ptr(part[operand * 4], "rw"),
                T.access_ptr(fragment[0], "r"),
                words_local[step * 2],
                words_local[step * 2 + 1],
            )
    add_parts(part, 0, sums_local, 0)


@T.macro
def store_sums(sums_local, lane, warp, tile, sums_shared):
    """A warp's sums of 8 tokens: the rows of fn, then the squares."""
    for n in T.unroll(ROW_TILES):
        for v in T.unroll(2):
            sums_shared[tile, warp, lane % 4 * 2 + v, n * MMA_COLUMNS + lane // 4] = sums_local[
                n * 2 + v
            ]
    if lane // 8 == lane % 4:
        sums_shared[tile, warp, lane // 4, SQUARES] = T.if_then_else(
            lane // 4 % 2 == 0, sums_local[6], sums_local[7]
        )


@T.macro
def add_tree(values_local, halves):
    """values_local[0] = the sum of 2 * halves[0] values, in an order that nothing changes."""
    for half in halves:
        for i in T.unroll(half):
            values_local[i] = values_local[i] + values_local[i + half]

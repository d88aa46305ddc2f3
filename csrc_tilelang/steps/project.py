"""project: fn . streams and the squares of 8 tokens, on tensor cores, a slice of each CTA.

fn is the A operand of mma.m16n8k16: 24 rows in three bf16 terms, which add up to the 24 bits of an
fp32. 8 tokens are B. Of the 80 rows of 5 operands the last 8 are the tokens themselves: the
diagonal of that product are the squares.

A CTA's slice of fn is cut into blocks of 32 columns of one stream, two steps of an mma. The blocks
are dealt out to 16 warps: warp w has the blocks w, w + 16 and so on. Each block and each term
starts from zero, since tensor cores truncate as they accumulate, and is added in fp32, rounded to
nearest. The order of all these sums depends on the hidden size alone.
"""

from typing import Any, NamedTuple

import tilelang.language as T

from ..device import load_async16, mma_bf16, prefetch_l2_bulk, split3
from ..layout import HC_MULT, MIXES, MMA_COLUMNS, SPLIT_TERMS, SQUARES, halves, slice_size

WARPS = 16  # to which the blocks are dealt out; a warp of a kernel can stand for several of them
WARP_TREE = halves(WARPS)
BLOCK_COLUMNS = 32
STEPS = 2  # of 16 columns in a block
CHUNK = 4  # columns of a lane in a step
ROW_TILES = MIXES // MMA_COLUMNS  # row groups of 8 of fn
BLOCK_WEIGHTS = ROW_TILES * STEPS * CHUNK  # weights of a lane in a block
BLOCK_TERMS = BLOCK_WEIGHTS * SPLIT_TERMS // 2  # and packed pairs of their terms
REGISTER_BLOCKS = 2  # blocks of each of the 16 warps whose terms fit in registers: 72 of 128
SUMS = SQUARES + 1  # what is summed up for a token: 24 projections, the squares
SUMS_PITCH = 28  # floats from token to token: the lanes' sums on different banks
TOKEN_SUMS = 8  # of a lane, for 8 tokens: two a row tile, then two of the squares
STREAMS_PAD = 16  # bf16 elements behind a token's streams: the rows of 4 tokens on different banks

# The A operands of a step, 5 for the 72 rows of fn's terms and 8 tokens: (row tile, term) above and
# below, where term 0 is the largest and None the tokens themselves.
OPERANDS = (
    ((0, 2), (1, 2)),
    ((0, 1), (1, 1)),
    ((0, 0), (1, 0)),
    ((2, 2), (2, 1)),
    ((2, 0), None),
)
WHOLE_OPERANDS = 4  # those whose lower half is fn's, too: 4 words of a lane, the last one has 2
ALL_OPERANDS = tuple(range(len(OPERANDS)))
ALL_STEPS = tuple(range(STEPS))
ALL_PAIRS = (0, 1)
PLACES = tuple(  # of a row tile: (term, operand, half)
    tuple(
        (half[1], operand, i)
        for operand in ALL_OPERANDS
        for i, half in enumerate(OPERANDS[operand])
        if half is not None and half[0] == n
    )
    for n in range(ROW_TILES)
)


def blocks(hidden: int) -> int:
    """Return how many blocks a CTA projects: block b is columns b // 4 * 32 on of stream b % 4.

    The last block of a stream has only its first step where the slice is not a multiple of 32.
    """
    return HC_MULT * -(-slice_size(hidden) // BLOCK_COLUMNS)


def shared_blocks(hidden: int) -> int:
    """Return how many blocks have no place in registers."""
    return max(0, blocks(hidden) - REGISTER_BLOCKS * WARPS)


def only_whole_blocks(hidden: int) -> bool:
    """Return whether no lane has to look for the end of the slice.

    That saves a branch (NOTES.md, "No branch where all blocks are whole").
    """
    return slice_size(hidden) % BLOCK_COLUMNS == 0 and blocks(hidden) >= REGISTER_BLOCKS * WARPS


def term(operand: int, half: int, step: int, pair: int) -> int:
    """Return where a lane keeps a packed pair: 4 words an operand and step, in the order of mma."""
    if operand < WHOLE_OPERANDS:
        return (operand * STEPS + step) * 4 + pair * 2 + half
    return WHOLE_OPERANDS * STEPS * 4 + step * 2 + pair


class Block(NamedTuple):
    """A block of a CTA, as one lane sees it.

    Attributes:
        index: the block.
        rank: the CTA in its cluster.
        lane: the lane, which has columns 4 * (lane % 4) on of each step.
        hidden: the hidden size.
    """

    index: Any
    rank: Any
    lane: Any
    hidden: int

    @property
    def stream(self):
        """The stream of the block."""
        return self.index % HC_MULT

    @property
    def start(self):
        """The first column of the block in the CTA's slice."""
        return self.index // HC_MULT * BLOCK_COLUMNS

    def column(self, step):
        """The lane's first column of a step in the CTA's slice."""
        return self.start + step * (BLOCK_COLUMNS // STEPS) + self.lane % 4 * CHUNK

    def inside(self, column):
        """Whether the slice has a column."""
        return True if only_whole_blocks(self.hidden) else column < slice_size(self.hidden)

    def fn_column(self, column):
        """The column of fn at a column of the slice."""
        return self.stream * self.hidden + self.rank * slice_size(self.hidden) + column

    def stream_column(self, column):
        """The column in the CTA's streams of a token, one after the other."""
        return self.stream * slice_size(self.hidden) + column


class Terms(NamedTuple):
    """Where the terms of a block are.

    Attributes:
        terms_local: a lane's terms of some blocks.
        t0: where those of the block begin.
        terms_shared: [slots, 9, 32, 4] words, 36 a lane and slot.
        slot: the slot of the block; None where its terms are in registers.
    """

    terms_local: Any
    t0: Any
    terms_shared: Any = None
    slot: Any = None

    def in_slot(self, slot):
        """The terms of a slot of shared memory instead."""
        return self._replace(t0=0, slot=slot)


def prefetch_fn(fn, segment, rank, hidden: int):
    """Start to bring a segment of fn to L2: a CTA's columns of one stream of one row."""
    column = segment % HC_MULT * hidden + rank * slice_size(hidden)
    return prefetch_l2_bulk(fn[segment // HC_MULT, column], slice_size(hidden) * 4)


@T.macro
def load_block(fn, block, weights_local, w0):
    """This lane's weights of a block: 3 rows, 2 steps, 4 columns; zeros past the slice's end."""
    for step in T.unroll(STEPS):
        h = block.column(step)
        inside = block.inside(h)
        for n in T.unroll(ROW_TILES):
            if inside:
                for v in T.vectorized(CHUNK):
                    weights_local[w0 + (n * STEPS + step) * CHUNK + v] = fn[
                        n * MMA_COLUMNS + block.lane // 4, block.fn_column(h + v)
                    ]
            else:
                for v in T.unroll(CHUNK):
                    weights_local[w0 + (n * STEPS + step) * CHUNK + v] = 0.0


@T.macro
def split_block(weights_local, w0, terms_local, t0):
    """The three bf16 terms of a lane's weights of a block, as :func:`term` places them."""
    split_local = T.alloc_local((SPLIT_TERMS,), "uint32")
    for step in ALL_STEPS:
        for n in (0, 1, 2):
            for pair in ALL_PAIRS:
                w = w0 + (n * STEPS + step) * CHUNK + pair * 2
                split3(weights_local[w], weights_local[w + 1], split_local[0])
                for i_term, operand, half in PLACES[n]:
                    terms_local[t0 + term(operand, half, step, pair)] = split_local[i_term]


@T.macro
def copy_block(fn, block, terms_shared, slot):
    """:func:`load_block` to the lanes' places in shared memory, there after ``loads_wait``.

    A warp copies 4 rows of 128 bytes at a time, so a lane copies for others of its warp.
    """
    h = block.start + block.lane % 8 * CHUNK
    inside = block.inside(h)
    for q in T.unroll(BLOCK_WEIGHTS // 4):
        vector = q // 2 * STEPS + block.lane % 8 // 4
        reader = q % 2 * 16 + block.lane // 8 * 4 + block.lane % 4
        if inside:
            load_async16(
                terms_shared[slot, vector, reader, 0],
                fn[q * 4 + block.lane // 8, block.fn_column(h)],
            )
        else:
            for v in T.vectorized(4):
                terms_shared[slot, vector, reader, v] = T.uint32(0)


@T.macro
def split_shared_block(terms_shared, slot, lane, weights_local, terms_local):
    """What :func:`copy_block` has brought to this lane's places, split in place."""
    for q in T.unroll(BLOCK_WEIGHTS // 4):
        for v in T.vectorized(4):
            weights_local[q * 4 + v] = T.reinterpret(terms_shared[slot, q, lane, v], "float32")
    split_block(weights_local, 0, terms_local, 0)
    for q in T.unroll(BLOCK_TERMS // 4):
        for v in T.vectorized(4):
            terms_shared[slot, q, lane, v] = terms_local[q * 4 + v]


@T.macro
def load_columns(streams_shared, row, block, values_local, v0):
    """B of a block: this lane's columns of the token in ``row``; zeros past the slice's end."""
    words_local = T.view(values_local, (values_local.shape[0] // 2,), "uint32")
    for step in T.unroll(STEPS):
        h = block.column(step)
        inside = block.inside(h)
        if inside:
            for v in T.vectorized(CHUNK):
                values_local[v0 + step * CHUNK + v] = streams_shared[
                    row, block.stream_column(h + v)
                ]
        else:
            for v in T.unroll(CHUNK // 2):
                words_local[v0 // 2 + step * (CHUNK // 2) + v] = T.uint32(0)


@T.macro
def load_operand(terms, lane, place, words_local, w0, fragment):
    """Operand and step ``place`` as A; ``w0``: where the step's words of the tokens begin."""
    operand, step = place
    if terms.slot is not None and operand < WHOLE_OPERANDS:
        for q in T.vectorized(4):
            fragment[q] = terms.terms_shared[terms.slot, operand * STEPS + step, lane, q]
    else:
        for pair in ALL_PAIRS:
            if terms.slot is None:
                fragment[pair * 2] = terms.terms_local[terms.t0 + term(operand, 0, step, pair)]
            else:
                fragment[pair * 2] = terms.terms_shared[
                    terms.slot, WHOLE_OPERANDS * STEPS, lane, step * 2 + pair
                ]
            if operand < WHOLE_OPERANDS:
                fragment[pair * 2 + 1] = terms.terms_local[terms.t0 + term(operand, 1, step, pair)]
            else:
                fragment[pair * 2 + 1] = words_local[w0 + pair]


@T.macro
def add_parts(part, p0, sums_local, s0):
    """The products of a block, of all operands from ``p0`` on, added to 8 tokens' sums."""
    for v in T.unroll(2):
        # Rows 0 to 7, 8 to 15 and 16 to 23 come with the small terms first; the squares follow.
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
def multiply(words_local, lane, terms, fragment, part, sums_local):
    """sums += fn . tokens of a block; ``words_local`` are this lane's columns of its token.

    ``part``, of zeros, and ``fragment`` are the caller's.
    """
    for step in ALL_STEPS:
        for operand in ALL_OPERANDS:
            load_operand(terms, lane, (operand, step), words_local, step * 2, fragment)
            mma_bf16(
                part[operand * 4], fragment[0], words_local[step * 2], words_local[step * 2 + 1]
            )
    add_parts(part, 0, sums_local, 0)


@T.macro
def add_block(streams_shared, row, block, terms, sums_local):
    """sums += fn . streams of a block, for 8 tokens; this lane's column is the token in ``row``."""
    values_local = T.alloc_local((STEPS * CHUNK,), "bfloat16")
    words_local = T.view(values_local, (STEPS * CHUNK // 2,), "uint32")
    fragment = T.alloc_local((4,), "uint32")
    part = T.alloc_local((len(OPERANDS) * 4,), "float32")
    for q in T.unroll(len(OPERANDS) * 4):
        part[q] = 0.0
    load_columns(streams_shared, row, block, values_local, 0)
    multiply(words_local, block.lane, terms, fragment, part, sums_local)


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

"""The steps of ``post_head`` on a tile of 8 tokens: post, the head, the final RMSNorm.

What a lane brings of a tile to shared memory, 8 columns of one token in x and in 4 streams, nobody
but the lane reads. What CTAs tell each other of a tile lies in a slot of its own, and an inbox says
when all of it has come.
"""

from typing import Any, NamedTuple

import tilelang.language as T

from ..arguments import named
from ..device import (
    inbox_open,
    load_async16,
    load_stream16,
    mma_bf16,
    send4,
    split3,
    store16,
)
from ..layout import CLUSTER, HC_MULT, SPLIT_TERMS, VECTOR, WARP, add_tree, halves
from .collapse import add_squares, collapse, norm_factor, normalise, round_values
from .columns import QUAD, SUMS_IN_PITCH, TILE, add_slices, column_warps
from .mixes import logit, sigmoid
from .post import Comb, Old, mix_stream
from .project import ALL_PAIRS, CHUNK, STEPS

ROWS = HC_MULT * SPLIT_TERMS  # of A: term 0 of fn's 4 rows, term 1, term 2
SUMS = ROWS + 1  # The squares come last.
STREAM_TERMS = STEPS * 4  # packed pairs of a lane and stream: an A fragment for each step
BATCH = 4  # tokens whose sums of squares, a float each, are one message
ALL_STREAMS = tuple(range(HC_MULT))

# A lane of a quad adds up every fourth slice, then the quad adds up its lanes: the order of
# columns.add_slices.
ADDING_LANES = min(QUAD, CLUSTER)
LANE_SLICES = CLUSTER // ADDING_LANES


class Tiles(NamedTuple):
    """What a CTA keeps of its tiles in shared memory.

    Attributes:
        loop: whether a place serves one tile after the other.
        fn_shared: [places, 4, threads, 8] bf16; the last place holds a lane's weights until they
            are split, which other buffers use later.
        x_shared: [places, threads, 8] bf16, x, then the collapsed streams until their RMSNorm.
        streams_shared: [places, 4, threads, 8] bf16, the old streams, then the new ones.
        mixes_shared: [places, 8, 5, 4] fp32, the post weights and the comb of each token.
        sums_shared: [2 * :func:`tile_sums`] fp32, the warps' sums of one tile and of the next.
        norm_shared: [places, warps, 8] fp32, the warps' squares of the collapsed streams.
    """

    loop: bool
    fn_shared: Any
    x_shared: Any
    streams_shared: Any
    mixes_shared: Any
    sums_shared: Any
    norm_shared: Any

    def place(self, shared, i):
        """Where tile ``i`` lies in a buffer of tiles, or of slots."""
        return i % int(shared.shape[0]) if self.loop else i


class Slots(NamedTuple):
    """What CTAs send each other, and the inboxes that are told of the bytes.

    Attributes:
        sums_in_shared: [slots * 8, pitch] fp32, 4 projections of each token from each CTA.
        squares_in_shared: [slots, CTAs, 8] fp32, the squares of each token from each CTA.
        norm_in_shared: [slots, CTAs, 8] fp32, the squares of the collapsed streams.
        sums_inbox: [slots], told of projections and squares.
        norm_inbox: [slots], told of the squares of the collapsed streams.
    """

    sums_in_shared: Any
    squares_in_shared: Any
    norm_in_shared: Any
    sums_inbox: Any
    norm_inbox: Any


class Weights(NamedTuple):
    """What a lane keeps of the weights in registers.

    Attributes:
        terms_local: fn in three terms, an A fragment for each stream and step.
        gain_local: the norm's weight of the lane's columns.
        scale_local: the scale of the mixes.
        base_local: the base of the mix of stream lane % 4.
    """

    terms_local: Any
    gain_local: Any
    scale_local: Any
    base_local: Any


def slots_for(tiles: int) -> Slots:
    """Make room for what CTAs send of ``tiles`` tiles at a time."""
    return named(
        Slots(
            T.alloc_shared((tiles * TILE, SUMS_IN_PITCH), "float32"),
            T.alloc_shared((tiles, CLUSTER, TILE), "float32"),
            T.alloc_shared((tiles, CLUSTER, TILE), "float32"),
            T.alloc_shared((tiles,), "uint64"),
            T.alloc_shared((tiles,), "uint64"),
        )
    )


def weights_of_lane() -> Weights:
    """Make room for a lane's weights."""
    return named(
        Weights(
            T.alloc_local((HC_MULT * STREAM_TERMS,), "uint32"),
            T.alloc_local((VECTOR,), "bfloat16"),
            T.alloc_local((1,), "float32"),
            T.alloc_local((1,), "float32"),
        )
    )


def tile_sums(hidden: int) -> int:
    """Return the floats of the warps' sums of a tile."""
    return column_warps(hidden) * TILE * SUMS


def sums_bytes(i, columns):
    """Return the bytes that all CTAs send of tile ``i``: 16 a token, and 16 for 4 squares."""
    here = columns.tokens(i)
    return CLUSTER * 16 * (here + T.ceildiv(here, BATCH))


def norm_bytes(i, columns):
    """Return the bytes that all CTAs send of the collapsed tile ``i``: 16 for 4 squares."""
    return CLUSTER * 16 * T.ceildiv(columns.tokens(i), BATCH)


@T.macro
def open_inboxes(tiles, columns, slots, norm):
    """The inboxes of the first tiles, opened by one thread: of many threads racecheck warns."""
    if columns.tx == 0:
        for i in T.serial(tiles):
            inbox_open(slots.sums_inbox[i], sums_bytes(i, columns))
            if norm:
                inbox_open(slots.norm_inbox[i], norm_bytes(i, columns))


@T.macro
def load_rows(fn, columns, tiles):
    """This lane's weights on their way: 4 columns of a row of fn, in each stream.

    They go through shared memory: loaded to registers before x, the compiler waited for them, to
    split them, before it asked for x; loaded after x, it asked for them when x had come.
    """
    place = tiles.fn_shared.shape[0] - 1
    for j in T.unroll(HC_MULT):
        if columns.inside:
            load_async16(
                tiles.fn_shared[place, j, columns.tx, 0],
                fn[
                    columns.row % HC_MULT,
                    j * columns.hidden + columns.first_column + columns.row // HC_MULT * CHUNK,
                ],
            )


@T.macro
def split_rows(columns, tiles, weights):
    """A fragments of one stream after the other: lane row r holds rows r and r + 8 of A.

    Lane rows 0 to 3 bring the weights of step 0 of row r of fn, 4 to 7 those of step 1 of row
    r - 4. Each splits its own; the former need terms 0 and 2 of both steps, the latter term 1.
    """
    fn_local = T.alloc_local((HC_MULT * VECTOR,), "bfloat16")
    weights_local = T.view(fn_local, (HC_MULT * CHUNK,), "float32")
    split_local = T.alloc_local((SPLIT_TERMS,), "uint32")
    other = T.alloc_local((1,), "uint32")
    last = T.alloc_local((1,), "uint32")
    place = tiles.fn_shared.shape[0] - 1
    upper = columns.row < HC_MULT
    for j in T.unroll(HC_MULT):
        if columns.inside:
            for v in T.vectorized(VECTOR):
                fn_local[j * VECTOR + v] = tiles.fn_shared[place, j, columns.tx, v]
        else:
            for v in T.unroll(CHUNK):
                weights_local[j * CHUNK + v] = 0.0
    for j in ALL_STREAMS:
        for pair in ALL_PAIRS:
            split3(
                weights_local[j * CHUNK + pair * 2],
                weights_local[j * CHUNK + pair * 2 + 1],
                split_local[0],
            )
            other[0] = T.shfl_xor(T.if_then_else(upper, split_local[1], split_local[0]), WARP // 2)
            last[0] = T.shfl_xor(split_local[2], WARP // 2)
            t0 = j * STREAM_TERMS + pair * 2
            weights.terms_local[t0] = T.if_then_else(upper, split_local[0], other[0])
            weights.terms_local[t0 + 1] = T.if_then_else(upper, split_local[2], T.uint32(0))
            weights.terms_local[t0 + 4] = T.if_then_else(upper, other[0], split_local[1])
            weights.terms_local[t0 + 5] = T.if_then_else(upper, last[0], T.uint32(0))


@T.macro
def load_constants(mixing, output, columns, weights):
    """This lane's weights of the norm, scale and base."""
    if output.norm and columns.inside:
        for v in T.vectorized(VECTOR):
            weights.gain_local[v] = output.norm_weight[columns.first_column + v]
    weights.scale_local[0] = mixing.hc_scale[0]
    weights.base_local[0] = mixing.hc_base[columns.lane % HC_MULT]


@T.macro
def load_tile(i, token, there, post, columns, tiles):
    """This lane's columns of a token of the cluster on their way to those of tile ``i``."""
    if there and columns.inside:
        t = columns.first + token
        load_stream16(
            tiles.x_shared[tiles.place(tiles.x_shared, i), columns.tx, 0],
            post.x[t, columns.first_column],
        )
        for j in T.unroll(HC_MULT):
            load_stream16(
                tiles.streams_shared[tiles.place(tiles.streams_shared, i), j, columns.tx, 0],
                post.residual[t, j, columns.first_column],
            )


@T.macro
def mix_streams(i, post, columns, tiles, new_local, words_local):
    """post of a lane's columns of tile ``i``; the new streams take the place of the old ones."""
    x_local = T.alloc_local((VECTOR,), "bfloat16")
    streams_local = T.alloc_local((HC_MULT * VECTOR,), "bfloat16")
    post_local = T.alloc_local((HC_MULT,), "float32")
    comb_local = T.alloc_local((HC_MULT * HC_MULT,), "float32")
    place = tiles.place(tiles.streams_shared, i)
    mixes = tiles.place(tiles.mixes_shared, i)
    token = T.min(columns.row, columns.tokens(i) - 1)
    for v in T.vectorized(VECTOR):
        x_local[v] = tiles.x_shared[tiles.place(tiles.x_shared, i), columns.tx, v]
    for j in T.unroll(HC_MULT):
        for v in T.vectorized(VECTOR):
            streams_local[j * VECTOR + v] = tiles.streams_shared[place, j, columns.tx, v]
    for j in T.vectorized(HC_MULT):
        post_local[j] = tiles.mixes_shared[mixes, token, 0, j]
    for r in T.unroll(HC_MULT):
        for j in T.vectorized(HC_MULT):
            comb_local[r * HC_MULT + j] = tiles.mixes_shared[mixes, token, 1 + r, j]
    for j in T.unroll(HC_MULT):
        mix_stream(
            Old(x_local, streams_local, VECTOR), post_local[j], Comb(comb_local, j, HC_MULT),
            new_local, j * VECTOR,
        )  # fmt: skip
        for v in T.vectorized(VECTOR):
            tiles.streams_shared[place, j, columns.tx, v] = new_local[j * VECTOR + v]
    if post.residual_out is not None and columns.row < columns.tokens(i):
        for j in T.unroll(HC_MULT):
            store16(
                post.residual_out[columns.first_token(i) + columns.row, j, columns.first_column],
                words_local[j * VECTOR // 2],
            )


@T.macro
def add_projection(words_local, weights, sums_local):
    """sums_local = fn . streams of a warp's columns: this lane's rows of A, of two tokens.

    Tensor cores truncate as they accumulate, so each stream and each term starts from zero and is
    added in fp32, rounded to nearest.
    """
    part = T.alloc_local((4,), "float32")
    for q in T.unroll(4):
        sums_local[q] = 0.0
    for j in T.unroll(HC_MULT):
        for q in T.unroll(4):
            part[q] = 0.0
        for step in T.unroll(STEPS):
            mma_bf16(
                part[0],
                weights.terms_local[j * STREAM_TERMS + step * 4],
                words_local[j * CHUNK + step * 2],
                words_local[j * CHUNK + step * 2 + 1],
            )
        for q in T.unroll(4):
            sums_local[q] = sums_local[q] + part[q]


@T.macro
def add_diagonal(words_local, diagonal):
    """diagonal = squares of a warp's columns, of two tokens: those of the product of the streams
    with themselves, as B is rows 0 to 7 of A."""
    part = T.alloc_local((4,), "float32")
    fragment = T.alloc_local((4,), "uint32")
    for v in T.unroll(2):
        diagonal[v] = 0.0
    for j in T.unroll(HC_MULT):
        for q in T.unroll(4):
            part[q] = 0.0
        for step in T.unroll(STEPS):
            for half in T.unroll(2):
                fragment[half * 2] = words_local[j * CHUNK + step * 2 + half]
                fragment[half * 2 + 1] = T.uint32(0)
            mma_bf16(
                part[0],
                fragment[0],
                words_local[j * CHUNK + step * 2],
                words_local[j * CHUNK + step * 2 + 1],
            )
        for v in T.unroll(2):
            diagonal[v] = diagonal[v] + part[v]


@T.macro
def mix_tile(i, post, columns, tiles, weights):
    """post and the projection of tile ``i``: the new streams, and this warp's sums."""
    new_local = T.alloc_local((HC_MULT * VECTOR,), "bfloat16")
    words_local = T.view(new_local, (HC_MULT * VECTOR // 2,), "uint32")
    sums_local = T.alloc_local((4,), "float32")
    diagonal = T.alloc_local((2,), "float32")
    if columns.inside:
        mix_streams(i, post, columns, tiles, new_local, words_local)
    else:
        for v in T.unroll(HC_MULT * VECTOR // 2):
            words_local[v] = T.uint32(0)
    add_projection(words_local, weights, sums_local)
    add_diagonal(words_local, diagonal)
    s0 = i % 2 * tile_sums(columns.hidden) + columns.warp * TILE * SUMS
    for v in T.unroll(2):
        token = columns.lane % QUAD * 2 + v
        tiles.sums_shared[s0 + token * SUMS + columns.row] = sums_local[v]
        if columns.row < HC_MULT:
            tiles.sums_shared[s0 + token * SUMS + TILE + columns.row] = sums_local[2 + v]
    if columns.row // 2 == columns.lane % QUAD:
        tiles.sums_shared[s0 + columns.row * SUMS + ROWS] = T.if_then_else(
            columns.row % 2 == 0, diagonal[0], diagonal[1]
        )


@T.macro
def send_squares(i, total, first_lane, columns, slots_shared, slot, inbox):
    """The squares of tile ``i`` to all CTAs; total[0] of lane first_lane + t is that of token t."""
    squares_local = T.alloc_local((BATCH,), "float32")
    batch = columns.lane // CLUSTER
    for k in T.unroll(BATCH):
        squares_local[k] = T.shfl_sync(total[0], first_lane + batch * BATCH % TILE + k)
    if batch < 2 and batch * BATCH < columns.tokens(i):
        send4(
            slots_shared[slot, columns.rank, batch * BATCH],
            inbox[slot],
            columns.lane % CLUSTER,
            squares_local[0],
        )


@T.macro
def send_sums(i, columns, tiles, slots):
    """The warps' sums of tile ``i`` added up, then the terms, and sent to all CTAs.

    One warp takes a token and one lane a sum; lanes 16 to 23 take the squares of all tokens, sent
    by a warp that has no other sums, where there is one.
    """
    total = T.alloc_local((1,), "float32")
    mixes_local = T.alloc_local((HC_MULT,), "float32")
    warps = column_warps(columns.hidden)
    lane = columns.lane
    slot = tiles.place(slots.sums_inbox, i)
    squares_warp = TILE if warps > TILE else warps - 1
    for k in T.unroll(-(-TILE // warps)):
        t = k * warps + columns.warp
        if t < columns.tokens(i) or columns.warp == squares_warp:
            total[0] = 0.0
            if lane < ROWS or lane // TILE == 2:
                place = i % 2 * tile_sums(columns.hidden) + T.if_then_else(
                    lane < ROWS, t % TILE * SUMS + lane, lane % TILE * SUMS + ROWS
                )
                for w in T.unroll(warps):
                    total[0] = total[0] + tiles.sums_shared[place + w * TILE * SUMS]
            for j in T.unroll(HC_MULT):
                mixes_local[j] = (
                    T.shfl_sync(total[0], 2 * HC_MULT + j) + T.shfl_sync(total[0], HC_MULT + j)
                ) + T.shfl_sync(total[0], j)
            if t < columns.tokens(i) and lane < CLUSTER:
                send4(
                    slots.sums_in_shared[slot * TILE + t, columns.rank * HC_MULT],
                    slots.sums_inbox[slot],
                    lane,
                    mixes_local[0],
                )
            if k == 0 and columns.warp == squares_warp:
                send_squares(
                    i, total, 2 * TILE, columns, slots.squares_in_shared, slot, slots.sums_inbox
                )


@T.macro
def add_squares_in(i, squares_in_shared, slot, columns, squares):
    """squares[0] = the sum over the CTAs of the lane's token of tile ``i``, added up by a quad."""
    slices_local = T.alloc_local((LANE_SLICES,), "float32")
    token = T.min(columns.row, columns.tokens(i) - 1)
    for k in T.unroll(LANE_SLICES):
        slices_local[k] = squares_in_shared[
            slot, columns.lane % ADDING_LANES + k * ADDING_LANES, token
        ]
    add_tree(slices_local, halves(LANE_SLICES))
    squares[0] = slices_local[0]
    for half in halves(ADDING_LANES):
        squares[0] = squares[0] + T.shfl_xor(squares[0], half)


@T.macro
def make_weights(i, columns, tiles, slots, weights, mixing, weights_local):
    """The 4 collapse weights of the lane's token of tile ``i``, whose sums have come."""
    squares = T.alloc_local((1,), "float32")
    total = T.alloc_local((1,), "float32")
    weight = T.alloc_local((1,), "float32")
    slot = tiles.place(slots.sums_inbox, i)
    token = T.min(columns.row, columns.tokens(i) - 1)
    add_squares_in(i, slots.squares_in_shared, slot, columns, squares)
    add_slices(slots.sums_in_shared, slot * TILE + token, columns.lane % QUAD, HC_MULT, total)
    total[0] = logit(
        total[0], squares[0], HC_MULT * columns.hidden, mixing.rms_eps, weights.scale_local[0],
        weights.base_local[0],
    )  # fmt: skip
    weight[0] = sigmoid(total[0]) + mixing.hc_pre_eps
    for j in T.unroll(HC_MULT):
        weights_local[j] = T.shfl_sync(weight[0], columns.row * QUAD + j)


@T.macro
def collapse_tile(i, columns, tiles, slots, weights, mixing, output):
    """The collapsed streams of tile ``i``, whose sums have come.

    They go to memory, or for the RMSNorm to the place of x, and this warp's sums of their squares
    to ``norm_shared``.
    """
    streams_local = T.alloc_local((HC_MULT * VECTOR,), "bfloat16")
    new_local = T.alloc_local((VECTOR,), "bfloat16")
    words_local = T.view(new_local, (VECTOR // 2,), "uint32")
    total_local = T.alloc_local((VECTOR,), "float32")
    weights_local = T.alloc_local((HC_MULT,), "float32")
    squares = T.alloc_local((1,), "float32")
    place = tiles.place(tiles.streams_shared, i)
    make_weights(i, columns, tiles, slots, weights, mixing, weights_local)
    squares[0] = 0.0
    if columns.inside:
        for j in T.unroll(HC_MULT):
            for v in T.vectorized(VECTOR):
                streams_local[j * VECTOR + v] = tiles.streams_shared[place, j, columns.tx, v]
        collapse(streams_local, 0, weights_local, 0, total_local)
        add_squares(total_local, squares, 0)
        round_values(total_local, new_local, 0)
        if output.norm:
            for v in T.vectorized(VECTOR):
                tiles.x_shared[tiles.place(tiles.x_shared, i), columns.tx, v] = new_local[v]
        elif columns.row < columns.tokens(i):
            store16(
                output.out[columns.first_token(i) + columns.row, columns.first_column],
                words_local[0],
            )
    if output.norm:
        squares[0] = squares[0] + T.shfl_xor(squares[0], 1)
        squares[0] = squares[0] + T.shfl_xor(squares[0], 2)
        if columns.lane % QUAD == 0:
            tiles.norm_shared[tiles.place(tiles.norm_shared, i), columns.warp, columns.row] = (
                squares[0]
            )


@T.macro
def send_norm(i, columns, tiles, slots):
    """The warps' squares of the collapsed tile ``i`` added up and sent to all CTAs, by one warp."""
    total = T.alloc_local((1,), "float32")
    total[0] = 0.0
    for w in T.unroll(column_warps(columns.hidden)):
        total[0] = (
            total[0] + tiles.norm_shared[tiles.place(tiles.norm_shared, i), w, columns.lane % TILE]
        )
    slot = tiles.place(slots.norm_inbox, i)
    send_squares(i, total, 0, columns, slots.norm_in_shared, slot, slots.norm_inbox)


@T.macro
def normalise_tile(i, columns, tiles, slots, weights, output):
    """The RMSNorm of tile ``i``, whose squares have come, to memory."""
    x_local = T.alloc_local((VECTOR,), "bfloat16")
    new_local = T.alloc_local((VECTOR,), "bfloat16")
    words_local = T.view(new_local, (VECTOR // 2,), "uint32")
    total_local = T.alloc_local((VECTOR,), "float32")
    squares = T.alloc_local((1,), "float32")
    slot = tiles.place(slots.norm_inbox, i)
    add_squares_in(i, slots.norm_in_shared, slot, columns, squares)
    factor = norm_factor(squares[0], columns.hidden, output.norm_eps)
    if columns.inside and columns.row < columns.tokens(i):
        for v in T.vectorized(VECTOR):
            x_local[v] = tiles.x_shared[tiles.place(tiles.x_shared, i), columns.tx, v]
        normalise(x_local, 0, factor, weights.gain_local, 0, total_local)
        round_values(total_local, new_local, 0)
        store16(
            output.out[columns.first_token(i) + columns.row, columns.first_column],
            words_local[0],
        )

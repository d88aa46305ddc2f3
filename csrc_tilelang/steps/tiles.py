"""tiles: what kernels share that loop over tiles of tokens, ``pre`` and the long boundary.

A cluster of 16 CTAs shares the hidden dimension and keeps its slices of fn on the chip, in three
bf16 terms, while the cluster loops over tiles of 16 tokens (8 where a slice has more than 320
columns). 8 projection warps of a CTA hold fn; its token warps own 1 or 2 tokens of a tile each.
Whoever owns a token's mixes, one CTA of the 16, is sent the token's sums, sends its collapse
weights to all, and makes its post weights and comb when all tiles are done: in the loop, where
registers hold fn, Sinkhorn would be spilled.

What CTAs tell each other goes through inboxes, of two or three sets in turn, which a thread that
has waited opens again.
"""

from typing import Any, NamedTuple

import tilelang.language as T

from ...geometry import tile_tokens
from ..device import address, inbox_again, inbox_wait, send, send2, send4
from ..layout import (
    CLUSTER,
    COMB,
    HC_MULT,
    MIXES,
    MMA_COLUMNS,
    SLICE_TREE,
    SQUARES,
    VECTOR,
    WARP,
    add_tree,
    first_token,
    most_tokens,
    slice_size,
    tokens_of_tile,
)
from .collapse import add_squares, collapse, norm_factor, normalise, round_values
from .mixes import logit, scale_of, sigmoid, store_comb
from .project import STREAMS_PAD, SUMS, SUMS_PITCH, WARP_TREE, WARPS
from .sinkhorn import sinkhorn, softmax_rows

PROJECTION_WARPS = 8
PROJECTION_THREADS = PROJECTION_WARPS * WARP
HALVES = WARPS // PROJECTION_WARPS  # A projection warp stands for two of the warps of the layout.
SETS = 2  # of weights, of a tile's sums in shared memory, and of the tokens of two turns
SUMS_BYTES = CLUSTER * SUMS_PITCH * 4  # what an owner is sent of a token


class Memory(NamedTuple):
    """What a CTA keeps in shared memory, and the inboxes of what CTAs tell each other.

    Attributes:
        streams_shared: [buffers * tile, 4 * slice + pad] bf16, the streams of some tiles.
        sums_shared: [2 * tile / 8, 8, 8, 28] fp32, the sums of two tiles, by projection warp.
        slices_shared: [sets, 16, 28] fp32, what the owner of a token is sent and adds up.
        weights_shared: [2, tile, 4] fp32, the collapse weights of a tile.
        squares_shared: [sets, 16, tile] fp32, what the norm of a tile adds up.
        gain_shared: [slice] bf16, the norm's weight.
        hc_shared: [27] fp32, the 3 scales, then the 24 biases.
        sums_inbox, weights_inbox, squares_inbox: an inbox for each set of what is sent.
    """

    streams_shared: Any
    sums_shared: Any
    slices_shared: Any
    weights_shared: Any
    squares_shared: Any
    gain_shared: Any
    hc_shared: Any
    sums_inbox: Any
    weights_inbox: Any
    squares_inbox: Any


class Collapsed(NamedTuple):
    """The collapsed streams of a token warp, rounded, until the norm of their tile.

    Attributes:
        value_local: a lane's elements of the tokens, one after the other.
        tokens: how many tokens of a tile a token warp owns.
    """

    value_local: Any
    tokens: int


@T.macro
def tiles_of_cluster(cluster, tokens, group_tokens, larger_groups, hidden):
    """Return variables: the first token of a cluster, its tokens, its tiles, and the warp.

    A kernel hands them on to a macro, where they are variables no more: TileLang splits an ``if``
    that reads a variable into one for each statement, and what the statements hand on then stays
    in registers around the loop (NOTES.md, "Variables handed on to a macro"). The tiles are not
    those of the tokens, since a minimum is made in a register of every lane, and there is no room
    for one. Lane 0 says which warp this is, so the compiler knows the warp's number to be the same
    in all lanes.
    """
    tile = tile_tokens(hidden)
    most = most_tokens(cluster, group_tokens, larger_groups, tile)
    first = T.alloc_var("int32", init=first_token(cluster, group_tokens, larger_groups, tile))
    count = T.alloc_var("int32", init=T.min(most, tokens - first))
    tiles = T.alloc_var("int32", init=T.ceildiv(most, tile))
    warp = T.alloc_var("int32", init=T.shfl_sync(T.get_thread_binding() // WARP, 0))
    return first, count, tiles, warp


def repetitions(hidden: int) -> int:
    """Return how many times 8 elements a lane has of a token's slice, in collapse and norm."""
    return -(-slice_size(hidden) // (WARP * VECTOR))


def element(r, lane):
    """Return the first element of a lane's repetition ``r``, in the slice."""
    return (r * WARP + lane) * VECTOR


def mma_tiles(hidden: int) -> int:
    """Return how many times 8 tokens a tile has."""
    return tile_tokens(hidden) // MMA_COLUMNS


def tiles_per_owned(hidden: int) -> int:
    """Return in how many tiles a CTA owns one token: 1, or 2 where a tile has 8 tokens."""
    return CLUSTER // tile_tokens(hidden)


def owned_sets(hidden: int) -> int:
    """Return how many sets of sums an owner has room for."""
    return SETS // tiles_per_owned(hidden)


def owned_set(i, hidden: int):
    """Return in which of these sets the sums of tile ``i`` are."""
    return i // tiles_per_owned(hidden) % owned_sets(hidden)


def owner(i, token, hidden: int):
    """Return the CTA that owns a token of tile ``i``."""
    return i % tiles_per_owned(hidden) * tile_tokens(hidden) + token


def owned_token(i, rank, hidden: int):
    """Return the token of tile ``i`` that CTA ``rank`` owns, if the tile has such a token."""
    return rank - i % tiles_per_owned(hidden) * tile_tokens(hidden)


def weights_bytes(i, hidden, count):
    """Return what the owners send of tile ``i``: 4 weights a token."""
    return tokens_of_tile(i, tile_tokens(hidden), count) * (HC_MULT * 4)


def squares_bytes(i, warp_tokens, hidden, count):
    """Return what 16 CTAs send of tile ``i``: a sum a token, for all tokens of a warp at once."""
    here = tokens_of_tile(i, tile_tokens(hidden), count)
    return T.ceildiv(here, warp_tokens) * (warp_tokens * CLUSTER * 4)


@T.macro
def memory_of_cta(hidden, buffers, squares_sets):
    """Room in shared memory, as the fields of a Memory: a macro's return loses its type."""
    tile = tile_tokens(hidden)
    size = slice_size(hidden)
    streams_shared = T.alloc_shared((buffers * tile, HC_MULT * size + STREAMS_PAD), "bfloat16")
    sums_shared = T.alloc_shared(
        (SETS * mma_tiles(hidden), PROJECTION_WARPS, MMA_COLUMNS, SUMS_PITCH), "float32"
    )
    slices_shared = T.alloc_shared((owned_sets(hidden), CLUSTER, SUMS_PITCH), "float32")
    weights_shared = T.alloc_shared((SETS, tile, HC_MULT), "float32")
    squares_shared = T.alloc_shared((squares_sets, CLUSTER, tile), "float32")
    gain_shared = T.alloc_shared((size,), "bfloat16")
    hc_shared = T.alloc_shared((3 + MIXES,), "float32")
    sums_inbox = T.alloc_shared((owned_sets(hidden),), "uint64")
    weights_inbox = T.alloc_shared((SETS,), "uint64")
    squares_inbox = T.alloc_shared((squares_sets,), "uint64")
    return (
        streams_shared, sums_shared, slices_shared, weights_shared, squares_shared, gain_shared,
        hc_shared, sums_inbox, weights_inbox, squares_inbox,
    )  # fmt: skip


@T.macro
def load_constants(mixing, output, memory, at):
    """Scales and biases, and the norm's weights of this CTA's columns, by token warp 0."""
    size = slice_size(at.hidden)
    if at.warp == 0 and at.lane < 3:
        memory.hc_shared[at.lane] = mixing.hc_scale[at.lane]
    if at.warp == 0 and at.lane < MIXES:
        memory.hc_shared[3 + at.lane] = mixing.hc_base[at.lane]
    if output.norm and at.warp == 0:
        for r in T.unroll(repetitions(at.hidden)):
            if element(r, at.lane) < size:
                for v in T.vectorized(VECTOR):
                    memory.gain_shared[element(r, at.lane) + v] = output.norm_weight[
                        at.rank * size + element(r, at.lane) + v
                    ]


@T.macro
def send_sums(i, token, memory, at):
    """4 sums of a token of tile ``i`` to its owner, those of the projection warps added up.

    Of 8 lanes in turn the first 7 have 4 sums each.
    """
    set0 = i % SETS * mma_tiles(at.hidden)
    v0 = at.lane % 8 * 4
    slot = address(memory.slices_shared[owned_set(i, at.hidden), at.rank, v0])
    inbox = address(memory.sums_inbox[owned_set(i, at.hidden)])
    lower_local = T.alloc_local((4,), "float32")
    upper_local = T.alloc_local((4,), "float32")
    vectors_local = T.alloc_local((PROJECTION_WARPS // 2 * 4,), "float32")
    for w in T.unroll(PROJECTION_WARPS // 2):
        for v in T.vectorized(4):
            lower_local[v] = memory.sums_shared[
                set0 + token // MMA_COLUMNS, w, token % MMA_COLUMNS, v0 + v
            ]
        for v in T.vectorized(4):
            upper_local[v] = memory.sums_shared[
                set0 + token // MMA_COLUMNS,
                w + PROJECTION_WARPS // 2,
                token % MMA_COLUMNS,
                v0 + v,
            ]
        for v in T.unroll(4):
            vectors_local[w * 4 + v] = lower_local[v] + upper_local[v]
    for half in WARP_TREE[2:]:
        for q in T.unroll(half * 4):
            vectors_local[q] = vectors_local[q] + vectors_local[half * 4 + q]
    send4(slot, inbox, owner(i, token, at.hidden), vectors_local[0])


@T.macro
def make_weights(i, own, mixing, logit_local, memory, at):
    """Collapse weights of token ``own`` of tile ``i``, which this CTA owns, to all, by one warp.

    logit_local[0] of lane c < 24 is the token's logit c then.
    """
    slices_local = T.alloc_local((CLUSTER,), "float32")
    pre_local = T.alloc_local((HC_MULT,), "float32")
    scale = T.alloc_local((1,), "float32")
    base = T.alloc_local((1,), "float32")
    mix = T.alloc_local((1,), "float32")
    owned = owned_set(i, at.hidden)
    # A lane has one column.
    scale[0] = memory.hc_shared[scale_of(at.lane)]
    base[0] = memory.hc_shared[3 + T.min(at.lane, MIXES - 1)]
    inbox_wait(
        memory.sums_inbox[owned],
        i // tiles_per_owned(at.hidden) // owned_sets(at.hidden) % 2,
    )
    for c in T.unroll(CLUSTER):
        slices_local[c] = memory.slices_shared[owned, c, T.min(at.lane, SUMS - 1)]
    T.sync_warp()
    if at.lane == 0:
        inbox_again(memory.sums_inbox[owned], SUMS_BYTES)
    add_tree(slices_local, SLICE_TREE)
    logit_local[0] = logit(
        slices_local[0], T.shfl_sync(slices_local[0], SQUARES), HC_MULT * at.hidden,
        mixing.rms_eps, scale[0], base[0],
    )  # fmt: skip
    mix[0] = sigmoid(logit_local[0]) + mixing.hc_pre_eps
    for j in T.unroll(HC_MULT):
        pre_local[j] = T.shfl_sync(mix[0], j)
    if at.lane < CLUSTER:
        send4(
            memory.weights_shared[i % SETS, own, 0],
            memory.weights_inbox[i % SETS],
            at.lane,
            pre_local[0],
        )


@T.macro
def leave_logits(t, logit_local, mixing, lane):
    """The logits of post weights and comb of token ``t`` where their results will be."""
    if lane >= HC_MULT and lane < COMB:
        mixing.post_mix[t, lane - HC_MULT] = logit_local[0]
    elif lane >= COMB and lane < MIXES:
        mixing.comb_mix[t, (lane - COMB) // HC_MULT, lane % HC_MULT] = logit_local[0]


@T.macro
def finish_mixes(count, threads, mixing, at):
    """Post weights and combs of the first ``count`` tokens that this CTA owns, from their logits.

    One of ``threads`` threads has a token, whose logits are where the results go.
    """
    post_local = T.alloc_local((HC_MULT,), "float32")
    comb_local = T.alloc_local((HC_MULT * HC_MULT,), "float32")
    for k in T.serial(T.ceildiv(count, threads * CLUSTER)):
        t = (k * threads + at.tx) * CLUSTER + at.rank
        if at.tx < threads and t < count:
            for j in T.vectorized(HC_MULT):
                post_local[j] = mixing.post_mix[at.first + t, j]
            for r in T.unroll(HC_MULT):
                for j in T.vectorized(HC_MULT):
                    comb_local[r * HC_MULT + j] = mixing.comb_mix[at.first + t, r, j]
            for j in T.unroll(HC_MULT):
                post_local[j] = sigmoid(post_local[j]) * mixing.hc_post_mult_value
            for j in T.vectorized(HC_MULT):
                mixing.post_mix[at.first + t, j] = post_local[j]
            softmax_rows(comb_local, mixing.hc_sinkhorn_eps)
            sinkhorn(comb_local, mixing.hc_sinkhorn_eps, mixing.sinkhorn_repeat)
            store_comb(comb_local, mixing, at.first + t)


@T.macro
def collapse_tile(i, buffer, output, collapsed, memory, at):
    """collapse: v = sum_j weight_j * r'_j, of this token warp's tokens of tile ``i``.

    Their streams are in ``buffer``. The rounding of v stays in registers and its squares go to all
    CTAs where the norm follows; it is the layer input otherwise. Tokens past the end are made like
    the others and not stored, so that the tokens of a warp overlap.
    """
    size = slice_size(at.hidden)
    tile = tile_tokens(at.hidden)
    reps = repetitions(at.hidden)
    row0 = at.warp * collapsed.tokens
    weights_local = T.alloc_local((collapsed.tokens * HC_MULT,), "float32")
    streams_local = T.alloc_local((HC_MULT * VECTOR,), "bfloat16")
    total_local = T.alloc_local((VECTOR,), "float32")
    squares_local = T.alloc_local((collapsed.tokens,), "float32")
    inbox_wait(memory.weights_inbox[i % SETS], i // SETS % 2)
    for k in T.unroll(collapsed.tokens):
        for j in T.vectorized(HC_MULT):
            weights_local[k * HC_MULT + j] = memory.weights_shared[i % SETS, row0 + k, j]
    T.sync_warp()
    if at.warp == 0 and at.lane == 0 and i + SETS < at.tiles:
        inbox_again(memory.weights_inbox[i % SETS], weights_bytes(i + SETS, at.hidden, at.count))
    for k in T.unroll(collapsed.tokens):
        squares_local[k] = 0.0
    for r in T.unroll(reps):
        if element(r, at.lane) < size:
            for k in T.unroll(collapsed.tokens):
                for j in T.unroll(HC_MULT):
                    for v in T.vectorized(VECTOR):
                        streams_local[j * VECTOR + v] = memory.streams_shared[
                            buffer * tile + row0 + k, j * size + element(r, at.lane) + v
                        ]
                collapse(streams_local, 0, weights_local, k * HC_MULT, total_local)
                add_squares(total_local, squares_local, k)
                round_values(total_local, collapsed.value_local, (k * reps + r) * VECTOR)
                if not output.norm and i * tile + row0 + k < at.count:
                    for v in T.vectorized(VECTOR):
                        output.out[
                            at.first + i * tile + row0 + k,
                            at.rank * size + element(r, at.lane) + v,
                        ] = collapsed.value_local[(k * reps + r) * VECTOR + v]
    if output.norm:
        send_squares(i, squares_local, memory, at)


@T.macro
def send_squares(i, squares_local, memory, at):
    """A token warp's sums of squares of tile ``i``, of 1 or 2 tokens, to all CTAs."""
    sets = memory.squares_inbox.shape[0]
    per = squares_local.shape[0]
    for k in T.unroll(per):
        squares_local[k] = T.warp_reduce_sum(squares_local[k])
    if at.lane < CLUSTER:
        if per == 2:
            send2(
                memory.squares_shared[i % sets, at.rank, at.warp * per],
                memory.squares_inbox[i % sets],
                at.lane,
                squares_local[0],
                squares_local[1],
            )
        else:
            send(
                memory.squares_shared[i % sets, at.rank, at.warp * per],
                memory.squares_inbox[i % sets],
                at.lane,
                squares_local[0],
            )


@T.macro
def normalise_tile(i, output, collapsed, memory, at):
    """The RMSNorm of what :func:`collapse_tile` left of tile ``i``, to memory."""
    size = slice_size(at.hidden)
    tile = tile_tokens(at.hidden)
    reps = repetitions(at.hidden)
    sets = memory.squares_inbox.shape[0]
    row0 = at.warp * collapsed.tokens
    factor = T.alloc_local((1,), "float32")
    factors_local = T.alloc_local((collapsed.tokens,), "float32")
    gain_local = T.alloc_local((VECTOR,), "bfloat16")
    out_local = T.alloc_local((VECTOR,), "bfloat16")
    total_local = T.alloc_local((VECTOR,), "float32")
    inbox_wait(memory.squares_inbox[i % sets], i // sets % 2)
    # Each half of a warp that has two tokens adds up one of them.
    factor[0] = memory.squares_shared[
        i % sets, at.lane % CLUSTER, row0 + at.lane // CLUSTER % collapsed.tokens
    ]
    T.sync_warp()
    if at.warp == 0 and at.lane == 0 and i + sets < at.tiles:
        inbox_again(
            memory.squares_inbox[i % sets],
            squares_bytes(i + sets, collapsed.tokens, at.hidden, at.count),
        )
    for half in SLICE_TREE:
        factor[0] = factor[0] + T.shfl_xor(factor[0], half)
    factor[0] = norm_factor(factor[0], at.hidden, output.norm_eps)
    for k in T.unroll(collapsed.tokens):
        factors_local[k] = T.shfl_sync(factor[0], k * CLUSTER)
    for r in T.unroll(reps):
        if element(r, at.lane) < size:
            for v in T.vectorized(VECTOR):
                gain_local[v] = memory.gain_shared[element(r, at.lane) + v]
            for k in T.unroll(collapsed.tokens):
                v0 = (k * reps + r) * VECTOR
                normalise(collapsed.value_local, v0, factors_local[k], gain_local, 0, total_local)
                round_values(total_local, out_local, 0)
                if i * tile + row0 + k < at.count:
                    for v in T.vectorized(VECTOR):
                        output.out[
                            at.first + i * tile + row0 + k,
                            at.rank * size + element(r, at.lane) + v,
                        ] = out_local[v]

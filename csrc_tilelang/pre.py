"""pre: projection, mixes, Sinkhorn, collapse and RMSNorm in one pass over the streams.

Algorithm: as in ``fused_post_pre_persistent``, clusters of 16 CTAs that share the hidden dimension
stay, as many as run at once, and loop over tiles of tokens: each token is read once, into shared
memory, where it is projected and, when its weights have come, collapsed. With no post to make, the
warps' roles are:

* 8 projection warps hold fn and do nothing else than project tile after tile as the streams come.
* 8 token warps own 1 or 2 tokens of a tile. They add up the projection warps' sums and send them to
  the tokens' owners, collapse the tile whose weights have come, load another one in its place and
  normalise the tile before that. They take turns in making the weights of the token that this
  CTA owns.

Loads are bulk copies, a row each, as many tiles ahead as there are buffers. Inboxes are of two sets
by the tile's parity, opened again for the tile after the next by a thread that has waited. Nothing
else has to say that a slot is free: a token warp sends its tokens' sums of tile i + 2 only when it
has its weights of tile i, which their owners sent when they had read all sums of tile i, and when
it has read their squares of tile i; and nobody sends weights or squares for them before that.
All waits are for CTAs of the same cluster, which the hardware starts together, or for warps of the
same CTA; no cluster waits for another. A CTA ends only when all that was sent to it has come.

The arithmetic and its order are those of ``fused_post_pre``: after ``post``, its bits.
"""

import tilelang.language as T

from ..dispatch import CLUSTER
from ._collapse import sigmoid
from ._device import DEVICE_SOURCE, HC_MULT, MIXES, MMA_COLUMNS, SQUARES, VECTOR, WARP
from ._operands import (
    ALL_OPERANDS,
    ALL_PAIRS,
    ALL_STEPS,
    CHUNK,
    OPERANDS,
    SLICE_TREE,
    STEPS,
    SUMS,
    SUMS_PITCH,
    UNIT_TERMS,
    UNIT_WEIGHTS,
    add_tree,
    slice_size,
    split_unit,
    store_sums,
    term,
)
from ._sinkhorn import COMB, sinkhorn, softmax_rows
from ._steps import widen
from .fused_post_pre import (
    BLOCK,
    PAD,
    WARP_TREE,
    WARPS,
    copy_unit,
    load_unit,
    only_whole_blocks,
    split_shared_unit,
    units,
)

PROJECTION_WARPS = 8  # each with the units of two warps of fused_post_pre
HALVES = WARPS // PROJECTION_WARPS
WARP_TOKENS = 2  # of a tile, of a token warp
PROJECTION_THREADS = PROJECTION_WARPS * WARP
TOKEN_BARRIER = 1  # named barrier of the token warps; 0 is the whole CTA's
WIDE_TILE_COLUMNS = 320  # columns of a slice up to which 16 tokens fit
# registers of three threads, one of each warpgroup: two project, one owns tokens
MOST_UNITS = 5
FEW_REGISTERS = 200
MANY_REGISTERS = 208
SHARED_BYTES = 227 * 1024  # of an SM of sm_90
MOST_BUFFERS = 6
LAG = 1  # tiles between the projection and the collapse of one
WEIGHTS_LAG = 0
FIRST_TILES = 2
FIRST_BATCH = 2
FEW_QUADS = 3
MANY_QUADS = 5
BULK = 1
PROJECTION_LOADS = 1
LOAD = "mhc::load_stream16"


def sets() -> int:
    return max(2, LAG + 1)


def square_sets() -> int:
    return LAG + 2


def rounds(hidden: int) -> tuple[tuple[int, int, bool], ...]:
    """(half, round, whole) of the units of a warp: half * 8 + round * 16 + warp."""
    n = units(hidden)
    return tuple(
        (half, u, half * PROJECTION_WARPS + u * WARPS + PROJECTION_WARPS <= n)
        for half in range(HALVES)
        for u in range(-(-n // WARPS))
        if half * PROJECTION_WARPS + u * WARPS < n
    )


def register_rounds(hidden: int) -> tuple[tuple[int, int, bool], ...]:
    """Those whose terms are in registers: the first two of each half, and one more if it is whole."""
    all_rounds = rounds(hidden)
    first = tuple(r for r in all_rounds if r[1] < 2)
    more = tuple(r for r in all_rounds if r[1] >= 2 and r[2])
    return first + more[: MOST_UNITS - 4]


def shared_rounds(hidden: int) -> tuple[tuple[int, int, bool], ...]:
    registered = register_rounds(hidden)
    return tuple(r for r in rounds(hidden) if r not in registered)


def shared_blocks(hidden: int):
    """(block of slots, half, round, whole) of those in shared memory."""
    return tuple((k, *r) for k, r in enumerate(shared_rounds(hidden)))


def load_batches(hidden: int):
    """Register rounds, two at a time: (place in the batch, half, round, place in registers)."""
    registered = register_rounds(hidden)
    starts = [0] + list(range(FIRST_BATCH, len(registered)))
    ends = starts[1:] + [len(registered)]
    return tuple(
        tuple((k, *registered[i + k][:2], i + k) for k in range(end - i))
        for i, end in zip(starts, ends)
    )


def half_rounds(hidden: int, half: int):
    """(round, whole, place in registers or None, block of slots in shared memory or None)."""
    registered, shared = register_rounds(hidden), shared_rounds(hidden)
    return tuple(
        (
            r[1],
            r[2],
            registered.index(r) if r in registered else None,
            shared.index(r) if r in shared else None,
        )
        for r in rounds(hidden)
        if r[0] == half
    )


def quads_of(hidden: int, register: int) -> int:
    """Fragments of a register round that are in shared memory after all."""
    last = len(register_rounds(hidden)) - 1
    return 0 if register < last or last < 3 else MANY_QUADS if last > 3 else FEW_QUADS


def most_quads(hidden: int) -> int:
    return quads_of(hidden, len(register_rounds(hidden)) - 1)


def projection_registers(hidden: int) -> int:
    return MANY_REGISTERS if len(register_rounds(hidden)) > 4 else FEW_REGISTERS


def tile_tokens(hidden: int) -> int:
    """Tokens of a tile: 16, or 8 where 16 do not fit in shared memory."""
    return 16 if slice_size(hidden) <= WIDE_TILE_COLUMNS else 8


def token_warps(hidden: int) -> int:
    """Warps that own tokens."""
    return tile_tokens(hidden) // WARP_TOKENS


def token_threads(hidden: int) -> int:
    return token_warps(hidden) * WARP


def threads(hidden: int) -> int:
    return PROJECTION_THREADS + token_threads(hidden)


def token_registers(hidden: int) -> int:
    """What the projection warps leave: 64 K registers are 512 for four threads, 504 for three."""
    groups = token_warps(hidden) // 4
    return (
        (128 if groups == 2 else 168) * (2 + groups) - 2 * projection_registers(hidden)
    ) // groups


def tokens_here(i, size, count):
    """Tokens of tile ``i`` of ``size`` tokens, 0 past the end."""
    return T.max(T.min(size, count - i * size), 0)


def weights_bytes(i, hidden, count):
    """What the owners send of tile ``i``: 4 weights a token."""
    return tokens_here(i, tile_tokens(hidden), count) * (HC_MULT * 4)


def squares_bytes(i, hidden, count):
    """What 16 CTAs send of tile ``i``: a sum a token, as many at once as a token warp has."""
    each = WARP_TOKENS
    return T.ceildiv(tokens_here(i, tile_tokens(hidden), count), each) * (each * CLUSTER * 4)


def buffers(hidden: int) -> int:
    """Tiles of streams that fit in shared memory beside the rest."""
    tile = tile_tokens(hidden)
    rest = max(1, len(shared_rounds(hidden)) * PROJECTION_WARPS) * UNIT_TERMS * WARP * 4
    rest += max(1, PROJECTION_WARPS * most_quads(hidden)) * WARP * 16
    rest += 2 * tile * PROJECTION_WARPS * SUMS_PITCH * 4
    rest += sets() * CLUSTER * SUMS_PITCH * 4 + square_sets() * CLUSTER * tile * 4
    rest += sets() * tile * HC_MULT * 4 + slice_size(hidden) * 2 + 1024
    row = (HC_MULT * slice_size(hidden) + PAD) * 2
    return min(MOST_BUFFERS, (SHARED_BYTES - rest) // (tile * row))


def load_bytes(i, hidden, count):
    """Bytes of the streams of tile ``i``."""
    return tokens_here(i, tile_tokens(hidden), count) * (HC_MULT * slice_size(hidden) * 2)


@T.macro
def load_terms(fn, rank, warp, lane, hidden, terms_local, terms_shared, quads_shared):
    """fn, split, as in fused_post_pre; this warp has the units of its warps p and p + 8."""
    split_terms_local = T.alloc_local((UNIT_TERMS,), "uint32")
    weights_local = T.alloc_local((2 * UNIT_WEIGHTS,), "float32")
    shared_weights_local = T.alloc_local((UNIT_WEIGHTS,), "float32")
    n = units(hidden)
    for k, half, u, whole in shared_blocks(hidden):
        unit = half * PROJECTION_WARPS + u * WARPS + warp
        if whole or unit < n:
            copy_unit(fn, unit, rank, lane, hidden, terms_shared, k * PROJECTION_WARPS + warp)
    for batch in load_batches(hidden):
        for k, half, u, _ in batch:
            load_unit(
                fn, half * PROJECTION_WARPS + u * WARPS + warp, rank, lane, hidden, weights_local,
                k * UNIT_WEIGHTS,
            )  # fmt: skip
        for k, _, _, place in batch:
            split_unit(weights_local, k * UNIT_WEIGHTS, terms_local, place * UNIT_TERMS)
            for quad in T.unroll(quads_of(hidden, place)):
                for q in T.vectorized(4):
                    quads_shared[warp, quad, lane, q] = terms_local[
                        place * UNIT_TERMS + quad * 4 + q
                    ]
    if len(shared_rounds(hidden)) > 0:
        T.call_extern("handle", "mhc::loads_wait")
        T.sync_warp()
        for k, half, u, whole in shared_blocks(hidden):
            if whole or half * PROJECTION_WARPS + u * WARPS + warp < n:
                split_shared_unit(
                    terms_shared, k * PROJECTION_WARPS + warp, lane, shared_weights_local,
                    split_terms_local,
                )  # fmt: skip


@T.macro
def add_unit_at_once(
    streams_shared, row, unit, lane, hidden, terms_local, t0, terms_shared, slot, quads_shared, quads,
    warp, sums_local, sets,
):  # fmt: skip
    """:func:`add_unit` for ``sets`` times 8 tokens: the terms of fn are read once for them."""
    values_local = T.alloc_local((sets * STEPS * CHUNK,), "bfloat16")
    words_local = T.view(values_local, (sets * STEPS * 2,), "uint32")
    fragment = T.alloc_local((4,), "uint32")
    part = T.alloc_local((sets * len(OPERANDS) * 4,), "float32")
    for q in T.unroll(sets * len(OPERANDS) * 4):
        part[q] = 0.0
    for n in T.unroll(sets):
        for step in T.unroll(STEPS):
            h = unit // HC_MULT * BLOCK + step * (BLOCK // STEPS) + lane % 4 * CHUNK
            inside = True if only_whole_blocks(hidden) else h < slice_size(hidden)
            if inside:
                for v in T.vectorized(CHUNK):
                    values_local[(n * STEPS + step) * CHUNK + v] = streams_shared[
                        row + n * MMA_COLUMNS, unit % HC_MULT * slice_size(hidden) + h + v
                    ]
            else:
                for v in T.unroll(2):
                    words_local[(n * STEPS + step) * 2 + v] = T.uint32(0)
    for operand in ALL_OPERANDS:
        for step in ALL_STEPS:
            for n in T.unroll(sets):
                if slot is not None and operand < 4:
                    for q in T.vectorized(4):
                        fragment[q] = terms_shared[slot, operand * STEPS + step, lane, q]
                elif operand * STEPS + step < quads:
                    for q in T.vectorized(4):
                        fragment[q] = quads_shared[warp, operand * STEPS + step, lane, q]
                else:
                    for pair in ALL_PAIRS:
                        if slot is None:
                            fragment[pair * 2] = terms_local[t0 + term(operand, 0, step, pair)]
                        else:
                            fragment[pair * 2] = terms_shared[
                                slot, 4 * STEPS, lane, step * 2 + pair
                            ]
                        if operand < 4:
                            fragment[pair * 2 + 1] = terms_local[t0 + term(operand, 1, step, pair)]
                        else:
                            fragment[pair * 2 + 1] = words_local[(n * STEPS + step) * 2 + pair]
                T.call_extern(
                    "handle",
                    "mhc::mma_bf16",
                    T.access_ptr(part[(n * len(OPERANDS) + operand) * 4], "rw"),
                    T.access_ptr(fragment[0], "r"),
                    words_local[(n * STEPS + step) * 2],
                    words_local[(n * STEPS + step) * 2 + 1],
                )
    for n in T.unroll(sets):
        p0 = n * len(OPERANDS) * 4
        for v in T.unroll(2):
            for half in T.unroll(2):
                sums_local[n * 8 + half * 2 + v] = sums_local[n * 8 + half * 2 + v] + (
                    (part[p0 + half * 2 + v] + part[p0 + 4 + half * 2 + v])
                    + part[p0 + 8 + half * 2 + v]
                )
            sums_local[n * 8 + 4 + v] = sums_local[n * 8 + 4 + v] + (
                (part[p0 + 12 + v] + part[p0 + 14 + v]) + part[p0 + 16 + v]
            )
            sums_local[n * 8 + 6 + v] = sums_local[n * 8 + 6 + v] + part[p0 + 18 + v]


@T.macro
def project_tile(
    streams_shared, row0, warp, lane, hidden, terms_local, terms_shared, quads_shared, set0,
    sums_shared,
):  # fmt: skip
    """Projection and sum of squares of a tile's tokens from row ``row0`` on."""
    sets = tile_tokens(hidden) // MMA_COLUMNS
    sums_local = T.alloc_local((sets * 8,), "float32")
    one_local = T.alloc_local((8,), "float32")
    both_local = T.alloc_local((sets * 8,), "float32")
    n_units = units(hidden)
    row = row0 + lane // 4
    for half in (0, 1):
        for q in T.unroll(sets * 8):
            sums_local[q] = 0.0
        for u, whole, register, block in half_rounds(hidden, half):
            unit = half * PROJECTION_WARPS + u * WARPS + warp
            if register is not None:
                add_unit_at_once(
                    streams_shared, row, unit, lane, hidden, terms_local,
                    register * UNIT_TERMS, terms_shared, None, quads_shared,
                    quads_of(hidden, register), warp, sums_local, sets,
                )  # fmt: skip
            else:
                if whole or unit < n_units:
                    add_unit_at_once(
                        streams_shared, row, unit, lane, hidden, terms_local, 0,
                        terms_shared, block * PROJECTION_WARPS + warp, quads_shared, 0, warp,
                        sums_local, sets,
                    )  # fmt: skip
        if half == 0:
            for q in T.unroll(sets * 8):
                both_local[q] = sums_local[q]
        else:
            for q in T.unroll(sets * 8):
                both_local[q] = both_local[q] + sums_local[q]
    for n in T.unroll(sets):
        for q in T.unroll(8):
            one_local[q] = both_local[n * 8 + q]
        store_sums(one_local, lane, warp, set0 + n, sums_shared)


@T.macro
def send_sums(sums_shared, set0, token, v0, slot, inbox, owner):
    """The warps' sums ``v0`` to ``v0 + 3`` of a token of a tile, added up, to its owner."""
    lower_local = T.alloc_local((4,), "float32")
    upper_local = T.alloc_local((4,), "float32")
    vectors_local = T.alloc_local((PROJECTION_WARPS // 2 * 4,), "float32")
    for w in T.unroll(PROJECTION_WARPS // 2):
        for v in T.vectorized(4):
            lower_local[v] = sums_shared[
                set0 + token // MMA_COLUMNS, w, token % MMA_COLUMNS, v0 + v
            ]
        for v in T.vectorized(4):
            upper_local[v] = sums_shared[
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
    T.call_extern("handle", "mhc::send4", slot, inbox, owner, T.access_ptr(vectors_local[0], "r"))


@T.macro
def make_weights(
    i, own, t, slices_shared, sums_inbox, hc_shared, weights_shared, weights_inbox, post_mix,
    comb_mix, rms_eps, hc_pre_eps, lane, hidden,
):  # fmt: skip
    """Collapse weights of token ``own`` of tile ``i``, which this CTA owns, by one warp.

    ``t`` is the token's place in the batch, where its other logits are left.
    """
    slices_local = T.alloc_local((CLUSTER,), "float32")
    pre_local = T.alloc_local((HC_MULT,), "float32")
    scale = T.alloc_local((1,), "float32")
    base = T.alloc_local((1,), "float32")
    logit = T.alloc_local((1,), "float32")
    mix = T.alloc_local((1,), "float32")
    every = CLUSTER // tile_tokens(hidden)  # a CTA owns one token in every so many tiles
    owned = slices_shared.shape[0]
    n_sets = weights_inbox.shape[0]
    # m = projection * rsqrt(mean square + rms_eps), one column a lane; scale, base
    scale[0] = hc_shared[T.if_then_else(lane < HC_MULT, 0, T.if_then_else(lane < COMB, 1, 2))]
    base[0] = hc_shared[3 + T.min(lane, MIXES - 1)]
    T.call_extern(
        "handle",
        "mhc::inbox_wait",
        T.access_ptr(sums_inbox[i // every % owned], "r"),
        i // every // owned % 2,
    )
    for c in T.unroll(CLUSTER):
        slices_local[c] = slices_shared[i // every % owned, c, T.min(lane, SUMS - 1)]
    T.sync_warp()
    if lane == 0:
        T.call_extern(
            "handle",
            "mhc::inbox_again",
            T.access_ptr(sums_inbox[i // every % owned], "w"),
            CLUSTER * SUMS_PITCH * 4,
        )
    add_tree(slices_local, SLICE_TREE)
    mix[0] = T.rsqrt(T.shfl_sync(slices_local[0], SQUARES) * (1.0 / (HC_MULT * hidden)) + rms_eps)
    logit[0] = slices_local[0] * mix[0] * scale[0] + base[0]
    # collapse weights: sigmoid(m) + hc_pre_eps, to everyone
    sigmoid(logit[0], mix)
    mix[0] = mix[0] + hc_pre_eps
    for j in T.unroll(HC_MULT):
        pre_local[j] = T.shfl_sync(mix[0], j)
    if lane < CLUSTER:
        T.call_extern(
            "handle",
            "mhc::send4",
            T.access_ptr(weights_shared[i % n_sets, own, 0], "w"),
            T.access_ptr(weights_inbox[i % n_sets], "w"),
            lane,
            T.access_ptr(pre_local[0], "r"),
        )
    # the other logits wait where their results will be
    if lane >= HC_MULT and lane < COMB:
        post_mix[t, lane - HC_MULT, 0] = logit[0]
    elif lane >= COMB and lane < MIXES:
        comb_mix[t, (lane - COMB) // HC_MULT, lane % HC_MULT] = logit[0]


@T.macro
def finish_mixes(
    first, count, rank, thread, post_mix, comb_mix, hc_sinkhorn_eps, hc_post_mult_value,
    sinkhorn_repeat,
):  # fmt: skip
    """Of the tokens that this CTA owns, one a thread, from the logits that are in their place:

    post' = sigmoid(m) * hc_post_mult_value, comb' = Sinkhorn(softmax_rows(m)).
    """
    post_local = T.alloc_local((HC_MULT,), "float32")
    comb_local = T.alloc_local((HC_MULT * HC_MULT,), "float32")
    mix = T.alloc_local((1,), "float32")
    for k in T.serial(T.ceildiv(count, PROJECTION_THREADS * CLUSTER)):
        t = (k * PROJECTION_THREADS + thread) * CLUSTER + rank
        if t < count:
            for j in T.vectorized(HC_MULT):
                post_local[j] = post_mix[first + t, j, 0]
            for r in T.unroll(HC_MULT):
                for j in T.vectorized(HC_MULT):
                    comb_local[r * HC_MULT + j] = comb_mix[first + t, r, j]
            for j in T.unroll(HC_MULT):
                sigmoid(post_local[j], mix)
                post_local[j] = mix[0] * hc_post_mult_value
            for j in T.vectorized(HC_MULT):
                post_mix[first + t, j, 0] = post_local[j]
            softmax_rows(comb_local, hc_sinkhorn_eps)
            sinkhorn(comb_local, hc_sinkhorn_eps, sinkhorn_repeat)
            for r in T.unroll(HC_MULT):
                for j in T.vectorized(HC_MULT):
                    comb_mix[first + t, r, j] = comb_local[r * HC_MULT + j]


@T.macro
def collapse_tile(
    i, buffer, again, weights_shared, weights_inbox, streams_shared, squares_shared, squares_inbox,
    value_local, layer_input, first, count, rank, me, lane, hidden, norm,
):  # fmt: skip
    """collapse: v = sum_j weight_j * r'_j, of a token warp's tokens of tile ``i`` in ``buffer``.

    Its rounding stays in value_local and its squares go to all CTAs where the norm follows; it is
    the layer input otherwise. Tokens past the end are made like the others, and not stored: both
    tokens of a warp overlap. ``again``: whether this set of weights is used again.
    """
    size = slice_size(hidden)
    tile = tile_tokens(hidden)
    per = WARP_TOKENS
    reps = -(-size // (WARP * VECTOR))
    n_sets = weights_inbox.shape[0]
    n_squares = squares_inbox.shape[0]
    row0 = me * per
    collapse_weights = T.alloc_local((per * HC_MULT,), "float32")
    collapse_local = T.alloc_local((HC_MULT * VECTOR,), "bfloat16")
    wide_local = T.alloc_local((VECTOR,), "float32")
    total_local = T.alloc_local((VECTOR,), "float32")
    squares_local = T.alloc_local((per,), "float32")
    T.call_extern(
        "handle", "mhc::inbox_wait", T.access_ptr(weights_inbox[i % n_sets], "r"), i // n_sets % 2
    )
    for k in T.unroll(per):
        for j in T.vectorized(HC_MULT):
            collapse_weights[k * HC_MULT + j] = weights_shared[i % n_sets, row0 + k, j]
    T.sync_warp()
    if me == 0 and lane == 0 and again:
        T.call_extern(
            "handle",
            "mhc::inbox_again",
            T.access_ptr(weights_inbox[i % n_sets], "w"),
            weights_bytes(i + n_sets, hidden, count),
        )
    for k in T.unroll(per):
        squares_local[k] = 0.0
    for r in T.unroll(reps):
        if (r * WARP + lane) * VECTOR < size:
            for k in T.unroll(per):
                for j in T.unroll(HC_MULT):
                    for v in T.vectorized(VECTOR):
                        collapse_local[j * VECTOR + v] = streams_shared[
                            buffer * tile + row0 + k, j * size + (r * WARP + lane) * VECTOR + v
                        ]
                widen(collapse_local, 0, VECTOR, wide_local)
                for v in T.unroll(VECTOR):
                    total_local[v] = collapse_weights[k * HC_MULT] * wide_local[v]
                for j in T.unroll(HC_MULT - 1):
                    widen(collapse_local, (j + 1) * VECTOR, VECTOR, wide_local)
                    for v in T.unroll(VECTOR):
                        total_local[v] = (
                            total_local[v] + collapse_weights[k * HC_MULT + j + 1] * wide_local[v]
                        )
                for v in T.unroll(VECTOR):
                    squares_local[k] = squares_local[k] + total_local[v] * total_local[v]
                for v in T.vectorized(VECTOR):
                    value_local[(k * reps + r) * VECTOR + v] = T.cast(total_local[v], "bfloat16")
                if not norm:
                    if i * tile + row0 + k < count:
                        for v in T.vectorized(VECTOR):
                            layer_input[
                                first + i * tile + row0 + k,
                                rank * size + (r * WARP + lane) * VECTOR + v,
                            ] = value_local[(k * reps + r) * VECTOR + v]
    if norm:
        for k in T.unroll(per):
            squares_local[k] = T.warp_reduce_sum(squares_local[k])
        if lane < CLUSTER:
            T.call_extern(
                "handle",
                "mhc::send2",
                T.access_ptr(squares_shared[i % n_squares, rank, row0], "w"),
                T.access_ptr(squares_inbox[i % n_squares], "w"),
                lane,
                squares_local[0],
                squares_local[1],
            )


@T.macro
def normalise_tile(
    i, again, squares_shared, squares_inbox, value_local, gain_shared, layer_input, norm_eps, first,
    count, rank, me, lane, hidden,
):  # fmt: skip
    """RMSNorm: bf16(bf16(v) * rsqrt(mean(v^2) + norm_eps) * g) of a token warp's tokens of tile i.

    ``again``: whether this set of squares is used again.
    """
    size = slice_size(hidden)
    tile = tile_tokens(hidden)
    per = WARP_TOKENS
    reps = -(-size // (WARP * VECTOR))
    n_squares = squares_inbox.shape[0]
    row0 = me * per
    half_per = per // 2  # tokens that each half of the warp adds up
    squares = T.alloc_local((half_per,), "float32")
    squares_local = T.alloc_local((per,), "float32")
    gain_local = T.alloc_local((VECTOR,), "bfloat16")
    out_local = T.alloc_local((VECTOR,), "bfloat16")
    wide_local = T.alloc_local((VECTOR,), "float32")
    total_local = T.alloc_local((VECTOR,), "float32")
    T.call_extern(
        "handle",
        "mhc::inbox_wait",
        T.access_ptr(squares_inbox[i % n_squares], "r"),
        i // n_squares % 2,
    )
    for q in T.vectorized(half_per):
        squares[q] = squares_shared[
            i % n_squares, lane % CLUSTER, row0 + lane // CLUSTER * half_per + q
        ]
    T.sync_warp()
    if me == 0 and lane == 0 and again:
        T.call_extern(
            "handle",
            "mhc::inbox_again",
            T.access_ptr(squares_inbox[i % n_squares], "w"),
            squares_bytes(i + n_squares, hidden, count),
        )
    for half in SLICE_TREE:
        for q in T.unroll(half_per):
            squares[q] = squares[q] + T.shfl_xor(squares[q], half)
    for q in T.unroll(half_per):
        squares[q] = T.rsqrt(squares[q] * (1.0 / hidden) + norm_eps)
    for k in T.unroll(per):
        squares_local[k] = T.shfl_sync(squares[k % half_per], k // half_per * CLUSTER)
    for r in T.unroll(reps):
        if (r * WARP + lane) * VECTOR < size:
            for v in T.vectorized(VECTOR):
                gain_local[v] = gain_shared[(r * WARP + lane) * VECTOR + v]
            for k in T.unroll(per):
                widen(value_local, (k * reps + r) * VECTOR, VECTOR, wide_local)
                widen(gain_local, 0, VECTOR, total_local)
                for v in T.unroll(VECTOR):
                    total_local[v] = wide_local[v] * squares_local[k] * total_local[v]
                for v in T.vectorized(VECTOR):
                    out_local[v] = T.cast(total_local[v], "bfloat16")
                if i * tile + row0 + k < count:
                    for v in T.vectorized(VECTOR):
                        layer_input[
                            first + i * tile + row0 + k,
                            rank * size + (r * WARP + lane) * VECTOR + v,
                        ] = out_local[v]


@T.macro
def load_tile(
    residual, first, count, i, buffer, rank, me, per, lane, hidden, streams_shared, loaded
):
    """A token warp's tokens of tile ``i``: 16 bytes a lane, which that lane alone collapses."""
    size = slice_size(hidden)
    tile = tile_tokens(hidden)
    if BULK:
        if lane == 0:
            if me == 0 and i >= buffers(hidden):
                T.call_extern(
                    "handle",
                    "mhc::inbox_wait",
                    T.access_ptr(loaded[buffer], "r"),
                    (i // buffers(hidden) - 1) % 2,
                )
                T.call_extern(
                    "handle",
                    "mhc::inbox_again",
                    T.access_ptr(loaded[buffer], "w"),
                    load_bytes(i, hidden, count),
                )
            T.call_extern("handle", "mhc::bulk_fence")
            for k in T.unroll(per):
                if i * tile + me * per + k < count:
                    for j in T.unroll(HC_MULT):
                        T.call_extern(
                            "handle",
                            "mhc::load_bulk",
                            T.access_ptr(
                                streams_shared[buffer * tile + me * per + k, j * size], "w"
                            ),
                            T.access_ptr(
                                residual[first + i * tile + me * per + k, j, rank * size], "r"
                            ),
                            size * 2,
                            T.access_ptr(loaded[buffer], "w"),
                        )
    else:
        for r in T.unroll(-(-size // (WARP * VECTOR))):
            h = (r * WARP + lane) * VECTOR
            if h < size:
                for k in T.unroll(per):
                    t = first + T.min(i * tile + me * per + k, count - 1)
                    for j in T.unroll(HC_MULT):
                        T.call_extern(
                            "handle",
                            LOAD,
                            T.access_ptr(
                                streams_shared[buffer * tile + me * per + k, j * size + h], "w"
                            ),
                            T.access_ptr(residual[t, j, rank * size + h], "r"),
                        )
        T.call_extern("handle", "mhc::gate_pass_loaded", T.access_ptr(loaded[buffer], "w"))


@T.macro
def run_roles(
    residual, fn, hc_scale, hc_base, gain, post_mix, comb_mix, layer_input, rms_eps, hc_pre_eps,
    hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat, norm_eps, early, first, count, tiles,
    warp, i_c, hidden, norm,
):  # fmt: skip
    """One CTA of a cluster with ``count`` tokens from ``first`` on."""
    T.import_source(DEVICE_SOURCE)
    size = slice_size(hidden)
    tile = tile_tokens(hidden)
    per = WARP_TOKENS
    bufs = buffers(hidden)
    reps = -(-size // (WARP * VECTOR))
    every = CLUSTER // tile  # a CTA owns one token in every so many tiles
    n_sets = sets()
    n_squares = square_sets()
    owned = -(-n_sets // every)  # sets of what an owner is sent
    mma_tiles = tile // MMA_COLUMNS
    rank = i_c % CLUSTER
    tx = T.get_thread_binding()
    lane = tx % WARP

    streams_shared = T.alloc_shared((bufs * tile, HC_MULT * size + PAD), "bfloat16")
    terms_shared = T.alloc_shared(
        (max(1, len(shared_rounds(hidden)) * PROJECTION_WARPS), UNIT_TERMS // 4, WARP, 4), "uint32"
    )
    quads_shared = T.alloc_shared((PROJECTION_WARPS, max(1, most_quads(hidden)), WARP, 4), "uint32")
    sums_shared = T.alloc_shared(
        (2 * mma_tiles, PROJECTION_WARPS, MMA_COLUMNS, SUMS_PITCH), "float32"
    )
    slices_shared = T.alloc_shared((owned, CLUSTER, SUMS_PITCH), "float32")
    squares_shared = T.alloc_shared((n_squares, CLUSTER, tile), "float32")
    weights_shared = T.alloc_shared((n_sets, tile, HC_MULT), "float32")
    gain_shared = T.alloc_shared((size,), "bfloat16")
    hc_shared = T.alloc_shared((3 + MIXES,), "float32")
    sums_inbox = T.alloc_shared((owned,), "uint64")
    squares_inbox = T.alloc_shared((n_squares,), "uint64")
    weights_inbox = T.alloc_shared((n_sets,), "uint64")
    loaded = T.alloc_shared((bufs,), "uint64")
    projected = T.alloc_shared((2,), "uint64")
    added = T.alloc_shared((2,), "uint64")
    mixed = T.alloc_shared((1,), "uint64")
    freed = T.alloc_shared((2,), "uint64")

    terms_local = T.alloc_local((len(register_rounds(hidden)) * UNIT_TERMS,), "uint32")
    value_local = T.alloc_local((per * reps * VECTOR,), "bfloat16")

    # the inboxes are open before anyone can send: the cluster barrier lies between
    if tx == 0:
        for q in T.unroll(owned):
            T.call_extern(
                "handle",
                "mhc::inbox_open",
                T.access_ptr(sums_inbox[q], "w"),
                CLUSTER * SUMS_PITCH * 4,
            )
        for q in T.unroll(n_squares):
            T.call_extern(
                "handle",
                "mhc::inbox_open",
                T.access_ptr(squares_inbox[q], "w"),
                squares_bytes(q, hidden, count),
            )
        for q in T.unroll(n_sets):
            T.call_extern(
                "handle",
                "mhc::inbox_open",
                T.access_ptr(weights_inbox[q], "w"),
                weights_bytes(q, hidden, count),
            )
        for q in T.unroll(2):
            T.call_extern(
                "handle", "mhc::gate_open", T.access_ptr(projected[q], "w"), PROJECTION_THREADS
            )
            T.call_extern(
                "handle", "mhc::gate_open", T.access_ptr(added[q], "w"), token_threads(hidden)
            )
        for q in T.unroll(2):
            T.call_extern(
                "handle", "mhc::gate_open", T.access_ptr(freed[q], "w"), token_threads(hidden)
            )
        T.call_extern(
            "handle", "mhc::gate_open", T.access_ptr(mixed[0], "w"), token_threads(hidden)
        )
        for q in T.unroll(bufs):
            if BULK:
                T.call_extern(
                    "handle",
                    "mhc::inbox_open",
                    T.access_ptr(loaded[q], "w"),
                    load_bytes(q, hidden, count),
                )
            else:
                T.call_extern(
                    "handle", "mhc::gate_open", T.access_ptr(loaded[q], "w"), token_threads(hidden)
                )
    T.cluster_arrive()
    if tx < MIXES * HC_MULT and i_c < CLUSTER:
        T.call_extern(
            "handle",
            "mhc::prefetch_l2_bulk",
            T.access_ptr(fn[tx // HC_MULT, tx % HC_MULT * hidden + rank * size], "r"),
            size * 4,
        )

    if warp < PROJECTION_WARPS:
        T.set_max_nreg(projection_registers(hidden), 1)
        if early == 0:
            T.pdl_sync()
        T.pdl_trigger()
        load_terms(fn, rank, warp, lane, hidden, terms_local, terms_shared, quads_shared)
        T.cluster_wait()
        T.pdl_sync()
        if PROJECTION_LOADS:
            for b in T.unroll(bufs - FIRST_TILES):
                if FIRST_TILES + b < tiles:
                    load_tile(
                        residual, first, count, FIRST_TILES + b, FIRST_TILES + b, rank, warp,
                        tile // PROJECTION_WARPS, lane, hidden, streams_shared, loaded,
                    )  # fmt: skip
        for i in T.serial(tiles):
            T.call_extern(
                "handle",
                "mhc::inbox_wait" if BULK else "mhc::gate_wait",
                T.access_ptr(loaded[i % bufs], "r"),
                i // bufs % 2,
            )
            if i >= 2:
                T.call_extern(
                    "handle", "mhc::gate_wait", T.access_ptr(added[i % 2], "r"), (i // 2 - 1) % 2
                )
            project_tile(
                streams_shared, i % bufs * tile, warp, lane, hidden, terms_local, terms_shared,
                quads_shared, i % 2 * mma_tiles, sums_shared,
            )  # fmt: skip
            T.call_extern("handle", "mhc::gate_pass", T.access_ptr(projected[i % 2], "w"))
            if PROJECTION_LOADS:
                # another tile in the place of one that has been collapsed
                if i >= LAG + 1 and i - LAG - 1 + bufs < tiles:
                    T.call_extern(
                        "handle",
                        "mhc::gate_wait",
                        T.access_ptr(freed[(i - LAG - 1) % 2], "r"),
                        (i - LAG - 1) // 2 % 2,
                    )
                    load_tile(
                        residual, first, count, i - LAG - 1 + bufs, (i - LAG - 1) % bufs, rank,
                        warp, tile // PROJECTION_WARPS, lane, hidden, streams_shared, loaded,
                    )  # fmt: skip
        T.call_extern("handle", "mhc::gate_wait", T.access_ptr(mixed[0], "r"), 0)
        finish_mixes(
            first, count, rank, tx, post_mix, comb_mix, hc_sinkhorn_eps, hc_post_mult_value,
            sinkhorn_repeat,
        )  # fmt: skip
    else:
        T.set_max_nreg(token_registers(hidden), 0)
        me = warp - PROJECTION_WARPS
        row0 = me * per
        if early == 0:
            T.pdl_sync()
        T.pdl_trigger()
        T.cluster_wait()
        T.pdl_sync()
        for i in T.unroll(FIRST_TILES):
            if i < tiles:
                load_tile(
                    residual, first, count, i, i, rank, me, per, lane, hidden, streams_shared,
                    loaded,
                )
        if me == 0 and lane < 3:
            hc_shared[lane] = hc_scale[lane]
        if me == 0 and lane < MIXES:
            hc_shared[3 + lane] = hc_base[lane]
        if norm and me == 0:
            for r in T.unroll(reps):
                if (r * WARP + lane) * VECTOR < size:
                    for v in T.vectorized(VECTOR):
                        gain_shared[(r * WARP + lane) * VECTOR + v] = gain[
                            rank * size + (r * WARP + lane) * VECTOR + v
                        ]
        T.sync_threads(TOKEN_BARRIER, token_threads(hidden))
        for i in T.serial(tiles + 1 + LAG):
            if i < tiles:
                # the warps' sums added up and sent to the owners, 4 of a token a lane
                T.call_extern(
                    "handle", "mhc::gate_wait", T.access_ptr(projected[i % 2], "r"), i // 2 % 2
                )
                sent = row0 + lane // 8
                if lane // 8 < per and lane % 8 < SUMS_PITCH // 4 and i * tile + sent < count:
                    send_sums(
                        sums_shared, i % 2 * mma_tiles, sent, lane % 8 * 4,
                        T.access_ptr(slices_shared[i // every % owned, rank, lane % 8 * 4], "w"),
                        T.access_ptr(sums_inbox[i // every % owned], "w"),
                        i % every * tile + sent,
                    )  # fmt: skip
                T.call_extern("handle", "mhc::gate_pass", T.access_ptr(added[i % 2], "w"))
            # the first projections do not wait for more than they need
            if not PROJECTION_LOADS and i == 0:
                for b in T.unroll(bufs - FIRST_TILES):
                    if FIRST_TILES + b < tiles:
                        load_tile(
                            residual, first, count, FIRST_TILES + b, FIRST_TILES + b, rank, me,
                            per, lane, hidden, streams_shared, loaded,
                        )  # fmt: skip
            if norm and i >= 1 + LAG and (i - 1 - LAG) * tile + row0 < count:
                normalise_tile(
                    i - 1 - LAG, i - 1 - LAG + n_squares < tiles, squares_shared, squares_inbox,
                    value_local, gain_shared, layer_input, norm_eps, first, count, rank, me, lane,
                    hidden,
                )  # fmt: skip
            if i >= WEIGHTS_LAG and i - WEIGHTS_LAG < tiles:
                w = i - WEIGHTS_LAG
                own = rank - w % every * tile
                if (
                    w % token_warps(hidden) == me
                    and own >= 0
                    and own < tile
                    and w * tile + own < count
                ):
                    make_weights(
                        w, own, first + w * tile + own, slices_shared, sums_inbox, hc_shared,
                        weights_shared, weights_inbox, post_mix, comb_mix, rms_eps, hc_pre_eps,
                        lane, hidden,
                    )  # fmt: skip
                if w == tiles - 1:
                    T.call_extern("handle", "mhc::gate_pass", T.access_ptr(mixed[0], "w"))
            if i >= LAG and (i - LAG) * tile + row0 < count:
                collapse_tile(
                    i - LAG, (i - LAG) % bufs, i - LAG + n_sets < tiles, weights_shared, weights_inbox,
                    streams_shared, squares_shared, squares_inbox, value_local, layer_input, first,
                    count, rank, me, lane, hidden, norm,
                )  # fmt: skip
                # another tile in its place
                if not PROJECTION_LOADS and i - LAG + bufs < tiles:
                    if BULK:
                        T.sync_warp()
                    load_tile(
                        residual, first, count, i - LAG + bufs, (i - LAG) % bufs, rank, me, per,
                        lane, hidden, streams_shared, loaded,
                    )  # fmt: skip
            if PROJECTION_LOADS and i >= LAG and i - LAG < tiles:
                T.call_extern("handle", "mhc::gate_pass", T.access_ptr(freed[(i - LAG) % 2], "w"))


@T.macro
def collapse_streams(
    residual, fn, hc_scale, hc_base, gain, post_mix, comb_mix, layer_input, rms_eps, hc_pre_eps,
    hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat, norm_eps, group_tokens, early, tokens,
    i_c, hidden, norm,
):  # fmt: skip
    """One CTA; ``gain`` and ``norm_eps`` are read when ``norm`` is true."""
    first = T.alloc_var("int32", init=i_c // CLUSTER * group_tokens)
    count = T.alloc_var("int32", init=T.min(group_tokens, tokens - first))
    tiles = T.alloc_var("int32", init=T.ceildiv(count, tile_tokens(hidden)))
    warp = T.alloc_var("int32", init=T.shfl_sync(T.get_thread_binding() // WARP, 0))
    # handed on, they are variables no more: TileLang splits an if that asks for a variable into one
    # for each statement, and what the statements hand on then stays in registers around the loop
    run_roles(
        residual, fn, hc_scale, hc_base, gain, post_mix, comb_mix, layer_input, rms_eps,
        hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat, norm_eps, early, first,
        count, tiles, warp, i_c, hidden, norm,
    )  # fmt: skip


def pre(hidden: int, *, norm: bool, pdl: bool):
    """Build the pre kernel.

    Args:
        hidden: H, a multiple of 256 up to 7168.
        norm: whether the RMSNorm follows; adds the arguments norm_weight and norm_eps.
        pdl: must be true: clusters and programmatic dependent launch come together (sm_90).

    Returns:
        The TileLang program: (residual [n, 4, H] bf16, fn [24, 4 * H] fp32, hc_scale [3] fp32,
        hc_base [24] fp32, norm_weight [H] bf16 if norm, post_mix [n, 4, 1] fp32, comb_mix [n, 4, 4]
        fp32, layer_input [n, H] bf16, rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value
        fp32, sinkhorn_repeat int32, norm_eps fp32 if norm, group_tokens int32: tokens of a cluster,
        any number; early int32: whether fn may be read before the previous kernel has finished).
    """
    tokens = T.dynamic("tokens", "int32")

    @T.prim_func
    def mhc_pre(
        residual: T.Tensor((tokens, HC_MULT, hidden), "bfloat16"),
        fn: T.Tensor((MIXES, HC_MULT * hidden), "float32"),
        hc_scale: T.Tensor((3,), "float32"),
        hc_base: T.Tensor((MIXES,), "float32"),
        post_mix: T.Tensor((tokens, HC_MULT, 1), "float32"),
        comb_mix: T.Tensor((tokens, HC_MULT, HC_MULT), "float32"),
        layer_input: T.Tensor((tokens, hidden), "bfloat16"),
        rms_eps: T.float32,
        hc_pre_eps: T.float32,
        hc_sinkhorn_eps: T.float32,
        hc_post_mult_value: T.float32,
        sinkhorn_repeat: T.int32,
        group_tokens: T.int32,
        early: T.int32,
    ):
        with T.Kernel(
            T.ceildiv(tokens, group_tokens) * CLUSTER,
            threads=threads(hidden),
            cluster_dims=(CLUSTER, 1, 1),
        ) as i_c:
            collapse_streams(
                residual, fn, hc_scale, hc_base, None, post_mix, comb_mix, layer_input, rms_eps,
                hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat, None,
                group_tokens, early, tokens, i_c, hidden, False,
            )  # fmt: skip

    @T.prim_func
    def mhc_pre_norm(
        residual: T.Tensor((tokens, HC_MULT, hidden), "bfloat16"),
        fn: T.Tensor((MIXES, HC_MULT * hidden), "float32"),
        hc_scale: T.Tensor((3,), "float32"),
        hc_base: T.Tensor((MIXES,), "float32"),
        norm_weight: T.Tensor((hidden,), "bfloat16"),
        post_mix: T.Tensor((tokens, HC_MULT, 1), "float32"),
        comb_mix: T.Tensor((tokens, HC_MULT, HC_MULT), "float32"),
        layer_input: T.Tensor((tokens, hidden), "bfloat16"),
        rms_eps: T.float32,
        hc_pre_eps: T.float32,
        hc_sinkhorn_eps: T.float32,
        hc_post_mult_value: T.float32,
        sinkhorn_repeat: T.int32,
        norm_eps: T.float32,
        group_tokens: T.int32,
        early: T.int32,
    ):
        with T.Kernel(
            T.ceildiv(tokens, group_tokens) * CLUSTER,
            threads=threads(hidden),
            cluster_dims=(CLUSTER, 1, 1),
        ) as i_c:
            collapse_streams(
                residual, fn, hc_scale, hc_base, norm_weight, post_mix, comb_mix, layer_input,
                rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat,
                norm_eps, group_tokens, early, tokens, i_c, hidden, True,
            )  # fmt: skip

    return mhc_pre_norm if norm else mhc_pre

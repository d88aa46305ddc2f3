"""pre: projection, mixes, Sinkhorn, collapse and RMSNorm in one pass over the streams.

Algorithm: as in ``fused_post_pre_persistent``, clusters of 16 CTAs that share the hidden dimension
stay, as many as run at once, and loop over tiles of tokens. Each token is read once, into shared
memory, where it is projected and, when its weights have come, collapsed. With no post to make, the
warps have other roles:

* 8 projection warps hold fn in 200 registers a thread and what does not fit in shared memory. They
  do nothing but project tile after tile as the streams come, 16 tokens at once where a tile has so
  many, so that fn's operands are read once for them.
* 8 token warps (4 where a tile has 8 tokens) own 2 tokens of a tile each. They add up the
  projection warps' sums and send them to the tokens' owners, collapse the tile before, whose
  weights have come meanwhile, have another tile loaded in its place, and normalise the one before
  that. They take turns in making the weights of the token that this CTA owns.

Loads are bulk copies, a row each, as many tiles ahead as there are buffers. Clusters share whole
tiles; the first, which start first, have one more. That a slot of an inbox is free nothing else has
to say: a token warp sends its tokens' sums of tile i + 2 only when it has their weights of tile i,
which the owners sent when they had read all sums of tile i; weights of tile i + 2 follow these
sums, and so do squares of tile i + 3, which it sends when it has read those of tile i. A warp
without tokens in the last tile sends no sums: a barrier of the token warps ahead of that tile's
sums stands for them. All waits are for CTAs of the same cluster, which the hardware starts
together, or for warps of the same CTA; no cluster waits for another. A CTA ends only when all that
was sent to it has come.

The arithmetic and its order are those of ``fused_post_pre``: after ``post``, its bits.
"""

from typing import NamedTuple

import tilelang.language as T

from ..geometry import CLUSTER, tile_tokens
from ._device import DEVICE_SOURCE, HC_MULT, MIXES, MMA_COLUMNS, VECTOR, WARP
from ._operands import (
    ALL_OPERANDS,
    ALL_PAIRS,
    ALL_STEPS,
    CHUNK,
    OPERANDS,
    STEPS,
    SUMS_PITCH,
    UNIT_TERMS,
    UNIT_WEIGHTS,
    add_parts,
    slice_size,
    split_unit,
    store_sums,
    term,
)
from ._persistent import (
    HALVES,
    PROJECTION_THREADS,
    PROJECTION_WARPS,
    clusters,
    collapse_tile,
    finish_mixes,
    first_token,
    leave_logits,
    load_constants,
    make_weights,
    most_tokens,
    normalise_tile,
    send_sums,
    squares_bytes,
    tokens_here,
    weights_bytes,
)
from .fused_post_pre import (
    BLOCK,
    PAD,
    REGISTER_UNITS,
    WARPS,
    copy_unit,
    load_unit,
    only_whole_blocks,
    split_shared_unit,
    units,
)

WARP_TOKENS = 2  # of a tile, of a token warp
PROJECTION_REGISTERS = 200
LAUNCH_REGISTERS = {384: 168, 512: 128}  # a thread, by threads of a CTA: 64 K in all
TOKEN_BARRIER = 1  # named barrier of the token warps; 0 is the whole CTA's
REGISTERED = REGISTER_UNITS * WARPS  # units that fused_post_pre has in registers
MOST_SHARES = 5  # in registers: 180 of them, with a fragment or more in shared memory
# Fragments of the last share in registers that are in shared memory after all, by shares. With none
# the compiler spills as many, to where L1 misses: 8192 tokens took 190 us for 165 at H = 4096.
SHARED_FRAGMENTS = {4: 3, 5: 5}
SHARED_BYTES = 227 * 1024  # of an SM of sm_90
MOST_BUFFERS = 6
# loaded before the first is projected, each when the one before has come; with two at once and the
# others later 2048 tokens at H = 4096 took 46.2 us for 44.8, with all five 512 took 19.3 for 18.1
EARLY_TILES = 4
SQUARES_SETS = 3


class Share(NamedTuple):
    """8 units of a CTA, a unit of each projection warp: ``first`` to ``first + 7``.

    Attributes:
        first: the first unit; warp p of fused_post_pre has the units p, p + 16 and so on.
        half: which of the two warps of fused_post_pre's that a projection warp stands for.
        whole: whether the CTA has all 8 units.
        in_registers: where fn's terms are kept; in shared memory otherwise.
        place: among the shares that are kept there.
    """

    first: int
    half: int
    whole: bool
    in_registers: bool
    place: int


def shares(hidden: int) -> tuple[Share, ...]:
    """The shares of a CTA, in the order in which a projection warp takes its units."""
    n = units(hidden)
    firsts = sorted(
        range(0, n, PROJECTION_WARPS), key=lambda first: (first // PROJECTION_WARPS % HALVES, first)
    )
    kept = [first for first in firsts if first < REGISTERED]
    kept += [f for f in firsts if f >= REGISTERED and f + PROJECTION_WARPS <= n]
    kept = kept[:MOST_SHARES]
    others = [first for first in firsts if first not in kept]
    return tuple(
        Share(
            first=first,
            half=first // PROJECTION_WARPS % HALVES,
            whole=first + PROJECTION_WARPS <= n,
            in_registers=first in kept,
            place=(kept if first in kept else others).index(first),
        )
        for first in firsts
    )


def register_shares(hidden: int) -> tuple[Share, ...]:
    """Those in registers, by place."""
    return tuple(sorted((s for s in shares(hidden) if s.in_registers), key=lambda s: s.place))


def shared_shares(hidden: int) -> tuple[Share, ...]:
    """Those in shared memory."""
    return tuple(s for s in shares(hidden) if not s.in_registers)


def half_shares(hidden: int, half: int) -> tuple[Share, ...]:
    """Those of one half."""
    return tuple(s for s in shares(hidden) if s.half == half)


def load_batches(hidden: int) -> tuple[tuple[tuple[int, Share], ...], ...]:
    """The shares in registers two at a time, with their place in the batch."""
    kept = register_shares(hidden)
    return tuple(tuple(enumerate(kept[i : i + 2])) for i in range(0, len(kept), 2))


def shared_fragments(hidden: int, share: Share) -> int:
    """Fragments of a share in registers that are in shared memory after all."""
    n = len(register_shares(hidden))
    return SHARED_FRAGMENTS.get(n, 0) if share.place == n - 1 else 0


def most_fragments(hidden: int) -> int:
    """Of a projection warp, what there has to be room for."""
    return max(1, shared_fragments(hidden, register_shares(hidden)[-1]))


def slots(hidden: int) -> int:
    """Units in shared memory that there has to be room for."""
    return max(1, len(shared_shares(hidden)) * PROJECTION_WARPS)


def token_warps(hidden: int) -> int:
    """Warps that own tokens."""
    return tile_tokens(hidden) // WARP_TOKENS


def token_threads(hidden: int) -> int:
    """Their threads."""
    return token_warps(hidden) * WARP


def threads(hidden: int) -> int:
    """Threads of a CTA."""
    return PROJECTION_THREADS + token_threads(hidden)


def token_registers(hidden: int) -> int:
    """What the projection warps leave to a thread of the token warps."""
    n = threads(hidden)
    left = LAUNCH_REGISTERS[n] * n - PROJECTION_REGISTERS * PROJECTION_THREADS
    return left // token_threads(hidden)


def buffers(hidden: int) -> int:
    """Tiles of streams that fit in shared memory beside the rest."""
    tile = tile_tokens(hidden)
    rest = slots(hidden) * UNIT_TERMS * WARP * 4
    rest += PROJECTION_WARPS * most_fragments(hidden) * WARP * 16
    rest += 2 * tile * PROJECTION_WARPS * SUMS_PITCH * 4
    rest += 2 * CLUSTER * SUMS_PITCH * 4 + SQUARES_SETS * CLUSTER * tile * 4
    rest += 2 * tile * HC_MULT * 4 + slice_size(hidden) * 2 + 1024
    row = (HC_MULT * slice_size(hidden) + PAD) * 2
    return min(MOST_BUFFERS, (SHARED_BYTES - rest) // (tile * row))


def early_tiles(hidden: int) -> int:
    """Tiles that are loaded before the first is projected."""
    return min(EARLY_TILES, buffers(hidden))


def load_bytes(i, hidden, count):
    """Bytes of the streams of tile ``i``."""
    return tokens_here(i, tile_tokens(hidden), count) * (HC_MULT * slice_size(hidden) * 2)


@T.macro
def load_terms(fn, rank, warp, lane, hidden, terms_local, terms_shared, fragments_shared):
    """fn, split, as in fused_post_pre."""
    split_terms_local = T.alloc_local((UNIT_TERMS,), "uint32")
    weights_local = T.alloc_local((2 * UNIT_WEIGHTS,), "float32")
    shared_weights_local = T.alloc_local((UNIT_WEIGHTS,), "float32")
    for share in shared_shares(hidden):
        if share.whole or share.first + warp < units(hidden):
            copy_unit(
                fn, share.first + warp, rank, lane, hidden, terms_shared,
                share.place * PROJECTION_WARPS + warp,
            )  # fmt: skip
    for batch in load_batches(hidden):
        for k, share in batch:
            load_unit(fn, share.first + warp, rank, lane, hidden, weights_local, k * UNIT_WEIGHTS)
        for k, share in batch:
            split_unit(weights_local, k * UNIT_WEIGHTS, terms_local, share.place * UNIT_TERMS)
            for fragment in T.unroll(shared_fragments(hidden, share)):
                for q in T.vectorized(4):
                    fragments_shared[warp, fragment, lane, q] = terms_local[
                        share.place * UNIT_TERMS + fragment * 4 + q
                    ]
    if len(shared_shares(hidden)) > 0:
        T.call_extern("handle", "mhc::loads_wait")
        T.sync_warp()
        for share in shared_shares(hidden):
            if share.whole or share.first + warp < units(hidden):
                split_shared_unit(
                    terms_shared, share.place * PROJECTION_WARPS + warp, lane,
                    shared_weights_local, split_terms_local,
                )  # fmt: skip


@T.macro
def add_unit_to_all(
    streams_shared, row, share, warp, lane, hidden, terms_local, terms_shared, fragments_shared,
    sums_local, sets,
):  # fmt: skip
    """sums += fn . streams of a warp's unit of a share, for ``sets`` times 8 tokens at once.

    As ``add_unit`` of fused_post_pre for each of them; ``row`` is the first set's for this lane.
    """
    values_local = T.alloc_local((sets * STEPS * CHUNK,), "bfloat16")
    words_local = T.view(values_local, (sets * STEPS * 2,), "uint32")
    fragment = T.alloc_local((4,), "uint32")
    part = T.alloc_local((sets * len(OPERANDS) * 4,), "float32")
    unit = share.first + warp
    t0 = share.place * UNIT_TERMS
    slot = share.place * PROJECTION_WARPS + warp
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
                if not share.in_registers and operand < 4:
                    for q in T.vectorized(4):
                        fragment[q] = terms_shared[slot, operand * STEPS + step, lane, q]
                elif share.in_registers and operand * STEPS + step < shared_fragments(
                    hidden, share
                ):
                    for q in T.vectorized(4):
                        fragment[q] = fragments_shared[warp, operand * STEPS + step, lane, q]
                else:
                    for pair in ALL_PAIRS:
                        if share.in_registers:
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
        add_parts(part, n * len(OPERANDS) * 4, sums_local, n * 8)


@T.macro
def project_tile(
    streams_shared, row0, warp, lane, hidden, terms_local, terms_shared, fragments_shared, set0,
    sums_shared,
):  # fmt: skip
    """Projection and sum of squares of the tile from row ``row0`` on, absent tokens and all."""
    sets = tile_tokens(hidden) // MMA_COLUMNS
    half_local = T.alloc_local((sets * 8,), "float32")
    sums_local = T.alloc_local((sets * 8,), "float32")
    one_local = T.alloc_local((8,), "float32")
    for half in (0, 1):
        for q in T.unroll(sets * 8):
            half_local[q] = 0.0
        for share in half_shares(hidden, half):
            if share.whole or share.in_registers or share.first + warp < units(hidden):
                add_unit_to_all(
                    streams_shared, row0 + lane // 4, share, warp, lane, hidden, terms_local,
                    terms_shared, fragments_shared, half_local, sets,
                )  # fmt: skip
        for q in T.unroll(sets * 8):
            sums_local[q] = half_local[q] if half == 0 else sums_local[q] + half_local[q]
    for n in T.unroll(sets):
        for q in T.unroll(8):
            one_local[q] = sums_local[n * 8 + q]
        store_sums(one_local, lane, warp, set0 + n, sums_shared)


@T.macro
def load_rows(residual, first, count, i, buffer, rank, me, hidden, streams_shared, inbox):
    """A token warp's tokens of tile ``i``."""
    tile = tile_tokens(hidden)
    size = slice_size(hidden)
    for k in T.unroll(WARP_TOKENS):
        if i * tile + me * WARP_TOKENS + k < count:
            T.call_extern(
                "handle",
                "mhc::load_bulk4",
                T.access_ptr(streams_shared[buffer * tile + me * WARP_TOKENS + k, 0], "w"),
                size * 2,
                T.access_ptr(
                    residual[first + i * tile + me * WARP_TOKENS + k, 0, rank * size], "r"
                ),
                hidden * 2,
                size * 2,
                inbox,
            )


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
    owned = 2 // every  # sets of what an owner is sent
    mma_tiles = tile // MMA_COLUMNS
    rank = i_c % CLUSTER
    tx = T.get_thread_binding()
    lane = tx % WARP

    streams_shared = T.alloc_shared((bufs * tile, HC_MULT * size + PAD), "bfloat16")
    terms_shared = T.alloc_shared((slots(hidden), UNIT_TERMS // 4, WARP, 4), "uint32")
    fragments_shared = T.alloc_shared((PROJECTION_WARPS, most_fragments(hidden), WARP, 4), "uint32")
    sums_shared = T.alloc_shared(
        (2 * mma_tiles, PROJECTION_WARPS, MMA_COLUMNS, SUMS_PITCH), "float32"
    )
    slices_shared = T.alloc_shared((owned, CLUSTER, SUMS_PITCH), "float32")
    squares_shared = T.alloc_shared((SQUARES_SETS, CLUSTER, tile), "float32")
    weights_shared = T.alloc_shared((2, tile, HC_MULT), "float32")
    gain_shared = T.alloc_shared((size,), "bfloat16")
    hc_shared = T.alloc_shared((3 + MIXES,), "float32")
    sums_inbox = T.alloc_shared((owned,), "uint64")
    squares_inbox = T.alloc_shared((SQUARES_SETS,), "uint64")
    weights_inbox = T.alloc_shared((2,), "uint64")
    loads_inbox = T.alloc_shared((bufs,), "uint64")
    projected = T.alloc_shared((2,), "uint64")
    added = T.alloc_shared((2,), "uint64")
    mixed = T.alloc_shared((1,), "uint64")

    terms_local = T.alloc_local((len(register_shares(hidden)) * UNIT_TERMS,), "uint32")
    value_local = T.alloc_local((per * reps * VECTOR,), "bfloat16")
    logit = T.alloc_local((1,), "float32")

    # the inboxes are open before anyone can send: the cluster barrier lies between
    if tx == 0:
        for q in T.unroll(owned):
            T.call_extern(
                "handle",
                "mhc::inbox_open",
                T.access_ptr(sums_inbox[q], "w"),
                CLUSTER * SUMS_PITCH * 4,
            )
        for q in T.unroll(SQUARES_SETS):
            T.call_extern(
                "handle",
                "mhc::inbox_open",
                T.access_ptr(squares_inbox[q], "w"),
                squares_bytes(q, per, hidden, count),
            )
        for q in T.unroll(bufs):
            T.call_extern(
                "handle",
                "mhc::inbox_open",
                T.access_ptr(loads_inbox[q], "w"),
                load_bytes(q, hidden, count),
            )
        for q in T.unroll(2):
            T.call_extern(
                "handle",
                "mhc::inbox_open",
                T.access_ptr(weights_inbox[q], "w"),
                weights_bytes(q, hidden, count),
            )
            T.call_extern(
                "handle", "mhc::gate_open", T.access_ptr(projected[q], "w"), PROJECTION_THREADS
            )
            T.call_extern(
                "handle", "mhc::gate_open", T.access_ptr(added[q], "w"), token_threads(hidden)
            )
        T.call_extern(
            "handle", "mhc::gate_open", T.access_ptr(mixed[0], "w"), token_threads(hidden)
        )
    # what the barrier must order are the inboxes, and opening one has a fence of its own: relaxed,
    # 64 and 128 tokens at H = 7168 take 10.0 and 13.3 us, otherwise 10.2 and 14.0
    T.call_extern("handle", "tl::cluster_arrive_relaxed")
    if tx < MIXES * HC_MULT and i_c < CLUSTER:
        T.call_extern(
            "handle",
            "mhc::prefetch_l2_bulk",
            T.access_ptr(fn[tx // HC_MULT, tx % HC_MULT * hidden + rank * size], "r"),
            size * 4,
        )

    if warp < PROJECTION_WARPS:
        T.set_max_nreg(PROJECTION_REGISTERS, 1)
        if early == 0:
            T.pdl_sync()
        T.pdl_trigger()
        load_terms(fn, rank, warp, lane, hidden, terms_local, terms_shared, fragments_shared)
        T.cluster_wait()
        T.pdl_sync()
        for i in T.serial(tiles):
            # the streams are there, and the place of the sums is free
            T.call_extern(
                "handle",
                "mhc::inbox_wait",
                T.access_ptr(loads_inbox[i % bufs], "r"),
                i // bufs % 2,
            )
            if i >= 2:
                T.call_extern(
                    "handle", "mhc::gate_wait", T.access_ptr(added[i % 2], "r"), (i // 2 - 1) % 2
                )
            project_tile(
                streams_shared, i % bufs * tile, warp, lane, hidden, terms_local, terms_shared,
                fragments_shared, i % 2 * mma_tiles, sums_shared,
            )  # fmt: skip
            T.call_extern("handle", "mhc::gate_pass", T.access_ptr(projected[i % 2], "w"))
        T.call_extern("handle", "mhc::gate_wait", T.access_ptr(mixed[0], "r"), 0)
        finish_mixes(
            first, count, rank, tx, PROJECTION_THREADS, post_mix, comb_mix, hc_sinkhorn_eps,
            hc_post_mult_value, sinkhorn_repeat,
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
        load_rows(
            residual, first, count, 0, 0, rank, me, hidden, streams_shared,
            T.access_ptr(loads_inbox[0], "w"),
        )  # fmt: skip
        load_constants(
            hc_scale, hc_base, gain, rank, me, lane, hidden, norm, hc_shared, gain_shared
        )
        # Past the barrier no warp waits here any more, so no place is loaded again meanwhile
        for i in T.unroll(early_tiles(hidden) - 1):
            if (i + 1) * tile < count:
                T.call_extern("handle", "mhc::inbox_wait", T.access_ptr(loads_inbox[i], "r"), 0)
                load_rows(
                    residual, first, count, i + 1, i + 1, rank, me, hidden, streams_shared,
                    T.access_ptr(loads_inbox[i + 1], "w"),
                )  # fmt: skip
        T.sync_threads(TOKEN_BARRIER, token_threads(hidden))
        for i in T.serial(tiles + 2):
            if i == tiles - 1:
                # Some warps may have no tokens in the last tile and send nothing that the others
                # would wait for. Without this, its weights came while such a warp had still to look
                # at those of the tile in the same inbox before, and it waited for ever
                T.sync_threads(TOKEN_BARRIER, token_threads(hidden))
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
            if i == 0:
                for q in T.unroll(bufs - early_tiles(hidden)):
                    late = early_tiles(hidden) + q
                    load_rows(
                        residual, first, count, late, late, rank, me, hidden, streams_shared,
                        T.access_ptr(loads_inbox[late], "w"),
                    )  # fmt: skip
            if norm and i >= 2 and (i - 2) * tile + row0 < count:
                normalise_tile(
                    i - 2, i - 2 + SQUARES_SETS < tiles, squares_shared, squares_inbox,
                    value_local, gain_shared, layer_input, norm_eps, first, count, rank, me, per,
                    lane, hidden,
                )  # fmt: skip
            if i < tiles:
                own = rank - i % every * tile
                if (
                    i % token_warps(hidden) == me
                    and own >= 0
                    and own < tile
                    and i * tile + own < count
                ):
                    make_weights(
                        i, own, slices_shared, sums_inbox, hc_shared, weights_shared,
                        weights_inbox, rms_eps, hc_pre_eps, lane, hidden, logit,
                    )  # fmt: skip
                    leave_logits(first + i * tile + own, logit, lane, post_mix, comb_mix)
                if i == tiles - 1:
                    T.call_extern("handle", "mhc::gate_pass", T.access_ptr(mixed[0], "w"))
            if i >= 1 and (i - 1) * tile + row0 < count:
                collapse_tile(
                    i - 1, (i - 1) % bufs, i + 1 < tiles, weights_shared, weights_inbox,
                    streams_shared, squares_shared, squares_inbox, value_local, layer_input, first,
                    count, rank, me, per, lane, hidden, norm,
                )  # fmt: skip
                # another tile in its place, once all of the warp have read it
                T.sync_warp()
                if i - 1 + bufs < tiles:
                    if me == 0:
                        T.call_extern(
                            "handle",
                            "mhc::inbox_wait",
                            T.access_ptr(loads_inbox[(i - 1) % bufs], "r"),
                            (i - 1) // bufs % 2,
                        )
                        if lane == 0:
                            T.call_extern(
                                "handle",
                                "mhc::inbox_again",
                                T.access_ptr(loads_inbox[(i - 1) % bufs], "w"),
                                load_bytes(i - 1 + bufs, hidden, count),
                            )
                    T.call_extern("handle", "mhc::bulk_fence")
                    load_rows(
                        residual, first, count, i - 1 + bufs, (i - 1) % bufs, rank, me, hidden,
                        streams_shared, T.access_ptr(loads_inbox[(i - 1) % bufs], "w"),
                    )  # fmt: skip


@T.macro
def collapse_streams(
    residual, fn, hc_scale, hc_base, gain, post_mix, comb_mix, layer_input, rms_eps, hc_pre_eps,
    hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat, norm_eps, group_tokens, larger_groups,
    early, tokens, i_c, hidden, norm,
):  # fmt: skip
    """One CTA; ``gain`` and ``norm_eps`` are read when ``norm`` is true."""
    most = most_tokens(i_c // CLUSTER, group_tokens, larger_groups, hidden)
    first = T.alloc_var(
        "int32", init=first_token(i_c // CLUSTER, group_tokens, larger_groups, hidden)
    )
    count = T.alloc_var("int32", init=T.min(most, tokens - first))
    # not those of count: a minimum is made in a register of every lane, for which there is no room
    tiles = T.alloc_var("int32", init=T.ceildiv(most, tile_tokens(hidden)))
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
        up to a tile or whole tiles; larger_groups int32: the first clusters, which have a tile
        more; early int32: whether fn may be read before the previous kernel has finished).
    """
    tokens = T.dynamic("tokens", "int32")
    n_threads = threads(hidden)

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
        larger_groups: T.int32,
        early: T.int32,
    ):
        with T.Kernel(
            clusters(tokens, group_tokens, larger_groups, hidden) * CLUSTER,
            threads=n_threads,
            cluster_dims=(CLUSTER, 1, 1),
        ) as i_c:
            collapse_streams(
                residual, fn, hc_scale, hc_base, None, post_mix, comb_mix, layer_input, rms_eps,
                hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat, None,
                group_tokens, larger_groups, early, tokens, i_c, hidden, False,
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
        larger_groups: T.int32,
        early: T.int32,
    ):
        with T.Kernel(
            clusters(tokens, group_tokens, larger_groups, hidden) * CLUSTER,
            threads=n_threads,
            cluster_dims=(CLUSTER, 1, 1),
        ) as i_c:
            collapse_streams(
                residual, fn, hc_scale, hc_base, norm_weight, post_mix, comb_mix, layer_input,
                rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat,
                norm_eps, group_tokens, larger_groups, early, tokens, i_c, hidden, True,
            )  # fmt: skip

    return mhc_pre_norm if norm else mhc_pre

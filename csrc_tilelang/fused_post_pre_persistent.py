"""fused_post_pre_persistent: the whole boundary in one pass over memory, for many tokens.

Algorithm: as in ``fused_post_pre``, a cluster of 16 CTAs shares the hidden dimension and keeps its
slices of fn on the chip, in three bf16 terms; but clusters stay, as many as run at once, and loop
over tiles of 16 tokens (8 where a slice has more than 320 columns). Each token is read once and
written once. A CTA's warps have two roles, with registers to match:

* 8 token warps own 1 or 2 tokens of a tile. They make the new streams in shared memory and in
  global memory (post), then finish tiles before: the collapse of the last one, the RMSNorm of the
  one before that, so that what CTAs tell each other has a tile's time to travel.
* 8 projection warps hold fn, 144 registers a thread and the rest of it in shared memory. They
  project a tile when it is posted, send its sums to the tokens' owners, and load the tile after the
  next when the one before has been collapsed; one of them makes the collapse weights of the token
  that this CTA owns. When all tiles are done they make post weights and combs: in the loop, with fn
  in registers, Sinkhorn spilled, and the kernel before this one took 1.2 times as long as without
  it. Those of the last tile are made in lanes, where their logits still are, by the warp with the
  weights; those before by the other warps meanwhile, a token a thread. With all of them a token a
  thread, after a barrier, 256 and 512 tokens at H = 4096 took 14.57 and 23.13 us, now 14.24 and
  22.61.

Loads are bulk copies, a row each. A warp takes 100 cycles for one, so all projection warps share
them: by two warps, for 8192 tokens at H = 7168, the kernel took 580 us, by four 525. By the token
warps, with cp.async, it took 562; they load their post weights and combs alone, where they have one
token of a tile.

What CTAs tell each other goes through inboxes as in ``fused_post_pre``, of two sets by the tile's
parity, opened again for the tile after the next by a thread that has waited. Nothing else has to
say that a slot is free: a CTA sends for tile i + 2 only when it has the weights of tile i, which
its owner sent when it had read all sums of tile i. All waits are for CTAs of the same cluster,
which the hardware starts together, or for warps of the same CTA; no cluster waits for another.
A CTA ends only when all that was sent to it has come.

The arithmetic and its order are those of ``fused_post_pre``, whose bits these are.
"""

import tilelang.language as T

from ..dispatch import CLUSTER
from ._boundary import boundary_program
from ._collapse import sigmoid
from ._device import DEVICE_SOURCE, HC_MULT, MIXES, MMA_COLUMNS, SQUARES, VECTOR, WARP
from ._operands import (
    CHUNK,
    SLICE_TREE,
    SUMS,
    SUMS_PITCH,
    UNIT_TERMS,
    UNIT_WEIGHTS,
    add_tree,
    slice_size,
    split_unit,
    store_sums,
)
from ._sinkhorn import COMB, sinkhorn, softmax_row, softmax_rows
from ._steps import mix_stream, widen
from .fused_post_pre import (
    PAD,
    REGISTER_UNITS,
    WARP_TREE,
    WARPS,
    add_unit,
    copy_unit,
    load_unit,
    shared_units,
    split_shared_unit,
)

THREADS = WARPS * WARP
PROJECTION_WARPS = 8  # each with the units of two warps of fused_post_pre
HALVES = WARPS // PROJECTION_WARPS
PROJECTION_THREADS = PROJECTION_WARPS * WARP
TOKEN_WARPS = WARPS - PROJECTION_WARPS
# of 512 a thread of each sub-core's four warps: 144 of fn and 40, and what the token warps need
PROJECTION_REGISTERS = 184
TOKEN_REGISTERS = 512 // 2 - PROJECTION_REGISTERS
BUFFERS = 3  # of streams: a tile under way, one posted, one to be collapsed
WEIGHTS_WARP = PROJECTION_WARPS - 1  # none of those that add up and send sums
END_THREADS = WEIGHTS_WARP * WARP  # that make the post weights and combs of all tiles but the last
PROJECTION_BARRIER = 1  # named barrier of the projection warps; 0 is the whole CTA's
TOKEN_BARRIER = 2  # of the token warps
WIDE_TILE_COLUMNS = 320  # columns of a slice up to which 16 tokens fit
PREFETCHES = MIXES * HC_MULT // WARPS  # rows of fn's slice that a warp brings to L2

# what a kernel loops over at trace time
ALL_HALVES = tuple(range(HALVES))


def tile_tokens(hidden: int) -> int:
    """Tokens of a tile: 16, or 8 where 16 do not fit in shared memory."""
    return 16 if slice_size(hidden) <= WIDE_TILE_COLUMNS else 8


def warp_tokens(hidden: int) -> int:
    """Tokens of a token warp in a tile, and those that a projection warp loads."""
    return tile_tokens(hidden) // TOKEN_WARPS


def tokens_load_mixes(hidden: int) -> bool:
    """Whether token warps load their post weights and combs themselves: of one token a tile.

    For 8192 tokens at H = 7168 the kernel took 480 us so, 494 with bulk copies by the projection
    warps; of two tokens a tile, at H = 4096, 294 and 289.
    """
    return warp_tokens(hidden) == 1


def in_slots(first: int, warp, n_shared: int):
    """Whether projection warp ``warp`` has slot ``first + warp``: known now, where all or none do.

    Without a branch around the units in shared memory, 512 and 8192 tokens at H = 7168 took 40.85
    and 491 us, before 42.30 and 513; some of it by the relaxed arrival and the spread prefetch.
    """
    if first + PROJECTION_WARPS <= n_shared:
        return True
    if first >= n_shared:
        return False
    return first + warp < n_shared


def tokens_here(i, size, count):
    """Tokens of tile ``i`` of ``size`` tokens, 0 past the end."""
    return T.max(T.min(size, count - i * size), 0)


def load_bytes(i, part, hidden, count):
    """What warp ``part`` loads of tile ``i``: x, streams, and mixes that no token warp loads."""
    per = warp_tokens(hidden)
    row = HC_MULT + 1
    here = T.max(T.min(per, count - i * tile_tokens(hidden) - part * per), 0)
    mixes = 0 if tokens_load_mixes(hidden) else row * HC_MULT * 4
    return here * (row * slice_size(hidden) * 2 + mixes)


def weights_bytes(i, hidden, count):
    """What the owners send of tile ``i``: 4 weights a token."""
    return tokens_here(i, tile_tokens(hidden), count) * (HC_MULT * 4)


def squares_bytes(i, hidden, count):
    """What 16 CTAs send of tile ``i``: a sum a token, as many at once as a token warp has."""
    each = warp_tokens(hidden)
    return T.ceildiv(tokens_here(i, tile_tokens(hidden), count), each) * (each * CLUSTER * 4)


@T.macro
def load_tokens(
    x, residual, post_layer_mix, comb_res_mix, first, count, i, rank, part, lane, hidden,
    x_shared, streams_shared, post_shared, comb_shared, inbox,
):  # fmt: skip
    """A warp's part of tile ``i``, in bulk copies of a row each and two for the mixes.

    One lane, whose addresses are the same for the whole warp: with a row a lane, each copy went
    through a loop over the lanes.
    """
    tile = tile_tokens(hidden)
    per = warp_tokens(hidden)
    size = slice_size(hidden)
    row0 = part * per
    here = T.min(per, count - i * tile - row0)
    for k in T.unroll(per, unroll_factor=1):
        if lane == 0 and k < here:
            t = first + i * tile + row0 + k
            T.call_extern(
                "handle",
                "mhc::load_bulk",
                T.access_ptr(x_shared[i % 2 * tile + row0 + k, 0], "w"),
                T.access_ptr(x[t, rank * size], "r"),
                size * 2,
                inbox,
            )
            for j in T.unroll(HC_MULT):
                T.call_extern(
                    "handle",
                    "mhc::load_bulk",
                    T.access_ptr(streams_shared[i % BUFFERS * tile + row0 + k, j * size], "w"),
                    T.access_ptr(residual[t, j, rank * size], "r"),
                    size * 2,
                    inbox,
                )
    if not tokens_load_mixes(hidden) and lane == 0 and here > 0:
        t = first + i * tile + row0
        T.call_extern(
            "handle",
            "mhc::load_bulk",
            T.access_ptr(post_shared[i % 2 * tile + row0, 0], "w"),
            T.access_ptr(post_layer_mix[t, 0, 0], "r"),
            here * (HC_MULT * 4),
            inbox,
        )
        T.call_extern(
            "handle",
            "mhc::load_bulk",
            T.access_ptr(comb_shared[i % 2 * tile + row0, 0], "w"),
            T.access_ptr(comb_res_mix[t, 0, 0], "r"),
            here * (HC_MULT * HC_MULT * 4),
            inbox,
        )


@T.macro
def load_mixes(post_layer_mix, comb_res_mix, t, there, row, lane, post_shared, comb_shared):
    """Post weights and combs of token ``t`` if ``there``, 16 bytes a lane: a group of cp.async."""
    if lane <= HC_MULT and there:
        if lane == 0:
            T.call_extern(
                "handle",
                "mhc::load_async16",
                T.access_ptr(post_shared[row, 0], "w"),
                T.access_ptr(post_layer_mix[t, 0, 0], "r"),
            )
        else:
            T.call_extern(
                "handle",
                "mhc::load_async16",
                T.access_ptr(comb_shared[row, (lane - 1) * HC_MULT], "w"),
                T.access_ptr(comb_res_mix[t, lane - 1, 0], "r"),
            )
    T.call_extern("handle", "mhc::loads_commit")


@T.macro
def post_token(
    x_shared, streams_shared, post_shared, comb_shared, residual_out, x_row, row, t, rank, lane,
    hidden,
):  # fmt: skip
    """post: r'[j] = bf16(post[j] * x + sum_i comb[i, j] * r[i]) of one token, in place and out."""
    size = slice_size(hidden)
    new_local = T.alloc_local((HC_MULT * CHUNK,), "bfloat16")
    mixes_local = T.alloc_local(((HC_MULT + 1) * HC_MULT,), "float32")
    for j in T.vectorized(HC_MULT):
        mixes_local[j] = post_shared[x_row, j]
    for i in T.unroll(HC_MULT):
        for j in T.vectorized(HC_MULT):
            mixes_local[(i + 1) * HC_MULT + j] = comb_shared[x_row, i * HC_MULT + j]
    # not unrolled: with all of a token's columns at once it spilled 13 registers
    for r in T.unroll(-(-size // (WARP * CHUNK)), unroll_factor=1):
        h = (r * WARP + lane) * CHUNK
        x_local = T.alloc_local((CHUNK,), "bfloat16")
        streams_local = T.alloc_local((HC_MULT * CHUNK,), "bfloat16")
        if size % (WARP * CHUNK) == 0 or h < size:
            for v in T.vectorized(CHUNK):
                x_local[v] = x_shared[x_row, h + v]
            for j in T.unroll(HC_MULT):
                for v in T.vectorized(CHUNK):
                    streams_local[j * CHUNK + v] = streams_shared[row, j * size + h + v]
            for j in T.unroll(HC_MULT):
                mix_stream(
                    x_local, 0, streams_local, 0, mixes_local[j], mixes_local, HC_MULT + j, HC_MULT,
                    new_local, j * CHUNK, CHUNK,
                )  # fmt: skip
            for j in T.unroll(HC_MULT):
                for v in T.vectorized(CHUNK):
                    residual_out[t, j, rank * size + h + v] = new_local[j * CHUNK + v]
                for v in T.vectorized(CHUNK):
                    streams_shared[row, j * size + h + v] = new_local[j * CHUNK + v]


@T.macro
def add_slices(value):
    """value[0] summed up over 16 aligned lanes, in the order of SLICE_TREE."""
    for half in SLICE_TREE:
        value[0] = value[0] + T.shfl_xor(value[0], half)


@T.macro
def run_roles(
    x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, gain, residual_out, post_mix,
    comb_mix, layer_input, rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value,
    sinkhorn_repeat, norm_eps, early, first, count, tiles, warp, i_c, hidden, norm,
):  # fmt: skip
    """One CTA of a cluster with ``count`` tokens from ``first`` on."""
    T.import_source(DEVICE_SOURCE)
    size = slice_size(hidden)
    n_shared = shared_units(hidden)
    tile = tile_tokens(hidden)
    per = warp_tokens(hidden)
    reps = -(-size // (WARP * VECTOR))  # 16-byte vectors of a lane, in the collapse
    every = CLUSTER // tile  # a CTA owns one token in every so many tiles
    owned = 2 // every  # sets of what an owner is sent
    mma_tiles = tile // MMA_COLUMNS
    all_rounds = tuple(range(-(-n_shared // WARPS)))
    rank = i_c % CLUSTER
    tx = T.get_thread_binding()
    lane = tx % WARP

    streams_shared = T.alloc_shared((BUFFERS * tile, HC_MULT * size + PAD), "bfloat16")
    x_shared = T.alloc_shared((2 * tile, size), "bfloat16")
    post_shared = T.alloc_shared((2 * tile, HC_MULT), "float32")
    comb_shared = T.alloc_shared((2 * tile, HC_MULT * HC_MULT), "float32")
    terms_shared = T.alloc_shared((max(1, n_shared), UNIT_TERMS // 4, WARP, 4), "uint32")
    sums_shared = T.alloc_shared(
        (2 * mma_tiles, PROJECTION_WARPS, MMA_COLUMNS, SUMS_PITCH), "float32"
    )
    slices_shared = T.alloc_shared((owned, CLUSTER, SUMS_PITCH), "float32")
    squares_shared = T.alloc_shared((2, CLUSTER, tile), "float32")
    weights_shared = T.alloc_shared((2, tile, HC_MULT), "float32")
    gain_shared = T.alloc_shared((size,), "bfloat16")
    hc_shared = T.alloc_shared((3 + MIXES,), "float32")
    sums_inbox = T.alloc_shared((owned,), "uint64")
    squares_inbox = T.alloc_shared((2,), "uint64")
    weights_inbox = T.alloc_shared((2,), "uint64")
    loads_inbox = T.alloc_shared((BUFFERS, TOKEN_WARPS), "uint64")
    posted = T.alloc_shared((2,), "uint64")
    freed = T.alloc_shared((2,), "uint64")

    terms_local = T.alloc_local((HALVES * REGISTER_UNITS * UNIT_TERMS,), "uint32")
    split_terms_local = T.alloc_local((UNIT_TERMS,), "uint32")
    weights_local = T.alloc_local((REGISTER_UNITS * UNIT_WEIGHTS,), "float32")
    shared_weights_local = T.alloc_local((UNIT_WEIGHTS,), "float32")
    sums_local = T.alloc_local((8,), "float32")
    both_local = T.alloc_local((8,), "float32")
    slices_local = T.alloc_local((CLUSTER,), "float32")
    vectors_local = T.alloc_local((PROJECTION_WARPS // 2 * 4,), "float32")
    upper_local = T.alloc_local((4,), "float32")
    comb_local = T.alloc_local((HC_MULT * HC_MULT,), "float32")
    pre_local = T.alloc_local((HC_MULT,), "float32")
    collapse_weights = T.alloc_local((per * HC_MULT,), "float32")
    value_local = T.alloc_local((per * reps * VECTOR,), "bfloat16")
    gain_local = T.alloc_local((VECTOR,), "bfloat16")
    out_local = T.alloc_local((VECTOR,), "bfloat16")
    collapse_local = T.alloc_local((HC_MULT * VECTOR,), "bfloat16")
    wide_local = T.alloc_local((VECTOR,), "float32")
    total_local = T.alloc_local((VECTOR,), "float32")
    squares_local = T.alloc_local((per,), "float32")
    squares = T.alloc_local((1,), "float32")
    scale = T.alloc_local((1,), "float32")
    base = T.alloc_local((1,), "float32")
    logit = T.alloc_local((1,), "float32")
    mix = T.alloc_local((1,), "float32")

    # the inboxes are open before anyone can send: the cluster barrier lies between
    if lane == 0:
        if warp < owned:
            T.call_extern(
                "handle",
                "mhc::inbox_open",
                T.access_ptr(sums_inbox[warp], "w"),
                CLUSTER * SUMS_PITCH * 4,
            )
        elif warp < owned + 2:
            T.call_extern(
                "handle",
                "mhc::inbox_open",
                T.access_ptr(squares_inbox[warp - owned], "w"),
                squares_bytes(warp - owned, hidden, count),
            )
        elif warp < owned + 4:
            T.call_extern(
                "handle",
                "mhc::inbox_open",
                T.access_ptr(weights_inbox[warp - owned - 2], "w"),
                weights_bytes(warp - owned - 2, hidden, count),
            )
        elif warp < owned + 6:
            T.call_extern(
                "handle",
                "mhc::gate_open",
                T.access_ptr(posted[warp - owned - 4], "w"),
                TOKEN_WARPS * WARP,
            )
        elif warp < owned + 8:
            T.call_extern(
                "handle",
                "mhc::gate_open",
                T.access_ptr(freed[warp - owned - 6], "w"),
                TOKEN_WARPS * WARP,
            )
        if warp < TOKEN_WARPS:
            for i in T.unroll(BUFFERS):
                T.call_extern(
                    "handle",
                    "mhc::inbox_open",
                    T.access_ptr(loads_inbox[i, warp], "w"),
                    load_bytes(i, warp, hidden, count),
                )
    # relaxed as in fused_post_pre, and fn's rows to L2 by all warps, six each, not by three: both
    # together, 256 and 512 tokens at H = 4096 took 14.57 and 23.13 us, before 15.26 and 23.30
    T.call_extern("handle", "tl::cluster_arrive_relaxed")
    row = warp * PREFETCHES + lane
    if lane < PREFETCHES and i_c < CLUSTER:
        T.call_extern(
            "handle",
            "mhc::prefetch_l2_bulk",
            T.access_ptr(fn[row // HC_MULT, row % HC_MULT * hidden + rank * size], "r"),
            size * 4,
        )

    if warp < PROJECTION_WARPS:
        T.set_max_nreg(PROJECTION_REGISTERS, 1)
        if early == 0:
            T.pdl_sync()
        T.pdl_trigger()
        # fn, split, as in fused_post_pre; this warp has the units of its warps p and p + 8
        for half in ALL_HALVES:
            for u in all_rounds:
                slot = u * WARPS + half * PROJECTION_WARPS + warp
                if in_slots(u * WARPS + half * PROJECTION_WARPS, warp, n_shared):
                    copy_unit(
                        fn, slot + REGISTER_UNITS * WARPS, rank, lane, hidden, terms_shared, slot
                    )
        for half in T.unroll(HALVES):
            unit = half * PROJECTION_WARPS + warp
            for u in T.unroll(REGISTER_UNITS):
                load_unit(fn, unit + u * WARPS, rank, lane, hidden, weights_local, u * UNIT_WEIGHTS)
            for u in T.unroll(REGISTER_UNITS):
                split_unit(
                    weights_local, u * UNIT_WEIGHTS, terms_local,
                    (half * REGISTER_UNITS + u) * UNIT_TERMS,
                )  # fmt: skip
        if n_shared > 0:
            T.call_extern("handle", "mhc::loads_wait")
            T.sync_warp()
            for half in ALL_HALVES:
                for u in all_rounds:
                    slot = u * WARPS + half * PROJECTION_WARPS + warp
                    if in_slots(u * WARPS + half * PROJECTION_WARPS, warp, n_shared):
                        split_shared_unit(
                            terms_shared, slot, lane, shared_weights_local, split_terms_local
                        )
        T.cluster_wait()
        T.pdl_sync()
        for i in T.serial(tiles):
            here = T.min(tile, count - i * tile)
            set0 = i % 2 * mma_tiles
            # projection and sum of squares, 8 tokens at a time
            T.call_extern("handle", "mhc::gate_wait", T.access_ptr(posted[i % 2], "r"), i // 2 % 2)
            for n in T.serial(T.ceildiv(here, MMA_COLUMNS)):
                row = i % BUFFERS * tile + T.min(n * MMA_COLUMNS + lane // 4, here - 1)
                for half in ALL_HALVES:
                    for q in T.unroll(8):
                        sums_local[q] = 0.0
                    unit = half * PROJECTION_WARPS + warp
                    t0 = half * REGISTER_UNITS * UNIT_TERMS
                    for u in T.unroll(REGISTER_UNITS):
                        add_unit(
                            streams_shared, row, unit + u * WARPS, lane, hidden,
                            terms_local, t0 + u * UNIT_TERMS, terms_shared, None, sums_local,
                        )  # fmt: skip
                    for u in all_rounds:
                        if in_slots(u * WARPS + half * PROJECTION_WARPS, warp, n_shared):
                            add_unit(
                                streams_shared, row, unit + (u + REGISTER_UNITS) * WARPS, lane,
                                hidden, terms_local, 0, terms_shared, unit + u * WARPS, sums_local,
                            )  # fmt: skip
                    if half == 0:
                        for q in T.unroll(8):
                            both_local[q] = sums_local[q]
                    else:
                        for q in T.unroll(8):
                            sums_local[q] = both_local[q] + sums_local[q]
                store_sums(sums_local, lane, warp, set0 + n, sums_shared)
            T.sync_threads(PROJECTION_BARRIER, PROJECTION_THREADS)
            # the warps' sums added up, 4 of a token a thread, and sent to the token's owner
            sent = tx // 8
            if sent < here and tx % 8 < SUMS_PITCH // 4:
                for w in T.unroll(PROJECTION_WARPS // 2):
                    for v in T.vectorized(4):
                        pre_local[v] = sums_shared[
                            set0 + sent // MMA_COLUMNS, w, sent % MMA_COLUMNS, tx % 8 * 4 + v
                        ]
                    for v in T.vectorized(4):
                        upper_local[v] = sums_shared[
                            set0 + sent // MMA_COLUMNS,
                            w + PROJECTION_WARPS // 2,
                            sent % MMA_COLUMNS,
                            tx % 8 * 4 + v,
                        ]
                    for v in T.unroll(4):
                        vectors_local[w * 4 + v] = pre_local[v] + upper_local[v]
                for half in WARP_TREE[2:]:
                    for q in T.unroll(half * 4):
                        vectors_local[q] = vectors_local[q] + vectors_local[half * 4 + q]
                T.call_extern(
                    "handle",
                    "mhc::send4",
                    T.access_ptr(slices_shared[i % owned, rank, tx % 8 * 4], "w"),
                    T.access_ptr(sums_inbox[i % owned], "w"),
                    i % every * tile + sent,
                    T.access_ptr(vectors_local[0], "r"),
                )
            # loads of the tile after the next, when the tile before has been collapsed
            if i + 2 < tiles:
                T.call_extern(
                    "handle", "mhc::gate_wait", T.access_ptr(freed[i % 2], "r"), i // 2 % 2
                )
                T.call_extern("handle", "mhc::bulk_fence")
                load_tokens(
                    x, residual, post_layer_mix, comb_res_mix, first, count, i + 2, rank, warp,
                    lane, hidden, x_shared, streams_shared, post_shared, comb_shared,
                    T.access_ptr(loads_inbox[(i + 2) % BUFFERS, warp], "w"),
                )  # fmt: skip
            if warp == WEIGHTS_WARP:
                own = rank - i % every * tile
                if own >= 0 and own < here:
                    # m = projection * rsqrt(mean square + rms_eps), one column a lane; scale, base
                    scale[0] = hc_shared[
                        T.if_then_else(lane < HC_MULT, 0, T.if_then_else(lane < COMB, 1, 2))
                    ]
                    base[0] = hc_shared[3 + T.min(lane, MIXES - 1)]
                    T.call_extern(
                        "handle",
                        "mhc::inbox_wait",
                        T.access_ptr(sums_inbox[i % owned], "r"),
                        i // 2 % 2,
                    )
                    for c in T.unroll(CLUSTER):
                        slices_local[c] = slices_shared[i % owned, c, T.min(lane, SUMS - 1)]
                    T.sync_warp()
                    if lane == 0:
                        T.call_extern(
                            "handle",
                            "mhc::inbox_again",
                            T.access_ptr(sums_inbox[i % owned], "w"),
                            CLUSTER * SUMS_PITCH * 4,
                        )
                    add_tree(slices_local, SLICE_TREE)
                    mix[0] = T.rsqrt(
                        T.shfl_sync(slices_local[0], SQUARES) * (1.0 / (HC_MULT * hidden)) + rms_eps
                    )
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
                            T.access_ptr(weights_shared[i % 2, own, 0], "w"),
                            T.access_ptr(weights_inbox[i % 2], "w"),
                            lane,
                            T.access_ptr(pre_local[0], "r"),
                        )
                    # the other logits wait where their results will be; of the last tile, here
                    t = first + i * tile + own
                    if i + 1 < tiles:
                        if lane >= HC_MULT and lane < COMB:
                            post_mix[t, lane - HC_MULT, 0] = logit[0]
                        elif lane >= COMB and lane < MIXES:
                            comb_mix[t, (lane - COMB) // HC_MULT, lane % HC_MULT] = logit[0]
        # of the tokens that this CTA owns: post' = sigmoid(m) * hc_post_mult_value,
        # comb' = Sinkhorn(softmax_rows(m)). Of the tiles before the last, a token a thread: their
        # logits were written before the last tile's barrier
        before = (tiles - 1) * tile
        for k in T.serial(T.ceildiv(before, END_THREADS * CLUSTER)):
            t = (k * END_THREADS + tx) * CLUSTER + rank
            if tx < END_THREADS and t < before:
                for j in T.vectorized(HC_MULT):
                    pre_local[j] = post_mix[first + t, j, 0]
                for r in T.unroll(HC_MULT):
                    for j in T.vectorized(HC_MULT):
                        comb_local[r * HC_MULT + j] = comb_mix[first + t, r, j]
                for j in T.unroll(HC_MULT):
                    sigmoid(pre_local[j], mix)
                    pre_local[j] = mix[0] * hc_post_mult_value
                for j in T.vectorized(HC_MULT):
                    post_mix[first + t, j, 0] = pre_local[j]
                softmax_rows(comb_local, hc_sinkhorn_eps)
                sinkhorn(comb_local, hc_sinkhorn_eps, sinkhorn_repeat)
                for r in T.unroll(HC_MULT):
                    for j in T.vectorized(HC_MULT):
                        comb_mix[first + t, r, j] = comb_local[r * HC_MULT + j]
        # and of the last tile, in lanes
        if warp == WEIGHTS_WARP:
            own = rank - (tiles - 1) % every * tile
            if own >= 0 and own < count - before:
                t = first + before + own
                sigmoid(logit[0], mix)
                if lane >= HC_MULT and lane < COMB:
                    post_mix[t, lane - HC_MULT, 0] = mix[0] * hc_post_mult_value
                softmax_row(logit, hc_sinkhorn_eps, mix)
                for q in T.unroll(HC_MULT * HC_MULT):
                    comb_local[q] = T.shfl_sync(mix[0], COMB + q)
                sinkhorn(comb_local, hc_sinkhorn_eps, sinkhorn_repeat)
                if lane == 0:
                    for r in T.unroll(HC_MULT):
                        for j in T.vectorized(HC_MULT):
                            comb_mix[t, r, j] = comb_local[r * HC_MULT + j]
    else:
        T.set_max_nreg(TOKEN_REGISTERS, 0)
        me = warp - PROJECTION_WARPS
        row0 = me * per
        mine = lane // CLUSTER % per  # this half warp's token of the warp's
        if early == 0:
            T.pdl_sync()
        T.pdl_trigger()
        T.cluster_wait()
        T.pdl_sync()
        if warp == PROJECTION_WARPS and lane < 3:
            hc_shared[lane] = hc_scale[lane]
        if warp == PROJECTION_WARPS and lane < MIXES:
            hc_shared[3 + lane] = hc_base[lane]
        if norm and me == 0:
            for r in T.unroll(reps):
                if (r * WARP + lane) * VECTOR < size:
                    for v in T.vectorized(VECTOR):
                        gain_shared[(r * WARP + lane) * VECTOR + v] = gain[
                            rank * size + (r * WARP + lane) * VECTOR + v
                        ]
        T.sync_threads(TOKEN_BARRIER, TOKEN_WARPS * WARP)
        # who projects is not ready yet; everyone's own
        for i in T.unroll(2):
            if tokens_load_mixes(hidden):
                load_mixes(
                    post_layer_mix, comb_res_mix, first + i * tile + row0, i * tile + row0 < count,
                    i * tile + row0, lane, post_shared, comb_shared,
                )  # fmt: skip
            load_tokens(
                x, residual, post_layer_mix, comb_res_mix, first, count, i, rank, me, lane, hidden,
                x_shared, streams_shared, post_shared, comb_shared,
                T.access_ptr(loads_inbox[i, me], "w"),
            )  # fmt: skip
        for i in T.serial(tiles + 2):
            # post, as soon as the loads are there
            if i < tiles:
                if i * tile + row0 < count:
                    T.call_extern(
                        "handle",
                        "mhc::inbox_wait",
                        T.access_ptr(loads_inbox[i % BUFFERS, me], "r"),
                        i // BUFFERS % 2,
                    )
                    # not where nothing will be loaded: a phase of 0 bytes would end at once
                    if lane == 0 and (i + BUFFERS) * tile + row0 < count:
                        T.call_extern(
                            "handle",
                            "mhc::inbox_again",
                            T.access_ptr(loads_inbox[i % BUFFERS, me], "w"),
                            load_bytes(i + BUFFERS, me, hidden, count),
                        )
                if tokens_load_mixes(hidden):
                    # all but those of the next tile
                    T.call_extern("handle", "mhc::loads_wait_but<1>")
                    T.sync_warp()
                for k in T.serial(T.max(T.min(per, count - i * tile - row0), 0)):
                    post_token(
                        x_shared, streams_shared, post_shared, comb_shared, residual_out,
                        i % 2 * tile + row0 + k, i % BUFFERS * tile + row0 + k,
                        first + i * tile + row0 + k, rank, lane, hidden,
                    )  # fmt: skip
                T.call_extern("handle", "mhc::gate_pass", T.access_ptr(posted[i % 2], "w"))
                if tokens_load_mixes(hidden):
                    # in the place of those that the warp has used
                    T.sync_warp()
                    load_mixes(
                        post_layer_mix, comb_res_mix, first + (i + 2) * tile + row0,
                        (i + 2) * tile + row0 < count, i % 2 * tile + row0, lane, post_shared,
                        comb_shared,
                    )  # fmt: skip
            # RMSNorm of the tile before the last: bf16(bf16(v) * rsqrt(mean(v^2) + norm_eps) * g)
            if norm and i >= 2 and (i - 2) * tile + row0 < count:
                T.call_extern(
                    "handle",
                    "mhc::inbox_wait",
                    T.access_ptr(squares_inbox[i % 2], "r"),
                    (i - 2) // 2 % 2,
                )
                squares[0] = squares_shared[i % 2, lane % CLUSTER, row0 + mine]
                T.sync_warp()
                if me == 0 and lane == 0 and i < tiles:
                    T.call_extern(
                        "handle",
                        "mhc::inbox_again",
                        T.access_ptr(squares_inbox[i % 2], "w"),
                        squares_bytes(i, hidden, count),
                    )
                add_slices(squares)
                squares[0] = T.rsqrt(squares[0] * (1.0 / hidden) + norm_eps)
                for k in T.unroll(per):
                    squares_local[k] = T.shfl_sync(squares[0], k * CLUSTER)
                for k in T.unroll(per):
                    if (i - 2) * tile + row0 + k < count:
                        for r in T.unroll(reps):
                            if (r * WARP + lane) * VECTOR < size:
                                widen(value_local, (k * reps + r) * VECTOR, VECTOR, wide_local)
                                for v in T.vectorized(VECTOR):
                                    gain_local[v] = gain_shared[(r * WARP + lane) * VECTOR + v]
                                widen(gain_local, 0, VECTOR, total_local)
                                for v in T.unroll(VECTOR):
                                    total_local[v] = (
                                        wide_local[v] * squares_local[k] * total_local[v]
                                    )
                                for v in T.vectorized(VECTOR):
                                    out_local[v] = T.cast(total_local[v], "bfloat16")
                                for v in T.vectorized(VECTOR):
                                    layer_input[
                                        first + (i - 2) * tile + row0 + k,
                                        rank * size + (r * WARP + lane) * VECTOR + v,
                                    ] = out_local[v]
            if i >= 1 and (i - 1) * tile + row0 < count:
                T.call_extern(
                    "handle",
                    "mhc::inbox_wait",
                    T.access_ptr(weights_inbox[(i - 1) % 2], "r"),
                    (i - 1) // 2 % 2,
                )
                for k in T.unroll(per):
                    for j in T.vectorized(HC_MULT):
                        collapse_weights[k * HC_MULT + j] = weights_shared[(i - 1) % 2, row0 + k, j]
                T.sync_warp()
                if me == 0 and lane == 0 and i + 1 < tiles:
                    T.call_extern(
                        "handle",
                        "mhc::inbox_again",
                        T.access_ptr(weights_inbox[(i - 1) % 2], "w"),
                        weights_bytes(i + 1, hidden, count),
                    )
                # collapse of the tile before: v = sum_j weight_j * r'_j
                for k in T.unroll(per):
                    squares_local[k] = 0.0
                    if (i - 1) * tile + row0 + k < count:
                        for r in T.unroll(reps):
                            if (r * WARP + lane) * VECTOR < size:
                                for j in T.unroll(HC_MULT):
                                    for v in T.vectorized(VECTOR):
                                        collapse_local[j * VECTOR + v] = streams_shared[
                                            (i - 1) % BUFFERS * tile + row0 + k,
                                            j * size + (r * WARP + lane) * VECTOR + v,
                                        ]
                                widen(collapse_local, 0, VECTOR, wide_local)
                                for v in T.unroll(VECTOR):
                                    total_local[v] = collapse_weights[k * HC_MULT] * wide_local[v]
                                for j in T.unroll(HC_MULT - 1):
                                    widen(collapse_local, (j + 1) * VECTOR, VECTOR, wide_local)
                                    for v in T.unroll(VECTOR):
                                        total_local[v] = (
                                            total_local[v]
                                            + collapse_weights[k * HC_MULT + j + 1] * wide_local[v]
                                        )
                                for v in T.unroll(VECTOR):
                                    squares_local[k] = (
                                        squares_local[k] + total_local[v] * total_local[v]
                                    )
                                for v in T.vectorized(VECTOR):
                                    value_local[(k * reps + r) * VECTOR + v] = T.cast(
                                        total_local[v], "bfloat16"
                                    )
                                if not norm:
                                    for v in T.vectorized(VECTOR):
                                        layer_input[
                                            first + (i - 1) * tile + row0 + k,
                                            rank * size + (r * WARP + lane) * VECTOR + v,
                                        ] = value_local[(k * reps + r) * VECTOR + v]
                if norm:
                    for k in T.unroll(per):
                        squares_local[k] = T.warp_reduce_sum(squares_local[k])
                    if lane < CLUSTER:
                        if per == 2:
                            T.call_extern(
                                "handle",
                                "mhc::send2",
                                T.access_ptr(squares_shared[(i - 1) % 2, rank, row0], "w"),
                                T.access_ptr(squares_inbox[(i - 1) % 2], "w"),
                                lane,
                                squares_local[0],
                                squares_local[per - 1],
                            )
                        else:
                            T.call_extern(
                                "handle",
                                "mhc::send",
                                T.access_ptr(squares_shared[(i - 1) % 2, rank, row0], "w"),
                                T.access_ptr(squares_inbox[(i - 1) % 2], "w"),
                                lane,
                                squares_local[0],
                            )
            if i < tiles:
                T.call_extern("handle", "mhc::gate_pass", T.access_ptr(freed[i % 2], "w"))


@T.macro
def boundary(
    x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, gain, residual_out, post_mix,
    comb_mix, layer_input, rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value,
    sinkhorn_repeat, norm_eps, group_tokens, early, tokens, i_c, hidden, norm,
):  # fmt: skip
    """One CTA; ``gain`` and ``norm_eps`` are read when ``norm`` is true."""
    first = T.alloc_var("int32", init=i_c // CLUSTER * group_tokens)
    count = T.alloc_var("int32", init=T.min(group_tokens, tokens - first))
    tiles = T.alloc_var("int32", init=T.ceildiv(count, tile_tokens(hidden)))
    warp = T.alloc_var("int32", init=T.shfl_sync(T.get_thread_binding() // WARP, 0))
    # handed on, they are variables no more: TileLang splits an if that asks for a variable into one
    # for each statement, and what the statements hand on then stays in registers around the loop
    run_roles(
        x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, gain, residual_out,
        post_mix, comb_mix, layer_input, rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value,
        sinkhorn_repeat, norm_eps, early, first, count, tiles, warp, i_c, hidden, norm,
    )  # fmt: skip


def fused_post_pre_persistent(hidden: int, *, norm: bool, pdl: bool):
    """Build the fused_post_pre_persistent kernel.

    Args:
        hidden: H, a multiple of 256 up to 7168.
        norm: whether the RMSNorm follows; adds the arguments norm_weight and norm_eps.
        pdl: must be true: clusters and programmatic dependent launch come together (sm_90).

    Returns:
        The TileLang program, as of :func:`._boundary.boundary_program`; group_tokens, the tokens of
        a cluster, may be any number.
    """
    return boundary_program("mhc_fused_post_pre_persistent", boundary, THREADS, hidden, norm=norm)

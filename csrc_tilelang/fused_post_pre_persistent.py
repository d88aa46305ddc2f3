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

from ..geometry import CLUSTER, tile_tokens
from ._collapse import sigmoid
from ._device import DEVICE_SOURCE, HC_MULT, MIXES, MMA_COLUMNS, VECTOR, WARP
from ._operands import (
    CHUNK,
    SUMS_PITCH,
    UNIT_TERMS,
    UNIT_WEIGHTS,
    slice_size,
    split_unit,
    store_sums,
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
    weights_bytes,
)
from ._sinkhorn import COMB, sinkhorn, softmax_row
from ._steps import mix_stream
from .fused_post_pre import (
    PAD,
    REGISTER_UNITS,
    WARPS,
    add_unit,
    copy_unit,
    load_unit,
    shared_units,
    split_shared_unit,
)

THREADS = WARPS * WARP
TOKEN_WARPS = WARPS - PROJECTION_WARPS
# of 512 a thread of each sub-core's four warps: 144 of fn and 40, and what the token warps need
PROJECTION_REGISTERS = 184
TOKEN_REGISTERS = 512 // 2 - PROJECTION_REGISTERS
BUFFERS = 3  # of streams: a tile under way, one posted, one to be collapsed
WEIGHTS_WARP = PROJECTION_WARPS - 1  # none of those that add up and send sums
END_THREADS = WEIGHTS_WARP * WARP  # that make the post weights and combs of all tiles but the last
PROJECTION_BARRIER = 1  # named barrier of the projection warps; 0 is the whole CTA's
TOKEN_BARRIER = 2  # of the token warps
PREFETCHES = MIXES * HC_MULT // WARPS  # rows of fn's slice that a warp brings to L2

# what a kernel loops over at trace time
ALL_HALVES = tuple(range(HALVES))


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


def load_bytes(i, part, hidden, count):
    """What warp ``part`` loads of tile ``i``: x, streams, and mixes that no token warp loads."""
    per = warp_tokens(hidden)
    row = HC_MULT + 1
    here = T.max(T.min(per, count - i * tile_tokens(hidden) - part * per), 0)
    mixes = 0 if tokens_load_mixes(hidden) else row * HC_MULT * 4
    return here * (row * slice_size(hidden) * 2 + mixes)


@T.macro
def load_tokens(
    x, residual, post_layer_mix, comb_res_mix, first, count, i, rank, part, hidden, x_shared,
    streams_shared, post_shared, comb_shared, inbox,
):  # fmt: skip
    """A warp's part of tile ``i``, in bulk copies of a row each and two for the mixes."""
    tile = tile_tokens(hidden)
    per = warp_tokens(hidden)
    size = slice_size(hidden)
    row0 = part * per
    here = T.min(per, count - i * tile - row0)
    for k in T.unroll(per, unroll_factor=1):
        if k < here:
            t = first + i * tile + row0 + k
            T.call_extern(
                "handle",
                "mhc::load_bulk",
                T.access_ptr(x_shared[i % 2 * tile + row0 + k, 0], "w"),
                T.access_ptr(x[t, rank * size], "r"),
                size * 2,
                inbox,
            )
            T.call_extern(
                "handle",
                "mhc::load_bulk4",
                T.access_ptr(streams_shared[i % BUFFERS * tile + row0 + k, 0], "w"),
                size * 2,
                T.access_ptr(residual[t, 0, rank * size], "r"),
                hidden * 2,
                size * 2,
                inbox,
            )
    if not tokens_load_mixes(hidden) and here > 0:
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
    comb_local = T.alloc_local((HC_MULT * HC_MULT,), "float32")
    value_local = T.alloc_local((per * reps * VECTOR,), "bfloat16")
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
                squares_bytes(warp - owned, per, hidden, count),
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
                send_sums(
                    sums_shared, set0, sent, tx % 8 * 4,
                    T.access_ptr(slices_shared[i % owned, rank, tx % 8 * 4], "w"),
                    T.access_ptr(sums_inbox[i % owned], "w"),
                    i % every * tile + sent,
                )  # fmt: skip
            # loads of the tile after the next, when the tile before has been collapsed
            if i + 2 < tiles:
                T.call_extern(
                    "handle", "mhc::gate_wait", T.access_ptr(freed[i % 2], "r"), i // 2 % 2
                )
                T.call_extern("handle", "mhc::bulk_fence")
                load_tokens(
                    x, residual, post_layer_mix, comb_res_mix, first, count, i + 2, rank, warp,
                    hidden, x_shared, streams_shared, post_shared, comb_shared,
                    T.access_ptr(loads_inbox[(i + 2) % BUFFERS, warp], "w"),
                )  # fmt: skip
            if warp == WEIGHTS_WARP:
                own = rank - i % every * tile
                if own >= 0 and own < here:
                    make_weights(
                        i, own, slices_shared, sums_inbox, hc_shared, weights_shared,
                        weights_inbox, rms_eps, hc_pre_eps, lane, hidden, logit,
                    )  # fmt: skip
                    # the other logits wait where their results will be; of the last tile, here
                    if i + 1 < tiles:
                        leave_logits(first + i * tile + own, logit, lane, post_mix, comb_mix)
        # of the tokens that this CTA owns: post' = sigmoid(m) * hc_post_mult_value,
        # comb' = Sinkhorn(softmax_rows(m)). Of the tiles before the last, a token a thread: their
        # logits were written before the last tile's barrier
        before = (tiles - 1) * tile
        finish_mixes(
            first, before, rank, tx, END_THREADS, post_mix, comb_mix, hc_sinkhorn_eps,
            hc_post_mult_value, sinkhorn_repeat,
        )  # fmt: skip
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
        if early == 0:
            T.pdl_sync()
        T.pdl_trigger()
        T.cluster_wait()
        T.pdl_sync()
        load_constants(
            hc_scale, hc_base, gain, rank, me, lane, hidden, norm, hc_shared, gain_shared
        )
        T.sync_threads(TOKEN_BARRIER, TOKEN_WARPS * WARP)
        # who projects is not ready yet; everyone's own
        for i in T.unroll(2):
            if tokens_load_mixes(hidden):
                load_mixes(
                    post_layer_mix, comb_res_mix, first + i * tile + row0, i * tile + row0 < count,
                    i * tile + row0, lane, post_shared, comb_shared,
                )  # fmt: skip
            load_tokens(
                x, residual, post_layer_mix, comb_res_mix, first, count, i, rank, me, hidden,
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
                normalise_tile(
                    i - 2, i < tiles, squares_shared, squares_inbox, value_local, gain_shared,
                    layer_input, norm_eps, first, count, rank, me, per, lane, hidden,
                )  # fmt: skip
            if i >= 1 and (i - 1) * tile + row0 < count:
                collapse_tile(
                    i - 1, (i - 1) % BUFFERS, i + 1 < tiles, weights_shared, weights_inbox,
                    streams_shared, squares_shared, squares_inbox, value_local, layer_input, first,
                    count, rank, me, per, lane, hidden, norm,
                )  # fmt: skip
            if i < tiles:
                T.call_extern("handle", "mhc::gate_pass", T.access_ptr(freed[i % 2], "w"))


@T.macro
def boundary(
    x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, gain, residual_out, post_mix,
    comb_mix, layer_input, rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value,
    sinkhorn_repeat, norm_eps, group_tokens, larger_groups, early, tokens, i_c, hidden, norm,
):  # fmt: skip
    """One CTA; ``gain`` and ``norm_eps`` are read when ``norm`` is true."""
    most = most_tokens(i_c // CLUSTER, group_tokens, larger_groups, hidden)
    first = T.alloc_var(
        "int32", init=first_token(i_c // CLUSTER, group_tokens, larger_groups, hidden)
    )
    count = T.alloc_var("int32", init=T.min(most, tokens - first))
    tiles = T.alloc_var("int32", init=T.ceildiv(most, tile_tokens(hidden)))
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
        The TileLang program: (x [n, H] bf16, residual [n, 4, H] bf16, post_layer_mix [n, 4, 1]
        fp32, comb_res_mix [n, 4, 4] fp32, fn [24, 4 * H] fp32, hc_scale [3] fp32, hc_base [24]
        fp32, norm_weight [H] bf16 if norm, residual_out [n, 4, H] bf16, post_mix [n, 4, 1] fp32,
        comb_mix [n, 4, 4] fp32, layer_input [n, H] bf16, rms_eps, hc_pre_eps, hc_sinkhorn_eps,
        hc_post_mult_value fp32, sinkhorn_repeat int32, norm_eps fp32 if norm, group_tokens int32:
        tokens of a cluster, whole tiles; larger_groups int32: the first clusters, which have a tile
        more; early int32: whether fn may be read before the previous kernel has finished).
    """
    tokens = T.dynamic("tokens", "int32")

    @T.prim_func
    def mhc_fused_post_pre_persistent(
        x: T.Tensor((tokens, hidden), "bfloat16"),
        residual: T.Tensor((tokens, HC_MULT, hidden), "bfloat16"),
        post_layer_mix: T.Tensor((tokens, HC_MULT, 1), "float32"),
        comb_res_mix: T.Tensor((tokens, HC_MULT, HC_MULT), "float32"),
        fn: T.Tensor((MIXES, HC_MULT * hidden), "float32"),
        hc_scale: T.Tensor((3,), "float32"),
        hc_base: T.Tensor((MIXES,), "float32"),
        residual_out: T.Tensor((tokens, HC_MULT, hidden), "bfloat16"),
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
            threads=THREADS,
            cluster_dims=(CLUSTER, 1, 1),
        ) as i_c:
            boundary(
                x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, None,
                residual_out, post_mix, comb_mix, layer_input, rms_eps, hc_pre_eps,
                hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat, None, group_tokens,
                larger_groups, early, tokens, i_c, hidden, False,
            )  # fmt: skip

    @T.prim_func
    def mhc_fused_post_pre_persistent_norm(
        x: T.Tensor((tokens, hidden), "bfloat16"),
        residual: T.Tensor((tokens, HC_MULT, hidden), "bfloat16"),
        post_layer_mix: T.Tensor((tokens, HC_MULT, 1), "float32"),
        comb_res_mix: T.Tensor((tokens, HC_MULT, HC_MULT), "float32"),
        fn: T.Tensor((MIXES, HC_MULT * hidden), "float32"),
        hc_scale: T.Tensor((3,), "float32"),
        hc_base: T.Tensor((MIXES,), "float32"),
        norm_weight: T.Tensor((hidden,), "bfloat16"),
        residual_out: T.Tensor((tokens, HC_MULT, hidden), "bfloat16"),
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
            threads=THREADS,
            cluster_dims=(CLUSTER, 1, 1),
        ) as i_c:
            boundary(
                x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, norm_weight,
                residual_out, post_mix, comb_mix, layer_input, rms_eps, hc_pre_eps,
                hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat, norm_eps, group_tokens,
                larger_groups, early, tokens, i_c, hidden, True,
            )  # fmt: skip

    return mhc_fused_post_pre_persistent_norm if norm else mhc_fused_post_pre_persistent

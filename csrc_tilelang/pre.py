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
from ._device import DEVICE_SOURCE, HC_MULT, MIXES, MMA_COLUMNS, VECTOR, WARP
from ._operands import SUMS_PITCH, UNIT_TERMS, slice_size
from ._persistent import (
    HALVES,
    PROJECTION_REGISTERS,
    PROJECTION_THREADS,
    PROJECTION_WARPS,
    THREADS,
    TOKEN_BARRIER,
    TOKEN_REGISTERS,
    TOKEN_THREADS,
    TOKEN_WARPS,
    collapse_tile,
    finish_mixes,
    load_terms,
    make_weights,
    normalise_tile,
    project_tile,
    send_sums,
    squares_bytes,
    tile_tokens,
    tokens_here,
    warp_tokens,
    weights_bytes,
)
from .fused_post_pre import PAD, REGISTER_UNITS, shared_units

SHARED_BYTES = 227 * 1024  # of an SM of sm_90
MOST_BUFFERS = 6
LAG = 1  # tiles between the projection and the collapse of one
SETS = 3
FIRST_TILES = 2
BULK = 0
LOAD = "mhc::load_async16"


def buffers(hidden: int) -> int:
    """Tiles of streams that fit in shared memory beside the rest."""
    tile = tile_tokens(hidden)
    rest = max(1, shared_units(hidden)) * UNIT_TERMS * WARP * 4
    rest += 2 * tile * PROJECTION_WARPS * SUMS_PITCH * 4
    rest += 2 * tile // CLUSTER * CLUSTER * SUMS_PITCH * 4 + SETS * CLUSTER * tile * 4
    rest += 2 * tile * HC_MULT * 4 + slice_size(hidden) * 2 + 1024
    return min(MOST_BUFFERS, (SHARED_BYTES - rest) // (tile * (HC_MULT * slice_size(hidden) + PAD) * 2))


def load_bytes(i, hidden, count):
    """Bytes of the streams of tile ``i``."""
    return tokens_here(i, tile_tokens(hidden), count) * (HC_MULT * slice_size(hidden) * 2)


@T.macro
def load_tile(residual, first, count, i, buffer, rank, me, lane, hidden, streams_shared, loaded):
    """A token warp's tokens of tile ``i``: 16 bytes a lane, which that lane alone collapses."""
    size = slice_size(hidden)
    tile = tile_tokens(hidden)
    per = warp_tokens(hidden)
    if BULK:
        if lane == 0:
            if me == 0 and i >= buffers(hidden):
                T.call_extern("handle", "mhc::inbox_wait", T.access_ptr(loaded[buffer], "r"), (i // buffers(hidden) - 1) % 2)
                T.call_extern("handle", "mhc::inbox_again", T.access_ptr(loaded[buffer], "w"), load_bytes(i, hidden, count))
            T.call_extern("handle", "mhc::bulk_fence")
            for k in T.unroll(per):
                if i * tile + me * per + k < count:
                    for j in T.unroll(HC_MULT):
                        T.call_extern(
                            "handle",
                            "mhc::load_bulk",
                            T.access_ptr(streams_shared[buffer * tile + me * per + k, j * size], "w"),
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
    per = warp_tokens(hidden)
    bufs = buffers(hidden)
    reps = -(-size // (WARP * VECTOR))
    every = CLUSTER // tile  # a CTA owns one token in every so many tiles
    owned = 2 // every  # sets of what an owner is sent
    mma_tiles = tile // MMA_COLUMNS
    rank = i_c % CLUSTER
    tx = T.get_thread_binding()
    lane = tx % WARP

    streams_shared = T.alloc_shared((bufs * tile, HC_MULT * size + PAD), "bfloat16")
    terms_shared = T.alloc_shared(
        (max(1, shared_units(hidden)), UNIT_TERMS // 4, WARP, 4), "uint32"
    )
    sums_shared = T.alloc_shared(
        (2 * mma_tiles, PROJECTION_WARPS, MMA_COLUMNS, SUMS_PITCH), "float32"
    )
    slices_shared = T.alloc_shared((owned, CLUSTER, SUMS_PITCH), "float32")
    squares_shared = T.alloc_shared((SETS, CLUSTER, tile), "float32")
    weights_shared = T.alloc_shared((2, tile, HC_MULT), "float32")
    gain_shared = T.alloc_shared((size,), "bfloat16")
    hc_shared = T.alloc_shared((3 + MIXES,), "float32")
    sums_inbox = T.alloc_shared((owned,), "uint64")
    squares_inbox = T.alloc_shared((SETS,), "uint64")
    weights_inbox = T.alloc_shared((2,), "uint64")
    loaded = T.alloc_shared((bufs,), "uint64")
    projected = T.alloc_shared((2,), "uint64")
    added = T.alloc_shared((2,), "uint64")
    mixed = T.alloc_shared((1,), "uint64")

    terms_local = T.alloc_local((HALVES * REGISTER_UNITS * UNIT_TERMS,), "uint32")
    value_local = T.alloc_local((per * reps * VECTOR,), "bfloat16")

    # the inboxes are open before anyone can send: the cluster barrier lies between
    if lane == 0:
        if warp < owned:
            T.call_extern(
                "handle",
                "mhc::inbox_open",
                T.access_ptr(sums_inbox[warp], "w"),
                CLUSTER * SUMS_PITCH * 4,
            )
        elif warp < owned + SETS:
            T.call_extern(
                "handle",
                "mhc::inbox_open",
                T.access_ptr(squares_inbox[warp - owned], "w"),
                squares_bytes(warp - owned, hidden, count),
            )
        elif warp < owned + SETS + 2:
            T.call_extern(
                "handle",
                "mhc::inbox_open",
                T.access_ptr(weights_inbox[warp - owned - SETS], "w"),
                weights_bytes(warp - owned - SETS, hidden, count),
            )
        elif warp < owned + SETS + 4:
            T.call_extern(
                "handle",
                "mhc::gate_open",
                T.access_ptr(projected[warp - owned - SETS - 2], "w"),
                PROJECTION_THREADS,
            )
        elif warp < owned + SETS + 6:
            T.call_extern(
                "handle",
                "mhc::gate_open",
                T.access_ptr(added[warp - owned - SETS - 4], "w"),
                TOKEN_THREADS,
            )
        elif warp == owned + SETS + 6:
            T.call_extern(
                "handle", "mhc::gate_open", T.access_ptr(mixed[0], "w"), TOKEN_THREADS
            )
        if warp < bufs:
            if BULK:
                T.call_extern(
                    "handle",
                    "mhc::inbox_open",
                    T.access_ptr(loaded[warp], "w"),
                    load_bytes(warp, hidden, count),
                )
            else:
                T.call_extern(
                    "handle", "mhc::gate_open", T.access_ptr(loaded[warp], "w"), TOKEN_THREADS
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
        T.set_max_nreg(PROJECTION_REGISTERS, 1)
        if early == 0:
            T.pdl_sync()
        T.pdl_trigger()
        load_terms(fn, rank, warp, lane, hidden, terms_local, terms_shared)
        T.cluster_wait()
        T.pdl_sync()
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
                streams_shared, i % bufs * tile, T.min(tile, count - i * tile), warp, lane, hidden,
                terms_local, terms_shared, i % 2 * mma_tiles, sums_shared,
            )  # fmt: skip
            T.call_extern("handle", "mhc::gate_pass", T.access_ptr(projected[i % 2], "w"))
        T.call_extern("handle", "mhc::gate_wait", T.access_ptr(mixed[0], "r"), 0)
        finish_mixes(
            first, count, rank, tx, post_mix, comb_mix, hc_sinkhorn_eps, hc_post_mult_value,
            sinkhorn_repeat,
        )  # fmt: skip
    else:
        T.set_max_nreg(TOKEN_REGISTERS, 0)
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
                    residual, first, count, i, i, rank, me, lane, hidden, streams_shared, loaded
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
        T.sync_threads(TOKEN_BARRIER, TOKEN_THREADS)
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
                        T.access_ptr(slices_shared[i % owned, rank, lane % 8 * 4], "w"),
                        T.access_ptr(sums_inbox[i % owned], "w"),
                        i % every * tile + sent,
                    )  # fmt: skip
                T.call_extern("handle", "mhc::gate_pass", T.access_ptr(added[i % 2], "w"))
            # the first projections do not wait for more than they need
            if i == 0:
                for b in T.unroll(bufs - FIRST_TILES):
                    if FIRST_TILES + b < tiles:
                        load_tile(
                            residual, first, count, FIRST_TILES + b, FIRST_TILES + b, rank, me,
                            lane, hidden, streams_shared, loaded,
                        )  # fmt: skip
            if norm and i >= 1 + LAG and (i - 1 - LAG) * tile + row0 < count:
                normalise_tile(
                    i - 1 - LAG, i - 1 - LAG + SETS < tiles, squares_shared, squares_inbox,
                    value_local, gain_shared, layer_input, norm_eps, first, count, rank, me, lane,
                    hidden,
                )  # fmt: skip
            if i < tiles:
                own = rank - i % every * tile
                if i % TOKEN_WARPS == me and own >= 0 and i * tile + own < count and own < tile:
                    make_weights(
                        i, own, first + i * tile + own, slices_shared, sums_inbox, hc_shared,
                        weights_shared, weights_inbox, post_mix, comb_mix, rms_eps, hc_pre_eps,
                        lane, hidden,
                    )  # fmt: skip
                if i == tiles - 1:
                    T.call_extern("handle", "mhc::gate_pass", T.access_ptr(mixed[0], "w"))
            if i >= LAG and (i - LAG) * tile + row0 < count:
                collapse_tile(
                    i - LAG, (i - LAG) % bufs, i + 2 - LAG < tiles, weights_shared, weights_inbox,
                    streams_shared, squares_shared, squares_inbox, value_local, layer_input, first,
                    count, rank, me, lane, hidden, norm,
                )  # fmt: skip
                # another tile in its place
                if i - LAG + bufs < tiles:
                    if BULK:
                        T.sync_warp()
                    load_tile(
                        residual, first, count, i - LAG + bufs, (i - LAG) % bufs, rank, me, lane,
                        hidden, streams_shared, loaded,
                    )  # fmt: skip


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
            threads=THREADS,
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
            threads=THREADS,
            cluster_dims=(CLUSTER, 1, 1),
        ) as i_c:
            collapse_streams(
                residual, fn, hc_scale, hc_base, norm_weight, post_mix, comb_mix, layer_input,
                rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat,
                norm_eps, group_tokens, early, tokens, i_c, hidden, True,
            )  # fmt: skip

    return mhc_pre_norm if norm else mhc_pre

"""fused_post_pre_persistent: the whole boundary in one pass over memory, for many tokens.

Algorithm: as in ``fused_post_pre``, a cluster of 16 CTAs shares the hidden dimension and keeps its
slices of fn on the chip, in three bf16 terms; but clusters stay, as many as run at once, and loop
over tiles of 16 tokens (8 where a slice has more than 320 columns). Each token is read once and
written once. A CTA's warps have two roles, with registers to match:

* 8 token warps own 1 or 2 tokens of a tile. They make the new streams in shared memory and in
  global memory (post), then finish tiles before: the collapse of the last one, the RMSNorm of the
  one before that, so that what CTAs tell each other has a tile's time to travel.
* 8 projection warps hold fn, 144 registers a thread and the rest of fn in shared memory. They
  project a tile when the tile is posted, send its sums to the tokens' owners, and load the tile
  after the next when the one before has been collapsed; one of them makes the collapse weights of
  the token that this CTA owns. When all tiles are done they make post weights and combs, since
  Sinkhorn in the loop, with fn in registers, is spilled. Those of the last tile are made in lanes,
  where their logits still are, by the warp with the weights; those before by the other warps
  meanwhile, a token a thread (NOTES.md, "Variants of the persistent kernel", E).

Loads are bulk copies, a row each, and all projection warps share them (NOTES.md, "All projection
warps load"). The token warps load their post weights and combs alone, where they have one token of
a tile.

What CTAs tell each other goes through inboxes as in ``fused_post_pre``, of two sets by the tile's
parity, which a thread that has waited opens again for the tile after the next. Nothing else has to
say that a slot is free: a CTA sends for tile i + 2 only when it has the weights of tile i, which
their owners sent when they had read all sums of tile i. All waits are for CTAs of the same cluster,
which the hardware starts together, or for warps of the same CTA; no cluster waits for another. A
CTA ends only when all that was sent to it has come.

The arithmetic and its order are those of ``fused_post_pre``, whose bits these are.
"""

from typing import Any, NamedTuple

import tilelang.language as T

from ..geometry import tile_tokens
from . import device
from .arguments import Arguments, Collapse, Context, Mixing, Post
from .layout import (
    CLUSTER,
    HC_MULT,
    MIXES,
    MMA_COLUMNS,
    VECTOR,
    WARP,
    clusters,
    slice_size,
)
from .steps import tiles as steps
from .steps.mixes import finish_in_lanes
from .steps.post import Comb, Old, mix_stream
from .steps.project import (
    BLOCK_TERMS,
    BLOCK_WEIGHTS,
    CHUNK,
    REGISTER_BLOCKS,
    SUMS_PITCH,
    TOKEN_SUMS,
    WARPS,
    Block,
    Terms,
    add_block,
    copy_block,
    load_block,
    shared_blocks,
    split_block,
    split_shared_block,
    store_sums,
)
from .steps.tiles import HALVES, PROJECTION_WARPS, SETS

THREADS = WARPS * WARP
TOKEN_WARPS = WARPS - PROJECTION_WARPS
# Of 512 a thread of each sub-core's four warps: 144 of fn and 40, and what the token warps need.
PROJECTION_REGISTERS = 184
TOKEN_REGISTERS = 512 // 2 - PROJECTION_REGISTERS
BUFFERS = 3  # of streams: a tile under way, one posted, one to be collapsed
WEIGHTS_WARP = PROJECTION_WARPS - 1  # none of those that add up and send sums
END_THREADS = WEIGHTS_WARP * WARP  # that make the post weights and combs of all tiles but the last
PROJECTION_BARRIER = 1  # named barrier of the projection warps; 0 is the whole CTA's
TOKEN_BARRIER = 2  # of the token warps
PREFETCHES = MIXES * HC_MULT // WARPS  # rows of fn's slice that a warp brings to L2
ALL_HALVES = tuple(range(HALVES))


def warp_tokens(hidden: int) -> int:
    """Return how many tokens of a tile a token warp owns, and a projection warp loads."""
    return tile_tokens(hidden) // TOKEN_WARPS


def tokens_load_mixes(hidden: int) -> bool:
    """Return whether token warps load their post weights and combs themselves: of one token a tile.

    With two tokens a tile that is slower (NOTES.md, "Variants of the persistent kernel", M).
    """
    return warp_tokens(hidden) == 1


def shared_rounds(hidden: int) -> tuple[int, ...]:
    """Return the numbers of blocks of one of 16 warps whose terms are in shared memory."""
    return tuple(range(-(-shared_blocks(hidden) // WARPS)))


def has_block(u: int, half: int, warp, hidden: int):
    """Return whether a projection warp has shared block ``u`` of a half.

    That is known now where all or none have one: without a branch around the blocks in shared
    memory the kernel is faster (NOTES.md, "Variants of the persistent kernel", S).
    """
    first = u * WARPS + half * PROJECTION_WARPS
    if first + PROJECTION_WARPS <= shared_blocks(hidden):
        return True
    if first >= shared_blocks(hidden):
        return False
    return first + warp < shared_blocks(hidden)


class Loads(NamedTuple):
    """What a tile is loaded to besides the streams, and how warps of the CTA tell each other of it.

    Attributes:
        x_shared: [2 * tile, slice] bf16, x of two tiles.
        post_shared, comb_shared: [2 * tile, 4] and [2 * tile, 16] fp32, their mixes.
        inbox: [3, 8], a token warp's tokens of a tile have come.
        posted, freed: [2], gates: a tile of either parity has its new streams, or is collapsed.
    """

    x_shared: Any
    post_shared: Any
    comb_shared: Any
    inbox: Any
    posted: Any
    freed: Any


@T.macro
def loads_of_cta(hidden):
    """Room in shared memory, as the fields of a Loads."""
    tile = tile_tokens(hidden)
    x_shared = T.alloc_shared((2 * tile, slice_size(hidden)), "bfloat16")
    post_shared = T.alloc_shared((2 * tile, HC_MULT), "float32")
    comb_shared = T.alloc_shared((2 * tile, HC_MULT * HC_MULT), "float32")
    loads_inbox = T.alloc_shared((BUFFERS, TOKEN_WARPS), "uint64")
    posted = T.alloc_shared((2,), "uint64")
    freed = T.alloc_shared((2,), "uint64")
    return x_shared, post_shared, comb_shared, loads_inbox, posted, freed


def load_bytes(i, part, hidden, count):
    """Return what warp ``part`` loads of tile ``i``: x, streams, mixes that no token warp loads."""
    per = warp_tokens(hidden)
    row = HC_MULT + 1
    here = T.max(T.min(per, count - i * tile_tokens(hidden) - part * per), 0)
    mixes = 0 if tokens_load_mixes(hidden) else row * HC_MULT * 4
    return here * (row * slice_size(hidden) * 2 + mixes)


@T.macro
def open_inboxes(memory, loads, at):
    """Open inboxes and gates, before anyone can send: the cluster barrier lies between."""
    owned = steps.owned_sets(at.hidden)
    if at.lane == 0:
        if at.warp < owned:
            device.inbox_open(memory.sums_inbox[at.warp], steps.SUMS_BYTES)
        elif at.warp < owned + 2:
            device.inbox_open(
                memory.squares_inbox[at.warp - owned],
                steps.squares_bytes(at.warp - owned, warp_tokens(at.hidden), at.hidden, at.count),
            )
        elif at.warp < owned + 4:
            device.inbox_open(
                memory.weights_inbox[at.warp - owned - 2],
                steps.weights_bytes(at.warp - owned - 2, at.hidden, at.count),
            )
        elif at.warp < owned + 6:
            device.gate_open(loads.posted[at.warp - owned - 4], TOKEN_WARPS * WARP)
        elif at.warp < owned + 8:
            device.gate_open(loads.freed[at.warp - owned - 6], TOKEN_WARPS * WARP)
        if at.warp < TOKEN_WARPS:
            for i in T.unroll(BUFFERS):
                device.inbox_open(
                    loads.inbox[i, at.warp], load_bytes(i, at.warp, at.hidden, at.count)
                )


@T.macro
def load_tokens(i, post, memory, loads, at):
    """A warp's part of tile ``i``, in bulk copies of a row each and two for the mixes."""
    tile = tile_tokens(at.hidden)
    per = warp_tokens(at.hidden)
    size = slice_size(at.hidden)
    row0 = at.warp * per
    here = T.min(per, at.count - i * tile - row0)
    inbox = device.address(loads.inbox[i % BUFFERS, at.warp])
    for k in T.unroll(per, unroll_factor=1):
        if k < here:
            t = at.first + i * tile + row0 + k
            device.load_bulk(
                loads.x_shared[i % 2 * tile + row0 + k, 0], post.x[t, at.rank * size],
                size * 2, inbox,
            )  # fmt: skip
            device.load_bulk4(
                memory.streams_shared[i % BUFFERS * tile + row0 + k, 0], size * 2,
                post.residual[t, 0, at.rank * size], at.hidden * 2, size * 2, inbox,
            )  # fmt: skip
    if not tokens_load_mixes(at.hidden) and here > 0:
        t = at.first + i * tile + row0
        device.load_bulk(
            loads.post_shared[i % 2 * tile + row0, 0], post.post_layer_mix[t, 0],
            here * (HC_MULT * 4), inbox,
        )  # fmt: skip
        device.load_bulk(
            loads.comb_shared[i % 2 * tile + row0, 0], post.comb_res_mix[t, 0, 0],
            here * (HC_MULT * HC_MULT * 4), inbox,
        )  # fmt: skip


@T.macro
def load_mixes(i, post, loads, at):
    """Post weights and comb of a token warp's token of tile ``i``: a group of cp.async."""
    tile = tile_tokens(at.hidden)
    t = at.first + i * tile + at.warp
    row = i % 2 * tile + at.warp
    if at.lane <= HC_MULT and i * tile + at.warp < at.count:
        if at.lane == 0:
            device.load_async16(loads.post_shared[row, 0], post.post_layer_mix[t, 0])
        else:
            device.load_async16(
                loads.comb_shared[row, (at.lane - 1) * HC_MULT],
                post.comb_res_mix[t, at.lane - 1, 0],
            )
    device.loads_commit()


@T.macro
def post_token(i, token, post, memory, loads, at):
    """post of a token of tile ``i``, in place and out."""
    tile = tile_tokens(at.hidden)
    size = slice_size(at.hidden)
    x_row = i % 2 * tile + token
    row = i % BUFFERS * tile + token
    t = at.first + i * tile + token
    new_local = T.alloc_local((HC_MULT * CHUNK,), "bfloat16")
    mixes_local = T.alloc_local(((HC_MULT + 1) * HC_MULT,), "float32")
    for j in T.vectorized(HC_MULT):
        mixes_local[j] = loads.post_shared[x_row, j]
    for i_old in T.unroll(HC_MULT):
        for j in T.vectorized(HC_MULT):
            mixes_local[(i_old + 1) * HC_MULT + j] = loads.comb_shared[x_row, i_old * HC_MULT + j]
    # This loop is not unrolled: with all of a token's columns at once it spills.
    for r in T.unroll(-(-size // (WARP * CHUNK)), unroll_factor=1):
        h = (r * WARP + at.lane) * CHUNK
        x_local = T.alloc_local((CHUNK,), "bfloat16")
        streams_local = T.alloc_local((HC_MULT * CHUNK,), "bfloat16")
        if size % (WARP * CHUNK) == 0 or h < size:
            for v in T.vectorized(CHUNK):
                x_local[v] = loads.x_shared[x_row, h + v]
            for j in T.unroll(HC_MULT):
                for v in T.vectorized(CHUNK):
                    streams_local[j * CHUNK + v] = memory.streams_shared[row, j * size + h + v]
            for j in T.unroll(HC_MULT):
                mix_stream(
                    Old(x_local, streams_local, CHUNK),
                    mixes_local[j],
                    Comb(mixes_local, HC_MULT + j, HC_MULT),
                    new_local,
                    j * CHUNK,
                )
            for j in T.unroll(HC_MULT):
                for v in T.vectorized(CHUNK):
                    post.residual_out[t, j, at.rank * size + h + v] = new_local[j * CHUNK + v]
                for v in T.vectorized(CHUNK):
                    memory.streams_shared[row, j * size + h + v] = new_local[j * CHUNK + v]


@T.macro
def split_fn(fn, terms, at):
    """fn's terms; this warp has the blocks of the warps p and p + 8 of the layout."""
    split_terms_local = T.alloc_local((BLOCK_TERMS,), "uint32")
    weights_local = T.alloc_local((REGISTER_BLOCKS * BLOCK_WEIGHTS,), "float32")
    shared_weights_local = T.alloc_local((BLOCK_WEIGHTS,), "float32")
    for half in ALL_HALVES:
        for u in shared_rounds(at.hidden):
            slot = u * WARPS + half * PROJECTION_WARPS + at.warp
            if has_block(u, half, at.warp, at.hidden):
                block = Block(slot + REGISTER_BLOCKS * WARPS, at.rank, at.lane, at.hidden)
                copy_block(fn, block, terms.terms_shared, slot)
    for half in T.unroll(HALVES):
        first = half * PROJECTION_WARPS + at.warp
        for u in T.unroll(REGISTER_BLOCKS):
            block = Block(first + u * WARPS, at.rank, at.lane, at.hidden)
            load_block(fn, block, weights_local, u * BLOCK_WEIGHTS)
        for u in T.unroll(REGISTER_BLOCKS):
            t0 = (half * REGISTER_BLOCKS + u) * BLOCK_TERMS
            split_block(weights_local, u * BLOCK_WEIGHTS, terms.terms_local, t0)
    if shared_blocks(at.hidden) > 0:
        device.loads_wait()
        T.sync_warp()
        for half in ALL_HALVES:
            for u in shared_rounds(at.hidden):
                slot = u * WARPS + half * PROJECTION_WARPS + at.warp
                if has_block(u, half, at.warp, at.hidden):
                    split_shared_block(
                        terms.terms_shared, slot, at.lane, shared_weights_local, split_terms_local
                    )


@T.macro
def project_tile(i, here, terms, memory, at):
    """Projection and sum of squares of tile ``i``, 8 tokens at a time."""
    sums_local = T.alloc_local((TOKEN_SUMS,), "float32")
    both_local = T.alloc_local((TOKEN_SUMS,), "float32")
    row0 = i % BUFFERS * tile_tokens(at.hidden)
    for n in T.serial(T.ceildiv(here, MMA_COLUMNS)):
        row = row0 + T.min(n * MMA_COLUMNS + at.lane // 4, here - 1)
        for half in ALL_HALVES:
            for q in T.unroll(TOKEN_SUMS):
                sums_local[q] = 0.0
            first = half * PROJECTION_WARPS + at.warp
            for u in T.unroll(REGISTER_BLOCKS):
                block = Block(first + u * WARPS, at.rank, at.lane, at.hidden)
                t0 = (half * REGISTER_BLOCKS + u) * BLOCK_TERMS
                add_block(memory.streams_shared, row, block, terms._replace(t0=t0), sums_local)
            for u in shared_rounds(at.hidden):
                if has_block(u, half, at.warp, at.hidden):
                    slot = first + u * WARPS
                    block = Block(slot + REGISTER_BLOCKS * WARPS, at.rank, at.lane, at.hidden)
                    shared = terms._replace(slot=slot)
                    add_block(memory.streams_shared, row, block, shared, sums_local)
            if half == 0:
                for q in T.unroll(TOKEN_SUMS):
                    both_local[q] = sums_local[q]
            else:
                for q in T.unroll(TOKEN_SUMS):
                    sums_local[q] = both_local[q] + sums_local[q]
        tile = i % SETS * steps.mma_tiles(at.hidden) + n
        store_sums(sums_local, at.lane, at.warp, tile, memory.sums_shared)


@T.macro
def loop_of_projection_warps(given, terms, logit_local, memory, loads, at):
    """Project the tiles as they are posted, send sums, load, and make weights."""
    tile = tile_tokens(at.hidden)
    for i in T.serial(at.tiles):
        here = T.min(tile, at.count - i * tile)
        device.gate_wait(loads.posted[i % 2], i // 2 % 2)
        project_tile(i, here, terms, memory, at)
        T.sync_threads(PROJECTION_BARRIER, steps.PROJECTION_THREADS)
        sent = at.tx // 8
        if sent < here and at.tx % 8 < SUMS_PITCH // 4:
            steps.send_sums(i, sent, memory, at)
        # The tile after the next is loaded when the tile before has been collapsed.
        if i + 2 < at.tiles:
            device.gate_wait(loads.freed[i % 2], i // 2 % 2)
            device.bulk_fence()
            load_tokens(i + 2, given.post, memory, loads, at)
        if at.warp == WEIGHTS_WARP:
            own = steps.owned_token(i, at.rank, at.hidden)
            if own >= 0 and own < here:
                steps.make_weights(i, own, given.mixing, logit_local, memory, at)
                # The other logits wait where their results will be; those of the last tile, here.
                if i + 1 < at.tiles:
                    steps.leave_logits(
                        at.first + i * tile + own, logit_local, given.mixing, at.lane
                    )


@T.macro
def finish_last_tile(before, mixing, logit_local, at):
    """Post weights and comb of the token of the last tile that this CTA owns, in lanes."""
    own = steps.owned_token(at.tiles - 1, at.rank, at.hidden)
    if own >= 0 and own < at.count - before:
        finish_in_lanes(logit_local, mixing, at.first + before + own, at.lane)


@T.macro
def run_projection_warps(given, memory, loads, at):
    """The role of a projection warp."""
    n_shared = max(1, shared_blocks(at.hidden))
    terms_local = T.alloc_local((HALVES * REGISTER_BLOCKS * BLOCK_TERMS,), "uint32")
    terms_shared = T.alloc_shared((n_shared, BLOCK_TERMS // 4, WARP, 4), "uint32")
    terms = Terms(terms_local, 0, terms_shared)
    logit_local = T.alloc_local((1,), "float32")
    T.set_max_nreg(PROJECTION_REGISTERS, 1)
    if given.early == 0:
        T.pdl_sync()
    T.pdl_trigger()
    split_fn(given.mixing.fn, terms, at)
    T.cluster_wait()
    T.pdl_sync()
    loop_of_projection_warps(given, terms, logit_local, memory, loads, at)
    # The logits of the tiles before the last were written before the last tile's barrier.
    before = (at.tiles - 1) * tile_tokens(at.hidden)
    steps.finish_mixes(before, END_THREADS, given.mixing, at)
    if at.warp == WEIGHTS_WARP:
        finish_last_tile(before, given.mixing, logit_local, at)


@T.macro
def post_tile(i, post, memory, loads, at):
    """post of a token warp's tokens of tile ``i``, as soon as the loads are there."""
    tile = tile_tokens(at.hidden)
    per = warp_tokens(at.hidden)
    row0 = at.warp * per
    if i * tile + row0 < at.count:
        device.inbox_wait(loads.inbox[i % BUFFERS, at.warp], i // BUFFERS % 2)
        # Where nothing will be loaded the inbox stays shut: a phase of 0 bytes would end at once.
        if at.lane == 0 and (i + BUFFERS) * tile + row0 < at.count:
            device.inbox_again(
                loads.inbox[i % BUFFERS, at.warp],
                load_bytes(i + BUFFERS, at.warp, at.hidden, at.count),
            )
    if tokens_load_mixes(at.hidden):
        # The mixes of the next tile may be under way still.
        device.loads_wait(but=1)
        T.sync_warp()
    for k in T.serial(T.max(T.min(per, at.count - i * tile - row0), 0)):
        post_token(i, row0 + k, post, memory, loads, at)
    device.gate_pass(loads.posted[i % 2])
    if tokens_load_mixes(at.hidden):
        # The place of these mixes is free when all lanes have used them.
        T.sync_warp()
        load_mixes(i + 2, post, loads, at)


@T.macro
def loop_of_token_warps(given, collapsed, memory, loads, at):
    """Post a tile, normalise the one before the last, and collapse the last one."""
    tile = tile_tokens(at.hidden)
    row0 = at.warp * collapsed.tokens
    for i in T.serial(at.tiles + 2):
        if i < at.tiles:
            post_tile(i, given.post, memory, loads, at)
        if given.output.norm and i >= 2 and (i - 2) * tile + row0 < at.count:
            steps.normalise_tile(i - 2, given.output, collapsed, memory, at)
        if i >= 1 and (i - 1) * tile + row0 < at.count:
            steps.collapse_tile(i - 1, (i - 1) % BUFFERS, given.output, collapsed, memory, at)
        if i < at.tiles:
            device.gate_pass(loads.freed[i % 2])


@T.macro
def run_token_warps(given, memory, loads, at):
    """The role of a token warp."""
    per = warp_tokens(at.hidden)
    value_local = T.alloc_local((per * steps.repetitions(at.hidden) * VECTOR,), "bfloat16")
    T.set_max_nreg(TOKEN_REGISTERS, 0)
    if given.early == 0:
        T.pdl_sync()
    T.pdl_trigger()
    T.cluster_wait()
    T.pdl_sync()
    steps.load_constants(given.mixing, given.output, memory, at)
    T.sync_threads(TOKEN_BARRIER, TOKEN_WARPS * WARP)
    # The projection warps are not ready yet, so token warps load their own tokens of two tiles.
    for i in T.unroll(2):
        if tokens_load_mixes(at.hidden):
            load_mixes(i, given.post, loads, at)
        load_tokens(i, given.post, memory, loads, at)
    loop_of_token_warps(given, steps.Collapsed(value_local, per), memory, loads, at)


@T.macro
def run_roles(given, hidden, i_c, first, count, tiles, warp):
    """One CTA of a cluster with ``count`` tokens from ``first`` on."""
    T.import_source(device.SOURCE)
    size = slice_size(hidden)
    rank = i_c % CLUSTER
    tx = T.get_thread_binding()
    lane = tx % WARP
    memory = steps.Memory(*steps.memory_of_cta(hidden, BUFFERS, SETS))
    loads = Loads(*loads_of_cta(hidden))
    at = Context(hidden, tx, lane, warp, rank, first, count, tiles)
    open_inboxes(memory, loads, at)
    # The arrival is relaxed as in fused_post_pre, and all warps bring fn's rows to L2, six each,
    # not three of them (NOTES.md, "Variants of the persistent kernel", R).
    device.cluster_arrive_relaxed()
    row = warp * PREFETCHES + lane
    if lane < PREFETCHES and i_c < CLUSTER:
        device.prefetch_l2_bulk(
            given.mixing.fn[row // HC_MULT, row % HC_MULT * hidden + rank * size], size * 4
        )
    if warp < PROJECTION_WARPS:
        run_projection_warps(given, memory, loads, at)
    else:
        run_token_warps(given, memory, loads, at._replace(warp=warp - PROJECTION_WARPS))


def fused_post_pre_persistent(hidden: int, *, norm: bool, pdl: bool):
    """Build the fused_post_pre_persistent kernel.

    Args:
        hidden: H, a multiple of 256 up to 7168.
        norm: whether the RMSNorm follows; without it norm_weight and norm_eps are not read.
        pdl: must be true: clusters and programmatic dependent launch come together (sm_90).

    Returns:
        The TileLang program. ``group_tokens`` are the tokens of a cluster, whole tiles; the first
        ``larger_groups`` clusters have a tile more; ``early`` says whether fn may be read before
        the previous kernel has finished.
    """
    tokens = T.dynamic("tokens", "int32")

    @T.prim_func
    def mhc_fused_post_pre_persistent(
        x: T.Tensor((tokens, hidden), "bfloat16"),
        residual: T.Tensor((tokens, HC_MULT, hidden), "bfloat16"),
        post_layer_mix: T.Tensor((tokens, HC_MULT), "float32"),
        comb_res_mix: T.Tensor((tokens, HC_MULT, HC_MULT), "float32"),
        fn: T.Tensor((MIXES, HC_MULT * hidden), "float32"),
        hc_scale: T.Tensor((3,), "float32"),
        hc_base: T.Tensor((MIXES,), "float32"),
        norm_weight: T.Tensor((hidden,), "bfloat16"),
        residual_out: T.Tensor((tokens, HC_MULT, hidden), "bfloat16"),
        post_mix: T.Tensor((tokens, HC_MULT), "float32"),
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
            clusters(tokens, group_tokens, larger_groups, tile_tokens(hidden)) * CLUSTER,
            threads=THREADS,
            cluster_dims=(CLUSTER, 1, 1),
        ) as i_c:
            given = Arguments(
                Mixing(
                    fn, hc_scale, hc_base, rms_eps, hc_pre_eps, hc_sinkhorn_eps,
                    hc_post_mult_value, sinkhorn_repeat, post_mix, comb_mix,
                ),
                Collapse(layer_input, norm, norm_weight, norm_eps),
                early,
                Post(x, residual, post_layer_mix, comb_res_mix, residual_out),
            )  # fmt: skip
            first, count, tiles, warp = steps.tiles_of_cluster(
                i_c // CLUSTER, tokens, group_tokens, larger_groups, hidden
            )
            run_roles(given, hidden, i_c, first, count, tiles, warp)

    return mhc_fused_post_pre_persistent

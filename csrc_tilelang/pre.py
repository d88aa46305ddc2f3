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

from typing import Any, NamedTuple

import tilelang.language as T

from ..geometry import tile_tokens
from . import device
from .arguments import Arguments, Collapse, Context, Mixing
from .layout import (
    CLUSTER,
    HC_MULT,
    MIXES,
    MMA_COLUMNS,
    VECTOR,
    WARP,
    clusters,
    slice_size,
    tokens_of_tile,
)
from .steps import tiles as steps
from .steps.project import (
    ALL_OPERANDS,
    ALL_STEPS,
    BLOCK_TERMS,
    BLOCK_WEIGHTS,
    CHUNK,
    OPERANDS,
    REGISTER_BLOCKS,
    STEPS,
    STREAMS_PAD,
    SUMS_PITCH,
    TOKEN_SUMS,
    WARPS,
    Block,
    Terms,
    add_parts,
    blocks,
    copy_block,
    load_block,
    load_columns,
    load_operand,
    split_block,
    split_shared_block,
    store_sums,
)
from .steps.tiles import HALVES, PROJECTION_THREADS, PROJECTION_WARPS, SETS

WARP_TOKENS = 2  # of a tile, of a token warp
PROJECTION_REGISTERS = 200
LAUNCH_REGISTERS = {384: 168, 512: 128}  # a thread, by threads of a CTA: 64 K in all
TOKEN_BARRIER = 1  # named barrier of the token warps; 0 is the whole CTA's
MOST_OCTETS = 5  # in registers: 180 of them, with a fragment or more in shared memory
# Fragments of the last octet in registers that are in shared memory after all, by octets. Otherwise
# the compiler spills as many, to where L1 misses (NOTES.md, "16 tokens projected at once").
SHARED_FRAGMENTS = {4: 3, 5: 5}
SHARED_BYTES = 227 * 1024  # of an SM of sm_90
MOST_BUFFERS = 6
# These tiles are loaded before the first is projected, each when the one before has come (NOTES.md,
# "First tiles in turn").
EARLY_TILES = 4
SQUARES_SETS = 3


class Octet(NamedTuple):
    """8 blocks of a CTA, a block of each projection warp: ``first`` to ``first + 7``.

    Attributes:
        first: the first block; the layout deals out the blocks w, w + 16 and so on to warp w.
        half: which of two warps of the layout a projection warp stands for.
        whole: whether the CTA has all 8 blocks.
        in_registers: where fn's terms are kept; in shared memory otherwise.
        place: among the octets that are kept there.
    """

    first: int
    half: int
    whole: bool
    in_registers: bool
    place: int

    def block(self, at):
        """The block of this warp."""
        return Block(self.first + at.warp, at.rank, at.lane, at.hidden)

    def slot(self, at):
        """The slot of this warp in shared memory."""
        return self.place * PROJECTION_WARPS + at.warp

    def has_block(self, at):
        """Whether the CTA has the block of this warp."""
        return self.whole or self.first + at.warp < blocks(at.hidden)


def octets(hidden: int) -> tuple[Octet, ...]:
    """Return the octets of a CTA, in the order in which a projection warp takes its blocks."""
    n = blocks(hidden)
    firsts = sorted(
        range(0, n, PROJECTION_WARPS), key=lambda first: (first // PROJECTION_WARPS % HALVES, first)
    )
    kept = [first for first in firsts if first < REGISTER_BLOCKS * WARPS]
    kept += [f for f in firsts if f >= REGISTER_BLOCKS * WARPS and f + PROJECTION_WARPS <= n]
    kept = kept[:MOST_OCTETS]
    others = [first for first in firsts if first not in kept]
    return tuple(
        Octet(
            first=first,
            half=first // PROJECTION_WARPS % HALVES,
            whole=first + PROJECTION_WARPS <= n,
            in_registers=first in kept,
            place=(kept if first in kept else others).index(first),
        )
        for first in firsts
    )


def register_octets(hidden: int) -> tuple[Octet, ...]:
    """Return the octets in registers, by place."""
    return tuple(sorted((o for o in octets(hidden) if o.in_registers), key=lambda o: o.place))


def shared_octets(hidden: int) -> tuple[Octet, ...]:
    """Return the octets in shared memory."""
    return tuple(o for o in octets(hidden) if not o.in_registers)


def half_octets(hidden: int, half: int) -> tuple[Octet, ...]:
    """Return the octets of one half."""
    return tuple(o for o in octets(hidden) if o.half == half)


def load_batches(hidden: int) -> tuple[tuple[tuple[int, Octet], ...], ...]:
    """Return the octets in registers two at a time, with their place in the batch."""
    kept = register_octets(hidden)
    return tuple(tuple(enumerate(kept[i : i + 2])) for i in range(0, len(kept), 2))


def shared_fragments(hidden: int, octet: Octet) -> int:
    """Return how many fragments of an octet in registers are in shared memory after all."""
    n = len(register_octets(hidden))
    return SHARED_FRAGMENTS.get(n, 0) if octet.place == n - 1 else 0


def most_fragments(hidden: int) -> int:
    """Return for how many fragments of a projection warp there has to be room."""
    return max(1, shared_fragments(hidden, register_octets(hidden)[-1]))


def slots(hidden: int) -> int:
    """Return for how many blocks in shared memory there has to be room."""
    return max(1, len(shared_octets(hidden)) * PROJECTION_WARPS)


def token_threads(hidden: int) -> int:
    """Return the threads of the warps that own tokens."""
    return tile_tokens(hidden) // WARP_TOKENS * WARP


def threads(hidden: int) -> int:
    """Return the threads of a CTA."""
    return PROJECTION_THREADS + token_threads(hidden)


def token_registers(hidden: int) -> int:
    """Return what the projection warps leave to a thread of the token warps."""
    n = threads(hidden)
    left = LAUNCH_REGISTERS[n] * n - PROJECTION_REGISTERS * PROJECTION_THREADS
    return left // token_threads(hidden)


def buffers(hidden: int) -> int:
    """Return how many tiles of streams fit in shared memory beside the rest."""
    tile = tile_tokens(hidden)
    rest = slots(hidden) * BLOCK_TERMS * WARP * 4
    rest += PROJECTION_WARPS * most_fragments(hidden) * WARP * 16
    rest += 2 * tile * PROJECTION_WARPS * SUMS_PITCH * 4
    rest += 2 * CLUSTER * SUMS_PITCH * 4 + SQUARES_SETS * CLUSTER * tile * 4
    rest += 2 * tile * HC_MULT * 4 + slice_size(hidden) * 2 + 1024
    row = (HC_MULT * slice_size(hidden) + STREAMS_PAD) * 2
    return min(MOST_BUFFERS, (SHARED_BYTES - rest) // (tile * row))


def early_tiles(hidden: int) -> int:
    """Return how many tiles are loaded before the first is projected."""
    return min(EARLY_TILES, buffers(hidden))


def load_bytes(i, hidden, count):
    """Return the bytes of the streams of tile ``i``."""
    return tokens_of_tile(i, tile_tokens(hidden), count) * (HC_MULT * slice_size(hidden) * 2)


class Fn(NamedTuple):
    """fn's terms of a projection warp.

    Attributes:
        terms_local: those of the octets in registers, by place.
        terms_shared: those of the octets in shared memory, by slot.
        fragments_shared: the fragments that are in shared memory after all, by warp.
    """

    terms_local: Any
    terms_shared: Any
    fragments_shared: Any

    def terms(self, octet, at):
        """The terms of this warp's block of an octet."""
        if octet.in_registers:
            return Terms(self.terms_local, octet.place * BLOCK_TERMS)
        return Terms(None, None, self.terms_shared, octet.slot(at))


class Gates(NamedTuple):
    """How warps of the CTA tell each other how far they are.

    Attributes:
        loads_inbox: the streams of a tile have come, by buffer.
        projected: the projection warps' sums of a tile are there, by the tile's parity.
        added: their place is free again.
        mixed: all logits are where the post weights and combs go.
    """

    loads_inbox: Any
    projected: Any
    added: Any
    mixed: Any


@T.macro
def gates_of_cta(hidden):
    """Room in shared memory, as the fields of a Gates."""
    loads_inbox = T.alloc_shared((buffers(hidden),), "uint64")
    projected = T.alloc_shared((2,), "uint64")
    added = T.alloc_shared((2,), "uint64")
    mixed = T.alloc_shared((1,), "uint64")
    return loads_inbox, projected, added, mixed


@T.macro
def open_inboxes(memory, gates, at):
    """Open inboxes and gates, before anyone can send: the cluster barrier lies between."""
    for q in T.unroll(steps.owned_sets(at.hidden)):
        device.inbox_open(memory.sums_inbox[q], steps.SUMS_BYTES)
    for q in T.unroll(SQUARES_SETS):
        device.inbox_open(
            memory.squares_inbox[q], steps.squares_bytes(q, WARP_TOKENS, at.hidden, at.count)
        )
    for q in T.unroll(buffers(at.hidden)):
        device.inbox_open(gates.loads_inbox[q], load_bytes(q, at.hidden, at.count))
    for q in T.unroll(SETS):
        device.inbox_open(memory.weights_inbox[q], steps.weights_bytes(q, at.hidden, at.count))
        device.gate_open(gates.projected[q], PROJECTION_THREADS)
        device.gate_open(gates.added[q], token_threads(at.hidden))
    device.gate_open(gates.mixed[0], token_threads(at.hidden))


@T.macro
def split_fn(fn, terms, at):
    """fn's terms; this warp has a block of each octet."""
    split_terms_local = T.alloc_local((BLOCK_TERMS,), "uint32")
    weights_local = T.alloc_local((2 * BLOCK_WEIGHTS,), "float32")
    shared_weights_local = T.alloc_local((BLOCK_WEIGHTS,), "float32")
    for octet in shared_octets(at.hidden):
        if octet.has_block(at):
            copy_block(fn, octet.block(at), terms.terms_shared, octet.slot(at))
    for batch in load_batches(at.hidden):
        for k, octet in batch:
            load_block(fn, octet.block(at), weights_local, k * BLOCK_WEIGHTS)
        for k, octet in batch:
            t0 = octet.place * BLOCK_TERMS
            split_block(weights_local, k * BLOCK_WEIGHTS, terms.terms_local, t0)
            for fragment in T.unroll(shared_fragments(at.hidden, octet)):
                for q in T.vectorized(4):
                    terms.fragments_shared[at.warp, fragment, at.lane, q] = terms.terms_local[
                        t0 + fragment * 4 + q
                    ]
    if len(shared_octets(at.hidden)) > 0:
        device.loads_wait()
        T.sync_warp()
        for octet in shared_octets(at.hidden):
            if octet.has_block(at):
                split_shared_block(
                    terms.terms_shared, octet.slot(at), at.lane, shared_weights_local,
                    split_terms_local,
                )  # fmt: skip


@T.macro
def add_block_to_all(streams_shared, row, octet, terms, sums_local, sets, at):
    """sums += fn . streams of this warp's block of an octet, for ``sets`` times 8 tokens at once.

    Each of them as by ``add_block``; ``row`` is the first set's for this lane.
    """
    values_local = T.alloc_local((sets * STEPS * CHUNK,), "bfloat16")
    words_local = T.view(values_local, (sets * STEPS * 2,), "uint32")
    fragment = T.alloc_local((4,), "uint32")
    part = T.alloc_local((sets * len(OPERANDS) * 4,), "float32")
    for q in T.unroll(sets * len(OPERANDS) * 4):
        part[q] = 0.0
    for n in T.unroll(sets):
        load_columns(
            streams_shared, row + n * MMA_COLUMNS, octet.block(at), values_local, n * STEPS * CHUNK
        )
    for operand in ALL_OPERANDS:
        for step in ALL_STEPS:
            for n in T.unroll(sets):
                words = (n * STEPS + step) * 2
                place = operand * STEPS + step
                if octet.in_registers and place < shared_fragments(at.hidden, octet):
                    for q in T.vectorized(4):
                        fragment[q] = terms.fragments_shared[at.warp, place, at.lane, q]
                else:
                    load_operand(
                        terms.terms(octet, at), at.lane, (operand, step), words_local, words,
                        fragment,
                    )  # fmt: skip
                device.mma_bf16(
                    part[(n * len(OPERANDS) + operand) * 4], fragment[0],
                    words_local[words], words_local[words + 1],
                )  # fmt: skip
    for n in T.unroll(sets):
        add_parts(part, n * len(OPERANDS) * 4, sums_local, n * TOKEN_SUMS)


@T.macro
def project_tile(i, terms, memory, at):
    """Projection and sum of squares of tile ``i``, absent tokens and all."""
    sets = steps.mma_tiles(at.hidden)
    row0 = i % buffers(at.hidden) * tile_tokens(at.hidden)
    half_local = T.alloc_local((sets * TOKEN_SUMS,), "float32")
    sums_local = T.alloc_local((sets * TOKEN_SUMS,), "float32")
    one_local = T.alloc_local((TOKEN_SUMS,), "float32")
    for half in (0, 1):
        for q in T.unroll(sets * TOKEN_SUMS):
            half_local[q] = 0.0
        for octet in half_octets(at.hidden, half):
            if octet.in_registers or octet.has_block(at):
                add_block_to_all(
                    memory.streams_shared, row0 + at.lane // 4, octet, terms, half_local, sets, at
                )
        for q in T.unroll(sets * TOKEN_SUMS):
            sums_local[q] = half_local[q] if half == 0 else sums_local[q] + half_local[q]
    for n in T.unroll(sets):
        for q in T.unroll(TOKEN_SUMS):
            one_local[q] = sums_local[n * TOKEN_SUMS + q]
        store_sums(one_local, at.lane, at.warp, i % SETS * sets + n, memory.sums_shared)


@T.macro
def load_tokens(i, buffer, residual, memory, gates, at):
    """A token warp's tokens of tile ``i``."""
    tile = tile_tokens(at.hidden)
    size = slice_size(at.hidden)
    row0 = at.warp * WARP_TOKENS
    inbox = device.address(gates.loads_inbox[buffer])
    for k in T.unroll(WARP_TOKENS):
        if i * tile + row0 + k < at.count:
            device.load_bulk4(
                memory.streams_shared[buffer * tile + row0 + k, 0], size * 2,
                residual[at.first + i * tile + row0 + k, 0, at.rank * size], at.hidden * 2,
                size * 2, inbox,
            )  # fmt: skip


@T.macro
def load_first_tiles(residual, memory, gates, at):
    """The second tile and some more, each when the one before has come."""
    for i in T.unroll(early_tiles(at.hidden) - 1):
        if (i + 1) * tile_tokens(at.hidden) < at.count:
            device.inbox_wait(gates.loads_inbox[i], 0)
            load_tokens(i + 1, i + 1, residual, memory, gates, at)


@T.macro
def load_again(i, residual, memory, gates, at):
    """Another tile in the place of tile ``i``, once all of the warp have read tile ``i``."""
    bufs = buffers(at.hidden)
    T.sync_warp()
    if i + bufs < at.tiles:
        if at.warp == 0:
            device.inbox_wait(gates.loads_inbox[i % bufs], i // bufs % 2)
            if at.lane == 0:
                device.inbox_again(
                    gates.loads_inbox[i % bufs], load_bytes(i + bufs, at.hidden, at.count)
                )
        device.bulk_fence()
        load_tokens(i + bufs, i % bufs, residual, memory, gates, at)


@T.macro
def run_projection_warps(given, memory, gates, at):
    """The role of a projection warp."""
    terms_local = T.alloc_local((len(register_octets(at.hidden)) * BLOCK_TERMS,), "uint32")
    terms_shared = T.alloc_shared((slots(at.hidden), BLOCK_TERMS // 4, WARP, 4), "uint32")
    fragments_shared = T.alloc_shared(
        (PROJECTION_WARPS, most_fragments(at.hidden), WARP, 4), "uint32"
    )
    terms = Fn(terms_local, terms_shared, fragments_shared)
    bufs = buffers(at.hidden)
    T.set_max_nreg(PROJECTION_REGISTERS, 1)
    if given.early == 0:
        T.pdl_sync()
    T.pdl_trigger()
    split_fn(given.mixing.fn, terms, at)
    T.cluster_wait()
    T.pdl_sync()
    for i in T.serial(at.tiles):
        # The streams have to be there, and the place of the sums to be free.
        device.inbox_wait(gates.loads_inbox[i % bufs], i // bufs % 2)
        if i >= 2:
            device.gate_wait(gates.added[i % 2], (i // 2 - 1) % 2)
        project_tile(i, terms, memory, at)
        device.gate_pass(gates.projected[i % 2])
    device.gate_wait(gates.mixed[0], 0)
    steps.finish_mixes(at.count, PROJECTION_THREADS, given.mixing, at)


@T.macro
def send_tile(i, memory, gates, at):
    """The sums of a token warp's tokens of tile ``i`` to their owners, 4 of a token a lane."""
    sent = at.warp * WARP_TOKENS + at.lane // 8
    device.gate_wait(gates.projected[i % 2], i // 2 % 2)
    if (
        at.lane // 8 < WARP_TOKENS
        and at.lane % 8 < SUMS_PITCH // 4
        and i * tile_tokens(at.hidden) + sent < at.count
    ):
        steps.send_sums(i, sent, memory, at)
    device.gate_pass(gates.added[i % 2])


@T.macro
def make_weights_in_turn(i, mixing, logit_local, memory, gates, at):
    """The collapse weights of a token of tile ``i`` that this CTA owns, by the warps in turn."""
    tile = tile_tokens(at.hidden)
    own = steps.owned_token(i, at.rank, at.hidden)
    if (
        i % (tile // WARP_TOKENS) == at.warp
        and own >= 0
        and own < tile
        and i * tile + own < at.count
    ):
        steps.make_weights(i, own, mixing, logit_local, memory, at)
        steps.leave_logits(at.first + i * tile + own, logit_local, mixing, at.lane)
    if i == at.tiles - 1:
        device.gate_pass(gates.mixed[0])


@T.macro
def loop_of_token_warps(residual, given, memory, gates, at):
    """Send a tile's sums, normalise the tile before the last, collapse the last, and load."""
    tile = tile_tokens(at.hidden)
    bufs = buffers(at.hidden)
    row0 = at.warp * WARP_TOKENS
    value_local = T.alloc_local((WARP_TOKENS * steps.repetitions(at.hidden) * VECTOR,), "bfloat16")
    collapsed = steps.Collapsed(value_local, WARP_TOKENS)
    logit_local = T.alloc_local((1,), "float32")
    for i in T.serial(at.tiles + 2):
        if i == at.tiles - 1:
            # A warp that has no tokens in the last tile sends nothing for which others would wait:
            # the weights of that tile could come before such a warp has seen those of the tile
            # before in the same inbox, and the warp would wait for ever.
            T.sync_threads(TOKEN_BARRIER, token_threads(at.hidden))
        if i < at.tiles:
            send_tile(i, memory, gates, at)
        if i == 0:
            for q in T.unroll(bufs - early_tiles(at.hidden)):
                late = early_tiles(at.hidden) + q
                load_tokens(late, late, residual, memory, gates, at)
        if given.output.norm and i >= 2 and (i - 2) * tile + row0 < at.count:
            steps.normalise_tile(i - 2, given.output, collapsed, memory, at)
        if i < at.tiles:
            make_weights_in_turn(i, given.mixing, logit_local, memory, gates, at)
        if i >= 1 and (i - 1) * tile + row0 < at.count:
            steps.collapse_tile(i - 1, (i - 1) % bufs, given.output, collapsed, memory, at)
            load_again(i - 1, residual, memory, gates, at)


@T.macro
def run_token_warps(residual, given, memory, gates, at):
    """The role of a token warp."""
    T.set_max_nreg(token_registers(at.hidden), 0)
    if given.early == 0:
        T.pdl_sync()
    T.pdl_trigger()
    T.cluster_wait()
    T.pdl_sync()
    load_tokens(0, 0, residual, memory, gates, at)
    steps.load_constants(given.mixing, given.output, memory, at)
    load_first_tiles(residual, memory, gates, at)
    # Past the barrier no warp waits here any more, so no place is loaded again meanwhile.
    T.sync_threads(TOKEN_BARRIER, token_threads(at.hidden))
    loop_of_token_warps(residual, given, memory, gates, at)


@T.macro
def run_roles(residual, given, hidden, i_c, first, count, tiles, warp):
    """One CTA of a cluster with ``count`` tokens from ``first`` on."""
    T.import_source(device.SOURCE)
    size = slice_size(hidden)
    rank = i_c % CLUSTER
    tx = T.get_thread_binding()
    lane = tx % WARP
    memory = steps.Memory(*steps.memory_of_cta(hidden, buffers(hidden), SQUARES_SETS))
    gates = Gates(*gates_of_cta(hidden))
    at = Context(hidden, tx, lane, warp, rank, first, count, tiles)
    if tx == 0:
        open_inboxes(memory, gates, at)
    # The arrival is relaxed: what the barrier must order are the inboxes, and opening one has a
    # fence of its own (NOTES.md, "What pre in one pass reached at first").
    device.cluster_arrive_relaxed()
    if tx < MIXES * HC_MULT and i_c < CLUSTER:
        device.prefetch_l2_bulk(
            given.mixing.fn[tx // HC_MULT, tx % HC_MULT * hidden + rank * size], size * 4
        )
    if warp < PROJECTION_WARPS:
        run_projection_warps(given, memory, gates, at)
    else:
        run_token_warps(residual, given, memory, gates, at._replace(warp=warp - PROJECTION_WARPS))


def pre(hidden: int, *, norm: bool, pdl: bool):
    """Build the pre kernel.

    Args:
        hidden: H, a multiple of 256 up to 7168.
        norm: whether the RMSNorm follows; without it norm_weight and norm_eps are not read.
        pdl: must be true: clusters and programmatic dependent launch come together (sm_90).

    Returns:
        The TileLang program. ``group_tokens`` are the tokens of a cluster, up to a tile or whole
        tiles; the first ``larger_groups`` clusters have a tile more; ``early`` says whether fn may
        be read before the previous kernel has finished.
    """
    tokens = T.dynamic("tokens", "int32")

    @T.prim_func
    def mhc_pre(
        residual: T.Tensor((tokens, HC_MULT, hidden), "bfloat16"),
        fn: T.Tensor((MIXES, HC_MULT * hidden), "float32"),
        hc_scale: T.Tensor((3,), "float32"),
        hc_base: T.Tensor((MIXES,), "float32"),
        norm_weight: T.Tensor((hidden,), "bfloat16"),
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
            threads=threads(hidden),
            cluster_dims=(CLUSTER, 1, 1),
        ) as i_c:
            given = Arguments(
                Mixing(
                    fn, hc_scale, hc_base, rms_eps, hc_pre_eps, hc_sinkhorn_eps,
                    hc_post_mult_value, sinkhorn_repeat, post_mix, comb_mix,
                ),
                Collapse(layer_input, norm, norm_weight, norm_eps),
                early,
            )  # fmt: skip
            first, count, tiles, warp = steps.tiles_of_cluster(
                i_c // CLUSTER, tokens, group_tokens, larger_groups, hidden
            )
            run_roles(residual, given, hidden, i_c, first, count, tiles, warp)

    return mhc_pre

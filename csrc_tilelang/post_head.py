"""post_head: the last post step, the head and the final RMSNorm in one launch.

Algorithm: the new streams live in shared memory alone, unless they are asked for as well: x and the
old streams are read once, the hidden state is written once, 12 bytes of traffic per hidden element
and token where post and head move 36. A cluster of 16 CTAs takes a group of tokens, each CTA a
sixteenth of the hidden size in all 4 streams, each of its warps 32 columns. A lane sends for its
columns of x, streams and fn by itself, 16 bytes at a time, in groups of loads that are waited for
in turn, and splits what it brought of fn in three bf16 terms, which stay in registers. A tile is 8
tokens. The cluster

1. computes the new streams of a tile in place, as ``post`` does;
2. projects them with mma.m16n8k16: the 4 rows of fn in three terms are 12 of the 16 rows of A, 8
   tokens are B. The squares are summed up by the lanes;
3. sends its 5 sums a token to all CTAs, each of which works out the 4 weights itself, every warp
   for itself;
4. collapses its columns, and for the RMSNorm sends their sum of squares to all CTAs as well;
5. normalises the tile.

There are two schedules of these steps.

In a round, for few tokens, all tiles of a group lie in shared memory at once, and what is sent of a
tile has an inbox of its own: 1, 2 and 3 are done for one tile after the other, then 4, then 5. So
what CTAs tell each other of a tile travels while they work on the others.

In a loop, for many tokens, turn i is 1, 2 and 3 of tile i, then 5 of tile i - 3, then 4 of tile
i - 1, whose squares are sent in turn i + 1, and then tile i + 2 is sent for. So loads have a turn
and more to come, and what CTAs tell each other has the work on another tile to travel, with one
barrier of the CTA a turn. There are 4 sets of inboxes, opened again for the tile after the next 3
by a thread that has waited, and nothing else has to say that a slot is free. A CTA sends the sums
of tile i in turn i, when all its warps have passed the barrier of that turn and so have the sums of
tile i - 2. Each other CTA sent those behind its own barrier of turn i - 2, before which all its
warps had collapsed tile i - 4, read its sums and opened the inbox again. Likewise the squares of
tile i, sent in turn i + 2 when the sums of tile i are there: each other CTA sent those behind its
barrier of turn i, before which its warps had normalised tile i - 4. With 3 sets, a CTA could still
be reading.

A CTA waits only for CTAs of its own cluster, which start together or not at all, and ends only
when all that is sent to it has come, so nobody sends to one that has gone.

Slices, blocks and warps are added up in a fixed order that depends on the hidden size alone: a
token's outputs are the same bits in any batch and at any position.
"""

import tilelang.language as T

from ..geometry import POST_HEAD_GROUP_TOKENS, post_head_ctas_per_sm
from .arguments import Collapse, Mixing, Post, named
from .device import SOURCE, inbox_again, inbox_wait, load_async16, loads_commit, loads_wait
from .layout import CLUSTER, HC_MULT, VECTOR, WARP
from .steps.columns import TILE, column_warps, columns_of, prefetch_rows
from .steps.head_tile import (
    Tiles,
    collapse_tile,
    load_constants,
    load_rows,
    load_tile,
    mix_tile,
    norm_bytes,
    normalise_tile,
    open_inboxes,
    send_norm,
    send_sums,
    slots_for,
    split_rows,
    sums_bytes,
    tile_sums,
    weights_of_lane,
)

ROUND_TILES = POST_HEAD_GROUP_TOKENS // TILE  # at most

# The loop.
BUFFERS = 3  # of streams: a tile in work, the one before, to be collapsed, and one on its way
X_BUFFERS = BUFFERS + 2  # The two tiles before those are normalised later, from the place of x.
SETS = 4  # of what other CTAs send
TAIL = 3  # A tile is normalised so many turns after its projection, or collapsed one turn after.


def threads(hidden: int) -> int:
    """Return the threads of a CTA."""
    return column_warps(hidden) * WARP


def tiles_of_round(hidden: int) -> Tiles:
    """Make room for the tiles of a group, all at once."""
    n = threads(hidden)
    fn_shared = T.alloc_shared((1, HC_MULT, n, VECTOR), "bfloat16")
    return named(
        Tiles(
            False,
            fn_shared,
            T.alloc_shared((ROUND_TILES, n, VECTOR), "bfloat16"),
            T.alloc_shared((ROUND_TILES, HC_MULT, n, VECTOR), "bfloat16"),
            T.alloc_shared((ROUND_TILES, TILE, HC_MULT + 1, HC_MULT), "float32"),
            # They come when every lane has split its weights, which no other lane reads.
            T.view(fn_shared, (HC_MULT * n * VECTOR // 2,), "float32"),
            T.alloc_shared((ROUND_TILES, column_warps(hidden), TILE), "float32"),
        )
    )


def tiles_of_loop(hidden: int) -> Tiles:
    """Make room for the tiles that the turns of the loop work on."""
    n = threads(hidden)
    streams_shared = T.alloc_shared((BUFFERS, HC_MULT, n, VECTOR), "bfloat16")
    return named(
        Tiles(
            True,
            streams_shared,  # No tile needs the last buffer before fn is split.
            T.alloc_shared((X_BUFFERS, n, VECTOR), "bfloat16"),
            streams_shared,
            T.alloc_shared((BUFFERS + 1, TILE, HC_MULT + 1, HC_MULT), "float32"),
            T.alloc_shared((2 * tile_sums(hidden),), "float32"),
            T.alloc_shared((2, column_warps(hidden), TILE), "float32"),
        )
    )


@T.macro
def begin(tiles, columns, slots, fn, norm, i_c):
    """Inboxes, opened for the first tiles, and the wait for the previous kernel."""
    # They are open before anyone can send: the cluster barrier lies between.
    open_inboxes(tiles, columns, slots, norm)
    T.cluster_arrive()
    # fn is a weight: on its way to L2 while the previous kernel still runs.
    if i_c < CLUSTER:
        prefetch_rows(fn, columns, threads(columns.hidden))
    T.pdl_sync()
    T.pdl_trigger()


@T.macro
def load_all_mixes(post, columns, tiles):
    """Post weights and combs of all tokens on their way: a row of 16 bytes a thread."""
    n = threads(columns.hidden)
    for i in T.unroll(-(-POST_HEAD_GROUP_TOKENS * (HC_MULT + 1) // n)):
        vector = i * n + columns.tx
        if vector < columns.count:
            load_async16(
                tiles.mixes_shared[vector // TILE, vector % TILE, 0, 0],
                post.post_layer_mix[columns.first + vector, 0],
            )
        elif vector < columns.count * (HC_MULT + 1):
            token = (vector - columns.count) // HC_MULT
            load_async16(
                tiles.mixes_shared[
                    token // TILE, token % TILE, 1 + (vector - columns.count) % HC_MULT, 0
                ],
                post.comb_res_mix[columns.first + token, (vector - columns.count) % HC_MULT, 0],
            )


@T.macro
def run_round(post, mixing, output, i_c, hidden, first, count, n_tiles):
    """One CTA and all tiles of its cluster at once."""
    columns = columns_of(hidden, i_c, first, count)
    tiles = tiles_of_round(hidden)
    slots = slots_for(ROUND_TILES)
    weights = weights_of_lane()
    begin(n_tiles, columns, slots, mixing.fn, output.norm, i_c)

    # All is on its way at once, in groups of loads: fn, the mixes, then one for each tile.
    load_rows(mixing.fn, columns, tiles)
    loads_commit()
    load_all_mixes(post, columns, tiles)
    loads_commit()
    # Lanes without a token load nothing (NOTES.md, "Lanes of absent tokens load nothing"). What
    # lies in their place reaches no other token: but for squares that nobody reads, it is not sent.
    for i in T.unroll(ROUND_TILES):
        token = i * TILE + columns.row
        load_tile(i, token, token < count, post, columns, tiles)
        loads_commit()
    load_constants(mixing, output, columns, weights)
    loads_wait(but=ROUND_TILES + 1)
    split_rows(columns, tiles, weights)
    loads_wait(but=ROUND_TILES)
    T.sync_threads()
    T.cluster_wait()

    # The warps' sums of tile i take the place of those of tile i - 2, which were read before the
    # barrier of tile i - 1.
    for i in T.serial(n_tiles):
        # An empty group more leaves one of the others less to be excepted.
        loads_commit()
        loads_wait(but=ROUND_TILES)
        mix_tile(i, post, columns, tiles, weights)
        T.sync_threads()
        send_sums(i, columns, tiles, slots)

    for i in T.serial(n_tiles):
        inbox_wait(slots.sums_inbox[i])
        collapse_tile(i, columns, tiles, slots, weights, mixing, output)
        if output.norm:
            T.sync_threads()
            if columns.warp == i % column_warps(hidden):
                send_norm(i, columns, tiles, slots)

    if output.norm:
        for i in T.serial(n_tiles):
            inbox_wait(slots.norm_inbox[i])
            normalise_tile(i, columns, tiles, slots, weights, output)


@T.macro
def load_mixes(i, post, columns, tiles):
    """Post weights and combs of tile ``i``, if there is one: a row of 16 bytes a thread."""
    n = threads(columns.hidden)
    place = tiles.place(tiles.mixes_shared, i)
    for k in T.unroll(-(-TILE * (HC_MULT + 1) // n)):
        vector = k * n + columns.tx
        if vector < TILE:
            if i * TILE + vector < columns.count:
                load_async16(
                    tiles.mixes_shared[place, vector, 0, 0],
                    post.post_layer_mix[columns.first_token(i) + vector, 0],
                )
        elif vector < TILE * (HC_MULT + 1):
            token = vector // HC_MULT - TILE // HC_MULT
            if i * TILE + token < columns.count:
                load_async16(
                    tiles.mixes_shared[place, token, 1 + vector % HC_MULT, 0],
                    post.comb_res_mix[columns.first_token(i) + token, vector % HC_MULT, 0],
                )


@T.macro
def load_next_tile(i, post, columns, tiles):
    """Tile ``i``, if there is one, and the mixes of the next on their way, as one group of loads.

    The group is made even if it is empty, for the count. Lanes without a token load the last one:
    with a condition of each lane, as in a round, registers are spilled (NOTES.md, "Lanes of absent
    tokens load nothing").
    """
    token = T.min(i * TILE + columns.row, columns.count - 1)
    load_tile(i, token, i * TILE < columns.count, post, columns, tiles)
    load_mixes(i + 1, post, columns, tiles)
    loads_commit()


@T.macro
def wait_in_turn(i, n_tiles, columns, inbox, size):
    """Wait for what is sent of tile ``i``, and open the inbox for a later tile."""
    inbox_wait(inbox[i % SETS], i // SETS % 2)
    if columns.tx == 0 and i + SETS < n_tiles:
        inbox_again(inbox[i % SETS], size(i + SETS, columns))


@T.macro
def run_loop(post, mixing, output, i_c, hidden, first, count, n_tiles):
    """One CTA and the tiles of its cluster in turn."""
    warps = column_warps(hidden)
    # This warp adds up the squares: one that has no sums, where there is one.
    norm_warp = TILE + 1 if warps > TILE + 1 else 0
    columns = columns_of(hidden, i_c, first, count)
    tiles = tiles_of_loop(hidden)
    slots = slots_for(SETS)
    weights = weights_of_lane()
    begin(T.min(n_tiles, SETS), columns, slots, mixing.fn, output.norm, i_c)

    # All is on its way at once, in groups of loads: fn, the first tile's mixes, then one for each
    # tile, with the mixes of the next.
    load_rows(mixing.fn, columns, tiles)
    loads_commit()
    load_mixes(0, post, columns, tiles)
    loads_commit()
    for i in T.unroll(BUFFERS - 1):
        load_next_tile(i, post, columns, tiles)
    load_constants(mixing, output, columns, weights)
    loads_wait(but=BUFFERS)
    split_rows(columns, tiles, weights)
    loads_wait(but=BUFFERS - 1)
    T.sync_threads()
    T.cluster_wait()

    for i in T.serial(n_tiles + (TAIL if output.norm else 1)):
        if i < n_tiles:
            loads_wait(but=BUFFERS - 2)
            mix_tile(i, post, columns, tiles, weights)
        if i < n_tiles + (2 if output.norm else 0):
            T.sync_threads()

        if i < n_tiles:
            send_sums(i, columns, tiles, slots)
        if output.norm and i >= 2 and i < n_tiles + 2 and columns.warp == norm_warp:
            send_norm(i - 2, columns, tiles, slots)

        if output.norm and i >= TAIL:
            wait_in_turn(i - TAIL, n_tiles, columns, slots.norm_inbox, norm_bytes)
            normalise_tile(i - TAIL, columns, tiles, slots, weights, output)
        if i >= 1 and i <= n_tiles:
            wait_in_turn(i - 1, n_tiles, columns, slots.sums_inbox, sums_bytes)
            collapse_tile(i - 1, columns, tiles, slots, weights, mixing, output)
        load_next_tile(i + BUFFERS - 1, post, columns, tiles)  # in the places of those just done


def post_head(hidden: int, *, norm: bool, streams: bool, loop: bool, pdl: bool):
    """Build the post_head kernel.

    Args:
        hidden: H, a multiple of 256 up to 7168.
        norm: whether the RMSNorm follows; without it norm_weight and norm_eps are not read.
        streams: whether the new streams are written as well; without it nothing is done with
            residual_out.
        loop: whether a cluster takes its tiles in turn, instead of all at once, which at most
            ``geometry.POST_HEAD_GROUP_TOKENS`` tokens allow.
        pdl: must be true: clusters and programmatic dependent launch come together (sm_90).

    Returns:
        The TileLang program. Each of ``clusters`` clusters takes as many units of ``unit`` tokens
        as another, or one more.
    """
    tokens = T.dynamic("tokens", "int32")
    ctas_per_sm = post_head_ctas_per_sm(hidden, loop)
    run = run_loop if loop else run_round

    @T.prim_func
    def mhc_post_head(
        x: T.Tensor((tokens, hidden), "bfloat16"),
        residual: T.Tensor((tokens, HC_MULT, hidden), "bfloat16"),
        post_layer_mix: T.Tensor((tokens, HC_MULT), "float32"),
        comb_res_mix: T.Tensor((tokens, HC_MULT, HC_MULT), "float32"),
        fn: T.Tensor((HC_MULT, HC_MULT * hidden), "float32"),
        hc_scale: T.Tensor((1,), "float32"),
        hc_base: T.Tensor((HC_MULT,), "float32"),
        norm_weight: T.Tensor((hidden,), "bfloat16"),
        residual_out: T.Tensor((tokens, HC_MULT, hidden), "bfloat16"),
        out: T.Tensor((tokens, hidden), "bfloat16"),
        rms_eps: T.float32,
        hc_eps: T.float32,
        norm_eps: T.float32,
        clusters: T.int32,
        unit: T.int32,
    ):
        with T.Kernel(
            clusters * CLUSTER, threads=threads(hidden), cluster_dims=(CLUSTER, 1, 1)
        ) as i_c:
            T.import_source(SOURCE)
            T.annotate_min_blocks_per_sm(ctas_per_sm)
            cluster = i_c // CLUSTER
            # the first clusters have a unit more: they start first, and on SMs of their own
            units = T.alloc_var("int32", init=T.truncdiv(tokens + unit - 1, unit))
            share = T.alloc_var("int32", init=T.truncdiv(units, clusters))
            more = T.alloc_var("int32", init=units - share * clusters)
            first = T.alloc_var("int32", init=(cluster * share + T.min(cluster, more)) * unit)
            most = (share + T.if_then_else(cluster < more, 1, 0)) * unit
            count = T.alloc_var("int32", init=T.min(most, tokens - first))
            n_tiles = T.alloc_var("int32", init=T.ceildiv(count, TILE))
            post = Post(
                x, residual, post_layer_mix, comb_res_mix, residual_out if streams else None
            )
            mixing = Mixing(fn, hc_scale, hc_base, rms_eps, hc_eps)
            output = Collapse(out, norm, norm_weight, norm_eps)
            run(post, mixing, output, i_c, hidden, first, count, n_tiles)

    return mhc_post_head

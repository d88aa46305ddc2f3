"""post_head_persistent: the last post step, the head and the final RMSNorm, for many tokens.

Algorithm: the new streams live in shared memory alone, unless they are asked for as well: x and the
old streams are read once, the hidden state is written once, 12 bytes of traffic per hidden element
and token where post and head move 36. A cluster of 16 CTAs takes a group of tokens, each CTA a
sixteenth of the hidden size in all 4 streams, each of its warps 32 columns. fn is loaded once, and
each lane splits what it brought in three bf16 terms, which stay in registers. Then the cluster
loops over tiles of 8 tokens. In turn i it

1. computes the new streams of tile i in place, as ``post`` does;
2. projects them with mma.m16n8k16: the 4 rows of fn in three terms are 12 of the 16 rows of A, 8
   tokens are B. The squares are summed up by the lanes;
3. sends its 5 sums a token to all CTAs, and for the RMSNorm the sums of squares of tile i - 2;
4. normalises tile i - 3;
5. works out the 4 weights of each token of tile i - 1, every warp for itself, and collapses its
   columns;
6. sends for tile i + 2: x and streams go to shared memory, 16 bytes a lane, where nobody but the
   lane reads them.

So loads have a turn and more to come, and what CTAs tell each other has the work on another tile
to travel, with one barrier of the CTA a turn.

What CTAs tell each other goes through inboxes of 4 sets, tile by tile, opened again for the tile
after the next 3 by a thread that has waited. Nothing else has to say that a slot is free. A CTA
sends the sums of tile i in turn i, when all its warps have passed the barrier of that turn and so
have the sums of tile i - 2. Each other CTA sent those behind its own barrier of turn i - 2, before
which all its warps had collapsed tile i - 4, read its sums and opened the inbox again. Likewise the
squares of tile i, sent in turn i + 2 when the sums of tile i are there: each other CTA sent those
behind its barrier of turn i, before which its warps had normalised tile i - 4. With 3 sets, a CTA
could still be reading. All waits are for CTAs of the same cluster, which start together or not at
all. A CTA ends only when all that was sent to it has come, so nobody sends to one that has gone.

Slices, blocks and warps are added up in a fixed order that depends on the hidden size alone: a
token's outputs are the same bits in any batch and at any position.
"""

import tilelang.language as T

from ..geometry import CLUSTER, post_head_persistent_ctas_per_sm
from ._device import HC_MULT, MMA_COLUMNS, VECTOR, WARP
from ._group import COLUMNS, SUMS_IN_PITCH, column_warps, prefetch_rows, slice_size
from ._post_head import (
    STREAM_TERMS,
    collapse_tile,
    load_rows,
    load_tile,
    loads_wait_but,
    mix_tile,
    norm_bytes,
    normalise_tile,
    open_inboxes,
    post_head_program,
    send_norm,
    send_sums,
    split_rows,
    sums_bytes,
    tile_sums,
    tile_tokens,
)

BUFFERS = 3  # of streams: a tile in work, the one before, to be collapsed, and one on its way
X_BUFFERS = BUFFERS + 2  # the two before that are normalised later, from the place of x
SETS = 4  # of what other CTAs send
TAIL = 3  # a tile is normalised so many turns after its projection, or collapsed one turn after it
# groups of loads: fn, the first tile's mixes, then one for each tile, with the mixes of the next
FN_LOADED = loads_wait_but(BUFFERS)
MIXES_LOADED = loads_wait_but(BUFFERS - 1)
TILE_LOADED = loads_wait_but(BUFFERS - 2)


@T.macro
def load_mixes(post_layer_mix, comb_res_mix, first, count, i, tx, threads, mixes_shared):
    """Post weights and combs of tile ``i``, if there is one: a row of 16 bytes a thread."""
    place = i % (BUFFERS + 1) * MMA_COLUMNS
    for k in T.unroll(-(-MMA_COLUMNS * (HC_MULT + 1) // threads)):
        vector = k * threads + tx
        if vector < MMA_COLUMNS:
            if i * MMA_COLUMNS + vector < count:
                T.call_extern(
                    "handle",
                    "mhc::load_async16",
                    T.access_ptr(mixes_shared[place + vector, 0, 0], "w"),
                    T.access_ptr(post_layer_mix[first + i * MMA_COLUMNS + vector, 0], "r"),
                )
        elif vector < MMA_COLUMNS * (HC_MULT + 1):
            token = vector // HC_MULT - MMA_COLUMNS // HC_MULT
            if i * MMA_COLUMNS + token < count:
                T.call_extern(
                    "handle",
                    "mhc::load_async16",
                    T.access_ptr(mixes_shared[place + token, 1 + vector % HC_MULT, 0], "w"),
                    T.access_ptr(
                        comb_res_mix[first + i * MMA_COLUMNS + token, vector % HC_MULT, 0], "r"
                    ),
                )


@T.macro
def run_tiles(
    x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, gain, residual_out, out,
    rms_eps, hc_eps, norm_eps, first, count, tiles, i_c, hidden, norm, streams,
):  # fmt: skip
    """One CTA of a cluster with ``count`` tokens from ``first`` on."""
    size = slice_size(hidden)
    warps = column_warps(hidden)
    threads = warps * WARP
    rank = T.cast(i_c % CLUSTER, "int32")
    tx = T.get_thread_binding()
    lane = tx % WARP
    warp = tx // WARP
    row = lane // 4
    h = warp * COLUMNS + lane % 4 * VECTOR
    column = rank * size + h
    inside = True if size % COLUMNS == 0 else h < size
    # that adds up the squares of v: one that has no sums, where there is
    norm_warp = MMA_COLUMNS + 1 if warps > MMA_COLUMNS + 1 else 0
    sums = tile_sums(hidden)

    x_shared = T.alloc_shared((X_BUFFERS, threads, VECTOR), "bfloat16")
    streams_shared = T.alloc_shared((BUFFERS, HC_MULT, threads, VECTOR), "bfloat16")
    mixes_shared = T.alloc_shared(((BUFFERS + 1) * MMA_COLUMNS, HC_MULT + 1, HC_MULT), "float32")
    sums_shared = T.alloc_shared((2 * sums,), "float32")
    norm_shared = T.alloc_shared((2, warps, MMA_COLUMNS), "float32")
    sums_in_shared = T.alloc_shared((SETS * MMA_COLUMNS, SUMS_IN_PITCH), "float32")
    squares_in_shared = T.alloc_shared((SETS, CLUSTER, MMA_COLUMNS), "float32")
    norm_in_shared = T.alloc_shared((SETS, CLUSTER, MMA_COLUMNS), "float32")
    sums_inbox = T.alloc_shared((SETS,), "uint64")
    norm_inbox = T.alloc_shared((SETS,), "uint64")

    terms_local = T.alloc_local((HC_MULT * STREAM_TERMS,), "uint32")
    gain_local = T.alloc_local((VECTOR,), "bfloat16")
    scale_local = T.alloc_local((1,), "float32")
    base_local = T.alloc_local((1,), "float32")

    # the inboxes are open before anyone can send: the cluster barrier lies between
    open_inboxes(T.min(tiles, SETS), count, norm, tx, sums_inbox, norm_inbox)
    T.cluster_arrive()
    # fn is a weight: on its way to L2 while the previous kernel still runs
    if i_c < CLUSTER:
        prefetch_rows(fn, HC_MULT, rank, tx, threads, hidden)
    T.pdl_sync()
    T.pdl_trigger()

    # fn, and the first tiles, on their way at once, in groups to be waited for in turn; fn where
    # the last buffer is not used yet. Lanes of absent tokens load the last one: with a lane's own
    # condition, as in post_head, 24 bytes are spilled at H = 5120 with norm and streams
    load_rows(fn, column, row, inside, tx, hidden, streams_shared, BUFFERS - 1)
    T.call_extern("handle", "mhc::loads_commit")
    load_mixes(post_layer_mix, comb_res_mix, first, count, 0, tx, threads, mixes_shared)
    T.call_extern("handle", "mhc::loads_commit")
    for i in T.unroll(BUFFERS - 1):
        load_tile(
            x, residual, first, T.min(i * MMA_COLUMNS + row, count - 1), i * MMA_COLUMNS < count,
            column, inside, tx, x_shared, i, streams_shared, i,
        )  # fmt: skip
        load_mixes(post_layer_mix, comb_res_mix, first, count, i + 1, tx, threads, mixes_shared)
        T.call_extern("handle", "mhc::loads_commit")
    if norm and inside:
        for v in T.vectorized(VECTOR):
            gain_local[v] = gain[column + v]
    scale_local[0] = hc_scale[0]
    base_local[0] = hc_base[lane % 4]
    T.call_extern("handle", FN_LOADED)
    split_rows(streams_shared, BUFFERS - 1, row, inside, tx, terms_local)
    T.call_extern("handle", MIXES_LOADED)
    T.sync_threads()
    T.cluster_wait()

    for i in T.serial(tiles + (TAIL if norm else 1)):
        if i < tiles:
            T.call_extern("handle", TILE_LOADED)
            mix_tile(
                x_shared, i % X_BUFFERS, streams_shared, i % BUFFERS, mixes_shared,
                i % (BUFFERS + 1) * MMA_COLUMNS, terms_local, tile_tokens(i, count),
                first + i * MMA_COLUMNS, row, lane, warp, column, inside, tx, streams, residual_out,
                sums_shared, i % 2 * sums,
            )  # fmt: skip
        if i < tiles + (2 if norm else 0):
            T.sync_threads()

        if i < tiles:
            send_sums(
                sums_shared, i % 2 * sums, tile_tokens(i, count), rank, lane, warp, warps,
                sums_in_shared, squares_in_shared, sums_inbox, i % SETS,
            )  # fmt: skip
        if norm and i >= 2 and i < tiles + 2 and warp == norm_warp:
            send_norm(
                norm_shared, i % 2, tile_tokens(i - 2, count), rank, lane, warps, norm_in_shared,
                norm_inbox, (i - 2) % SETS,
            )  # fmt: skip

        if norm and i >= TAIL:
            T.call_extern(
                "handle",
                "mhc::inbox_wait",
                T.access_ptr(norm_inbox[(i - TAIL) % SETS], "r"),
                (i - TAIL) // SETS % 2,
            )
            if tx == 0 and i - TAIL + SETS < tiles:
                T.call_extern(
                    "handle",
                    "mhc::inbox_again",
                    T.access_ptr(norm_inbox[(i - TAIL) % SETS], "w"),
                    norm_bytes(i - TAIL + SETS, count),
                )
            normalise_tile(
                x_shared, (i - TAIL) % X_BUFFERS, norm_in_shared, (i - TAIL) % SETS, gain_local,
                norm_eps, tile_tokens(i - TAIL, count), first + (i - TAIL) * MMA_COLUMNS, row, lane,
                column, inside, tx, hidden, out,
            )  # fmt: skip

        if i >= 1 and i <= tiles:
            T.call_extern(
                "handle",
                "mhc::inbox_wait",
                T.access_ptr(sums_inbox[(i - 1) % SETS], "r"),
                (i - 1) // SETS % 2,
            )
            if tx == 0 and i - 1 + SETS < tiles:
                T.call_extern(
                    "handle",
                    "mhc::inbox_again",
                    T.access_ptr(sums_inbox[(i - 1) % SETS], "w"),
                    sums_bytes(i - 1 + SETS, count),
                )
            collapse_tile(
                streams_shared, (i - 1) % BUFFERS, x_shared, (i - 1) % X_BUFFERS, sums_in_shared,
                squares_in_shared, (i - 1) % SETS, scale_local, base_local, rms_eps, hc_eps,
                tile_tokens(i - 1, count), first + (i - 1) * MMA_COLUMNS, row, lane, warp, column,
                inside, tx, hidden, norm, out, norm_shared, (i - 1) % 2,
            )  # fmt: skip

        # in the places of the tiles just done; a group of loads even if it is empty, for the count
        load_tile(
            x, residual, first, T.min((i + BUFFERS - 1) * MMA_COLUMNS + row, count - 1),
            (i + BUFFERS - 1) * MMA_COLUMNS < count, column, inside, tx, x_shared,
            (i + BUFFERS - 1) % X_BUFFERS, streams_shared, (i + BUFFERS - 1) % BUFFERS,
        )  # fmt: skip
        load_mixes(
            post_layer_mix, comb_res_mix, first, count, i + BUFFERS, tx, threads, mixes_shared
        )
        T.call_extern("handle", "mhc::loads_commit")


def post_head_persistent(hidden: int, *, norm: bool, streams: bool, pdl: bool):
    """Build the post_head_persistent kernel.

    Args:
        hidden: H, a multiple of 256 up to 7168.
        norm: whether the RMSNorm follows; adds the arguments norm_weight and norm_eps.
        streams: whether the new streams are written as well.
        pdl: must be true: clusters and programmatic dependent launch come together (sm_90).

    Returns:
        The TileLang program of :func:`_post_head.post_head_program`.
    """
    return post_head_program(
        "mhc_post_head_persistent", run_tiles, hidden,
        ctas_per_sm=post_head_persistent_ctas_per_sm(hidden), norm=norm, streams=streams,
    )  # fmt: skip

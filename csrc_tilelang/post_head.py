"""post_head: the last post step, the head and the final RMSNorm in one launch, for few tokens.

Algorithm: the new streams live in shared memory alone, unless they are asked for as well: x and the
old streams are read once, the hidden state is written once, 12 bytes of traffic per hidden element
and token where post and head move 36. A cluster of 16 CTAs takes a group of up to 32 tokens, each
CTA a sixteenth of the hidden size in all 4 streams, each of its warps 32 columns. The cluster

1. sends fn, the mixes, x and the streams to shared memory, 16 bytes a lane, in groups of loads that
   are waited for in turn: fn, of which each lane splits what it brought in three bf16 terms, the
   mixes, then 8 tokens at a time, a tile, which nobody but the lane reads;
2. computes the new streams of a tile in place, as ``post`` does, while the next are on their way;
3. projects them with mma.m16n8k16: the 4 rows of fn in three terms are 12 of the 16 rows of A, 8
   tokens are B. The squares are summed up by the lanes;
4. sends its 5 sums a token to all CTAs, each of which works out the 4 weights itself;
5. collapses its columns, and for the RMSNorm sends their sum of squares to all CTAs as well.

What is sent of a tile has an inbox of its own, so it travels while other tiles are worked on. All
of a group lies in shared memory at once: for more tokens there is ``post_head_persistent``.

A CTA waits only for CTAs of its own cluster, which start together or not at all, and ends only
when all its inboxes are full, so nobody sends to one that has gone.

Slices, blocks and warps are added up in a fixed order that depends on the hidden size alone: a
token's outputs are the same bits in any batch and at any position.
"""

import tilelang.language as T

from ..geometry import CLUSTER, POST_HEAD_GROUP_TOKENS, post_head_ctas_per_sm
from ._device import HC_MULT, MMA_COLUMNS, VECTOR, WARP
from ._group import COLUMNS, SUMS_IN_PITCH, column_warps, prefetch_rows, slice_size
from ._post_head import (
    STREAM_TERMS,
    collapse_tile,
    load_rows,
    load_tile,
    loads_wait_but,
    mix_tile,
    normalise_tile,
    open_inboxes,
    post_head_program,
    send_norm,
    send_sums,
    split_rows,
    tile_sums,
    tile_tokens,
)

TILES = POST_HEAD_GROUP_TOKENS // MMA_COLUMNS  # at most


@T.macro
def finish_round(
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
    sums = tile_sums(hidden)

    x_shared = T.alloc_shared((TILES, threads, VECTOR), "bfloat16")
    streams_shared = T.alloc_shared((TILES, HC_MULT, threads, VECTOR), "bfloat16")
    mixes_shared = T.alloc_shared((POST_HEAD_GROUP_TOKENS, HC_MULT + 1, HC_MULT), "float32")
    # this CTA's columns of fn, which only the lane reads that loaded them, then the warps' sums
    fn_shared = T.alloc_shared((1, HC_MULT, threads, VECTOR), "bfloat16")
    sums_shared = T.view(fn_shared, (HC_MULT * threads * VECTOR // 2,), "float32")
    norm_shared = T.alloc_shared((TILES, warps, MMA_COLUMNS), "float32")
    sums_in_shared = T.alloc_shared((POST_HEAD_GROUP_TOKENS, SUMS_IN_PITCH), "float32")
    squares_in_shared = T.alloc_shared((TILES, CLUSTER, MMA_COLUMNS), "float32")
    norm_in_shared = T.alloc_shared((TILES, CLUSTER, MMA_COLUMNS), "float32")
    sums_inbox = T.alloc_shared((TILES,), "uint64")
    norm_inbox = T.alloc_shared((TILES,), "uint64")

    terms_local = T.alloc_local((HC_MULT * STREAM_TERMS,), "uint32")
    gain_local = T.alloc_local((VECTOR,), "bfloat16")
    scale_local = T.alloc_local((1,), "float32")
    base_local = T.alloc_local((1,), "float32")

    # the inboxes, one a tile, are open before anyone can send: the cluster barrier lies between
    open_inboxes(tiles, count, norm, tx, sums_inbox, norm_inbox)
    T.cluster_arrive()
    # fn is a weight: on its way to L2 while the previous kernel still runs
    if i_c < CLUSTER:
        prefetch_rows(fn, HC_MULT, rank, tx, threads, hidden)
    T.pdl_sync()
    T.pdl_trigger()

    # all on its way at once, in groups of loads: fn, the mixes, then one for each tile
    load_rows(fn, column, row, inside, tx, hidden, fn_shared, 0)
    T.call_extern("handle", "mhc::loads_commit")
    for i in T.unroll(-(-POST_HEAD_GROUP_TOKENS * (HC_MULT + 1) // threads)):
        vector = i * threads + tx
        if vector < count:
            T.call_extern(
                "handle",
                "mhc::load_async16",
                T.access_ptr(mixes_shared[vector, 0, 0], "w"),
                T.access_ptr(post_layer_mix[first + vector, 0], "r"),
            )
        elif vector < count * (HC_MULT + 1):
            T.call_extern(
                "handle",
                "mhc::load_async16",
                T.access_ptr(
                    mixes_shared[(vector - count) // HC_MULT, 1 + (vector - count) % HC_MULT, 0],
                    "w",
                ),
                T.access_ptr(
                    comb_res_mix[
                        first + (vector - count) // HC_MULT, (vector - count) % HC_MULT, 0
                    ],
                    "r",
                ),
            )
    T.call_extern("handle", "mhc::loads_commit")
    # Lanes of absent tokens load nothing, 3.1 us in place of 3.3 for one token at H = 4096. What
    # lies in their place reaches no other token: but for squares that nobody reads, it is not sent
    for i in T.unroll(TILES):
        load_tile(
            x, residual, first, i * MMA_COLUMNS + row, i * MMA_COLUMNS + row < count, column,
            inside, tx, x_shared, i, streams_shared, i,
        )  # fmt: skip
        T.call_extern("handle", "mhc::loads_commit")
    if norm and inside:
        for v in T.vectorized(VECTOR):
            gain_local[v] = gain[column + v]
    scale_local[0] = hc_scale[0]
    base_local[0] = hc_base[lane % 4]
    T.call_extern("handle", loads_wait_but(TILES + 1))
    split_rows(fn_shared, 0, row, inside, tx, terms_local)
    T.call_extern("handle", loads_wait_but(TILES))
    T.sync_threads()
    T.cluster_wait()

    # a tile at a time, while the next ones are on their way. The warps' sums of tile i take the
    # place of those of tile i - 2, which were read before the barrier of tile i - 1
    for i in T.serial(tiles):
        # an empty group more leaves one of the others less to be excepted
        T.call_extern("handle", "mhc::loads_commit")
        T.call_extern("handle", loads_wait_but(TILES))
        mix_tile(
            x_shared, i, streams_shared, i, mixes_shared, i * MMA_COLUMNS, terms_local,
            tile_tokens(i, count), first + i * MMA_COLUMNS, row, lane, warp, column, inside, tx,
            streams, residual_out, sums_shared, i % 2 * sums,
        )  # fmt: skip
        T.sync_threads()
        send_sums(
            sums_shared, i % 2 * sums, tile_tokens(i, count), rank, lane, warp, warps,
            sums_in_shared, squares_in_shared, sums_inbox, i,
        )  # fmt: skip

    for i in T.serial(tiles):
        T.call_extern("handle", "mhc::inbox_wait", T.access_ptr(sums_inbox[i], "r"))
        collapse_tile(
            streams_shared, i, x_shared, i, sums_in_shared, squares_in_shared, i, scale_local,
            base_local, rms_eps, hc_eps, tile_tokens(i, count), first + i * MMA_COLUMNS, row, lane,
            warp, column, inside, tx, hidden, norm, out, norm_shared, i,
        )  # fmt: skip
        if norm:
            T.sync_threads()
            if warp == i % warps:
                send_norm(
                    norm_shared, i, tile_tokens(i, count), rank, lane, warps, norm_in_shared,
                    norm_inbox, i,
                )  # fmt: skip

    if norm:
        for i in T.serial(tiles):
            T.call_extern("handle", "mhc::inbox_wait", T.access_ptr(norm_inbox[i], "r"))
            normalise_tile(
                x_shared, i, norm_in_shared, i, gain_local, norm_eps, tile_tokens(i, count),
                first + i * MMA_COLUMNS, row, lane, column, inside, tx, hidden, out,
            )  # fmt: skip


def post_head(hidden: int, *, norm: bool, streams: bool, pdl: bool):
    """Build the post_head kernel.

    Args:
        hidden: H, a multiple of 256 up to 7168.
        norm: whether the RMSNorm follows; adds the arguments norm_weight and norm_eps.
        streams: whether the new streams are written as well.
        pdl: must be true: clusters and programmatic dependent launch come together (sm_90).

    Returns:
        The TileLang program of :func:`_post_head.post_head_program`, for at most
        ``geometry.POST_HEAD_GROUP_TOKENS`` tokens a cluster.
    """
    return post_head_program(
        "mhc_post_head", finish_round, hidden, ctas_per_sm=post_head_ctas_per_sm(hidden), norm=norm,
        streams=streams,
    )  # fmt: skip

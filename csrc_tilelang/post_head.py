"""post_head: the last post step, the head and the final RMSNorm in one launch.

Algorithm: the new streams live in shared memory alone, unless they are asked for as well: x and the
old streams are read once, the hidden state is written once, 12 bytes of traffic per hidden element
and token where post and head move 36. A cluster of 16 CTAs takes a group of up to 24 tokens, each
CTA a sixteenth of the hidden size in all 4 streams, each of its warps 32 columns. The cluster

1. sends fn, the mixes, x and the streams to shared memory, 16 bytes a lane, in groups of loads that
   are waited for in turn: fn, of which each lane splits what it brought in three bf16 terms, the
   mixes, then 8 tokens at a time, a tile, which nobody but the lane reads;
2. computes the new streams of a tile in place, as ``post`` does, while the next are on their way;
3. projects them with mma.m16n8k16: the 4 rows of fn in three terms are 12 of the 16 rows of A, 8
   tokens are B. The squares are summed up by the lanes;
4. sends its 5 sums a token to all CTAs, each of which works out the 4 weights itself;
5. collapses its columns, and for the RMSNorm sends their sum of squares to all CTAs as well.

What is sent of a tile has an inbox of its own, so it travels while other tiles are worked on.

A CTA waits only for CTAs of its own cluster, which start together or not at all, and ends only
when all its inboxes are full, so nobody sends to one that has gone.

Slices, blocks and warps are added up in a fixed order that depends on the hidden size alone: a
token's outputs are the same bits in any batch and at any position.
"""

import tilelang.language as T

from ..dispatch import CLUSTER, POST_HEAD_GROUP_TOKENS
from ._device import (
    DEVICE_SOURCE,
    HC_MULT,
    MMA_COLUMNS,
    SPLIT_TERMS,
    VECTOR,
    WARP,
)
from ._group import (
    COLUMNS,
    SUMS_IN_PITCH,
    collapse_weight,
    column_warps,
    prefetch_rows,
    slice_size,
)
from ._operands import ALL_PAIRS, CHUNK, STEPS, add_tree
from ._steps import mix_stream, widen

TILES = POST_HEAD_GROUP_TOKENS // MMA_COLUMNS  # of 8 tokens
ROWS = HC_MULT * SPLIT_TERMS  # of A: term 0 of fn's 4 rows, term 1, term 2
HEAD_SUMS = ROWS + 1  # and the squares
HEAD_PITCH = HEAD_SUMS  # floats from token to token; padded it would be one CTA on an SM, not two
STREAM_TERMS = STEPS * 4  # packed pairs of a lane and stream: an A fragment for each step
TWO_CTAS_WARPS = 8
BATCH = 4  # tokens whose sums of squares, a float each, are one message
SUMS_INBOX = 0  # of the first tile; then those of the others
NORM_INBOX = TILES  # the same
# groups of loads: fn, the mixes, then one for each tile
FN_LOADED = f"mhc::loads_wait_but<{TILES + 1}>"
MIXES_LOADED = f"mhc::loads_wait_but<{TILES}>"
ALL_STREAMS = tuple(range(HC_MULT))

# A lane of a quad adds up every fourth slice, then the quad: the order of _group.add_slices
QUAD = min(4, CLUSTER)
QUAD_SLICES = CLUSTER // QUAD
QUAD_TREE = tuple(QUAD_SLICES >> i for i in range(1, QUAD_SLICES.bit_length()))
QUAD_LANES = tuple(QUAD >> i for i in range(1, QUAD.bit_length()))


def ctas_per_sm(hidden: int) -> int:
    """CTAs to allow on an SM by a limit on registers: of 8 warps two have 128 a thread."""
    return 2 if column_warps(hidden) <= TWO_CTAS_WARPS else 1


@T.macro
def split_rows(weights_local, row, terms_local):
    """A fragments of one stream after the other: lane row r holds rows r and r + 8 of A.

    Lane rows 0 to 3 bring the weights of step 0 of row r of fn, 4 to 7 those of step 1 of row
    r - 4. Each splits its own; the former need terms 0 and 2 of both steps, the latter term 1.
    """
    split_local = T.alloc_local((SPLIT_TERMS,), "uint32")
    other = T.alloc_local((1,), "uint32")
    last = T.alloc_local((1,), "uint32")
    for j in ALL_STREAMS:
        for pair in ALL_PAIRS:
            T.call_extern(
                "handle",
                "mhc::split3",
                weights_local[j * CHUNK + pair * 2],
                weights_local[j * CHUNK + pair * 2 + 1],
                T.access_ptr(split_local[0], "w"),
            )
            other[0] = T.shfl_xor(
                T.if_then_else(row < HC_MULT, split_local[1], split_local[0]), WARP // 2
            )
            last[0] = T.shfl_xor(split_local[2], WARP // 2)
            t0 = j * STREAM_TERMS + pair * 2
            terms_local[t0] = T.if_then_else(row < HC_MULT, split_local[0], other[0])
            terms_local[t0 + 1] = T.if_then_else(row < HC_MULT, split_local[2], T.uint32(0))
            terms_local[t0 + 4] = T.if_then_else(row < HC_MULT, other[0], split_local[1])
            terms_local[t0 + 5] = T.if_then_else(row < HC_MULT, last[0], T.uint32(0))


@T.macro
def add_squares_in(squares_in_shared, tile, row, lane, squares):
    """squares[0] = the sum over the CTAs of token ``row`` of a tile, by the 4 lanes of its quad."""
    slices_local = T.alloc_local((QUAD_SLICES,), "float32")
    for i in T.unroll(QUAD_SLICES):
        slices_local[i] = squares_in_shared[tile, lane % QUAD + i * QUAD, row]
    add_tree(slices_local, QUAD_TREE)
    squares[0] = slices_local[0]
    for half in QUAD_LANES:
        squares[0] = squares[0] + T.shfl_xor(squares[0], half)


@T.macro
def send_squares(total, first_lane, tile, rank, lane, count, slots_shared, inbox_shared, inbox):
    """Sums of squares of a tile to all CTAs; ``total`` of ``first_lane + t`` is that of token t."""
    squares_local = T.alloc_local((BATCH,), "float32")
    for i in T.unroll(BATCH):
        squares_local[i] = T.shfl_sync(
            total[0], first_lane + lane // CLUSTER * BATCH % MMA_COLUMNS + i
        )
    if lane // CLUSTER < 2 and tile * MMA_COLUMNS + lane // CLUSTER * BATCH < count:
        T.call_extern(
            "handle",
            "mhc::send4",
            T.access_ptr(slots_shared[tile, rank, lane // CLUSTER * BATCH], "w"),
            T.access_ptr(inbox_shared[inbox + tile], "w"),
            lane % CLUSTER,
            T.access_ptr(squares_local[0], "r"),
        )


@T.macro
def finish_group(
    x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, gain, residual_out, out,
    rms_eps, hc_eps, norm_eps, group_tokens, tokens, i_c, hidden, norm, streams,
):  # fmt: skip
    """One CTA; ``gain`` and ``norm_eps`` are read when ``norm`` is true."""
    T.import_source(DEVICE_SOURCE)
    T.annotate_min_blocks_per_sm(ctas_per_sm(hidden))
    size = slice_size(hidden)
    warps = column_warps(hidden)
    threads = warps * WARP
    rank = T.cast(i_c % CLUSTER, "int32")
    t0 = T.alloc_var("int64", init=T.cast(i_c // CLUSTER, "int64") * group_tokens)
    count = T.alloc_var(
        "int32", init=T.cast(T.min(T.cast(group_tokens, "int64"), tokens - t0), "int32")
    )
    tx = T.get_thread_binding()
    lane = tx % WARP
    warp = tx // WARP
    row = lane // 4
    h = warp * COLUMNS + lane % 4 * VECTOR
    column = rank * size + h
    inside = True if size % COLUMNS == 0 else h < size
    # the same warp adds up the squares of a tile wherever it lies: one that has no other sums
    squares_warp = MMA_COLUMNS if warps > MMA_COLUMNS else warps - 1

    x_shared = T.alloc_shared((TILES, threads, VECTOR), "bfloat16")
    streams_shared = T.alloc_shared((TILES, HC_MULT, threads, VECTOR), "bfloat16")
    mixes_shared = T.alloc_shared((POST_HEAD_GROUP_TOKENS, HC_MULT + 1, HC_MULT), "float32")
    # this CTA's columns of fn, which only the lane reads that loaded them, then the warps' sums
    sums = TILES * warps * MMA_COLUMNS * HEAD_PITCH
    work_shared = T.alloc_shared((max(threads * HC_MULT * CHUNK, sums),), "float32")
    norm_shared = T.alloc_shared((TILES, warps, MMA_COLUMNS), "float32")
    sums_in_shared = T.alloc_shared((POST_HEAD_GROUP_TOKENS, SUMS_IN_PITCH), "float32")
    squares_in_shared = T.alloc_shared((TILES, CLUSTER, MMA_COLUMNS), "float32")
    norm_in_shared = T.alloc_shared((TILES, CLUSTER, MMA_COLUMNS), "float32")
    inbox_shared = T.alloc_shared((2 * TILES,), "uint64")

    weights_local = T.alloc_local((HC_MULT * CHUNK,), "float32")
    terms_local = T.alloc_local((HC_MULT * STREAM_TERMS,), "uint32")
    x_local = T.alloc_local((VECTOR,), "bfloat16")
    streams_local = T.alloc_local((HC_MULT * VECTOR,), "bfloat16")
    new_local = T.alloc_local((HC_MULT * VECTOR,), "bfloat16")
    words_local = T.view(new_local, (HC_MULT * VECTOR // 2,), "uint32")
    wide_local = T.alloc_local((VECTOR,), "float32")
    value_local = T.alloc_local((VECTOR,), "float32")
    post_local = T.alloc_local((HC_MULT,), "float32")
    comb_local = T.alloc_local((HC_MULT * HC_MULT,), "float32")
    part = T.alloc_local((4,), "float32")
    sums_local = T.alloc_local((4,), "float32")
    gain_local = T.alloc_local((VECTOR,), "bfloat16")
    total = T.alloc_local((1,), "float32")
    squares = T.alloc_local((1,), "float32")
    scale_local = T.alloc_local((1,), "float32")
    base_local = T.alloc_local((1,), "float32")
    mix = T.alloc_local((1,), "float32")

    # the inboxes, one a tile, are open before anyone can send: the cluster barrier lies between. By
    # one thread: of lanes that open them side by side racecheck warns
    if tx == 0:
        for tile in T.serial(T.ceildiv(count, MMA_COLUMNS)):
            # messages of 16 bytes: one a token, and one for the squares of 4 tokens
            opened = T.min(count - tile * MMA_COLUMNS, MMA_COLUMNS)
            T.call_extern(
                "handle",
                "mhc::inbox_open",
                T.access_ptr(inbox_shared[SUMS_INBOX + tile], "w"),
                CLUSTER * 16 * (opened + T.ceildiv(opened, BATCH)),
            )
            if norm:
                T.call_extern(
                    "handle",
                    "mhc::inbox_open",
                    T.access_ptr(inbox_shared[NORM_INBOX + tile], "w"),
                    CLUSTER * 16 * T.ceildiv(opened, BATCH),
                )
    T.cluster_arrive()
    # fn is a weight: on its way to L2 while the previous kernel still runs
    if i_c < CLUSTER:
        prefetch_rows(fn, HC_MULT, rank, tx, threads, hidden)
    T.pdl_sync()
    T.pdl_trigger()

    # fn, mixes, x and streams of all tokens on their way at once, in groups to be waited for in
    # turn. fn goes through shared memory too: loaded to registers before x, the compiler waited for
    # it, to split it, before it asked for x; loaded after x, it asked for it when x had come
    for j in T.unroll(HC_MULT):
        if inside:
            T.call_extern(
                "handle",
                "mhc::load_async16",
                T.access_ptr(work_shared[(j * threads + tx) * CHUNK], "w"),
                T.access_ptr(fn[row % HC_MULT, j * hidden + column + row // HC_MULT * CHUNK], "r"),
            )
    T.call_extern("handle", "mhc::loads_commit")
    for i in T.unroll(-(-POST_HEAD_GROUP_TOKENS * (HC_MULT + 1) // threads)):
        vector = i * threads + tx
        if vector < count:
            T.call_extern(
                "handle",
                "mhc::load_async16",
                T.access_ptr(mixes_shared[vector, 0, 0], "w"),
                T.access_ptr(post_layer_mix[t0 + vector, 0], "r"),
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
                    comb_res_mix[t0 + (vector - count) // HC_MULT, (vector - count) % HC_MULT, 0],
                    "r",
                ),
            )
    T.call_extern("handle", "mhc::loads_commit")
    for tile in T.unroll(TILES):
        if tile * MMA_COLUMNS < count and inside:
            token = T.min(tile * MMA_COLUMNS + row, count - 1)
            T.call_extern(
                "handle",
                "mhc::load_async16",
                T.access_ptr(x_shared[tile, tx, 0], "w"),
                T.access_ptr(x[t0 + token, column], "r"),
            )
            for i in T.unroll(HC_MULT):
                T.call_extern(
                    "handle",
                    "mhc::load_async16",
                    T.access_ptr(streams_shared[tile, i, tx, 0], "w"),
                    T.access_ptr(residual[t0 + token, i, column], "r"),
                )
        T.call_extern("handle", "mhc::loads_commit")
    if norm and inside:
        for v in T.vectorized(VECTOR):
            gain_local[v] = gain[column + v]
    scale_local[0] = hc_scale[0]
    base_local[0] = hc_base[lane % 4]
    T.call_extern("handle", FN_LOADED)
    for j in T.unroll(HC_MULT):
        if inside:
            for v in T.vectorized(CHUNK):
                weights_local[j * CHUNK + v] = work_shared[(j * threads + tx) * CHUNK + v]
        else:
            for v in T.unroll(CHUNK):
                weights_local[j * CHUNK + v] = 0.0
    split_rows(weights_local, row, terms_local)
    T.call_extern("handle", MIXES_LOADED)
    T.sync_threads()
    T.cluster_wait()

    # a tile at a time, while the next ones are on their way
    for tile in T.serial(T.ceildiv(count, MMA_COLUMNS)):
        # an empty group more leaves one of the others less to be excepted
        T.call_extern("handle", "mhc::loads_commit")
        T.call_extern("handle", MIXES_LOADED)
        token = T.min(tile * MMA_COLUMNS + row, count - 1)
        squares[0] = 0.0
        if inside:
            # post: r'[j] = bf16(post[j] * x + sum_i comb[i, j] * r[i]), in place
            for v in T.vectorized(VECTOR):
                x_local[v] = x_shared[tile, tx, v]
            for i in T.unroll(HC_MULT):
                for v in T.vectorized(VECTOR):
                    streams_local[i * VECTOR + v] = streams_shared[tile, i, tx, v]
            for j in T.vectorized(HC_MULT):
                post_local[j] = mixes_shared[token, 0, j]
            for i in T.unroll(HC_MULT):
                for j in T.vectorized(HC_MULT):
                    comb_local[i * HC_MULT + j] = mixes_shared[token, 1 + i, j]
            for j in T.unroll(HC_MULT):
                mix_stream(
                    x_local, 0, streams_local, 0, post_local[j], comb_local, j, HC_MULT,
                    new_local, j * VECTOR, VECTOR,
                )  # fmt: skip
                for v in T.vectorized(VECTOR):
                    streams_shared[tile, j, tx, v] = new_local[j * VECTOR + v]
                widen(new_local, j * VECTOR, VECTOR, wide_local)
                for v in T.unroll(VECTOR):
                    squares[0] = squares[0] + wide_local[v] * wide_local[v]
            if streams and tile * MMA_COLUMNS + row < count:
                for j in T.unroll(HC_MULT):
                    T.call_extern(
                        "handle",
                        "mhc::store16",
                        T.access_ptr(residual_out[t0 + token, j, column], "w"),
                        T.access_ptr(words_local[j * VECTOR // 2], "r"),
                    )
        else:
            for v in T.unroll(HC_MULT * VECTOR // 2):
                words_local[v] = T.uint32(0)

        # projection of these columns; tensor cores truncate as they accumulate, so each stream and
        # each term starts from zero and is added in fp32, rounded to nearest
        for q in T.unroll(4):
            sums_local[q] = 0.0
        for j in T.unroll(HC_MULT):
            for q in T.unroll(4):
                part[q] = 0.0
            for step in T.unroll(STEPS):
                T.call_extern(
                    "handle",
                    "mhc::mma_bf16",
                    T.access_ptr(part[0], "rw"),
                    T.access_ptr(terms_local[j * STREAM_TERMS + step * 4], "r"),
                    words_local[j * CHUNK + step * 2],
                    words_local[j * CHUNK + step * 2 + 1],
                )
            for q in T.unroll(4):
                sums_local[q] = sums_local[q] + part[q]
        squares[0] = squares[0] + T.shfl_xor(squares[0], 1)
        squares[0] = squares[0] + T.shfl_xor(squares[0], 2)
        place = (tile * warps + warp) * MMA_COLUMNS  # of the warp's sums of 8 tokens
        for v in T.unroll(2):
            work_shared[(place + lane % 4 * 2 + v) * HEAD_PITCH + row] = sums_local[v]
            if row < HC_MULT:
                work_shared[(place + lane % 4 * 2 + v) * HEAD_PITCH + MMA_COLUMNS + row] = (
                    sums_local[2 + v]
                )
        if lane % 4 == 0:
            work_shared[(place + row) * HEAD_PITCH + ROWS] = squares[0]
        T.sync_threads()

        # the warps' sums of the tile added up, one warp a token and one lane a sum, then the terms;
        # in lanes 16 to 23 the squares of all tokens. To all CTAs
        for i in T.unroll(-(-MMA_COLUMNS // warps)):
            t = i * warps + warp
            if (t < MMA_COLUMNS and tile * MMA_COLUMNS + t < count) or warp == squares_warp:
                total[0] = 0.0
                if lane < ROWS or lane // MMA_COLUMNS == 2:
                    place = tile * warps * MMA_COLUMNS * HEAD_PITCH + T.if_then_else(
                        lane < ROWS,
                        t % MMA_COLUMNS * HEAD_PITCH + lane,
                        lane % MMA_COLUMNS * HEAD_PITCH + ROWS,
                    )
                    for w in T.unroll(warps):
                        total[0] = total[0] + work_shared[place + w * MMA_COLUMNS * HEAD_PITCH]
                for j in T.unroll(HC_MULT):
                    post_local[j] = (
                        T.shfl_sync(total[0], 2 * HC_MULT + j) + T.shfl_sync(total[0], HC_MULT + j)
                    ) + T.shfl_sync(total[0], j)
                if t < MMA_COLUMNS and tile * MMA_COLUMNS + t < count and lane < CLUSTER:
                    T.call_extern(
                        "handle",
                        "mhc::send4",
                        T.access_ptr(sums_in_shared[tile * MMA_COLUMNS + t, rank * HC_MULT], "w"),
                        T.access_ptr(inbox_shared[SUMS_INBOX + tile], "w"),
                        lane,
                        T.access_ptr(post_local[0], "r"),
                    )
                if i == 0 and warp == squares_warp:
                    send_squares(
                        total, 2 * MMA_COLUMNS, tile, rank, lane, count, squares_in_shared,
                        inbox_shared, SUMS_INBOX,
                    )  # fmt: skip

    # collapse: v = sum_j (sigmoid(m_j) + hc_eps) * r'_j, its rounding in the place of x
    for tile in T.serial(T.ceildiv(count, MMA_COLUMNS)):
        token = T.min(tile * MMA_COLUMNS + row, count - 1)
        T.call_extern(
            "handle", "mhc::inbox_wait", T.access_ptr(inbox_shared[SUMS_INBOX + tile], "r")
        )
        add_squares_in(squares_in_shared, tile, token % MMA_COLUMNS, lane, squares)
        collapse_weight(
            sums_in_shared, token, lane % 4, squares, HC_MULT * hidden, rms_eps, scale_local,
            base_local, mix,
        )  # fmt: skip
        mix[0] = mix[0] + hc_eps
        for j in T.unroll(HC_MULT):
            post_local[j] = T.shfl_sync(mix[0], lane // 4 * 4 + j)
        squares[0] = 0.0
        if inside:
            for j in T.unroll(HC_MULT):
                for v in T.vectorized(VECTOR):
                    streams_local[j * VECTOR + v] = streams_shared[tile, j, tx, v]
            widen(streams_local, 0, VECTOR, wide_local)
            for v in T.unroll(VECTOR):
                value_local[v] = post_local[0] * wide_local[v]
            for j in T.unroll(HC_MULT - 1):
                widen(streams_local, (j + 1) * VECTOR, VECTOR, wide_local)
                for v in T.unroll(VECTOR):
                    value_local[v] = value_local[v] + post_local[j + 1] * wide_local[v]
            for v in T.unroll(VECTOR):
                squares[0] = squares[0] + value_local[v] * value_local[v]
            for v in T.vectorized(VECTOR):
                new_local[v] = T.cast(value_local[v], "bfloat16")
            if norm:
                for v in T.vectorized(VECTOR):
                    x_shared[tile, tx, v] = new_local[v]
            elif tile * MMA_COLUMNS + row < count:
                T.call_extern(
                    "handle",
                    "mhc::store16",
                    T.access_ptr(out[t0 + token, column], "w"),
                    T.access_ptr(words_local[0], "r"),
                )
        if norm:
            squares[0] = squares[0] + T.shfl_xor(squares[0], 1)
            squares[0] = squares[0] + T.shfl_xor(squares[0], 2)
            if lane % 4 == 0:
                norm_shared[tile, warp, row] = squares[0]
            T.sync_threads()
            if warp == tile % warps:  # its squares of v, a lane a token, to all CTAs
                total[0] = 0.0
                for w in T.unroll(warps):
                    total[0] = total[0] + norm_shared[tile, w, lane % MMA_COLUMNS]
                send_squares(
                    total, 0, tile, rank, lane, count, norm_in_shared, inbox_shared, NORM_INBOX
                )

    # RMSNorm: h = bf16(bf16(v) * rsqrt(mean(v^2) + norm_eps) * g)
    if norm:
        for tile in T.serial(T.ceildiv(count, MMA_COLUMNS)):
            token = T.min(tile * MMA_COLUMNS + row, count - 1)
            T.call_extern(
                "handle", "mhc::inbox_wait", T.access_ptr(inbox_shared[NORM_INBOX + tile], "r")
            )
            add_squares_in(norm_in_shared, tile, token % MMA_COLUMNS, lane, squares)
            total[0] = T.rsqrt(squares[0] * (1.0 / hidden) + norm_eps)
            if inside and tile * MMA_COLUMNS + row < count:
                for v in T.vectorized(VECTOR):
                    x_local[v] = x_shared[tile, tx, v]
                widen(x_local, 0, VECTOR, wide_local)
                widen(gain_local, 0, VECTOR, value_local)
                for v in T.unroll(VECTOR):
                    value_local[v] = wide_local[v] * total[0] * value_local[v]
                for v in T.vectorized(VECTOR):
                    new_local[v] = T.cast(value_local[v], "bfloat16")
                T.call_extern(
                    "handle",
                    "mhc::store16",
                    T.access_ptr(out[t0 + token, column], "w"),
                    T.access_ptr(words_local[0], "r"),
                )


def post_head(hidden: int, *, norm: bool, streams: bool, pdl: bool):
    """Build the post_head kernel.

    Args:
        hidden: H, a multiple of 256 up to 7168.
        norm: whether the RMSNorm follows; adds the arguments norm_weight and norm_eps.
        streams: whether the new streams are written as well; without it nothing is done with
            residual_out, for which residual can stand.
        pdl: must be true: clusters and programmatic dependent launch come together (sm_90).

    Returns:
        The TileLang program: (x [n, H] bf16, residual [n, 4, H] bf16, post_layer_mix [n, 4] fp32,
        comb_res_mix [n, 4, 4] fp32, fn [4, 4 * H] fp32, scale [1] fp32, base [4] fp32, norm_weight
        [H] bf16 if norm, residual_out [n, 4, H] bf16, out [n, H] bf16, rms_eps, hc_eps fp32,
        norm_eps fp32 if norm, group_tokens int32: tokens of a cluster, at most
        POST_HEAD_GROUP_TOKENS).
    """
    tokens = T.dynamic("tokens", "int64")
    threads = column_warps(hidden) * WARP

    @T.prim_func
    def mhc_post_head(
        x: T.Tensor((tokens, hidden), "bfloat16"),
        residual: T.Tensor((tokens, HC_MULT, hidden), "bfloat16"),
        post_layer_mix: T.Tensor((tokens, HC_MULT), "float32"),
        comb_res_mix: T.Tensor((tokens, HC_MULT, HC_MULT), "float32"),
        fn: T.Tensor((HC_MULT, HC_MULT * hidden), "float32"),
        hc_scale: T.Tensor((1,), "float32"),
        hc_base: T.Tensor((HC_MULT,), "float32"),
        residual_out: T.Tensor((tokens, HC_MULT, hidden), "bfloat16"),
        out: T.Tensor((tokens, hidden), "bfloat16"),
        rms_eps: T.float32,
        hc_eps: T.float32,
        group_tokens: T.int32,
    ):
        with T.Kernel(
            T.ceildiv(tokens, group_tokens) * CLUSTER,
            threads=threads,
            cluster_dims=(CLUSTER, 1, 1),
        ) as i_c:
            finish_group(
                x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, None,
                residual_out, out, rms_eps, hc_eps, None, group_tokens, tokens, i_c, hidden,
                False, streams,
            )  # fmt: skip

    @T.prim_func
    def mhc_post_head_norm(
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
        group_tokens: T.int32,
    ):
        with T.Kernel(
            T.ceildiv(tokens, group_tokens) * CLUSTER,
            threads=threads,
            cluster_dims=(CLUSTER, 1, 1),
        ) as i_c:
            finish_group(
                x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, norm_weight,
                residual_out, out, rms_eps, hc_eps, norm_eps, group_tokens, tokens, i_c, hidden,
                True, streams,
            )  # fmt: skip

    return mhc_post_head_norm if norm else mhc_post_head

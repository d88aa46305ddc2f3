"""post_head: the last post step, the head and the final RMSNorm in one launch.

Algorithm: the new streams live in shared memory alone, unless they are asked for as well: x and the
old streams are read once, the hidden state is written once, 12 bytes of traffic per hidden element
and token where post and head move 36. A cluster of 16 CTAs takes a group of up to 32 tokens, each
CTA a sixteenth of the hidden size in all 4 streams, each of its warps 32 columns. The cluster

1. sends x and the streams to shared memory, 16 bytes a lane, which nobody but the lane reads, and
   keeps its columns of fn in registers, split in three bf16 terms;
2. computes the new streams in place, as ``post`` does;
3. projects them with mma.m16n8k16: the 4 rows of fn in three terms are 12 of the 16 rows of A, 8
   tokens are B. The squares are summed up by the lanes;
4. sends its 5 sums a token to all CTAs, each of which works out the 4 weights itself;
5. collapses its columns, and for the RMSNorm sends their sum of squares to all CTAs as well.

A CTA waits only for CTAs of its own cluster, which start together or not at all, and ends only
when all its inboxes are full, so nobody sends to one that has gone.

Slices, blocks and warps are added up in a fixed order that depends on the hidden size alone: a
token's outputs are the same bits in any batch and at any position.
"""

import tilelang.language as T

from ..dispatch import CLUSTER, END_GROUP_TOKENS
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
    SENT_FLOATS,
    SQUARES_IN_PITCH,
    SUMS_IN_PITCH,
    SUMS_INBOX,
    add_slices,
    apply_gain,
    collapse_weight,
    column_warps,
    prefetch_rows,
    send_sums,
    slice_size,
)
from ._operands import ALL_PAIRS, ALL_STEPS, CHUNK, STEPS
from ._steps import mix_stream

TILES = END_GROUP_TOKENS // MMA_COLUMNS  # of 8 tokens
ROWS = HC_MULT * SPLIT_TERMS  # of A: term 0 of fn's 4 rows, term 1, term 2
HEAD_SUMS = ROWS + 1  # and the squares
HEAD_PITCH = HEAD_SUMS  # floats from token to token; padded it would be one CTA on an SM, not two
STREAM_TERMS = STEPS * 4  # packed pairs of a lane and stream: an A fragment for each step
NORM_INBOX = SUMS_INBOX + 1
ALL_STREAMS = tuple(range(HC_MULT))


@T.macro
def split_rows(weights_local, row, terms_local):
    """A fragments of one stream after the other: lane row r holds rows r and r + 8 of A."""
    split_local = T.alloc_local((SPLIT_TERMS,), "uint32")
    for j in ALL_STREAMS:
        for step in ALL_STEPS:
            for pair in ALL_PAIRS:
                T.call_extern(
                    "handle",
                    "mhc::split3",
                    weights_local[j * VECTOR + step * CHUNK + pair * 2],
                    weights_local[j * VECTOR + step * CHUNK + pair * 2 + 1],
                    T.access_ptr(split_local[0], "w"),
                )
                terms_local[j * STREAM_TERMS + step * 4 + pair * 2] = T.if_then_else(
                    row < HC_MULT, split_local[0], split_local[1]
                )
                terms_local[j * STREAM_TERMS + step * 4 + pair * 2 + 1] = T.if_then_else(
                    row < HC_MULT, split_local[2], T.uint32(0)
                )


@T.macro
def finish_group(
    x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, gain, residual_out, out,
    rms_eps, hc_eps, norm_eps, group_tokens, tokens, i_c, hidden, norm, streams,
):  # fmt: skip
    """One CTA; ``gain`` and ``norm_eps`` are read when ``norm`` is true."""
    T.import_source(DEVICE_SOURCE)
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

    x_shared = T.alloc_shared((TILES, threads, VECTOR), "bfloat16")
    streams_shared = T.alloc_shared((TILES, HC_MULT, threads, VECTOR), "bfloat16")
    mixes_shared = T.alloc_shared((END_GROUP_TOKENS, HC_MULT + 1, HC_MULT), "float32")
    sums_shared = T.alloc_shared((TILES, warps, MMA_COLUMNS, HEAD_PITCH), "float32")
    norm_shared = T.alloc_shared((warps, END_GROUP_TOKENS), "float32")
    sums_in_shared = T.alloc_shared((END_GROUP_TOKENS, SUMS_IN_PITCH), "float32")
    squares_in_shared = T.alloc_shared((END_GROUP_TOKENS, SQUARES_IN_PITCH), "float32")
    norm_in_shared = T.alloc_shared((END_GROUP_TOKENS, SQUARES_IN_PITCH), "float32")
    inbox_shared = T.alloc_shared((2,), "uint64")

    weights_local = T.alloc_local((HC_MULT * VECTOR,), "float32")
    terms_local = T.alloc_local((HC_MULT * STREAM_TERMS,), "uint32")
    x_local = T.alloc_local((VECTOR,), "bfloat16")
    streams_local = T.alloc_local((HC_MULT * VECTOR,), "bfloat16")
    new_local = T.alloc_local((HC_MULT * VECTOR,), "bfloat16")
    words_local = T.view(new_local, (HC_MULT * VECTOR // 2,), "uint32")
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

    # the inboxes are open before anyone can send: the cluster barrier lies between
    if tx == 0:
        T.call_extern(
            "handle",
            "mhc::inbox_open",
            T.access_ptr(inbox_shared[SUMS_INBOX], "w"),
            CLUSTER * SENT_FLOATS * 4 * count,
        )
        if norm:
            T.call_extern(
                "handle",
                "mhc::inbox_open",
                T.access_ptr(inbox_shared[NORM_INBOX], "w"),
                CLUSTER * 4 * count,
            )
    T.cluster_arrive()
    # fn is a weight: on its way to L2 while the previous kernel still runs
    if i_c < CLUSTER:
        prefetch_rows(fn, HC_MULT, rank, tx, threads, hidden)
    T.pdl_sync()
    T.pdl_trigger()

    # x, streams and mixes of all tokens on their way at once, then fn
    for i in T.serial(T.ceildiv(count * (HC_MULT + 1), threads)):
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
    for tile in T.serial(T.ceildiv(count, MMA_COLUMNS)):
        if inside:
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
    if inside:
        for j in T.unroll(HC_MULT):
            for half in T.unroll(2):
                for v in T.vectorized(VECTOR // 2):
                    weights_local[j * VECTOR + half * (VECTOR // 2) + v] = fn[
                        row % HC_MULT, j * hidden + column + half * (VECTOR // 2) + v
                    ]
        if norm:
            for v in T.vectorized(VECTOR):
                gain_local[v] = gain[column + v]
    else:
        for v in T.unroll(HC_MULT * VECTOR):
            weights_local[v] = 0.0
    scale_local[0] = hc_scale[0]
    base_local[0] = hc_base[lane % 4]
    split_rows(weights_local, row, terms_local)
    T.call_extern("handle", "mhc::loads_wait")
    T.sync_threads()

    for tile in T.serial(T.ceildiv(count, MMA_COLUMNS)):
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
                for v in T.unroll(VECTOR):
                    squares[0] = squares[0] + T.cast(new_local[j * VECTOR + v], "float32") * T.cast(
                        new_local[j * VECTOR + v], "float32"
                    )
            if streams and tile * MMA_COLUMNS + row < count:
                for j in T.unroll(HC_MULT):
                    for v in T.vectorized(VECTOR):
                        residual_out[t0 + token, j, column + v] = new_local[j * VECTOR + v]
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
        for v in T.unroll(2):
            sums_shared[tile, warp, lane % 4 * 2 + v, row] = sums_local[v]
            if row < HC_MULT:
                sums_shared[tile, warp, lane % 4 * 2 + v, MMA_COLUMNS + row] = sums_local[2 + v]
        if lane % 4 == 0:
            sums_shared[tile, warp, row, ROWS] = squares[0]
    T.sync_threads()
    T.cluster_wait()

    # the warps' sums added up, one warp a token and one lane a sum, then the terms; to all CTAs
    for i0_t in T.serial(T.ceildiv(count, warps)):
        token = i0_t * warps + warp
        if token < count:
            total[0] = 0.0
            if lane < HEAD_SUMS:
                for w in T.unroll(warps):
                    total[0] = (
                        total[0] + sums_shared[token // MMA_COLUMNS, w, token % MMA_COLUMNS, lane]
                    )
            for j in T.unroll(HC_MULT):
                post_local[j] = (
                    T.shfl_sync(total[0], 2 * HC_MULT + j) + T.shfl_sync(total[0], HC_MULT + j)
                ) + T.shfl_sync(total[0], j)
            squares[0] = T.shfl_sync(total[0], ROWS)
            send_sums(
                token, rank, lane, post_local, squares[0], sums_in_shared, squares_in_shared,
                inbox_shared,
            )  # fmt: skip

    # collapse: v = sum_j (sigmoid(m_j) + hc_eps) * r'_j, its rounding in the place of x
    T.call_extern("handle", "mhc::inbox_wait", T.access_ptr(inbox_shared[SUMS_INBOX], "r"))
    for tile in T.serial(T.ceildiv(count, MMA_COLUMNS)):
        token = T.min(tile * MMA_COLUMNS + row, count - 1)
        add_slices(squares_in_shared, token, squares)
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
            for v in T.unroll(VECTOR):
                value = T.alloc_var("float32", init=0.0)
                value = post_local[0] * T.cast(streams_local[v], "float32")
                for j in T.unroll(HC_MULT - 1):
                    value = value + post_local[j + 1] * T.cast(
                        streams_local[(j + 1) * VECTOR + v], "float32"
                    )
                squares[0] = squares[0] + value * value
                x_local[v] = T.cast(value, "bfloat16")
            if norm:
                for v in T.vectorized(VECTOR):
                    x_shared[tile, tx, v] = x_local[v]
            elif tile * MMA_COLUMNS + row < count:
                for v in T.vectorized(VECTOR):
                    out[t0 + token, column + v] = x_local[v]
        if norm:
            squares[0] = squares[0] + T.shfl_xor(squares[0], 1)
            squares[0] = squares[0] + T.shfl_xor(squares[0], 2)
            if lane % 4 == 0:
                norm_shared[warp, tile * MMA_COLUMNS + row] = squares[0]

    # RMSNorm: h = bf16(bf16(v) * rsqrt(mean(v^2) + norm_eps) * g)
    if norm:
        T.sync_threads()
        if lane < count:  # one lane a token, every warp some of the CTAs
            total[0] = 0.0
            for w in T.unroll(warps):
                total[0] = total[0] + norm_shared[w, lane]
            for i in T.unroll(-(-CLUSTER // warps)):
                if i * warps + warp < CLUSTER:
                    T.call_extern(
                        "handle",
                        "mhc::send",
                        T.access_ptr(norm_in_shared[lane, rank], "w"),
                        T.access_ptr(inbox_shared[NORM_INBOX], "w"),
                        i * warps + warp,
                        total[0],
                    )
        T.call_extern("handle", "mhc::inbox_wait", T.access_ptr(inbox_shared[NORM_INBOX], "r"))
        for tile in T.serial(T.ceildiv(count, MMA_COLUMNS)):
            token = T.min(tile * MMA_COLUMNS + row, count - 1)
            add_slices(norm_in_shared, token, squares)
            total[0] = T.rsqrt(squares[0] * (1.0 / hidden) + norm_eps)
            if inside and tile * MMA_COLUMNS + row < count:
                for v in T.vectorized(VECTOR):
                    x_local[v] = x_shared[tile, tx, v]
                apply_gain(x_local, total[0], gain_local)
                for v in T.vectorized(VECTOR):
                    out[t0 + token, column + v] = x_local[v]


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
        norm_eps fp32 if norm, group_tokens int32: tokens of a cluster, at most END_GROUP_TOKENS).
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

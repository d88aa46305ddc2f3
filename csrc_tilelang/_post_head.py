"""What ``post_head`` and ``post_head_persistent`` share: every step of a tile, so the same bits.

A tile is 8 tokens, a lane's part of it 8 columns of one of them in x and 4 streams, in shared
memory where nobody but the lane reads them. What CTAs tell each other of a tile lies in a slot of
its own, and an inbox says when all of it has come.
"""

import tilelang.language as T

from ..geometry import CLUSTER
from ._device import (
    DEVICE_SOURCE,
    HC_MULT,
    MMA_COLUMNS,
    SPLIT_TERMS,
    VECTOR,
    WARP,
)
from ._group import collapse_weight, column_warps
from ._operands import ALL_PAIRS, CHUNK, STEPS, add_tree
from ._steps import mix_stream, widen

ROWS = HC_MULT * SPLIT_TERMS  # of A: term 0 of fn's 4 rows, term 1, term 2
HEAD_SUMS = ROWS + 1  # and the squares
HEAD_PITCH = HEAD_SUMS  # floats from token to token
STREAM_TERMS = STEPS * 4  # packed pairs of a lane and stream: an A fragment for each step
BATCH = 4  # tokens whose sums of squares, a float each, are one message
LOAD = "mhc::load_stream16"  # past L1: what is read once
ALL_STREAMS = tuple(range(HC_MULT))

# A lane of a quad adds up every fourth slice, then the quad: the order of _group.add_slices
QUAD = min(4, CLUSTER)
QUAD_SLICES = CLUSTER // QUAD
QUAD_TREE = tuple(QUAD_SLICES >> i for i in range(1, QUAD_SLICES.bit_length()))
QUAD_LANES = tuple(QUAD >> i for i in range(1, QUAD.bit_length()))


def loads_wait_but(groups: int) -> str:
    """Device function that waits for all groups of loads but the last so many."""
    return f"mhc::loads_wait_but<{groups}>"


def tile_sums(hidden: int) -> int:
    """Floats of the warps' sums of a tile."""
    return column_warps(hidden) * MMA_COLUMNS * HEAD_PITCH


def tile_tokens(i, count):
    """Tokens of tile ``i``, which is there."""
    return T.min(MMA_COLUMNS, count - i * MMA_COLUMNS)


def sums_bytes(i, count):
    """What 16 CTAs send of tile ``i``: 16 bytes for each token, and for the squares of 4."""
    here = tile_tokens(i, count)
    return CLUSTER * 16 * (here + T.ceildiv(here, BATCH))


def norm_bytes(i, count):
    """And of the collapsed tile."""
    return CLUSTER * 16 * T.ceildiv(tile_tokens(i, count), BATCH)


@T.macro
def open_inboxes(slots, count, norm, tx, sums_inbox, norm_inbox):
    """Those of the first tiles, by one thread: of lanes that open them racecheck warns."""
    if tx == 0:
        for i in T.serial(slots):
            T.call_extern(
                "handle", "mhc::inbox_open", T.access_ptr(sums_inbox[i], "w"), sums_bytes(i, count)
            )
            if norm:
                T.call_extern(
                    "handle",
                    "mhc::inbox_open",
                    T.access_ptr(norm_inbox[i], "w"),
                    norm_bytes(i, count),
                )


@T.macro
def load_rows(fn, column, row, inside, tx, hidden, fn_shared, place):
    """This lane's weights: 4 columns of a row of fn, in each stream.

    Through shared memory: loaded to registers before x, the compiler waited for them, to split
    them, before it asked for x; loaded after x, it asked for them when x had come.
    """
    for j in T.unroll(HC_MULT):
        if inside:
            T.call_extern(
                "handle",
                "mhc::load_async16",
                T.access_ptr(fn_shared[place, j, tx, 0], "w"),
                T.access_ptr(fn[row % HC_MULT, j * hidden + column + row // HC_MULT * CHUNK], "r"),
            )


@T.macro
def split_rows(fn_shared, place, row, inside, tx, terms_local):
    """A fragments of one stream after the other: lane row r holds rows r and r + 8 of A.

    Lane rows 0 to 3 bring the weights of step 0 of row r of fn, 4 to 7 those of step 1 of row
    r - 4. Each splits its own; the former need terms 0 and 2 of both steps, the latter term 1.
    """
    fn_local = T.alloc_local((HC_MULT * VECTOR,), "bfloat16")
    weights_local = T.view(fn_local, (HC_MULT * CHUNK,), "float32")
    split_local = T.alloc_local((SPLIT_TERMS,), "uint32")
    other = T.alloc_local((1,), "uint32")
    last = T.alloc_local((1,), "uint32")
    for j in T.unroll(HC_MULT):
        if inside:
            for v in T.vectorized(VECTOR):
                fn_local[j * VECTOR + v] = fn_shared[place, j, tx, v]
        else:
            for v in T.unroll(CHUNK):
                weights_local[j * CHUNK + v] = 0.0
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
def load_tile(
    x, residual, first, token, there, column, inside, tx, x_shared, x_place, streams_shared, place,
):  # fmt: skip
    """This lane's columns of ``token`` of the cluster's, if it is ``there``."""
    if there and inside:
        t = first + token
        T.call_extern(
            "handle",
            LOAD,
            T.access_ptr(x_shared[x_place, tx, 0], "w"),
            T.access_ptr(x[t, column], "r"),
        )
        for j in T.unroll(HC_MULT):
            T.call_extern(
                "handle",
                LOAD,
                T.access_ptr(streams_shared[place, j, tx, 0], "w"),
                T.access_ptr(residual[t, j, column], "r"),
            )


@T.macro
def mix_tile(
    x_shared, x_place, streams_shared, place, mixes_shared, mixes_place, terms_local, here, t, row,
    lane, warp, column, inside, tx, streams, residual_out, sums_shared, s0,
):  # fmt: skip
    """post and the projection of a tile of ``here`` tokens from ``t`` on; this warp's sums.

    The new streams take the place of the old ones. ``mixes_place`` is that of the tile's first
    token, ``s0`` that of its sums.
    """
    x_local = T.alloc_local((VECTOR,), "bfloat16")
    streams_local = T.alloc_local((HC_MULT * VECTOR,), "bfloat16")
    new_local = T.alloc_local((HC_MULT * VECTOR,), "bfloat16")
    words_local = T.view(new_local, (HC_MULT * VECTOR // 2,), "uint32")
    fragment = T.alloc_local((4,), "uint32")
    post_local = T.alloc_local((HC_MULT,), "float32")
    comb_local = T.alloc_local((HC_MULT * HC_MULT,), "float32")
    part = T.alloc_local((4,), "float32")
    sums_local = T.alloc_local((4,), "float32")
    diagonal = T.alloc_local((2,), "float32")
    if inside:
        # post: r'[j] = bf16(post[j] * x + sum_i comb[i, j] * r[i])
        for v in T.vectorized(VECTOR):
            x_local[v] = x_shared[x_place, tx, v]
        for j in T.unroll(HC_MULT):
            for v in T.vectorized(VECTOR):
                streams_local[j * VECTOR + v] = streams_shared[place, j, tx, v]
        for j in T.vectorized(HC_MULT):
            post_local[j] = mixes_shared[mixes_place + T.min(row, here - 1), 0, j]
        for r in T.unroll(HC_MULT):
            for j in T.vectorized(HC_MULT):
                comb_local[r * HC_MULT + j] = mixes_shared[
                    mixes_place + T.min(row, here - 1), 1 + r, j
                ]
        for j in T.unroll(HC_MULT):
            mix_stream(
                x_local, 0, streams_local, 0, post_local[j], comb_local, j, HC_MULT,
                new_local, j * VECTOR, VECTOR,
            )  # fmt: skip
            for v in T.vectorized(VECTOR):
                streams_shared[place, j, tx, v] = new_local[j * VECTOR + v]
        if streams and row < here:
            for j in T.unroll(HC_MULT):
                T.call_extern(
                    "handle",
                    "mhc::store16",
                    T.access_ptr(residual_out[t + row, j, column], "w"),
                    T.access_ptr(words_local[j * VECTOR // 2], "r"),
                )
    else:
        for v in T.unroll(HC_MULT * VECTOR // 2):
            words_local[v] = T.uint32(0)

    # projection of these columns, and their squares: the diagonal of tokens . tokens^T, as B is
    # rows 0 to 7 of A. Tensor cores truncate as they accumulate, so each stream and each term
    # starts from zero and is added in fp32, rounded to nearest
    for q in T.unroll(4):
        sums_local[q] = 0.0
    for v in T.unroll(2):
        diagonal[v] = 0.0
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
    for j in T.unroll(HC_MULT):
        for q in T.unroll(4):
            part[q] = 0.0
        for step in T.unroll(STEPS):
            for half in T.unroll(2):
                fragment[half * 2] = words_local[j * CHUNK + step * 2 + half]
                fragment[half * 2 + 1] = T.uint32(0)
            T.call_extern(
                "handle",
                "mhc::mma_bf16",
                T.access_ptr(part[0], "rw"),
                T.access_ptr(fragment[0], "r"),
                words_local[j * CHUNK + step * 2],
                words_local[j * CHUNK + step * 2 + 1],
            )
        for v in T.unroll(2):
            diagonal[v] = diagonal[v] + part[v]
    w0 = s0 + warp * MMA_COLUMNS * HEAD_PITCH  # the warp's sums of 8 tokens
    for v in T.unroll(2):
        sums_shared[w0 + (lane % 4 * 2 + v) * HEAD_PITCH + row] = sums_local[v]
        if row < HC_MULT:
            sums_shared[w0 + (lane % 4 * 2 + v) * HEAD_PITCH + MMA_COLUMNS + row] = sums_local[
                2 + v
            ]
    if row // 2 == lane % 4:
        sums_shared[w0 + row * HEAD_PITCH + ROWS] = T.if_then_else(
            row % 2 == 0, diagonal[0], diagonal[1]
        )


@T.macro
def add_squares_in(squares_in_shared, slot, token, lane, squares):
    """squares[0] = the sum over the CTAs of a token of a tile, by the 4 lanes of its quad."""
    slices_local = T.alloc_local((QUAD_SLICES,), "float32")
    for i in T.unroll(QUAD_SLICES):
        slices_local[i] = squares_in_shared[slot, lane % QUAD + i * QUAD, token]
    add_tree(slices_local, QUAD_TREE)
    squares[0] = slices_local[0]
    for half in QUAD_LANES:
        squares[0] = squares[0] + T.shfl_xor(squares[0], half)


@T.macro
def send_squares(total, first_lane, here, rank, lane, slots_shared, slot, inbox):
    """Sums of squares of a tile to all CTAs; ``total`` of ``first_lane + t`` is that of token t."""
    squares_local = T.alloc_local((BATCH,), "float32")
    for i in T.unroll(BATCH):
        squares_local[i] = T.shfl_sync(
            total[0], first_lane + lane // CLUSTER * BATCH % MMA_COLUMNS + i
        )
    if lane // CLUSTER < 2 and lane // CLUSTER * BATCH < here:
        T.call_extern(
            "handle",
            "mhc::send4",
            T.access_ptr(slots_shared[slot, rank, lane // CLUSTER * BATCH], "w"),
            inbox,
            lane % CLUSTER,
            T.access_ptr(squares_local[0], "r"),
        )


@T.macro
def send_sums(
    sums_shared, s0, here, rank, lane, warp, warps, sums_in_shared, squares_in_shared, sums_inbox,
    slot,
):  # fmt: skip
    """The warps' sums of a tile added up, then the terms, and sent to all CTAs.

    One warp a token and one lane a sum; in lanes 16 to 23 the squares of all tokens, sent by a warp
    that has no other sums, where there is one.
    """
    total = T.alloc_local((1,), "float32")
    mixes_local = T.alloc_local((HC_MULT,), "float32")
    squares_warp = MMA_COLUMNS if warps > MMA_COLUMNS else warps - 1
    for k in T.unroll(-(-MMA_COLUMNS // warps)):
        t = k * warps + warp
        if t < here or warp == squares_warp:
            total[0] = 0.0
            if lane < ROWS or lane // MMA_COLUMNS == 2:
                place = s0 + T.if_then_else(
                    lane < ROWS,
                    t % MMA_COLUMNS * HEAD_PITCH + lane,
                    lane % MMA_COLUMNS * HEAD_PITCH + ROWS,
                )
                for w in T.unroll(warps):
                    total[0] = total[0] + sums_shared[place + w * MMA_COLUMNS * HEAD_PITCH]
            for j in T.unroll(HC_MULT):
                mixes_local[j] = (
                    T.shfl_sync(total[0], 2 * HC_MULT + j) + T.shfl_sync(total[0], HC_MULT + j)
                ) + T.shfl_sync(total[0], j)
            if t < here and lane < CLUSTER:
                T.call_extern(
                    "handle",
                    "mhc::send4",
                    T.access_ptr(sums_in_shared[slot * MMA_COLUMNS + t, rank * HC_MULT], "w"),
                    T.access_ptr(sums_inbox[slot], "w"),
                    lane,
                    T.access_ptr(mixes_local[0], "r"),
                )
            if k == 0 and warp == squares_warp:
                send_squares(
                    total, 2 * MMA_COLUMNS, here, rank, lane, squares_in_shared, slot,
                    T.access_ptr(sums_inbox[slot], "w"),
                )  # fmt: skip


@T.macro
def collapse_tile(
    streams_shared, place, x_shared, x_place, sums_in_shared, squares_in_shared, slot, scale_local,
    base_local, rms_eps, hc_eps, here, t, row, lane, warp, column, inside, tx, hidden, norm, out,
    norm_shared, n_place,
):  # fmt: skip
    """v = sum_j (sigmoid(m_j) + hc_eps) * r'_j of a tile whose sums have come.

    Its rounding goes to ``out``, or for the RMSNorm to the place of x; then this warp's sums of
    squares to ``norm_shared``.
    """
    streams_local = T.alloc_local((HC_MULT * VECTOR,), "bfloat16")
    new_local = T.alloc_local((VECTOR,), "bfloat16")
    words_local = T.view(new_local, (VECTOR // 2,), "uint32")
    wide_local = T.alloc_local((VECTOR,), "float32")
    value_local = T.alloc_local((VECTOR,), "float32")
    weights_local = T.alloc_local((HC_MULT,), "float32")
    squares = T.alloc_local((1,), "float32")
    mix = T.alloc_local((1,), "float32")
    add_squares_in(squares_in_shared, slot, T.min(row, here - 1), lane, squares)
    collapse_weight(
        sums_in_shared, slot * MMA_COLUMNS + T.min(row, here - 1), lane % 4, squares,
        HC_MULT * hidden, rms_eps, scale_local, base_local, mix,
    )  # fmt: skip
    mix[0] = mix[0] + hc_eps
    for j in T.unroll(HC_MULT):
        weights_local[j] = T.shfl_sync(mix[0], lane // 4 * 4 + j)
    squares[0] = 0.0
    if inside:
        for j in T.unroll(HC_MULT):
            for v in T.vectorized(VECTOR):
                streams_local[j * VECTOR + v] = streams_shared[place, j, tx, v]
        widen(streams_local, 0, VECTOR, wide_local)
        for v in T.unroll(VECTOR):
            value_local[v] = weights_local[0] * wide_local[v]
        for j in T.unroll(HC_MULT - 1):
            widen(streams_local, (j + 1) * VECTOR, VECTOR, wide_local)
            for v in T.unroll(VECTOR):
                value_local[v] = value_local[v] + weights_local[j + 1] * wide_local[v]
        for v in T.unroll(VECTOR):
            squares[0] = squares[0] + value_local[v] * value_local[v]
        for v in T.vectorized(VECTOR):
            new_local[v] = T.cast(value_local[v], "bfloat16")
        if norm:
            for v in T.vectorized(VECTOR):
                x_shared[x_place, tx, v] = new_local[v]
        elif row < here:
            T.call_extern(
                "handle",
                "mhc::store16",
                T.access_ptr(out[t + row, column], "w"),
                T.access_ptr(words_local[0], "r"),
            )
    if norm:
        squares[0] = squares[0] + T.shfl_xor(squares[0], 1)
        squares[0] = squares[0] + T.shfl_xor(squares[0], 2)
        if lane % 4 == 0:
            norm_shared[n_place, warp, row] = squares[0]


@T.macro
def send_norm(norm_shared, n_place, here, rank, lane, warps, norm_in_shared, norm_inbox, slot):
    """The warps' squares of v of a tile added up, a lane a token, by one warp to all CTAs."""
    total = T.alloc_local((1,), "float32")
    total[0] = 0.0
    for w in T.unroll(warps):
        total[0] = total[0] + norm_shared[n_place, w, lane % MMA_COLUMNS]
    send_squares(
        total, 0, here, rank, lane, norm_in_shared, slot, T.access_ptr(norm_inbox[slot], "w")
    )


@T.macro
def normalise_tile(
    x_shared, x_place, norm_in_shared, slot, gain_local, norm_eps, here, t, row, lane, column,
    inside, tx, hidden, out,
):  # fmt: skip
    """RMSNorm of a tile whose squares have come: h = bf16(bf16(v) * rsqrt(mean(v^2) + eps) * g)."""
    x_local = T.alloc_local((VECTOR,), "bfloat16")
    new_local = T.alloc_local((VECTOR,), "bfloat16")
    words_local = T.view(new_local, (VECTOR // 2,), "uint32")
    wide_local = T.alloc_local((VECTOR,), "float32")
    value_local = T.alloc_local((VECTOR,), "float32")
    squares = T.alloc_local((1,), "float32")
    add_squares_in(norm_in_shared, slot, T.min(row, here - 1), lane, squares)
    squares[0] = T.rsqrt(squares[0] * (1.0 / hidden) + norm_eps)
    if inside and row < here:
        for v in T.vectorized(VECTOR):
            x_local[v] = x_shared[x_place, tx, v]
        widen(x_local, 0, VECTOR, wide_local)
        widen(gain_local, 0, VECTOR, value_local)
        for v in T.unroll(VECTOR):
            value_local[v] = wide_local[v] * squares[0] * value_local[v]
        for v in T.vectorized(VECTOR):
            new_local[v] = T.cast(value_local[v], "bfloat16")
        T.call_extern(
            "handle",
            "mhc::store16",
            T.access_ptr(out[t + row, column], "w"),
            T.access_ptr(words_local[0], "r"),
        )


def post_head_program(
    name: str, finish_tiles, hidden: int, *, ctas_per_sm: int, norm: bool, streams: bool
):
    """A kernel whose clusters share the tokens, a unit at a time.

    Args:
        name: of the kernel, before "_norm".
        finish_tiles: macro of one CTA; takes what is asked for below, None for what is not there.
        hidden: H, a multiple of 256 up to 7168.
        ctas_per_sm: CTAs that must fit on an SM.
        norm: whether the RMSNorm follows; adds the arguments norm_weight and norm_eps.
        streams: whether the new streams are written as well; without it nothing is done with
            residual_out, for which residual can stand.

    Returns:
        The TileLang program: (x [n, H] bf16, residual [n, 4, H] bf16, post_layer_mix [n, 4] fp32,
        comb_res_mix [n, 4, 4] fp32, fn [4, 4 * H] fp32, scale [1] fp32, base [4] fp32, norm_weight
        [H] bf16 if norm, residual_out [n, 4, H] bf16, out [n, H] bf16, rms_eps, hc_eps fp32,
        norm_eps fp32 if norm, clusters int32, unit int32: tokens that a cluster takes at a time; a
        cluster has as many units as another, or one more).
    """
    tokens = T.dynamic("tokens", "int64")
    threads = column_warps(hidden) * WARP

    @T.macro
    def finish_group(
        x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, gain, residual_out, out,
        rms_eps, hc_eps, norm_eps, clusters, unit, i_c, norm,
    ):  # fmt: skip
        T.import_source(DEVICE_SOURCE)
        T.annotate_min_blocks_per_sm(ctas_per_sm)
        cluster = i_c // CLUSTER
        # the first clusters have a unit more: they start first, and on SMs of their own
        units = T.alloc_var("int32", init=T.truncdiv(T.cast(tokens, "int32") + unit - 1, unit))
        share = T.alloc_var("int32", init=T.truncdiv(units, clusters))
        more = T.alloc_var("int32", init=units - share * clusters)
        first = T.alloc_var(
            "int64", init=T.cast(cluster * share + T.min(cluster, more), "int64") * unit
        )
        count = T.alloc_var(
            "int32",
            init=T.cast(
                T.min(
                    T.cast((share + T.if_then_else(cluster < more, 1, 0)) * unit, "int64"),
                    tokens - first,
                ),
                "int32",
            ),
        )
        tiles = T.alloc_var("int32", init=T.ceildiv(count, MMA_COLUMNS))
        # handed on, they are variables no more: see fused_post_pre_persistent.boundary
        finish_tiles(
            x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, gain, residual_out,
            out, rms_eps, hc_eps, norm_eps, first, count, tiles, i_c, hidden, norm, streams,
        )  # fmt: skip

    @T.prim_func
    def plain(
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
        clusters: T.int32,
        unit: T.int32,
    ):
        with T.Kernel(clusters * CLUSTER, threads=threads, cluster_dims=(CLUSTER, 1, 1)) as i_c:
            finish_group(
                x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, None,
                residual_out, out, rms_eps, hc_eps, None, clusters, unit, i_c, False,
            )  # fmt: skip

    @T.prim_func
    def with_norm(
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
        with T.Kernel(clusters * CLUSTER, threads=threads, cluster_dims=(CLUSTER, 1, 1)) as i_c:
            finish_group(
                x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, norm_weight,
                residual_out, out, rms_eps, hc_eps, norm_eps, clusters, unit, i_c, True,
            )  # fmt: skip

    program = with_norm if norm else plain
    return program.with_attr("global_symbol", f"{name}_norm" if norm else name)

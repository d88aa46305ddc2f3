"""post_head: the last post step, the head and the final RMSNorm in one pass over memory.

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
6. sends for tile i + 3: x and streams go to shared memory, 16 bytes a lane, where nobody but the
   lane reads them.

So loads have two turns and more to come, and what CTAs tell each other has the work on another tile
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

from ..dispatch import CLUSTER
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

ROWS = HC_MULT * SPLIT_TERMS  # of A: term 0 of fn's 4 rows, term 1, term 2
HEAD_SUMS = ROWS + 1  # and the squares
HEAD_PITCH = HEAD_SUMS  # floats from token to token
STREAM_TERMS = STEPS * 4  # packed pairs of a lane and stream: an A fragment for each step
TWO_CTAS_WARPS = 8
BATCH = 4  # tokens whose sums of squares, a float each, are one message
BUFFERS = 4  # of streams: a tile in work, the one before, to be collapsed, and two on their way
X_BUFFERS = BUFFERS + 2  # the two before that are normalised later, from the place of x
SETS = 4  # of what other CTAs send
TAIL = 3  # a tile is normalised so many turns after its projection, or collapsed one turn after it
LOAD = "mhc::load_async16"
# groups of loads: fn, the first tile's mixes, then one for each tile, with the mixes of the next
FN_LOADED = f"mhc::loads_wait_but<{BUFFERS}>"
MIXES_LOADED = f"mhc::loads_wait_but<{BUFFERS - 1}>"
TILE_LOADED = f"mhc::loads_wait_but<{BUFFERS - 2}>"
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
def add_squares_in(squares_in_shared, place, token, lane, squares):
    """squares[0] = the sum over the CTAs of a token of a tile, by the 4 lanes of its quad."""
    slices_local = T.alloc_local((QUAD_SLICES,), "float32")
    for i in T.unroll(QUAD_SLICES):
        slices_local[i] = squares_in_shared[place, lane % QUAD + i * QUAD, token]
    add_tree(slices_local, QUAD_TREE)
    squares[0] = slices_local[0]
    for half in QUAD_LANES:
        squares[0] = squares[0] + T.shfl_xor(squares[0], half)


@T.macro
def send_squares(total, first_lane, here, rank, lane, slots_shared, place, inbox):
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
            T.access_ptr(slots_shared[place, rank, lane // CLUSTER * BATCH], "w"),
            inbox,
            lane % CLUSTER,
            T.access_ptr(squares_local[0], "r"),
        )


@T.macro
def load_mixes(post_layer_mix, comb_res_mix, first, count, i, tx, threads, mixes_shared):
    """Post weights and combs of tile ``i``, if there is one: a row of 16 bytes a thread."""
    place = i % (BUFFERS + 1)
    for k in T.unroll(-(-MMA_COLUMNS * (HC_MULT + 1) // threads)):
        vector = k * threads + tx
        if vector < MMA_COLUMNS:
            if i * MMA_COLUMNS + vector < count:
                T.call_extern(
                    "handle",
                    "mhc::load_async16",
                    T.access_ptr(mixes_shared[place, vector, 0, 0], "w"),
                    T.access_ptr(post_layer_mix[first + i * MMA_COLUMNS + vector, 0], "r"),
                )
        elif vector < MMA_COLUMNS * (HC_MULT + 1):
            token = vector // HC_MULT - MMA_COLUMNS // HC_MULT
            if i * MMA_COLUMNS + token < count:
                T.call_extern(
                    "handle",
                    "mhc::load_async16",
                    T.access_ptr(mixes_shared[place, token, 1 + vector % HC_MULT, 0], "w"),
                    T.access_ptr(
                        comb_res_mix[first + i * MMA_COLUMNS + token, vector % HC_MULT, 0], "r"
                    ),
                )


@T.macro
def load_tile(x, residual, first, count, i, row, column, inside, tx, x_shared, streams_shared):
    """This lane's columns of tile ``i``, if there is one: nobody else reads them."""
    if i * MMA_COLUMNS < count and inside:
        t = first + T.min(i * MMA_COLUMNS + row, count - 1)
        T.call_extern(
            "handle",
            LOAD,
            T.access_ptr(x_shared[i % X_BUFFERS, tx, 0], "w"),
            T.access_ptr(x[t, column], "r"),
        )
        for j in T.unroll(HC_MULT):
            T.call_extern(
                "handle",
                LOAD,
                T.access_ptr(streams_shared[i % BUFFERS, j, tx, 0], "w"),
                T.access_ptr(residual[t, j, column], "r"),
            )


@T.macro
def run_tiles(
    x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, gain, residual_out, out,
    rms_eps, hc_eps, norm_eps, first, count, tiles, i_c, hidden, norm, streams,
):  # fmt: skip
    """One CTA of a cluster with ``count`` tokens from ``first`` on."""
    T.import_source(DEVICE_SOURCE)
    T.annotate_min_blocks_per_sm(ctas_per_sm(hidden))
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
    # the warps that add up squares: two that have no other sums, where there are
    squares_warp = MMA_COLUMNS if warps > MMA_COLUMNS else warps - 1
    norm_warp = MMA_COLUMNS + 1 if warps > MMA_COLUMNS + 1 else 0

    x_shared = T.alloc_shared((X_BUFFERS, threads, VECTOR), "bfloat16")
    streams_shared = T.alloc_shared((BUFFERS, HC_MULT, threads, VECTOR), "bfloat16")
    mixes_shared = T.alloc_shared((BUFFERS + 1, MMA_COLUMNS, HC_MULT + 1, HC_MULT), "float32")
    sums_shared = T.alloc_shared((2, warps * MMA_COLUMNS * HEAD_PITCH), "float32")
    norm_shared = T.alloc_shared((2, warps, MMA_COLUMNS), "float32")
    sums_in_shared = T.alloc_shared((SETS * MMA_COLUMNS, SUMS_IN_PITCH), "float32")
    squares_in_shared = T.alloc_shared((SETS, CLUSTER, MMA_COLUMNS), "float32")
    norm_in_shared = T.alloc_shared((SETS, CLUSTER, MMA_COLUMNS), "float32")
    sums_inbox = T.alloc_shared((SETS,), "uint64")
    norm_inbox = T.alloc_shared((SETS,), "uint64")

    terms_local = T.alloc_local((HC_MULT * STREAM_TERMS,), "uint32")
    x_local = T.alloc_local((VECTOR,), "bfloat16")
    streams_local = T.alloc_local((HC_MULT * VECTOR,), "bfloat16")
    weights_local = T.view(streams_local, (HC_MULT * CHUNK,), "float32")
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

    # the inboxes are open before anyone can send: the cluster barrier lies between. By one thread:
    # of lanes that open them side by side racecheck warns
    if tx == 0:
        for i in T.serial(T.min(tiles, SETS)):
            T.call_extern(
                "handle",
                "mhc::inbox_open",
                T.access_ptr(sums_inbox[i], "w"),
                sums_bytes(i, count),
            )
            if norm:
                T.call_extern(
                    "handle",
                    "mhc::inbox_open",
                    T.access_ptr(norm_inbox[i], "w"),
                    norm_bytes(i, count),
                )
    T.cluster_arrive()
    # fn is a weight: on its way to L2 while the previous kernel still runs
    if i_c < CLUSTER:
        prefetch_rows(fn, HC_MULT, rank, tx, threads, hidden)
    T.pdl_sync()
    T.pdl_trigger()

    # fn, and the first tiles, on their way at once, in groups to be waited for in turn. fn goes
    # through shared memory too, where the last buffer is not used yet: loaded to registers before
    # x, the compiler waited for it, to split it, before it asked for x; loaded after x, it asked
    # for it when x had come
    for j in T.unroll(HC_MULT):
        if inside:
            T.call_extern(
                "handle",
                "mhc::load_async16",
                T.access_ptr(streams_shared[BUFFERS - 1, j, tx, 0], "w"),
                T.access_ptr(fn[row % HC_MULT, j * hidden + column + row // HC_MULT * CHUNK], "r"),
            )
    T.call_extern("handle", "mhc::loads_commit")
    load_mixes(post_layer_mix, comb_res_mix, first, count, 0, tx, threads, mixes_shared)
    T.call_extern("handle", "mhc::loads_commit")
    for i in T.unroll(BUFFERS - 1):
        load_tile(x, residual, first, count, i, row, column, inside, tx, x_shared, streams_shared)
        load_mixes(post_layer_mix, comb_res_mix, first, count, i + 1, tx, threads, mixes_shared)
        T.call_extern("handle", "mhc::loads_commit")
    if norm and inside:
        for v in T.vectorized(VECTOR):
            gain_local[v] = gain[column + v]
    scale_local[0] = hc_scale[0]
    base_local[0] = hc_base[lane % 4]
    T.call_extern("handle", FN_LOADED)
    for j in T.unroll(HC_MULT):
        if inside:
            for v in T.vectorized(VECTOR):
                streams_local[j * VECTOR + v] = streams_shared[BUFFERS - 1, j, tx, v]
        else:
            for v in T.unroll(CHUNK):
                weights_local[j * CHUNK + v] = 0.0
    split_rows(weights_local, row, terms_local)
    T.call_extern("handle", MIXES_LOADED)
    T.sync_threads()
    T.cluster_wait()

    for i in T.serial(tiles + (TAIL if norm else 1)):
        if i < tiles:
            T.call_extern("handle", TILE_LOADED)
            place = i % BUFFERS
            x_place = i % X_BUFFERS
            mixes_place = i % (BUFFERS + 1)
            token = T.min(row, tile_tokens(i, count) - 1)
            squares[0] = 0.0
            if inside:
                # post: r'[j] = bf16(post[j] * x + sum_i comb[i, j] * r[i]), in place
                for v in T.vectorized(VECTOR):
                    x_local[v] = x_shared[x_place, tx, v]
                for j in T.unroll(HC_MULT):
                    for v in T.vectorized(VECTOR):
                        streams_local[j * VECTOR + v] = streams_shared[place, j, tx, v]
                for j in T.vectorized(HC_MULT):
                    post_local[j] = mixes_shared[mixes_place, token, 0, j]
                for r in T.unroll(HC_MULT):
                    for j in T.vectorized(HC_MULT):
                        comb_local[r * HC_MULT + j] = mixes_shared[mixes_place, token, 1 + r, j]
                for j in T.unroll(HC_MULT):
                    mix_stream(
                        x_local, 0, streams_local, 0, post_local[j], comb_local, j, HC_MULT,
                        new_local, j * VECTOR, VECTOR,
                    )  # fmt: skip
                    for v in T.vectorized(VECTOR):
                        streams_shared[place, j, tx, v] = new_local[j * VECTOR + v]
                    widen(new_local, j * VECTOR, VECTOR, wide_local)
                    for v in T.unroll(VECTOR):
                        squares[0] = squares[0] + wide_local[v] * wide_local[v]
                if streams and i * MMA_COLUMNS + row < count:
                    for j in T.unroll(HC_MULT):
                        T.call_extern(
                            "handle",
                            "mhc::store16",
                            T.access_ptr(
                                residual_out[first + i * MMA_COLUMNS + row, j, column], "w"
                            ),
                            T.access_ptr(words_local[j * VECTOR // 2], "r"),
                        )
            else:
                for v in T.unroll(HC_MULT * VECTOR // 2):
                    words_local[v] = T.uint32(0)

            # projection of these columns; tensor cores truncate as they accumulate, so each stream
            # and each term starts from zero and is added in fp32, rounded to nearest
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
            s0 = warp * MMA_COLUMNS * HEAD_PITCH  # the warp's sums of 8 tokens
            for v in T.unroll(2):
                sums_shared[i % 2, s0 + (lane % 4 * 2 + v) * HEAD_PITCH + row] = sums_local[v]
                if row < HC_MULT:
                    sums_shared[i % 2, s0 + (lane % 4 * 2 + v) * HEAD_PITCH + MMA_COLUMNS + row] = (
                        sums_local[2 + v]
                    )
            if lane % 4 == 0:
                sums_shared[i % 2, s0 + row * HEAD_PITCH + ROWS] = squares[0]
        if i < tiles + (2 if norm else 0):
            T.sync_threads()

        # the warps' sums of the tile added up, one warp a token and one lane a sum, then the terms;
        # in lanes 16 to 23 the squares of all tokens. To all CTAs
        if i < tiles:
            for k in T.unroll(-(-MMA_COLUMNS // warps)):
                t = k * warps + warp
                here = tile_tokens(i, count)
                if t < here or warp == squares_warp:
                    total[0] = 0.0
                    if lane < ROWS or lane // MMA_COLUMNS == 2:
                        s0 = T.if_then_else(
                            lane < ROWS,
                            t % MMA_COLUMNS * HEAD_PITCH + lane,
                            lane % MMA_COLUMNS * HEAD_PITCH + ROWS,
                        )
                        for w in T.unroll(warps):
                            total[0] = (
                                total[0] + sums_shared[i % 2, s0 + w * MMA_COLUMNS * HEAD_PITCH]
                            )
                    for j in T.unroll(HC_MULT):
                        post_local[j] = (
                            T.shfl_sync(total[0], 2 * HC_MULT + j)
                            + T.shfl_sync(total[0], HC_MULT + j)
                        ) + T.shfl_sync(total[0], j)
                    if t < here and lane < CLUSTER:
                        T.call_extern(
                            "handle",
                            "mhc::send4",
                            T.access_ptr(
                                sums_in_shared[i % SETS * MMA_COLUMNS + t, rank * HC_MULT], "w"
                            ),
                            T.access_ptr(sums_inbox[i % SETS], "w"),
                            lane,
                            T.access_ptr(post_local[0], "r"),
                        )
                    if k == 0 and warp == squares_warp:
                        send_squares(
                            total, 2 * MMA_COLUMNS, here, rank, lane, squares_in_shared, i % SETS,
                            T.access_ptr(sums_inbox[i % SETS], "w"),
                        )  # fmt: skip
        # and the squares of v of the tile before the last, a lane a token
        if norm and i >= 2 and i < tiles + 2 and warp == norm_warp:
            total[0] = 0.0
            for w in T.unroll(warps):
                total[0] = total[0] + norm_shared[i % 2, w, lane % MMA_COLUMNS]
            send_squares(
                total, 0, tile_tokens(i - 2, count), rank, lane, norm_in_shared, (i - 2) % SETS,
                T.access_ptr(norm_inbox[(i - 2) % SETS], "w"),
            )  # fmt: skip

        # RMSNorm of the one before that: h = bf16(bf16(v) * rsqrt(mean(v^2) + norm_eps) * g)
        if norm and i >= TAIL:
            token = T.min(row, tile_tokens(i - TAIL, count) - 1)
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
            add_squares_in(norm_in_shared, (i - TAIL) % SETS, token, lane, squares)
            total[0] = T.rsqrt(squares[0] * (1.0 / hidden) + norm_eps)
            if inside and (i - TAIL) * MMA_COLUMNS + row < count:
                for v in T.vectorized(VECTOR):
                    x_local[v] = x_shared[(i - TAIL) % X_BUFFERS, tx, v]
                widen(x_local, 0, VECTOR, wide_local)
                widen(gain_local, 0, VECTOR, value_local)
                for v in T.unroll(VECTOR):
                    value_local[v] = wide_local[v] * total[0] * value_local[v]
                for v in T.vectorized(VECTOR):
                    new_local[v] = T.cast(value_local[v], "bfloat16")
                T.call_extern(
                    "handle",
                    "mhc::store16",
                    T.access_ptr(out[first + (i - TAIL) * MMA_COLUMNS + row, column], "w"),
                    T.access_ptr(words_local[0], "r"),
                )

        # collapse of the last tile: v = sum_j (sigmoid(m_j) + hc_eps) * r'_j, its rounding in the
        # place of x
        if i >= 1 and i <= tiles:
            token = T.min(row, tile_tokens(i - 1, count) - 1)
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
            add_squares_in(squares_in_shared, (i - 1) % SETS, token, lane, squares)
            collapse_weight(
                sums_in_shared, (i - 1) % SETS * MMA_COLUMNS + token, lane % 4, squares,
                HC_MULT * hidden, rms_eps, scale_local, base_local, mix,
            )  # fmt: skip
            mix[0] = mix[0] + hc_eps
            for j in T.unroll(HC_MULT):
                post_local[j] = T.shfl_sync(mix[0], lane // 4 * 4 + j)
            squares[0] = 0.0
            if inside:
                for j in T.unroll(HC_MULT):
                    for v in T.vectorized(VECTOR):
                        streams_local[j * VECTOR + v] = streams_shared[(i - 1) % BUFFERS, j, tx, v]
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
                        x_shared[(i - 1) % X_BUFFERS, tx, v] = new_local[v]
                elif (i - 1) * MMA_COLUMNS + row < count:
                    T.call_extern(
                        "handle",
                        "mhc::store16",
                        T.access_ptr(out[first + (i - 1) * MMA_COLUMNS + row, column], "w"),
                        T.access_ptr(words_local[0], "r"),
                    )
            if norm:
                squares[0] = squares[0] + T.shfl_xor(squares[0], 1)
                squares[0] = squares[0] + T.shfl_xor(squares[0], 2)
                if lane % 4 == 0:
                    norm_shared[(i - 1) % 2, warp, row] = squares[0]

        # in the places of the tiles just done; a group of loads even if it is empty, for the count
        load_tile(
            x, residual, first, count, i + BUFFERS - 1, row, column, inside, tx, x_shared,
            streams_shared,
        )  # fmt: skip
        load_mixes(
            post_layer_mix, comb_res_mix, first, count, i + BUFFERS, tx, threads, mixes_shared
        )
        T.call_extern("handle", "mhc::loads_commit")


@T.macro
def finish_group(
    x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, gain, residual_out, out,
    rms_eps, hc_eps, norm_eps, group_tokens, tokens, i_c, hidden, norm, streams,
):  # fmt: skip
    """One CTA; ``gain`` and ``norm_eps`` are read when ``norm`` is true."""
    first = T.alloc_var("int64", init=T.cast(i_c // CLUSTER, "int64") * group_tokens)
    count = T.alloc_var(
        "int32", init=T.cast(T.min(T.cast(group_tokens, "int64"), tokens - first), "int32")
    )
    tiles = T.alloc_var("int32", init=T.ceildiv(count, MMA_COLUMNS))
    # handed on, they are variables no more: see fused_post_pre_persistent.boundary
    run_tiles(
        x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, gain, residual_out, out,
        rms_eps, hc_eps, norm_eps, first, count, tiles, i_c, hidden, norm, streams,
    )  # fmt: skip


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
        norm_eps fp32 if norm, group_tokens int32: tokens of a cluster, any number).
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

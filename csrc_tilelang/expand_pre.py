"""expand_pre: the copies of the embedding and the first pre step in one launch.

Algorithm: all 4 streams are x, so their projection is that of x on the sum of fn's 4 stream blocks,
their mean square is that of x, and the collapse is x times the sum of the 4 weights: x is read
once, the copies are written once and never read. A cluster of 16 CTAs takes a group of up to 32
tokens, each CTA a sixteenth of the hidden size, each of its column warps 32 columns. The cluster

1. sends x to shared memory, 16 bytes a lane, which nobody but the lane reads; adds up fn's blocks
   in fp32 and keeps them in registers, split in three bf16 terms;
2. projects with mma.m16n8k16, fn as the A operand and 8 tokens as B, as ``fused_post_pre`` does;
3. sends the sums for the collapse of every token to all CTAs, and all 25 to the CTA that owns it;
4. writes the copies while they travel, then the layer input: the norm needs nothing but the same
   sums, mean(v^2) = (sum of weights)^2 mean(x^2). Meanwhile one more warp makes the post weights
   and runs Sinkhorn for the tokens that its CTA owns.

A CTA waits only for CTAs of its own cluster, which start together or not at all, and ends only
when all its inboxes are full, so nobody sends to one that has gone.

Slices, blocks and warps are added up in a fixed order that depends on the hidden size alone: a
token's outputs are the same bits in any batch and at any position.
"""

import tilelang.language as T

from ..geometry import CLUSTER, EXPAND_PRE_GROUP_TOKENS
from ._collapse import sigmoid
from ._device import DEVICE_SOURCE, HC_MULT, MIXES, MMA_COLUMNS, SQUARES, VECTOR, WARP
from ._group import (
    COLUMN_BARRIER,
    COLUMNS,
    SENT_FLOATS,
    SLICE_TREE,
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
from ._operands import (
    OPERANDS,
    ROW_TILES,
    SUMS,
    SUMS_PITCH,
    UNIT_TERMS,
    UNIT_WEIGHTS,
    add_tree,
    multiply,
    split_unit,
    store_sums,
)
from ._sinkhorn import COMB, sinkhorn, softmax_row

TILES = EXPAND_PRE_GROUP_TOKENS // MMA_COLUMNS  # of 8 tokens
OWNED = -(-EXPAND_PRE_GROUP_TOKENS // CLUSTER)  # tokens of a group that a CTA owns at most
OWNER_FLOATS = SUMS - HC_MULT  # of each CTA and owned token: post, comb, squares
TWO_CTAS_WARPS = 8  # column warps of which two CTAs have 96 registers a thread, without spills
INBOXES = 1 + OWNED  # sums of the collapse, then all sums of each owned token


def ctas_per_sm(hidden: int) -> int:
    """CTAs to allow on an SM by a limit on registers: phases overlap only among CTAs."""
    return 2 if column_warps(hidden) <= TWO_CTAS_WARPS else 1


@T.macro
def fold_weights(fn, row, k, hidden, weights_local):
    """This lane's weights: 3 rows, 8 columns, the blocks of the 4 streams added up in fp32."""
    blocks_local = T.alloc_local((HC_MULT * VECTOR,), "float32")
    for n in T.unroll(ROW_TILES):
        for j in T.unroll(HC_MULT):
            for half in T.unroll(2):
                for v in T.vectorized(VECTOR // 2):
                    blocks_local[j * VECTOR + half * (VECTOR // 2) + v] = fn[
                        n * MMA_COLUMNS + row, j * hidden + k + half * (VECTOR // 2) + v
                    ]
        for v in T.unroll(VECTOR):
            weights_local[n * VECTOR + v] = (blocks_local[v] + blocks_local[VECTOR + v]) + (
                blocks_local[2 * VECTOR + v] + blocks_local[3 * VECTOR + v]
            )


@T.macro
def expand_group(
    x, fn, hc_scale, hc_base, gain, residual_out, post_mix, comb_mix, layer_input, rms_eps,
    hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat, norm_eps, group_tokens,
    tokens, i_c, hidden, norm,
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

    x_shared = T.alloc_shared((TILES, threads, VECTOR), "bfloat16")
    sums_shared = T.alloc_shared((TILES, warps, MMA_COLUMNS, SUMS_PITCH), "float32")
    sums_in_shared = T.alloc_shared((EXPAND_PRE_GROUP_TOKENS, SUMS_IN_PITCH), "float32")
    squares_in_shared = T.alloc_shared((EXPAND_PRE_GROUP_TOKENS, SQUARES_IN_PITCH), "float32")
    owned_in_shared = T.alloc_shared((OWNED, CLUSTER, WARP), "float32")
    inbox_shared = T.alloc_shared((INBOXES,), "uint64")

    weights_local = T.alloc_local((UNIT_WEIGHTS,), "float32")
    terms_local = T.alloc_local((UNIT_TERMS,), "uint32")
    x_local = T.alloc_local((VECTOR,), "bfloat16")
    words_local = T.view(x_local, (VECTOR // 2,), "uint32")
    fragment = T.alloc_local((4,), "uint32")
    part = T.alloc_local((len(OPERANDS) * 4,), "float32")
    sums_local = T.alloc_local((8,), "float32")
    mixes_local = T.alloc_local((HC_MULT,), "float32")
    comb_local = T.alloc_local((HC_MULT * HC_MULT,), "float32")
    slices_local = T.alloc_local((CLUSTER,), "float32")
    gain_local = T.alloc_local((VECTOR,), "bfloat16")
    total = T.alloc_local((1,), "float32")
    squares = T.alloc_local((1,), "float32")
    scale_local = T.alloc_local((1,), "float32")
    base_local = T.alloc_local((1,), "float32")
    logit = T.alloc_local((1,), "float32")
    mix = T.alloc_local((1,), "float32")

    # the inboxes are open before anyone can send: the cluster barrier lies between
    if tx == 0:
        T.call_extern(
            "handle",
            "mhc::inbox_open",
            T.access_ptr(inbox_shared[SUMS_INBOX], "w"),
            CLUSTER * SENT_FLOATS * 4 * count,
        )
        for i in T.unroll(OWNED):
            if i * CLUSTER + rank < count:
                T.call_extern(
                    "handle",
                    "mhc::inbox_open",
                    T.access_ptr(inbox_shared[1 + i], "w"),
                    CLUSTER * OWNER_FLOATS * 4,
                )
    T.cluster_arrive()
    # fn is a weight: on its way to L2 while the previous kernel still runs
    if i_c < CLUSTER:
        prefetch_rows(fn, MIXES, rank, tx, threads + WARP, hidden)
    T.pdl_sync()
    T.pdl_trigger()

    if warp < warps:
        row = lane // 4
        h = warp * COLUMNS + lane % 4 * VECTOR
        column = rank * size + h
        inside = True if size % COLUMNS == 0 else h < size

        # x of all tokens on its way at once, then fn
        for tile in T.serial(T.ceildiv(count, MMA_COLUMNS)):
            if inside:
                T.call_extern(
                    "handle",
                    "mhc::load_async16",
                    T.access_ptr(x_shared[tile, tx, 0], "w"),
                    T.access_ptr(x[t0 + T.min(tile * MMA_COLUMNS + row, count - 1), column], "r"),
                )
            else:
                for v in T.unroll(VECTOR):
                    x_shared[tile, tx, v] = T.cast(0.0, "bfloat16")
        if inside:
            fold_weights(fn, row, column, hidden, weights_local)
        else:
            for v in T.unroll(UNIT_WEIGHTS):
                weights_local[v] = 0.0
        scale_local[0] = hc_scale[0]
        base_local[0] = hc_base[lane % 4]
        split_unit(weights_local, 0, terms_local, 0)
        T.call_extern("handle", "mhc::loads_wait")

        # projection and sum of squares of these columns, 8 tokens at a time
        for tile in T.serial(T.ceildiv(count, MMA_COLUMNS)):
            for v in T.vectorized(VECTOR):
                x_local[v] = x_shared[tile, tx, v]
            for q in T.unroll(8):
                sums_local[q] = 0.0
            for q in T.unroll(len(OPERANDS) * 4):
                part[q] = 0.0
            multiply(words_local, lane, terms_local, 0, None, None, fragment, part, sums_local)
            store_sums(sums_local, lane, warp, tile, sums_shared)
        T.sync_threads(COLUMN_BARRIER, threads)
        T.cluster_wait()

        # the warps' sums added up, one warp a token and one lane a sum, and sent
        for i0_t in T.serial(T.ceildiv(count, warps)):
            token = i0_t * warps + warp
            if token < count:
                total[0] = 0.0
                if lane < SUMS:
                    for w in T.unroll(warps):
                        total[0] = (
                            total[0]
                            + sums_shared[token // MMA_COLUMNS, w, token % MMA_COLUMNS, lane]
                        )
                for j in T.unroll(HC_MULT):
                    mixes_local[j] = T.shfl_sync(total[0], j)
                squares[0] = T.shfl_sync(total[0], SQUARES)
                send_sums(
                    token, rank, lane, mixes_local, squares[0], sums_in_shared,
                    squares_in_shared, inbox_shared,
                )  # fmt: skip
                if lane >= HC_MULT and lane < SUMS:
                    T.call_extern(
                        "handle",
                        "mhc::send",
                        T.access_ptr(owned_in_shared[token // CLUSTER, rank, lane], "w"),
                        T.access_ptr(inbox_shared[1 + token // CLUSTER], "w"),
                        token % CLUSTER,
                        total[0],
                    )

        if norm and inside:
            for v in T.vectorized(VECTOR):
                gain_local[v] = gain[column + v]
        # expand: r[j] = x
        for tile in T.serial(T.ceildiv(count, MMA_COLUMNS)):
            token = tile * MMA_COLUMNS + row
            if token < count and inside:
                for v in T.vectorized(VECTOR):
                    x_local[v] = x_shared[tile, tx, v]
                for j in T.unroll(HC_MULT):
                    for v in T.vectorized(VECTOR):
                        residual_out[t0 + token, j, column + v] = x_local[v]

        # collapse: v = (sum_j weight_j) * x, then the RMSNorm
        T.call_extern("handle", "mhc::inbox_wait", T.access_ptr(inbox_shared[SUMS_INBOX], "r"))
        for tile in T.serial(T.ceildiv(count, MMA_COLUMNS)):
            token = T.min(tile * MMA_COLUMNS + row, count - 1)
            add_slices(squares_in_shared, token, squares)
            collapse_weight(
                sums_in_shared, token, lane % 4, squares, hidden, rms_eps, scale_local,
                base_local, mix,
            )  # fmt: skip
            mix[0] = mix[0] + hc_pre_eps
            mix[0] = mix[0] + T.shfl_xor(mix[0], 1)
            mix[0] = mix[0] + T.shfl_xor(mix[0], 2)
            for v in T.vectorized(VECTOR):
                x_local[v] = x_shared[tile, tx, v]
            for v in T.unroll(VECTOR):
                x_local[v] = T.cast(mix[0] * T.cast(x_local[v], "float32"), "bfloat16")
            if norm:
                total[0] = T.rsqrt(mix[0] * mix[0] * (squares[0] * (1.0 / hidden)) + norm_eps)
                apply_gain(x_local, total[0], gain_local)
            if tile * MMA_COLUMNS + row < count and inside:
                for v in T.vectorized(VECTOR):
                    layer_input[t0 + token, column + v] = x_local[v]
    else:
        T.cluster_wait()
        scale_local[0] = 0.0
        base_local[0] = 0.0
        if lane >= HC_MULT and lane < MIXES:
            scale_local[0] = hc_scale[T.if_then_else(lane < COMB, 1, 2)]
            base_local[0] = hc_base[lane]
        for i in T.serial(OWNED):
            token = i * CLUSTER + rank
            if token < count:
                # m = projection * rsqrt(mean square + rms_eps), one column a lane; scale and base
                T.call_extern("handle", "mhc::inbox_wait", T.access_ptr(inbox_shared[1 + i], "r"))
                for c in T.unroll(CLUSTER):
                    slices_local[c] = 0.0
                    if lane >= HC_MULT and lane < SUMS:
                        slices_local[c] = owned_in_shared[i, c, lane]
                add_tree(slices_local, SLICE_TREE)
                mix[0] = T.rsqrt(T.shfl_sync(slices_local[0], SQUARES) * (1.0 / hidden) + rms_eps)
                logit[0] = slices_local[0] * mix[0] * scale_local[0] + base_local[0]
                # post' = sigmoid(m) * hc_post_mult_value
                sigmoid(logit[0], mix)
                if lane >= HC_MULT and lane < COMB:
                    post_mix[t0 + token, lane - HC_MULT] = mix[0] * hc_post_mult_value
                # comb' = Sinkhorn(softmax_rows(m))
                softmax_row(logit, hc_sinkhorn_eps, mix)
                for q in T.unroll(HC_MULT * HC_MULT):
                    comb_local[q] = T.shfl_sync(mix[0], COMB + q)
                sinkhorn(comb_local, hc_sinkhorn_eps, sinkhorn_repeat)
                if lane == 0:
                    for i_row in T.unroll(HC_MULT):
                        for j in T.vectorized(HC_MULT):
                            comb_mix[t0 + token, i_row, j] = comb_local[i_row * HC_MULT + j]


def expand_pre(hidden: int, *, norm: bool, pdl: bool):
    """Build the expand_pre kernel.

    Args:
        hidden: H, a multiple of 256 up to 7168.
        norm: whether the RMSNorm follows; adds the arguments norm_weight and norm_eps.
        pdl: must be true: clusters and programmatic dependent launch come together (sm_90).

    Returns:
        The TileLang program: (x [n, H] bf16, fn [24, 4 * H] fp32, hc_scale [3] fp32, hc_base [24]
        fp32, norm_weight [H] bf16 if norm, residual_out [n, 4, H] bf16, post_mix [n, 4] fp32,
        comb_mix [n, 4, 4] fp32, layer_input [n, H] bf16, rms_eps, hc_pre_eps, hc_sinkhorn_eps,
        hc_post_mult_value fp32, sinkhorn_repeat int32, norm_eps fp32 if norm, group_tokens int32:
        tokens of a cluster, at most EXPAND_PRE_GROUP_TOKENS).
    """
    tokens = T.dynamic("tokens", "int64")
    threads = (column_warps(hidden) + 1) * WARP

    @T.prim_func
    def mhc_expand_pre(
        x: T.Tensor((tokens, hidden), "bfloat16"),
        fn: T.Tensor((MIXES, HC_MULT * hidden), "float32"),
        hc_scale: T.Tensor((3,), "float32"),
        hc_base: T.Tensor((MIXES,), "float32"),
        residual_out: T.Tensor((tokens, HC_MULT, hidden), "bfloat16"),
        post_mix: T.Tensor((tokens, HC_MULT), "float32"),
        comb_mix: T.Tensor((tokens, HC_MULT, HC_MULT), "float32"),
        layer_input: T.Tensor((tokens, hidden), "bfloat16"),
        rms_eps: T.float32,
        hc_pre_eps: T.float32,
        hc_sinkhorn_eps: T.float32,
        hc_post_mult_value: T.float32,
        sinkhorn_repeat: T.int32,
        group_tokens: T.int32,
    ):
        with T.Kernel(
            T.ceildiv(tokens, group_tokens) * CLUSTER,
            threads=threads,
            cluster_dims=(CLUSTER, 1, 1),
        ) as i_c:
            expand_group(
                x, fn, hc_scale, hc_base, None, residual_out, post_mix, comb_mix, layer_input,
                rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat, None,
                group_tokens, tokens, i_c, hidden, False,
            )  # fmt: skip

    @T.prim_func
    def mhc_expand_pre_norm(
        x: T.Tensor((tokens, hidden), "bfloat16"),
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
    ):
        with T.Kernel(
            T.ceildiv(tokens, group_tokens) * CLUSTER,
            threads=threads,
            cluster_dims=(CLUSTER, 1, 1),
        ) as i_c:
            expand_group(
                x, fn, hc_scale, hc_base, norm_weight, residual_out, post_mix, comb_mix,
                layer_input, rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value,
                sinkhorn_repeat, norm_eps, group_tokens, tokens, i_c, hidden, True,
            )  # fmt: skip

    return mhc_expand_pre_norm if norm else mhc_expand_pre

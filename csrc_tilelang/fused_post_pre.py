"""fused_post_pre: the whole boundary in one launch, for up to 128 tokens.

Algorithm: a cluster of 16 CTAs takes a group of tokens, each CTA a sixteenth of the hidden size in
all 4 streams. It

1. keeps its slice of fn in registers (and shared memory beyond 64 columns a warp), split in three
   bf16 terms, which is done while the previous kernel still runs;
2. computes its slice of the new streams, which stay in shared memory as bf16;
3. projects them with mma.m16n8k16, fn as the A operand (24 of 32 rows) and 8 tokens as B. The last
   8 rows of A are the streams themselves: the diagonal of that product is the sum of squares;
4. sends its 25 sums a token to the CTA that owns the token, which adds the 16 slices up, works out
   the 4 collapse weights and sends them to all CTAs;
5. collapses its slice, sends its sum of squares to all CTAs for the RMSNorm and writes the layer
   input; meanwhile one warp of the owner makes the post weights and runs Sinkhorn.

What CTAs tell each other goes through distributed shared memory into inboxes (mbarriers that count
bytes). A CTA waits only for CTAs of its own cluster, and the hardware starts the CTAs of a cluster
together or not at all, so they all run: no wait depends on another cluster, another kernel or the
order in which CTAs are scheduled. A CTA ends only when all its inboxes are full, so nobody sends to
one that has gone.

Slices, blocks of 32 columns and warps are added up in a fixed order that depends on the hidden size
alone: a token's outputs are the same bits in any batch and at any position.
"""

import tilelang.language as T

from ..geometry import CLUSTER, FEW_CLUSTERS, GROUP_TOKENS
from ._collapse import sigmoid
from ._device import DEVICE_SOURCE, HC_MULT, MIXES, MMA_COLUMNS, SQUARES, VECTOR, WARP
from ._operands import (
    CHUNK,
    SLICE_TREE,
    SUMS,
    SUMS_PITCH,
    UNIT_TERMS,
    UNIT_WEIGHTS,
    add_tree,
    slice_size,
    split_unit,
    store_sums,
)
from ._sinkhorn import COMB, sinkhorn, softmax_row
from ._steps import mix_stream
from .steps import project
from .steps.project import BLOCK_COLUMNS as BLOCK  # noqa: F401
from .steps.project import REGISTER_BLOCKS as REGISTER_UNITS
from .steps.project import STREAMS_PAD as PAD
from .steps.project import WARP_TREE, WARPS
from .steps.project import blocks as units  # noqa: F401
from .steps.project import only_whole_blocks as only_whole_blocks
from .steps.project import shared_blocks as shared_units
from .steps.project import split_shared_block as split_shared_unit

THREADS = WARPS * WARP
COLLAPSE_WARPS = WARPS - 1  # the last one makes the mixes and runs Sinkhorn instead
TOKEN_TILES = -(-GROUP_TOKENS // MMA_COLUMNS)
OWNED = -(-GROUP_TOKENS // CLUSTER)  # tokens of a group that a CTA owns at most
ROUNDS = -(-GROUP_TOKENS // COLLAPSE_WARPS)  # tokens that a warp collapses at most
WEIGHTS_INBOX = OWNED  # inboxes: sums of an owned token, then weights, then squares, of each token
SQUARES_INBOX = WEIGHTS_INBOX + GROUP_TOKENS
INBOXES = SQUARES_INBOX + GROUP_TOKENS


@T.macro
def load_unit(fn, unit, rank, lane, hidden, weights_local, w0):
    """``project.load_block`` with its old parameters."""
    project.load_block(fn, project.Block(unit, rank, lane, hidden), weights_local, w0)


@T.macro
def copy_unit(fn, unit, rank, lane, hidden, terms_shared, slot):
    """``project.copy_block`` with its old parameters."""
    project.copy_block(fn, project.Block(unit, rank, lane, hidden), terms_shared, slot)


@T.macro
def add_unit(
    streams_shared, token, unit, lane, hidden, terms_local, t0, terms_shared, slot, sums_local
):
    """``project.add_block`` with its old parameters."""
    project.add_block(
        streams_shared, token, project.Block(unit, None, lane, hidden),
        project.Terms(terms_local, t0, terms_shared, slot), sums_local,
    )  # fmt: skip


@T.macro
def share_group(
    x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, gain, residual_out, post_mix,
    comb_mix, layer_input, rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value,
    sinkhorn_repeat, norm_eps, early, t0, count, many, warp, i_c, hidden, norm,
):  # fmt: skip
    """One CTA and its group of ``count`` tokens from ``t0`` on, one of ``many`` groups or not."""
    T.import_source(DEVICE_SOURCE)
    size = slice_size(hidden)
    n_shared = shared_units(hidden)
    # threads of a token in the post step: a power of two, for indices without divisions
    row = 1 << (size // CHUNK - 1).bit_length()
    reps = -(-size // (VECTOR * WARP))  # 16-byte vectors of a lane, in the collapse
    rank = i_c % CLUSTER
    tx = T.get_thread_binding()
    lane = tx % WARP

    streams_shared = T.alloc_shared((GROUP_TOKENS, HC_MULT * size + PAD), "bfloat16")
    terms_shared = T.alloc_shared((max(1, n_shared), UNIT_TERMS // 4, WARP, 4), "uint32")
    sums_shared = T.alloc_shared((TOKEN_TILES, WARPS, MMA_COLUMNS, SUMS_PITCH), "float32")
    # in the place of the sums, which come when all have read theirs of it
    x_shared = T.view(
        sums_shared, (TOKEN_TILES * WARPS * MMA_COLUMNS * SUMS_PITCH * 2,), "bfloat16"
    )
    mixes_shared = T.alloc_shared((GROUP_TOKENS, HC_MULT + 1, HC_MULT), "float32")
    slices_shared = T.alloc_shared((OWNED, CLUSTER, WARP), "float32")
    weights_shared = T.alloc_shared((GROUP_TOKENS, HC_MULT), "float32")
    squares_shared = T.alloc_shared((GROUP_TOKENS, CLUSTER), "float32")
    inbox_shared = T.alloc_shared((INBOXES,), "uint64")

    terms_local = T.alloc_local((REGISTER_UNITS * UNIT_TERMS,), "uint32")
    split_terms_local = T.alloc_local((UNIT_TERMS,), "uint32")
    weights_local = T.alloc_local((REGISTER_UNITS * UNIT_WEIGHTS,), "float32")
    shared_weights_local = T.alloc_local((UNIT_WEIGHTS,), "float32")
    x_local = T.alloc_local((CHUNK,), "bfloat16")
    streams_local = T.alloc_local((HC_MULT * CHUNK,), "bfloat16")
    new_local = T.alloc_local((HC_MULT * CHUNK,), "bfloat16")
    post_local = T.alloc_local((HC_MULT,), "float32")
    mixes_local = T.alloc_local(((HC_MULT + 1) * 2,), "float32")
    comb_local = T.alloc_local((HC_MULT * HC_MULT,), "float32")
    sums_local = T.alloc_local((8,), "float32")
    slices_local = T.alloc_local((max(WARPS, CLUSTER),), "float32")
    value_local = T.alloc_local((ROUNDS * reps * VECTOR,), "bfloat16")
    gain_local = T.alloc_local((reps * VECTOR,), "bfloat16")
    collapse_local = T.alloc_local((HC_MULT * VECTOR,), "bfloat16")
    squares = T.alloc_local((1,), "float32")
    scale_local = T.alloc_local((1,), "float32")
    base_local = T.alloc_local((1,), "float32")
    logit = T.alloc_local((1,), "float32")
    mix = T.alloc_local((1,), "float32")
    entry = T.alloc_local((1,), "float32")

    # the inboxes are open before anyone can send: the cluster barrier lies between
    if lane == 0:
        for i0_inbox in T.unroll(-(-INBOXES // WARPS)):
            if i0_inbox * WARPS + warp < INBOXES:
                T.call_extern(
                    "handle",
                    "mhc::inbox_open",
                    T.access_ptr(inbox_shared[i0_inbox * WARPS + warp], "w"),
                    T.if_then_else(
                        i0_inbox * WARPS + warp < WEIGHTS_INBOX,
                        CLUSTER * SUMS * 4,
                        T.if_then_else(
                            i0_inbox * WARPS + warp < SQUARES_INBOX, HC_MULT * 4, CLUSTER * 4
                        ),
                    ),
                )
    # what the barrier must order are the inboxes, and opening one has a fence of its own. Relaxed,
    # 64 and 128 tokens at H = 4096 took 7.08 and 9.70 us, otherwise 7.43 and 10.35; in few clusters
    # 8 and 32 took 4.14 and 5.57, otherwise 4.06 and 5.47
    if many:
        T.call_extern("handle", "tl::cluster_arrive_relaxed")
    else:
        T.cluster_arrive()

    # fn, split: weights, so on their way to L2 while the previous kernel runs, and read then too
    # where the host knows that it does not write them. To L2 by one cluster for all: of seven that
    # asked for the same bytes, 128 tokens took 0.3 us more at H = 4096 and 0.7 at 7168
    if tx < MIXES * HC_MULT and i_c < CLUSTER:
        T.call_extern(
            "handle",
            "mhc::prefetch_l2_bulk",
            T.access_ptr(fn[tx // HC_MULT, tx % HC_MULT * hidden + rank * size], "r"),
            size * 4,
        )
    if early == 0:
        T.pdl_sync()
    # the next kernel may start now, and read fn: if this one must not read early, neither may it
    T.pdl_trigger()
    # all of it under way at once: what goes to shared memory without registers, over the place of
    # its terms
    for u in T.unroll(-(-n_shared // WARPS)):
        if u * WARPS + warp < n_shared:
            copy_unit(
                fn, (u + REGISTER_UNITS) * WARPS + warp, rank, lane, hidden,
                terms_shared, u * WARPS + warp,
            )  # fmt: skip
    for u in T.unroll(REGISTER_UNITS):
        load_unit(fn, u * WARPS + warp, rank, lane, hidden, weights_local, u * UNIT_WEIGHTS)
    if n_shared > 0:
        T.call_extern("handle", "mhc::loads_wait")
        T.sync_warp()
        for u in T.unroll(-(-n_shared // WARPS)):
            if u * WARPS + warp < n_shared:
                split_shared_unit(
                    terms_shared, u * WARPS + warp, lane, shared_weights_local, split_terms_local
                )
    for u in T.unroll(REGISTER_UNITS):
        split_unit(weights_local, u * UNIT_WEIGHTS, terms_local, u * UNIT_TERMS)
    T.cluster_wait()
    T.pdl_sync()

    # post: r'[j] = bf16(post[j] * x + sum_i comb[i, j] * r[i]), in place: all loads are under way
    # together, and take no registers
    for i0_t in T.serial(T.ceildiv(count, THREADS // row * 2)):
        token = i0_t * (THREADS // row * 2) + tx // (row // 2)
        h = tx % (row // 2) * VECTOR
        if token < count and h < size:
            T.call_extern(
                "handle",
                "mhc::load_async16",
                T.access_ptr(x_shared[token * size + h], "w"),
                T.access_ptr(x[t0 + token, rank * size + h], "r"),
            )
            for i in T.unroll(HC_MULT):
                T.call_extern(
                    "handle",
                    "mhc::load_async16",
                    T.access_ptr(streams_shared[token, i * size + h], "w"),
                    T.access_ptr(residual[t0 + token, i, rank * size + h], "r"),
                )
    if tx < count:
        T.call_extern(
            "handle",
            "mhc::load_async16",
            T.access_ptr(mixes_shared[tx, 0, 0], "w"),
            T.access_ptr(post_layer_mix[t0 + tx, 0, 0], "r"),
        )
    elif tx < count * (HC_MULT + 1):
        T.call_extern(
            "handle",
            "mhc::load_async16",
            T.access_ptr(mixes_shared[(tx - count) // HC_MULT, 1 + (tx - count) % HC_MULT, 0], "w"),
            T.access_ptr(
                comb_res_mix[t0 + (tx - count) // HC_MULT, (tx - count) % HC_MULT, 0], "r"
            ),
        )
    T.call_extern("handle", "mhc::loads_wait")
    T.sync_threads()
    for i0_t in T.serial(T.ceildiv(count, THREADS // row)):
        token = i0_t * (THREADS // row) + tx // row
        h = tx % row * CHUNK
        if token < count and h < size:
            for v in T.vectorized(CHUNK):
                x_local[v] = x_shared[token * size + h + v]
            for i in T.unroll(HC_MULT):
                for v in T.vectorized(CHUNK):
                    streams_local[i * CHUNK + v] = streams_shared[token, i * size + h + v]
            for pair in T.unroll(HC_MULT // 2):
                for i in T.unroll(HC_MULT + 1):
                    for j in T.vectorized(2):
                        mixes_local[i * 2 + j] = mixes_shared[token, i, pair * 2 + j]
                for j in T.unroll(2):
                    mix_stream(
                        x_local, 0, streams_local, 0, mixes_local[j], mixes_local, 2 + j, 2,
                        new_local, (pair * 2 + j) * CHUNK, CHUNK,
                    )  # fmt: skip
            for j in T.unroll(HC_MULT):
                for v in T.vectorized(CHUNK):
                    residual_out[t0 + token, j, rank * size + h + v] = new_local[j * CHUNK + v]
                for v in T.vectorized(CHUNK):
                    streams_shared[token, j * size + h + v] = new_local[j * CHUNK + v]
    T.sync_threads()

    # projection and sum of squares of this slice, 8 tokens at a time
    for tile in T.serial(T.ceildiv(count, MMA_COLUMNS)):
        token = T.min(tile * MMA_COLUMNS + lane // 4, count - 1)
        for q in T.unroll(8):
            sums_local[q] = 0.0
        for u in T.unroll(REGISTER_UNITS):
            add_unit(
                streams_shared, token, u * WARPS + warp, lane, hidden,
                terms_local, u * UNIT_TERMS, terms_shared, None, sums_local,
            )  # fmt: skip
        for u in T.unroll(-(-n_shared // WARPS)):
            if u * WARPS + warp < n_shared:
                add_unit(
                    streams_shared, token, (u + REGISTER_UNITS) * WARPS + warp, lane, hidden,
                    terms_local, 0, terms_shared, u * WARPS + warp, sums_local,
                )  # fmt: skip
        store_sums(sums_local, lane, warp, tile, sums_shared)
    T.sync_threads()

    # the warps' sums added up, one warp a token and one lane a sum, and sent to the token's owner
    for i0_t in T.serial(T.ceildiv(count, WARPS)):
        token = i0_t * WARPS + warp
        if token < count and lane < SUMS:
            for w in T.unroll(WARPS):
                slices_local[w] = sums_shared[token // MMA_COLUMNS, w, token % MMA_COLUMNS, lane]
            add_tree(slices_local, WARP_TREE)
            T.call_extern(
                "handle",
                "mhc::send",
                T.access_ptr(slices_shared[token // CLUSTER, rank, lane], "w"),
                T.access_ptr(inbox_shared[token // CLUSTER], "w"),
                token % CLUSTER,
                slices_local[0],
            )

    if warp < COLLAPSE_WARPS:
        # collapse: v = sum_j weight_j * r'_j, one warp a token
        if norm and warp < count:
            for r in T.unroll(reps):
                if (r * WARP + lane) * VECTOR < size:
                    for v in T.vectorized(VECTOR):
                        gain_local[r * VECTOR + v] = gain[
                            rank * size + (r * WARP + lane) * VECTOR + v
                        ]
        for i in T.unroll(ROUNDS):
            if i * COLLAPSE_WARPS + warp < count:
                token = i * COLLAPSE_WARPS + warp
                T.call_extern(
                    "handle",
                    "mhc::inbox_wait",
                    T.access_ptr(inbox_shared[WEIGHTS_INBOX + token], "r"),
                )
                for j in T.vectorized(HC_MULT):
                    post_local[j] = weights_shared[token, j]
                squares[0] = 0.0
                for r in T.unroll(reps):
                    if (r * WARP + lane) * VECTOR < size:
                        for j in T.unroll(HC_MULT):
                            for v in T.vectorized(VECTOR):
                                collapse_local[j * VECTOR + v] = streams_shared[
                                    token, j * size + (r * WARP + lane) * VECTOR + v
                                ]
                        for v in T.unroll(VECTOR):
                            value = T.alloc_var("float32", init=0.0)
                            value = post_local[0] * T.cast(collapse_local[v], "float32")
                            for j in T.unroll(HC_MULT - 1):
                                value = value + post_local[j + 1] * T.cast(
                                    collapse_local[(j + 1) * VECTOR + v], "float32"
                                )
                            squares[0] = squares[0] + value * value
                            value_local[(i * reps + r) * VECTOR + v] = T.cast(value, "bfloat16")
                if norm:
                    squares[0] = T.warp_reduce_sum(squares[0])
                    if lane < CLUSTER:
                        T.call_extern(
                            "handle",
                            "mhc::send",
                            T.access_ptr(squares_shared[token, rank], "w"),
                            T.access_ptr(inbox_shared[SQUARES_INBOX + token], "w"),
                            lane,
                            squares[0],
                        )
        # RMSNorm: y = bf16(bf16(v) * rsqrt(mean(v^2) + norm_eps) * g)
        for i in T.unroll(ROUNDS):
            if i * COLLAPSE_WARPS + warp < count:
                token = i * COLLAPSE_WARPS + warp
                if norm:
                    T.call_extern(
                        "handle",
                        "mhc::inbox_wait",
                        T.access_ptr(inbox_shared[SQUARES_INBOX + token], "r"),
                    )
                    for c in T.vectorized(CLUSTER):
                        slices_local[c] = squares_shared[token, c]
                    add_tree(slices_local, SLICE_TREE)
                    squares[0] = T.rsqrt(slices_local[0] * (1.0 / hidden) + norm_eps)
                for r in T.unroll(reps):
                    if (r * WARP + lane) * VECTOR < size:
                        if norm:
                            for v in T.unroll(VECTOR):
                                value_local[(i * reps + r) * VECTOR + v] = T.cast(
                                    T.cast(value_local[(i * reps + r) * VECTOR + v], "float32")
                                    * squares[0]
                                    * T.cast(gain_local[r * VECTOR + v], "float32"),
                                    "bfloat16",
                                )
                        for v in T.vectorized(VECTOR):
                            layer_input[
                                t0 + token, rank * size + (r * WARP + lane) * VECTOR + v
                            ] = value_local[(i * reps + r) * VECTOR + v]
    elif rank < count:
        # a uniform matrix where there is no second token: it needs no rounds
        entry[0] = 1.0 / HC_MULT
        for i in T.unroll(OWNED):
            # the columns of the second token on the other lanes: combs are 16 of 32
            column = (lane + i * (WARP // OWNED)) % WARP
            token = i * CLUSTER + rank
            if token < count:
                scale_local[0] = 0.0
                base_local[0] = 0.0
                if column < MIXES:
                    scale_local[0] = hc_scale[
                        T.if_then_else(column < HC_MULT, 0, T.if_then_else(column < COMB, 1, 2))
                    ]
                    base_local[0] = hc_base[column]
                # m = projection * rsqrt(mean square + rms_eps), one column a lane; scale and base
                T.call_extern("handle", "mhc::inbox_wait", T.access_ptr(inbox_shared[i], "r"))
                for c in T.unroll(CLUSTER):
                    slices_local[c] = slices_shared[i, c, column]
                add_tree(slices_local, SLICE_TREE)
                mix[0] = T.rsqrt(
                    T.shfl_sync(slices_local[0], SQUARES - i * (WARP // OWNED))
                    * (1.0 / (HC_MULT * hidden))
                    + rms_eps
                )
                logit[0] = slices_local[0] * mix[0] * scale_local[0] + base_local[0]
                # collapse weights: sigmoid(m) + hc_pre_eps, to everyone
                sigmoid(logit[0], mix)
                for j in T.unroll(HC_MULT):
                    post_local[j] = (
                        T.shfl_sync(mix[0], (j + i * (WARP // OWNED)) % WARP) + hc_pre_eps
                    )
                if lane < CLUSTER:
                    T.call_extern(
                        "handle",
                        "mhc::send4",
                        T.access_ptr(weights_shared[token, 0], "w"),
                        T.access_ptr(inbox_shared[WEIGHTS_INBOX + token], "w"),
                        lane,
                        T.access_ptr(post_local[0], "r"),
                    )
                # post' = sigmoid(m) * hc_post_mult_value
                if column >= HC_MULT and column < COMB:
                    post_mix[t0 + token, column - HC_MULT, 0] = mix[0] * hc_post_mult_value
                # comb' = Sinkhorn(softmax_rows(m)): each token in one half of the warp
                softmax_row(logit, hc_sinkhorn_eps, mix)
                if column >= COMB and column < MIXES:
                    entry[0] = mix[0]
        for q in T.unroll(HC_MULT * HC_MULT):
            comb_local[q] = T.shfl_sync(
                entry[0], (COMB + q + lane // (WARP // OWNED) * (WARP // OWNED)) % WARP
            )
        sinkhorn(comb_local, hc_sinkhorn_eps, sinkhorn_repeat)
        token = lane // (WARP // OWNED) * CLUSTER + rank
        if lane % (WARP // OWNED) == 0 and token < count:
            for i in T.unroll(HC_MULT):
                for j in T.vectorized(HC_MULT):
                    comb_mix[t0 + token, i, j] = comb_local[i * HC_MULT + j]


@T.macro
def boundary(
    x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, gain, residual_out, post_mix,
    comb_mix, layer_input, rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value,
    sinkhorn_repeat, norm_eps, group_tokens, early, tokens, i_c, hidden, norm,
):  # fmt: skip
    """One CTA; ``gain`` and ``norm_eps`` are read when ``norm`` is true."""
    t0 = T.alloc_var("int32", init=i_c // CLUSTER * group_tokens)
    count = T.alloc_var("int32", init=T.min(group_tokens, tokens - t0))
    many = tokens > FEW_CLUSTERS * group_tokens
    warp = T.get_thread_binding() // WARP
    if not 0 < shared_units(hidden) < WARPS:
        # from lane 0, so that the compiler knows it to be the same in all lanes: an eighth to a
        # fifth fewer instructions, 14.60 us for 14.73 for 128 tokens at H = 7168. Not where some
        # warps have units in shared memory and some have none: 13.5 for 13.2 at H = 5120
        warp = T.alloc_var("int32", init=T.shfl_sync(T.get_thread_binding() // WARP, 0))
    # handed on, they are variables no more: TileLang splits an if that asks for a variable into one
    # for each statement
    share_group(
        x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, gain, residual_out,
        post_mix, comb_mix, layer_input, rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value,
        sinkhorn_repeat, norm_eps, early, t0, count, many, warp, i_c, hidden, norm,
    )  # fmt: skip


def fused_post_pre(hidden: int, *, norm: bool, pdl: bool):
    """Build the fused_post_pre kernel.

    Args:
        hidden: H, a multiple of 256 up to 7168.
        norm: whether the RMSNorm follows; adds the arguments norm_weight and norm_eps.
        pdl: must be true: clusters and programmatic dependent launch come together (sm_90).

    Returns:
        The TileLang program: (x [n, H] bf16, residual [n, 4, H] bf16, post_layer_mix [n, 4, 1]
        fp32, comb_res_mix [n, 4, 4] fp32, fn [24, 4 * H] fp32, hc_scale [3] fp32, hc_base [24]
        fp32, norm_weight [H] bf16 if norm, residual_out [n, 4, H] bf16, post_mix [n, 4, 1] fp32,
        comb_mix [n, 4, 4] fp32, layer_input [n, H] bf16, rms_eps, hc_pre_eps, hc_sinkhorn_eps,
        hc_post_mult_value fp32, sinkhorn_repeat int32, norm_eps fp32 if norm, group_tokens int32:
        tokens of a cluster, at most GROUP_TOKENS; early int32: whether fn may be read before the
        previous kernel has finished).
    """
    tokens = T.dynamic("tokens", "int32")

    @T.prim_func
    def mhc_fused_post_pre(
        x: T.Tensor((tokens, hidden), "bfloat16"),
        residual: T.Tensor((tokens, HC_MULT, hidden), "bfloat16"),
        post_layer_mix: T.Tensor((tokens, HC_MULT, 1), "float32"),
        comb_res_mix: T.Tensor((tokens, HC_MULT, HC_MULT), "float32"),
        fn: T.Tensor((MIXES, HC_MULT * hidden), "float32"),
        hc_scale: T.Tensor((3,), "float32"),
        hc_base: T.Tensor((MIXES,), "float32"),
        residual_out: T.Tensor((tokens, HC_MULT, hidden), "bfloat16"),
        post_mix: T.Tensor((tokens, HC_MULT, 1), "float32"),
        comb_mix: T.Tensor((tokens, HC_MULT, HC_MULT), "float32"),
        layer_input: T.Tensor((tokens, hidden), "bfloat16"),
        rms_eps: T.float32,
        hc_pre_eps: T.float32,
        hc_sinkhorn_eps: T.float32,
        hc_post_mult_value: T.float32,
        sinkhorn_repeat: T.int32,
        group_tokens: T.int32,
        early: T.int32,
    ):
        with T.Kernel(
            T.ceildiv(tokens, group_tokens) * CLUSTER,
            threads=THREADS,
            cluster_dims=(CLUSTER, 1, 1),
        ) as i_c:
            boundary(
                x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, None,
                residual_out, post_mix, comb_mix, layer_input, rms_eps, hc_pre_eps,
                hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat, None, group_tokens, early,
                tokens, i_c, hidden, False,
            )  # fmt: skip

    @T.prim_func
    def mhc_fused_post_pre_norm(
        x: T.Tensor((tokens, hidden), "bfloat16"),
        residual: T.Tensor((tokens, HC_MULT, hidden), "bfloat16"),
        post_layer_mix: T.Tensor((tokens, HC_MULT, 1), "float32"),
        comb_res_mix: T.Tensor((tokens, HC_MULT, HC_MULT), "float32"),
        fn: T.Tensor((MIXES, HC_MULT * hidden), "float32"),
        hc_scale: T.Tensor((3,), "float32"),
        hc_base: T.Tensor((MIXES,), "float32"),
        norm_weight: T.Tensor((hidden,), "bfloat16"),
        residual_out: T.Tensor((tokens, HC_MULT, hidden), "bfloat16"),
        post_mix: T.Tensor((tokens, HC_MULT, 1), "float32"),
        comb_mix: T.Tensor((tokens, HC_MULT, HC_MULT), "float32"),
        layer_input: T.Tensor((tokens, hidden), "bfloat16"),
        rms_eps: T.float32,
        hc_pre_eps: T.float32,
        hc_sinkhorn_eps: T.float32,
        hc_post_mult_value: T.float32,
        sinkhorn_repeat: T.int32,
        norm_eps: T.float32,
        group_tokens: T.int32,
        early: T.int32,
    ):
        with T.Kernel(
            T.ceildiv(tokens, group_tokens) * CLUSTER,
            threads=THREADS,
            cluster_dims=(CLUSTER, 1, 1),
        ) as i_c:
            boundary(
                x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, norm_weight,
                residual_out, post_mix, comb_mix, layer_input, rms_eps, hc_pre_eps,
                hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat, norm_eps, group_tokens,
                early, tokens, i_c, hidden, True,
            )  # fmt: skip

    return mhc_fused_post_pre_norm if norm else mhc_fused_post_pre

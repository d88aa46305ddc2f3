"""Steps of the kernels that loop over tiles of tokens: ``pre`` and ``fused_post_pre_persistent``.

A cluster of 16 CTAs shares the hidden dimension and keeps its slices of fn on the chip, in three
bf16 terms, while it loops over tiles of 16 tokens (8 where a slice has more than 320 columns). 8
projection warps of a CTA hold fn; its token warps own 1 or 2 tokens of a tile each. Whoever owns a
token's mixes, one CTA of the 16, is sent its sums, sends its collapse weights to all, and makes its
post weights and comb when all tiles are done: in the loop, with fn in registers, Sinkhorn spilled.

What CTAs tell each other goes through inboxes as in ``fused_post_pre``, of two or three sets in
turn, opened again by a thread that has waited.
"""

import tilelang.language as T

from ..geometry import CLUSTER, tile_tokens
from ._collapse import sigmoid
from ._device import HC_MULT, MIXES, MMA_COLUMNS, SQUARES, VECTOR, WARP
from ._operands import SLICE_TREE, SUMS, SUMS_PITCH, add_tree, slice_size
from ._sinkhorn import COMB, sinkhorn, softmax_rows
from ._steps import widen
from .fused_post_pre import WARP_TREE, WARPS

PROJECTION_WARPS = 8  # each with the units of two warps of fused_post_pre
PROJECTION_THREADS = PROJECTION_WARPS * WARP
HALVES = WARPS // PROJECTION_WARPS


def clusters(tokens, group_tokens, larger_groups, hidden):
    """Clusters that share ``tokens``; the first ``larger_groups`` have a tile more."""
    return T.ceildiv(tokens - larger_groups * tile_tokens(hidden), group_tokens)


def first_token(cluster, group_tokens, larger_groups, hidden):
    """The first token of a cluster, with such a share of them."""
    return cluster * group_tokens + T.min(cluster, larger_groups) * tile_tokens(hidden)


def most_tokens(cluster, group_tokens, larger_groups, hidden):
    """Tokens of a cluster, if there are so many left."""
    return group_tokens + T.if_then_else(cluster < larger_groups, tile_tokens(hidden), 0)


def tokens_here(i, size, count):
    """Tokens of tile ``i`` of ``size`` tokens, 0 past the end."""
    return T.max(T.min(size, count - i * size), 0)


def weights_bytes(i, hidden, count):
    """What the owners send of tile ``i``: 4 weights a token."""
    return tokens_here(i, tile_tokens(hidden), count) * (HC_MULT * 4)


def squares_bytes(i, per, hidden, count):
    """What 16 CTAs send of tile ``i``: a sum a token, as many at once as a token warp has."""
    return T.ceildiv(tokens_here(i, tile_tokens(hidden), count), per) * (per * CLUSTER * 4)


@T.macro
def load_constants(hc_scale, hc_base, gain, rank, me, lane, hidden, norm, hc_shared, gain_shared):
    """Scales and biases, and the norm's weights of this CTA's columns, by token warp 0."""
    size = slice_size(hidden)
    if me == 0 and lane < 3:
        hc_shared[lane] = hc_scale[lane]
    if me == 0 and lane < MIXES:
        hc_shared[3 + lane] = hc_base[lane]
    if norm and me == 0:
        for r in T.unroll(-(-size // (WARP * VECTOR))):
            if (r * WARP + lane) * VECTOR < size:
                for v in T.vectorized(VECTOR):
                    gain_shared[(r * WARP + lane) * VECTOR + v] = gain[
                        rank * size + (r * WARP + lane) * VECTOR + v
                    ]


@T.macro
def send_sums(sums_shared, set0, token, v0, slot, inbox, owner):
    """Sums ``v0`` to ``v0 + 3`` of a token, those of the projection warps added up, to its owner.

    ``slot`` and ``inbox`` are those of this CTA, for the token's tile.
    """
    lower_local = T.alloc_local((4,), "float32")
    upper_local = T.alloc_local((4,), "float32")
    vectors_local = T.alloc_local((PROJECTION_WARPS // 2 * 4,), "float32")
    for w in T.unroll(PROJECTION_WARPS // 2):
        for v in T.vectorized(4):
            lower_local[v] = sums_shared[
                set0 + token // MMA_COLUMNS, w, token % MMA_COLUMNS, v0 + v
            ]
        for v in T.vectorized(4):
            upper_local[v] = sums_shared[
                set0 + token // MMA_COLUMNS,
                w + PROJECTION_WARPS // 2,
                token % MMA_COLUMNS,
                v0 + v,
            ]
        for v in T.unroll(4):
            vectors_local[w * 4 + v] = lower_local[v] + upper_local[v]
    for half in WARP_TREE[2:]:
        for q in T.unroll(half * 4):
            vectors_local[q] = vectors_local[q] + vectors_local[half * 4 + q]
    T.call_extern("handle", "mhc::send4", slot, inbox, owner, T.access_ptr(vectors_local[0], "r"))


@T.macro
def make_weights(
    i, own, slices_shared, sums_inbox, hc_shared, weights_shared, weights_inbox, rms_eps,
    hc_pre_eps, lane, hidden, logit,
):  # fmt: skip
    """Collapse weights of token ``own`` of tile ``i``, which this CTA owns, to all, by one warp.

    logit[0] of lane c < 24 is its logit c then.
    """
    slices_local = T.alloc_local((CLUSTER,), "float32")
    pre_local = T.alloc_local((HC_MULT,), "float32")
    scale = T.alloc_local((1,), "float32")
    base = T.alloc_local((1,), "float32")
    mix = T.alloc_local((1,), "float32")
    every = CLUSTER // tile_tokens(hidden)  # a CTA owns one token in every so many tiles
    owned = slices_shared.shape[0]
    # m = projection * rsqrt(mean square + rms_eps), one column a lane; scale, base
    scale[0] = hc_shared[T.if_then_else(lane < HC_MULT, 0, T.if_then_else(lane < COMB, 1, 2))]
    base[0] = hc_shared[3 + T.min(lane, MIXES - 1)]
    T.call_extern(
        "handle",
        "mhc::inbox_wait",
        T.access_ptr(sums_inbox[i // every % owned], "r"),
        i // every // owned % 2,
    )
    for c in T.unroll(CLUSTER):
        slices_local[c] = slices_shared[i // every % owned, c, T.min(lane, SUMS - 1)]
    T.sync_warp()
    if lane == 0:
        T.call_extern(
            "handle",
            "mhc::inbox_again",
            T.access_ptr(sums_inbox[i // every % owned], "w"),
            CLUSTER * SUMS_PITCH * 4,
        )
    add_tree(slices_local, SLICE_TREE)
    mix[0] = T.rsqrt(T.shfl_sync(slices_local[0], SQUARES) * (1.0 / (HC_MULT * hidden)) + rms_eps)
    logit[0] = slices_local[0] * mix[0] * scale[0] + base[0]
    # collapse weights: sigmoid(m) + hc_pre_eps, to everyone
    sigmoid(logit[0], mix)
    mix[0] = mix[0] + hc_pre_eps
    for j in T.unroll(HC_MULT):
        pre_local[j] = T.shfl_sync(mix[0], j)
    if lane < CLUSTER:
        T.call_extern(
            "handle",
            "mhc::send4",
            T.access_ptr(weights_shared[i % 2, own, 0], "w"),
            T.access_ptr(weights_inbox[i % 2], "w"),
            lane,
            T.access_ptr(pre_local[0], "r"),
        )


@T.macro
def leave_logits(t, logit, lane, post_mix, comb_mix):
    """The logits of post weights and comb of token ``t`` where their results will be."""
    if lane >= HC_MULT and lane < COMB:
        post_mix[t, lane - HC_MULT, 0] = logit[0]
    elif lane >= COMB and lane < MIXES:
        comb_mix[t, (lane - COMB) // HC_MULT, lane % HC_MULT] = logit[0]


@T.macro
def finish_mixes(
    first, count, rank, thread, threads, post_mix, comb_mix, hc_sinkhorn_eps, hc_post_mult_value,
    sinkhorn_repeat,
):  # fmt: skip
    """Of the tokens that this CTA owns, one a thread of ``threads``, from logits in their place:

    post' = sigmoid(m) * hc_post_mult_value, comb' = Sinkhorn(softmax_rows(m)).
    """
    post_local = T.alloc_local((HC_MULT,), "float32")
    comb_local = T.alloc_local((HC_MULT * HC_MULT,), "float32")
    mix = T.alloc_local((1,), "float32")
    for k in T.serial(T.ceildiv(count, threads * CLUSTER)):
        t = (k * threads + thread) * CLUSTER + rank
        if thread < threads and t < count:
            for j in T.vectorized(HC_MULT):
                post_local[j] = post_mix[first + t, j, 0]
            for r in T.unroll(HC_MULT):
                for j in T.vectorized(HC_MULT):
                    comb_local[r * HC_MULT + j] = comb_mix[first + t, r, j]
            for j in T.unroll(HC_MULT):
                sigmoid(post_local[j], mix)
                post_local[j] = mix[0] * hc_post_mult_value
            for j in T.vectorized(HC_MULT):
                post_mix[first + t, j, 0] = post_local[j]
            softmax_rows(comb_local, hc_sinkhorn_eps)
            sinkhorn(comb_local, hc_sinkhorn_eps, sinkhorn_repeat)
            for r in T.unroll(HC_MULT):
                for j in T.vectorized(HC_MULT):
                    comb_mix[first + t, r, j] = comb_local[r * HC_MULT + j]


@T.macro
def collapse_tile(
    i, buffer, again, weights_shared, weights_inbox, streams_shared, squares_shared, squares_inbox,
    value_local, layer_input, first, count, rank, me, per, lane, hidden, norm,
):  # fmt: skip
    """collapse: v = sum_j weight_j * r'_j, of the ``per`` tokens of token warp ``me``.

    They are those of tile ``i``, in ``buffer``. The rounding of v stays in value_local and its
    squares go to all CTAs where the norm follows; it is the layer input otherwise. Tokens past the
    end are made like the others and not stored, so that the tokens of a warp overlap. ``again``:
    whether this set of weights is used again.
    """
    size = slice_size(hidden)
    tile = tile_tokens(hidden)
    reps = -(-size // (WARP * VECTOR))
    sets = squares_inbox.shape[0]
    row0 = me * per
    collapse_weights = T.alloc_local((per * HC_MULT,), "float32")
    collapse_local = T.alloc_local((HC_MULT * VECTOR,), "bfloat16")
    wide_local = T.alloc_local((VECTOR,), "float32")
    total_local = T.alloc_local((VECTOR,), "float32")
    squares_local = T.alloc_local((per,), "float32")
    T.call_extern("handle", "mhc::inbox_wait", T.access_ptr(weights_inbox[i % 2], "r"), i // 2 % 2)
    for k in T.unroll(per):
        for j in T.vectorized(HC_MULT):
            collapse_weights[k * HC_MULT + j] = weights_shared[i % 2, row0 + k, j]
    T.sync_warp()
    if me == 0 and lane == 0 and again:
        T.call_extern(
            "handle",
            "mhc::inbox_again",
            T.access_ptr(weights_inbox[i % 2], "w"),
            weights_bytes(i + 2, hidden, count),
        )
    for k in T.unroll(per):
        squares_local[k] = 0.0
    for r in T.unroll(reps):
        if (r * WARP + lane) * VECTOR < size:
            for k in T.unroll(per):
                for j in T.unroll(HC_MULT):
                    for v in T.vectorized(VECTOR):
                        collapse_local[j * VECTOR + v] = streams_shared[
                            buffer * tile + row0 + k, j * size + (r * WARP + lane) * VECTOR + v
                        ]
                widen(collapse_local, 0, VECTOR, wide_local)
                for v in T.unroll(VECTOR):
                    total_local[v] = collapse_weights[k * HC_MULT] * wide_local[v]
                for j in T.unroll(HC_MULT - 1):
                    widen(collapse_local, (j + 1) * VECTOR, VECTOR, wide_local)
                    for v in T.unroll(VECTOR):
                        total_local[v] = (
                            total_local[v] + collapse_weights[k * HC_MULT + j + 1] * wide_local[v]
                        )
                for v in T.unroll(VECTOR):
                    squares_local[k] = squares_local[k] + total_local[v] * total_local[v]
                for v in T.vectorized(VECTOR):
                    value_local[(k * reps + r) * VECTOR + v] = T.cast(total_local[v], "bfloat16")
                if not norm and i * tile + row0 + k < count:
                    for v in T.vectorized(VECTOR):
                        layer_input[
                            first + i * tile + row0 + k,
                            rank * size + (r * WARP + lane) * VECTOR + v,
                        ] = value_local[(k * reps + r) * VECTOR + v]
    if norm:
        for k in T.unroll(per):
            squares_local[k] = T.warp_reduce_sum(squares_local[k])
        if lane < CLUSTER:
            if per == 2:
                T.call_extern(
                    "handle",
                    "mhc::send2",
                    T.access_ptr(squares_shared[i % sets, rank, row0], "w"),
                    T.access_ptr(squares_inbox[i % sets], "w"),
                    lane,
                    squares_local[0],
                    squares_local[per - 1],
                )
            else:
                T.call_extern(
                    "handle",
                    "mhc::send",
                    T.access_ptr(squares_shared[i % sets, rank, row0], "w"),
                    T.access_ptr(squares_inbox[i % sets], "w"),
                    lane,
                    squares_local[0],
                )


@T.macro
def normalise_tile(
    i, again, squares_shared, squares_inbox, value_local, gain_shared, layer_input, norm_eps, first,
    count, rank, me, per, lane, hidden,
):  # fmt: skip
    """RMSNorm: bf16(bf16(v) * rsqrt(mean(v^2) + norm_eps) * g) of what collapse_tile left.

    ``again``: whether this set of squares is used again.
    """
    size = slice_size(hidden)
    tile = tile_tokens(hidden)
    reps = -(-size // (WARP * VECTOR))
    sets = squares_inbox.shape[0]
    row0 = me * per
    squares = T.alloc_local((1,), "float32")
    squares_local = T.alloc_local((per,), "float32")
    gain_local = T.alloc_local((VECTOR,), "bfloat16")
    out_local = T.alloc_local((VECTOR,), "bfloat16")
    wide_local = T.alloc_local((VECTOR,), "float32")
    total_local = T.alloc_local((VECTOR,), "float32")
    T.call_extern(
        "handle",
        "mhc::inbox_wait",
        T.access_ptr(squares_inbox[i % sets], "r"),
        i // sets % 2,
    )
    # each half of the warp adds up a token, where it has two
    squares[0] = squares_shared[i % sets, lane % CLUSTER, row0 + lane // CLUSTER % per]
    T.sync_warp()
    if me == 0 and lane == 0 and again:
        T.call_extern(
            "handle",
            "mhc::inbox_again",
            T.access_ptr(squares_inbox[i % sets], "w"),
            squares_bytes(i + sets, per, hidden, count),
        )
    for half in SLICE_TREE:
        squares[0] = squares[0] + T.shfl_xor(squares[0], half)
    squares[0] = T.rsqrt(squares[0] * (1.0 / hidden) + norm_eps)
    for k in T.unroll(per):
        squares_local[k] = T.shfl_sync(squares[0], k * CLUSTER)
    for r in T.unroll(reps):
        if (r * WARP + lane) * VECTOR < size:
            for v in T.vectorized(VECTOR):
                gain_local[v] = gain_shared[(r * WARP + lane) * VECTOR + v]
            for k in T.unroll(per):
                widen(value_local, (k * reps + r) * VECTOR, VECTOR, wide_local)
                widen(gain_local, 0, VECTOR, total_local)
                for v in T.unroll(VECTOR):
                    total_local[v] = wide_local[v] * squares_local[k] * total_local[v]
                for v in T.vectorized(VECTOR):
                    out_local[v] = T.cast(total_local[v], "bfloat16")
                if i * tile + row0 + k < count:
                    for v in T.vectorized(VECTOR):
                        layer_input[
                            first + i * tile + row0 + k,
                            rank * size + (r * WARP + lane) * VECTOR + v,
                        ] = out_local[v]

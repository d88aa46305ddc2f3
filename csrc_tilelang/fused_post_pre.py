"""fused_post_pre: the whole boundary in one launch, for up to 128 tokens.

Algorithm: a cluster of 16 CTAs takes a group of tokens, each CTA a sixteenth of the hidden size in
all 4 streams. It

1. keeps its slice of fn in registers (and shared memory beyond 64 columns a warp), split in three
   bf16 terms, which is done while the previous kernel still runs;
2. computes its slice of the new streams, which stay in shared memory as bf16;
3. projects them on tensor cores, 8 tokens at a time, and sums up their squares;
4. sends its 25 sums a token to the CTA that owns the token, which adds the 16 slices up, works out
   the 4 collapse weights and sends them to all CTAs;
5. collapses its slice, sends its sum of squares to all CTAs for the RMSNorm and writes the layer
   input; meanwhile one warp of the owner makes the post weights and runs Sinkhorn.

Slices, blocks of 32 columns and warps are added up in a fixed order that depends on the hidden size
alone: a token's outputs are the same bits in any batch and at any position.
"""

from typing import Any, NamedTuple

import tilelang.language as T

from ..geometry import FEW_CLUSTERS, GROUP_TOKENS
from .arguments import Arguments, Collapse, Context, Mixing, Post
from .device import SOURCE, cluster_arrive_relaxed, load_async16, loads_wait
from .layout import (
    CLUSTER,
    COMB,
    HC_MULT,
    MIXES,
    MMA_COLUMNS,
    SQUARES,
    VECTOR,
    WARP,
    clusters,
    first_token,
    slice_size,
)
from .steps.collapse import add_squares as add_value_squares
from .steps.collapse import collapse, norm_factor, normalise, round_values
from .steps.exchange import (
    Exchange,
    add_slices,
    add_squares,
    inboxes,
    open_inboxes,
    owned_tokens,
    send_squares,
    send_sums,
    send_weights,
    wait_for_weights,
)
from .steps.mixes import load_scale_and_base, logit, sigmoid, store_comb
from .steps.post import Comb, Old, mix_stream
from .steps.project import (
    BLOCK_TERMS,
    BLOCK_WEIGHTS,
    CHUNK,
    REGISTER_BLOCKS,
    STREAMS_PAD,
    SUMS_PITCH,
    TOKEN_SUMS,
    WARPS,
    Block,
    Terms,
    add_block,
    copy_block,
    load_block,
    prefetch_fn,
    shared_blocks,
    split_block,
    split_shared_block,
    store_sums,
)
from .steps.sinkhorn import sinkhorn, softmax_row

THREADS = WARPS * WARP
COLLAPSE_WARPS = WARPS - 1  # The last warp makes the mixes and runs Sinkhorn instead.
TOKEN_TILES = -(-GROUP_TOKENS // MMA_COLUMNS)
OWNED = owned_tokens(GROUP_TOKENS)
OWNED_LANES = WARP // OWNED  # of an owned token, in the warp that makes the mixes
ROUNDS = -(-GROUP_TOKENS // COLLAPSE_WARPS)  # tokens that a warp collapses at most


class Tokens(NamedTuple):
    """What a CTA keeps of its tokens.

    Attributes:
        streams_shared: the old streams of each token, then the new ones.
        x_shared: x, where the projection's sums come when all have read theirs of it.
        mixes_shared: the post weights and the comb of each token.
    """

    streams_shared: Any
    x_shared: Any
    mixes_shared: Any


def repetitions(hidden: int) -> int:
    """Return how many vectors of 16 bytes a lane has of a token's slice."""
    return -(-slice_size(hidden) // (VECTOR * WARP))


def element(r, lane):
    """Return the first element of a lane's vector ``r``, in the slice."""
    return (r * WARP + lane) * VECTOR


def post_threads(hidden: int) -> int:
    """Return how many threads a token has in the post step, 4 elements each.

    It is a power of two (NOTES.md, "Indices without divisions").
    """
    return 1 << (slice_size(hidden) // CHUNK - 1).bit_length()


@T.macro
def load_terms(fn, terms, at):
    """The CTA's slice of fn, split in three terms: warp w has the blocks w, w + 16 and so on.

    All of it is under way at once; what goes to shared memory takes no registers, and stands where
    its terms will.
    """
    rounds = -(-shared_blocks(at.hidden) // WARPS)
    weights_local = T.alloc_local((REGISTER_BLOCKS * BLOCK_WEIGHTS,), "float32")
    for u in T.unroll(rounds):
        if u * WARPS + at.warp < shared_blocks(at.hidden):
            block = Block((u + REGISTER_BLOCKS) * WARPS + at.warp, at.rank, at.lane, at.hidden)
            copy_block(fn, block, terms.terms_shared, u * WARPS + at.warp)
    for u in T.unroll(REGISTER_BLOCKS):
        block = Block(u * WARPS + at.warp, at.rank, at.lane, at.hidden)
        load_block(fn, block, weights_local, u * BLOCK_WEIGHTS)
    if rounds > 0:
        shared_weights_local = T.alloc_local((BLOCK_WEIGHTS,), "float32")
        shared_terms_local = T.alloc_local((BLOCK_TERMS,), "uint32")
        loads_wait()
        T.sync_warp()
        for u in T.unroll(rounds):
            if u * WARPS + at.warp < shared_blocks(at.hidden):
                split_shared_block(
                    terms.terms_shared, u * WARPS + at.warp, at.lane, shared_weights_local,
                    shared_terms_local,
                )  # fmt: skip
    for u in T.unroll(REGISTER_BLOCKS):
        split_block(weights_local, u * BLOCK_WEIGHTS, terms.terms_local, u * BLOCK_TERMS)


@T.macro
def load_tokens(post, tokens, at):
    """x, the old streams, post weights and combs: all under way together, without registers."""
    size = slice_size(at.hidden)
    threads = post_threads(at.hidden) * CHUNK // VECTOR
    for i0_t in T.serial(T.ceildiv(at.count, THREADS // threads)):
        token = i0_t * (THREADS // threads) + at.tx // threads
        h = at.tx % threads * VECTOR
        if token < at.count and h < size:
            load_async16(
                tokens.x_shared[token * size + h], post.x[at.first + token, at.rank * size + h]
            )
            for i in T.unroll(HC_MULT):
                load_async16(
                    tokens.streams_shared[token, i * size + h],
                    post.residual[at.first + token, i, at.rank * size + h],
                )
    if at.tx < at.count:
        load_async16(tokens.mixes_shared[at.tx, 0, 0], post.post_layer_mix[at.first + at.tx, 0])
    elif at.tx < at.count * (HC_MULT + 1):
        token = (at.tx - at.count) // HC_MULT
        row = (at.tx - at.count) % HC_MULT
        load_async16(
            tokens.mixes_shared[token, 1 + row, 0], post.comb_res_mix[at.first + token, row, 0]
        )
    loads_wait()


@T.macro
def mix_tokens(post, tokens, at):
    """post: the new streams, in the place of the old ones and in memory."""
    size = slice_size(at.hidden)
    threads = post_threads(at.hidden)
    x_local = T.alloc_local((CHUNK,), "bfloat16")
    streams_local = T.alloc_local((HC_MULT * CHUNK,), "bfloat16")
    new_local = T.alloc_local((HC_MULT * CHUNK,), "bfloat16")
    mixes_local = T.alloc_local(((HC_MULT + 1) * 2,), "float32")
    for i0_t in T.serial(T.ceildiv(at.count, THREADS // threads)):
        token = i0_t * (THREADS // threads) + at.tx // threads
        h = at.tx % threads * CHUNK
        if token < at.count and h < size:
            for v in T.vectorized(CHUNK):
                x_local[v] = tokens.x_shared[token * size + h + v]
            for i in T.unroll(HC_MULT):
                for v in T.vectorized(CHUNK):
                    streams_local[i * CHUNK + v] = tokens.streams_shared[token, i * size + h + v]
            for pair in T.unroll(HC_MULT // 2):
                for i in T.unroll(HC_MULT + 1):
                    for j in T.vectorized(2):
                        mixes_local[i * 2 + j] = tokens.mixes_shared[token, i, pair * 2 + j]
                for j in T.unroll(2):
                    mix_stream(
                        Old(x_local, streams_local, CHUNK), mixes_local[j],
                        Comb(mixes_local, 2 + j, 2), new_local, (pair * 2 + j) * CHUNK,
                    )  # fmt: skip
            for j in T.unroll(HC_MULT):
                for v in T.vectorized(CHUNK):
                    post.residual_out[at.first + token, j, at.rank * size + h + v] = new_local[
                        j * CHUNK + v
                    ]
                for v in T.vectorized(CHUNK):
                    tokens.streams_shared[token, j * size + h + v] = new_local[j * CHUNK + v]


@T.macro
def project_tokens(streams_shared, terms, sums_shared, at):
    """Projection and sum of squares of this slice, 8 tokens at a time."""
    n_shared = shared_blocks(at.hidden)
    sums_local = T.alloc_local((TOKEN_SUMS,), "float32")
    for tile in T.serial(T.ceildiv(at.count, MMA_COLUMNS)):
        token = T.min(tile * MMA_COLUMNS + at.lane // 4, at.count - 1)
        for q in T.unroll(TOKEN_SUMS):
            sums_local[q] = 0.0
        for u in T.unroll(REGISTER_BLOCKS):
            block = Block(u * WARPS + at.warp, at.rank, at.lane, at.hidden)
            add_block(
                streams_shared, token, block, Terms(terms.terms_local, u * BLOCK_TERMS), sums_local
            )
        for u in T.unroll(-(-n_shared // WARPS)):
            if u * WARPS + at.warp < n_shared:
                block = Block((u + REGISTER_BLOCKS) * WARPS + at.warp, at.rank, at.lane, at.hidden)
                add_block(
                    streams_shared, token, block, terms.in_slot(u * WARPS + at.warp), sums_local
                )
        store_sums(sums_local, at.lane, at.warp, tile, sums_shared)


@T.macro
def collapse_tokens(streams_shared, exchange, output, value_local, at):
    """collapse: a warp has a token, whose v stays in registers, rounded."""
    size = slice_size(at.hidden)
    reps = repetitions(at.hidden)
    weights_local = T.alloc_local((HC_MULT,), "float32")
    streams_local = T.alloc_local((HC_MULT * VECTOR,), "bfloat16")
    total_local = T.alloc_local((VECTOR,), "float32")
    squares = T.alloc_local((1,), "float32")
    for i in T.unroll(ROUNDS):
        token = i * COLLAPSE_WARPS + at.warp
        if token < at.count:
            wait_for_weights(token, exchange, weights_local)
            squares[0] = 0.0
            for r in T.unroll(reps):
                if element(r, at.lane) < size:
                    for j in T.unroll(HC_MULT):
                        for v in T.vectorized(VECTOR):
                            streams_local[j * VECTOR + v] = streams_shared[
                                token, j * size + element(r, at.lane) + v
                            ]
                    collapse(streams_local, 0, weights_local, 0, total_local)
                    add_value_squares(total_local, squares, 0)
                    round_values(total_local, value_local, (i * reps + r) * VECTOR)
            if output.norm:
                send_squares(token, squares, exchange, at)


@T.macro
def store_tokens(exchange, output, gain_local, value_local, at):
    """The collapsed tokens, after the RMSNorm if there is one, to memory."""
    size = slice_size(at.hidden)
    reps = repetitions(at.hidden)
    total_local = T.alloc_local((VECTOR,), "float32")
    factor = T.alloc_local((1,), "float32")
    for i in T.unroll(ROUNDS):
        token = i * COLLAPSE_WARPS + at.warp
        if token < at.count:
            if output.norm:
                add_squares(token, exchange, factor)
                factor[0] = norm_factor(factor[0], at.hidden, output.norm_eps)
            for r in T.unroll(reps):
                v0 = (i * reps + r) * VECTOR
                if element(r, at.lane) < size:
                    if output.norm:
                        normalise(value_local, v0, factor[0], gain_local, r * VECTOR, total_local)
                        round_values(total_local, value_local, v0)
                    for v in T.vectorized(VECTOR):
                        output.out[at.first + token, at.rank * size + element(r, at.lane) + v] = (
                            value_local[v0 + v]
                        )


@T.macro
def load_gain(output, gain_local, at):
    """This lane's elements of the norm's weight, in a warp that has a token."""
    size = slice_size(at.hidden)
    if at.warp < at.count:
        for r in T.unroll(repetitions(at.hidden)):
            if element(r, at.lane) < size:
                for v in T.vectorized(VECTOR):
                    gain_local[r * VECTOR + v] = output.norm_weight[
                        at.rank * size + element(r, at.lane) + v
                    ]


@T.macro
def make_mixes(exchange, mixing, at):
    """The mixes of the tokens that this CTA owns, by one warp: lane c has column c.

    Of the second token lane 16 has column 0, so that each comb is in a half of the warp.
    """
    comb_local = T.alloc_local((HC_MULT * HC_MULT,), "float32")
    total = T.alloc_local((1,), "float32")
    scale_local = T.alloc_local((1,), "float32")
    base_local = T.alloc_local((1,), "float32")
    logit_local = T.alloc_local((1,), "float32")
    mix = T.alloc_local((1,), "float32")
    weight = T.alloc_local((1,), "float32")
    entry = T.alloc_local((1,), "float32")
    # A uniform matrix needs no rounds: it stands where there is no second token.
    entry[0] = 1.0 / HC_MULT
    for i in T.unroll(OWNED):
        column = (at.lane + i * OWNED_LANES) % WARP
        token = i * CLUSTER + at.rank
        if token < at.count:
            load_scale_and_base(mixing, column, scale_local, base_local)
            add_slices(i, column, exchange, total)
            logit_local[0] = logit(
                total[0], T.shfl_sync(total[0], SQUARES - i * OWNED_LANES), HC_MULT * at.hidden,
                mixing.rms_eps, scale_local[0], base_local[0],
            )  # fmt: skip
            mix[0] = sigmoid(logit_local[0])
            weight[0] = mix[0] + mixing.hc_pre_eps
            send_weights(token, weight, i * OWNED_LANES, exchange, at.lane)
            if column >= HC_MULT and column < COMB:
                mixing.post_mix[at.first + token, column - HC_MULT] = (
                    mix[0] * mixing.hc_post_mult_value
                )
            softmax_row(logit_local, mixing.hc_sinkhorn_eps, mix)
            if column >= COMB and column < MIXES:
                entry[0] = mix[0]
    for q in T.unroll(HC_MULT * HC_MULT):
        comb_local[q] = T.shfl_sync(
            entry[0], (COMB + q + at.lane // OWNED_LANES * OWNED_LANES) % WARP
        )
    sinkhorn(comb_local, mixing.hc_sinkhorn_eps, mixing.sinkhorn_repeat)
    token = at.lane // OWNED_LANES * CLUSTER + at.rank
    if at.lane % OWNED_LANES == 0 and token < at.count:
        store_comb(comb_local, mixing, at.first + token)


@T.macro
def share_tokens(given, many, first, count, warp, i_c, hidden):
    """One CTA of a cluster with ``count`` tokens from ``first`` on; ``many``: in many clusters."""
    post, mixing, output, early = given.post, given.mixing, given.output, given.early
    tx = T.get_thread_binding()
    at = Context(hidden, tx, tx % WARP, warp, i_c % CLUSTER, first, count)
    T.import_source(SOURCE)
    size = slice_size(at.hidden)
    streams_shared = T.alloc_shared((GROUP_TOKENS, HC_MULT * size + STREAMS_PAD), "bfloat16")
    terms_shared = T.alloc_shared(
        (max(1, shared_blocks(at.hidden)), BLOCK_TERMS // 4, WARP, 4), "uint32"
    )
    sums_shared = T.alloc_shared((TOKEN_TILES, WARPS, MMA_COLUMNS, SUMS_PITCH), "float32")
    x_shared = T.view(
        sums_shared, (TOKEN_TILES * WARPS * MMA_COLUMNS * SUMS_PITCH * 2,), "bfloat16"
    )
    mixes_shared = T.alloc_shared((GROUP_TOKENS, HC_MULT + 1, HC_MULT), "float32")
    slices_shared = T.alloc_shared((OWNED, CLUSTER, WARP), "float32")
    weights_shared = T.alloc_shared((GROUP_TOKENS, HC_MULT), "float32")
    squares_shared = T.alloc_shared((GROUP_TOKENS, CLUSTER), "float32")
    inbox_shared = T.alloc_shared((inboxes(GROUP_TOKENS),), "uint64")
    terms_local = T.alloc_local((REGISTER_BLOCKS * BLOCK_TERMS,), "uint32")
    value_local = T.alloc_local((ROUNDS * repetitions(at.hidden) * VECTOR,), "bfloat16")
    gain_local = T.alloc_local((repetitions(at.hidden) * VECTOR,), "bfloat16")
    tokens = Tokens(streams_shared, x_shared, mixes_shared)
    terms = Terms(terms_local, 0, terms_shared)
    exchange = Exchange(slices_shared, weights_shared, squares_shared, inbox_shared)

    open_inboxes(exchange, at)
    # In few clusters the relaxed arrival is slower, nobody knows why (NOTES.md, "Variants of the
    # kernel for few tokens").
    if many:
        cluster_arrive_relaxed()
    else:
        T.cluster_arrive()
    # fn is a weight: it may come to L2 while the previous kernel runs, and be read then, too, where
    # the host knows that the previous kernel does not write fn. One cluster brings it for all
    # (NOTES.md, "Sums a warp a token, wide loads, one prefetching cluster").
    if at.tx < MIXES * HC_MULT and i_c < CLUSTER:
        prefetch_fn(mixing.fn, at.tx, at.rank, at.hidden)
    if early == 0:
        T.pdl_sync()
    # The next kernel may start now, and read fn: if this one must not read early, neither may that.
    T.pdl_trigger()
    load_terms(mixing.fn, terms, at)
    T.cluster_wait()
    T.pdl_sync()

    load_tokens(post, tokens, at)
    T.sync_threads()
    mix_tokens(post, tokens, at)
    T.sync_threads()
    project_tokens(streams_shared, terms, sums_shared, at)
    T.sync_threads()
    send_sums(sums_shared, exchange, at)
    if at.warp < COLLAPSE_WARPS:
        if output.norm:
            load_gain(output, gain_local, at)
        collapse_tokens(streams_shared, exchange, output, value_local, at)
        store_tokens(exchange, output, gain_local, value_local, at)
    elif at.rank < at.count:
        make_mixes(exchange, mixing, at)


@T.macro
def share(given, group_tokens, tokens, i_c, hidden):
    """One CTA; the parameters of :func:`share_tokens` make names of what are variables here."""
    first = T.alloc_var("int32", init=first_token(i_c // CLUSTER, group_tokens))
    count = T.alloc_var("int32", init=T.min(group_tokens, tokens - first))
    many = tokens > FEW_CLUSTERS * group_tokens
    warp = T.get_thread_binding() // WARP
    if not 0 < shared_blocks(hidden) < WARPS:
        # Lane 0 says it, so the compiler knows the warp's number to be the same in all lanes. That
        # is slower where some warps have blocks in shared memory and some have none (NOTES.md,
        # "Variables handed on to a macro").
        warp = T.alloc_var("int32", init=T.shfl_sync(T.get_thread_binding() // WARP, 0))
    share_tokens(given, many, first, count, warp, i_c, hidden)


def fused_post_pre(hidden: int, *, norm: bool, pdl: bool):
    """Build the fused_post_pre kernel.

    Args:
        hidden: H, a multiple of 256 up to 7168.
        norm: whether the RMSNorm follows; without it norm_weight and norm_eps are not read.
        pdl: must be true: clusters and programmatic dependent launch come together (sm_90).

    Returns:
        The TileLang program; ``group_tokens`` are the tokens of a cluster, at most GROUP_TOKENS,
        and ``early`` says whether fn may be read before the previous kernel has finished.
    """
    tokens = T.dynamic("tokens", "int32")

    @T.prim_func
    def mhc_fused_post_pre(
        x: T.Tensor((tokens, hidden), "bfloat16"),
        residual: T.Tensor((tokens, HC_MULT, hidden), "bfloat16"),
        post_layer_mix: T.Tensor((tokens, HC_MULT), "float32"),
        comb_res_mix: T.Tensor((tokens, HC_MULT, HC_MULT), "float32"),
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
        early: T.int32,
    ):
        with T.Kernel(
            clusters(tokens, group_tokens) * CLUSTER,
            threads=THREADS,
            cluster_dims=(CLUSTER, 1, 1),
        ) as i_c:
            mixing = Mixing(
                fn, hc_scale, hc_base, rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value,
                sinkhorn_repeat, post_mix, comb_mix,
            )  # fmt: skip
            output = Collapse(layer_input, norm, norm_weight, norm_eps)
            post = Post(x, residual, post_layer_mix, comb_res_mix, residual_out)
            share(Arguments(mixing, output, early, post), group_tokens, tokens, i_c, hidden)

    return mhc_fused_post_pre

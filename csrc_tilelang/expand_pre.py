"""expand_pre: the copies of the embedding and the first pre step in one launch.

Algorithm: all 4 streams are x, so their projection is that of x on the sum of fn's 4 stream blocks,
their mean square is that of x, and the collapse is x times the sum of the 4 weights: x is read
once, the copies are written once and never read. A cluster of 16 CTAs takes a group of up to 32
tokens, each CTA a sixteenth of the hidden size, each of its column warps 32 columns. The cluster

1. sends x to shared memory, 16 bytes a lane, which nobody but the lane reads; adds up fn's blocks
   in fp32 and keeps them in registers, split in three bf16 terms;
2. projects with mma.m16n8k16, fn as the A operand and 8 tokens as B, as ``fused_post_pre`` does;
3. sends the sums for the collapse of every token to all CTAs, and the others to the CTA that owns
   the token;
4. writes the copies while they travel, then the layer input: the norm needs nothing but the same
   sums, mean(v^2) = (sum of weights)^2 mean(x^2). Meanwhile one more warp makes the post weights
   and runs Sinkhorn for the tokens that its CTA owns.

A CTA waits only for CTAs of its own cluster, which start together or not at all, and ends only
when all its inboxes are full, so nobody sends to one that has gone.

Slices, blocks and warps are added up in a fixed order that depends on the hidden size alone: a
token's outputs are the same bits in any batch and at any position.
"""

from typing import Any, NamedTuple

import tilelang.language as T

from ..geometry import EXPAND_PRE_GROUP_TOKENS
from .arguments import Collapse, Mixing, named
from .device import SOURCE, inbox_open, inbox_wait, load_async16, loads_wait, send, send4
from .layout import (
    CLUSTER,
    HC_MULT,
    MIXES,
    MMA_COLUMNS,
    SLICE_TREE,
    SQUARES,
    VECTOR,
    WARP,
    add_tree,
    clusters,
    first_token,
    halves,
)
from .steps.collapse import norm_factor, normalise, round_values
from .steps.columns import (
    SUMS_IN_PITCH,
    TILE,
    add_slices,
    column_warps,
    columns_of,
    prefetch_rows,
)
from .steps.mixes import finish_in_lanes, load_scale_and_base, logit, sigmoid
from .steps.post import widen
from .steps.project import (
    BLOCK_TERMS,
    BLOCK_WEIGHTS,
    OPERANDS,
    ROW_TILES,
    SUMS,
    SUMS_PITCH,
    TOKEN_SUMS,
    Terms,
    multiply,
    split_block,
    store_sums,
)

TILES = EXPAND_PRE_GROUP_TOKENS // TILE  # of a group, at most
OWNED = -(-EXPAND_PRE_GROUP_TOKENS // CLUSTER)  # tokens of a group that a CTA owns at most
SENT_FLOATS = HC_MULT + 1  # from a CTA to all, of each token: collapse projections and squares
OWNER_FLOATS = SUMS - HC_MULT  # from a CTA to the owner, of each token: post, comb, squares
SQUARES_IN_PITCH = CLUSTER + 4  # floats: 8 tokens on different banks
TWO_CTAS_WARPS = 8  # column warps of which two CTAs have 96 registers a thread, without spills
COLUMN_BARRIER = 1  # named barrier of the column warps; 0 is the whole CTA's


def ctas_per_sm(hidden: int) -> int:
    """Return the CTAs to allow on an SM by a limit on registers: phases overlap among CTAs only."""
    return 2 if column_warps(hidden) <= TWO_CTAS_WARPS else 1


class Slots(NamedTuple):
    """What CTAs send each other, and the inboxes that are told of the bytes.

    Attributes:
        sums_in_shared: [tokens, pitch] fp32, 4 projections of each token from each CTA.
        squares_in_shared: [tokens, pitch] fp32, the squares of each token from each CTA.
        owned_in_shared: [owned tokens, CTAs, 32] fp32, all sums of each token that the CTA owns
            but the 4 projections.
        sums_inbox: [1], told of what all CTAs get.
        owned_inbox: [owned tokens], told of what the owner gets of each token.
    """

    sums_in_shared: Any
    squares_in_shared: Any
    owned_in_shared: Any
    sums_inbox: Any
    owned_inbox: Any


def slots_of_group() -> Slots:
    """Make room for what CTAs send of a group."""
    return named(
        Slots(
            T.alloc_shared((EXPAND_PRE_GROUP_TOKENS, SUMS_IN_PITCH), "float32"),
            T.alloc_shared((EXPAND_PRE_GROUP_TOKENS, SQUARES_IN_PITCH), "float32"),
            T.alloc_shared((OWNED, CLUSTER, WARP), "float32"),
            T.alloc_shared((1,), "uint64"),
            T.alloc_shared((OWNED,), "uint64"),
        )
    )


@T.macro
def open_inboxes(columns, slots):
    """The inboxes of a group, opened by one thread."""
    if columns.tx == 0:
        inbox_open(slots.sums_inbox[0], CLUSTER * SENT_FLOATS * 4 * columns.count)
        for i in T.unroll(OWNED):
            if i * CLUSTER + columns.rank < columns.count:
                inbox_open(slots.owned_inbox[i], CLUSTER * OWNER_FLOATS * 4)


@T.macro
def load_x(x, columns, x_shared):
    """x of all tokens on its way; lanes without a token load the last one, others zeros."""
    for i in T.serial(T.ceildiv(columns.count, TILE)):
        if columns.inside:
            token = T.min(i * TILE + columns.row, columns.count - 1)
            load_async16(x_shared[i, columns.tx, 0], x[columns.first + token, columns.first_column])
        else:
            for v in T.unroll(VECTOR):
                x_shared[i, columns.tx, v] = T.cast(0.0, "bfloat16")


@T.macro
def fold_weights(fn, columns, weights_local):
    """This lane's weights: 3 rows, 8 columns, the blocks of the 4 streams added up in fp32."""
    blocks_local = T.alloc_local((HC_MULT * VECTOR,), "float32")
    for n in T.unroll(ROW_TILES):
        for j in T.unroll(HC_MULT):
            for half in T.unroll(2):
                for v in T.vectorized(VECTOR // 2):
                    h = columns.first_column + half * (VECTOR // 2)
                    blocks_local[j * VECTOR + half * (VECTOR // 2) + v] = fn[
                        n * MMA_COLUMNS + columns.row, j * columns.hidden + h + v
                    ]
        for v in T.unroll(VECTOR):
            weights_local[n * VECTOR + v] = (blocks_local[v] + blocks_local[VECTOR + v]) + (
                blocks_local[2 * VECTOR + v] + blocks_local[3 * VECTOR + v]
            )


@T.macro
def project_tiles(columns, x_shared, terms_local, sums_shared):
    """Projections and squares of this warp's columns, a tile at a time."""
    x_local = T.alloc_local((VECTOR,), "bfloat16")
    words_local = T.view(x_local, (VECTOR // 2,), "uint32")
    fragment = T.alloc_local((4,), "uint32")
    part = T.alloc_local((len(OPERANDS) * 4,), "float32")
    sums_local = T.alloc_local((TOKEN_SUMS,), "float32")
    for i in T.serial(T.ceildiv(columns.count, TILE)):
        for v in T.vectorized(VECTOR):
            x_local[v] = x_shared[i, columns.tx, v]
        for q in T.unroll(TOKEN_SUMS):
            sums_local[q] = 0.0
        for q in T.unroll(len(OPERANDS) * 4):
            part[q] = 0.0
        multiply(words_local, columns.lane, Terms(terms_local, 0), fragment, part, sums_local)
        store_sums(sums_local, columns.lane, columns.warp, i, sums_shared)


@T.macro
def send_to_all(token, columns, total, slots):
    """A CTA's 4 collapse projections and squares of a token to all CTAs, by one warp."""
    mixes_local = T.alloc_local((HC_MULT,), "float32")
    squares = T.alloc_local((1,), "float32")
    lane = columns.lane
    for j in T.unroll(HC_MULT):
        mixes_local[j] = T.shfl_sync(total[0], j)
    squares[0] = T.shfl_sync(total[0], SQUARES)
    if lane < CLUSTER:
        send4(
            slots.sums_in_shared[token, columns.rank * HC_MULT], slots.sums_inbox[0], lane,
            mixes_local[0],
        )  # fmt: skip
    elif lane < 2 * CLUSTER:
        send(
            slots.squares_in_shared[token, columns.rank], slots.sums_inbox[0], lane - CLUSTER,
            squares[0],
        )  # fmt: skip


@T.macro
def send_sums(columns, sums_shared, slots):
    """The warps' sums added up, one warp a token and one lane a sum, and sent."""
    total = T.alloc_local((1,), "float32")
    warps = column_warps(columns.hidden)
    lane = columns.lane
    for k in T.serial(T.ceildiv(columns.count, warps)):
        token = k * warps + columns.warp
        if token < columns.count:
            total[0] = 0.0
            if lane < SUMS:
                for w in T.unroll(warps):
                    total[0] = total[0] + sums_shared[token // TILE, w, token % TILE, lane]
            send_to_all(token, columns, total, slots)
            if lane >= HC_MULT and lane < SUMS:
                send(
                    slots.owned_in_shared[token // CLUSTER, columns.rank, lane],
                    slots.owned_inbox[token // CLUSTER],
                    token % CLUSTER,
                    total[0],
                )


@T.macro
def store_copies(columns, x_shared, residual_out):
    """expand: r[j] = x."""
    x_local = T.alloc_local((VECTOR,), "bfloat16")
    for i in T.serial(T.ceildiv(columns.count, TILE)):
        token = i * TILE + columns.row
        if token < columns.count and columns.inside:
            for v in T.vectorized(VECTOR):
                x_local[v] = x_shared[i, columns.tx, v]
            for j in T.unroll(HC_MULT):
                for v in T.vectorized(VECTOR):
                    residual_out[columns.first + token, j, columns.first_column + v] = x_local[v]


class Constants(NamedTuple):
    """What a lane keeps of the constants in registers.

    Attributes:
        gain_local: the norm's weight of the lane's columns.
        scale_local: the scale of the lane's mix.
        base_local: the base of the lane's mix.
    """

    gain_local: Any
    scale_local: Any
    base_local: Any


@T.macro
def collapse_tiles(columns, x_shared, slots, mixing, constants, output):
    """v = (sum_j weight_j) * x of all tiles, then the RMSNorm."""
    x_local = T.alloc_local((VECTOR,), "bfloat16")
    total_local = T.alloc_local((VECTOR,), "float32")
    squares = T.alloc_local((1,), "float32")
    total = T.alloc_local((1,), "float32")
    weight = T.alloc_local((1,), "float32")
    for i in T.serial(T.ceildiv(columns.count, TILE)):
        token = T.min(i * TILE + columns.row, columns.count - 1)
        add_slices(slots.squares_in_shared, token, 0, 1, squares)
        add_slices(slots.sums_in_shared, token, columns.lane % HC_MULT, HC_MULT, total)
        total[0] = logit(
            total[0], squares[0], columns.hidden, mixing.rms_eps, constants.scale_local[0],
            constants.base_local[0],
        )  # fmt: skip
        weight[0] = sigmoid(total[0]) + mixing.hc_pre_eps
        for half in halves(HC_MULT)[::-1]:
            weight[0] = weight[0] + T.shfl_xor(weight[0], half)
        for v in T.vectorized(VECTOR):
            x_local[v] = x_shared[i, columns.tx, v]
        widen(x_local, 0, VECTOR, total_local)
        for v in T.unroll(VECTOR):
            total_local[v] = weight[0] * total_local[v]
        round_values(total_local, x_local, 0)
        if output.norm:
            factor = norm_factor(
                weight[0] * weight[0] * squares[0], columns.hidden, output.norm_eps
            )
            normalise(x_local, 0, factor, constants.gain_local, 0, total_local)
            round_values(total_local, x_local, 0)
        if i * TILE + columns.row < columns.count and columns.inside:
            for v in T.vectorized(VECTOR):
                output.out[columns.first + token, columns.first_column + v] = x_local[v]


@T.macro
def run_columns(x, columns, slots, mixing, residual_out, output):
    """A column warp: projection, copies and collapse of its columns."""
    warps = column_warps(columns.hidden)
    x_shared = T.alloc_shared((TILES, warps * WARP, VECTOR), "bfloat16")
    sums_shared = T.alloc_shared((TILES, warps, TILE, SUMS_PITCH), "float32")
    weights_local = T.alloc_local((BLOCK_WEIGHTS,), "float32")
    terms_local = T.alloc_local((BLOCK_TERMS,), "uint32")
    gain_local = T.alloc_local((VECTOR,), "bfloat16")
    scale_local = T.alloc_local((1,), "float32")
    base_local = T.alloc_local((1,), "float32")

    # x of all tokens is on its way at once, then fn.
    load_x(x, columns, x_shared)
    if columns.inside:
        fold_weights(mixing.fn, columns, weights_local)
    else:
        for v in T.unroll(BLOCK_WEIGHTS):
            weights_local[v] = 0.0
    scale_local[0] = mixing.hc_scale[0]
    base_local[0] = mixing.hc_base[columns.lane % 4]
    split_block(weights_local, 0, terms_local, 0)
    loads_wait()

    project_tiles(columns, x_shared, terms_local, sums_shared)
    T.sync_threads(COLUMN_BARRIER, warps * WARP)
    T.cluster_wait()
    send_sums(columns, sums_shared, slots)
    if output.norm and columns.inside:
        for v in T.vectorized(VECTOR):
            gain_local[v] = output.norm_weight[columns.first_column + v]
    store_copies(columns, x_shared, residual_out)
    inbox_wait(slots.sums_inbox[0])
    collapse_tiles(
        columns, x_shared, slots, mixing, Constants(gain_local, scale_local, base_local), output
    )


@T.macro
def run_owner(columns, slots, mixing):
    """The last warp: post weights and combs of the tokens that the CTA owns, one mix a lane."""
    slices_local = T.alloc_local((CLUSTER,), "float32")
    logit_local = T.alloc_local((1,), "float32")
    scale_local = T.alloc_local((1,), "float32")
    base_local = T.alloc_local((1,), "float32")
    lane = columns.lane
    T.cluster_wait()
    load_scale_and_base(mixing, lane, scale_local, base_local)
    for i in T.serial(OWNED):
        token = i * CLUSTER + columns.rank
        if token < columns.count:
            inbox_wait(slots.owned_inbox[i])
            for c in T.unroll(CLUSTER):
                slices_local[c] = 0.0
                if lane >= HC_MULT and lane < SUMS:
                    slices_local[c] = slots.owned_in_shared[i, c, lane]
            add_tree(slices_local, SLICE_TREE)
            logit_local[0] = logit(
                slices_local[0], T.shfl_sync(slices_local[0], SQUARES), columns.hidden,
                mixing.rms_eps, scale_local[0], base_local[0],
            )  # fmt: skip
            finish_in_lanes(logit_local, mixing, columns.first + token, lane)


@T.macro
def expand_group(x, mixing, residual_out, output, i_c, hidden, first, count):
    """One CTA and its group of ``count`` tokens from ``first`` on."""
    columns = columns_of(hidden, i_c, first, count)
    slots = slots_of_group()
    # The inboxes are open before anyone can send: the cluster barrier lies between.
    open_inboxes(columns, slots)
    T.cluster_arrive()
    # fn is a weight: on its way to L2 while the previous kernel still runs.
    if i_c < CLUSTER:
        prefetch_rows(mixing.fn, columns, threads(hidden))
    T.pdl_sync()
    T.pdl_trigger()
    if columns.warp < column_warps(hidden):
        run_columns(x, columns, slots, mixing, residual_out, output)
    else:
        run_owner(columns, slots, mixing)


def threads(hidden: int) -> int:
    """Return the threads of a CTA: column warps, and one for what the CTA owns."""
    return (column_warps(hidden) + 1) * WARP


def expand_pre(hidden: int, *, norm: bool, pdl: bool):
    """Build the expand_pre kernel.

    Args:
        hidden: H, a multiple of 256 up to 7168.
        norm: whether the RMSNorm follows; without it norm_weight and norm_eps are not read.
        pdl: must be true: clusters and programmatic dependent launch come together (sm_90).

    Returns:
        The TileLang program. ``group_tokens`` are the tokens of a cluster, at most
        EXPAND_PRE_GROUP_TOKENS.
    """
    tokens = T.dynamic("tokens", "int32")

    @T.prim_func
    def mhc_expand_pre(
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
            clusters(tokens, group_tokens) * CLUSTER,
            threads=threads(hidden),
            cluster_dims=(CLUSTER, 1, 1),
        ) as i_c:
            T.import_source(SOURCE)
            T.annotate_min_blocks_per_sm(ctas_per_sm(hidden))
            first = T.alloc_var("int32", init=first_token(i_c // CLUSTER, group_tokens))
            count = T.alloc_var("int32", init=T.min(group_tokens, tokens - first))
            mixing = Mixing(
                fn, hc_scale, hc_base, rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value,
                sinkhorn_repeat, post_mix, comb_mix,
            )  # fmt: skip
            output = Collapse(layer_input, norm, norm_weight, norm_eps)
            expand_group(x, mixing, residual_out, output, i_c, hidden, first, count)

    return mhc_expand_pre

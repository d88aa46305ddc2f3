"""One CTA a token: the steps of ``finish`` and ``head``, which finish a token from partial rows.

The collapse warps own the hidden dimension, 8 elements a thread and repetition. They ask for the
streams before the partial rows are added up, so both are on their way at once.
"""

from typing import Any, NamedTuple

import tilelang.language as T

from ..layout import HC_MULT, SQUARES, VECTOR, WARP
from . import collapse as steps
from .mixes import load_scale_and_base, logit, sigmoid

REPETITIONS = 2  # 16-byte vectors a thread and stream
MAX_COLLAPSE_THREADS = 256
CTAS_PER_SM = {2: 3, 3: 2, 4: 2}  # by repetitions: the most that compiles without spills
ROWS_AT_ONCE = 16  # partial rows that a warp has in flight: one trip to L2 for 128 slices
NORM_BARRIER = 1  # named barrier of the collapse warps; 0 is the whole CTA's


def repetitions(hidden: int) -> int:
    """16-byte vectors of one stream that a collapse thread owns."""
    return max(REPETITIONS, -(-hidden // (VECTOR * MAX_COLLAPSE_THREADS)))


def collapse_threads(hidden: int) -> int:
    """Threads that own hidden elements: whole warps."""
    return -(-hidden // (VECTOR * WARP * repetitions(hidden))) * WARP


def ctas_per_sm(hidden: int) -> int:
    """CTAs to allow on an SM by a limit on registers: a token's phases overlap only among CTAs."""
    return CTAS_PER_SM.get(repetitions(hidden), 1)


class Token(NamedTuple):
    """The token of a CTA, and what a thread holds of the token.

    Attributes:
        t: the token.
        hidden: the hidden size.
        tx: the thread.
        streams_local: its elements of the 4 streams.
        value_local: its elements of the collapsed streams.
        gain_local: its elements of the norm's weight.
    """

    t: Any
    hidden: int
    tx: Any
    streams_local: Any
    value_local: Any
    gain_local: Any

    def element(self, r):
        """The first hidden element of repetition ``r``."""
        return (r * collapse_threads(self.hidden) + self.tx) * VECTOR


def token_of_cta(t, hidden: int, tx) -> Token:
    """Make room in registers for a thread's part of token ``t``."""
    reps = repetitions(hidden)
    return Token(
        t, hidden, tx,
        T.alloc_local((reps * HC_MULT * VECTOR,), "bfloat16"),
        T.alloc_local((reps * VECTOR,), "bfloat16"),
        T.alloc_local((reps * VECTOR,), "bfloat16"),
    )  # fmt: skip


@T.macro
def load_token(residual, output, token):
    """This thread's elements of the 4 streams, and of the norm's weight if there is a norm."""
    for r in T.unroll(repetitions(token.hidden)):
        if token.element(r) < token.hidden:
            for i in T.unroll(HC_MULT):
                for v in T.vectorized(VECTOR):
                    token.streams_local[(r * HC_MULT + i) * VECTOR + v] = residual[
                        token.t, i, token.element(r) + v
                    ]
    if output.norm:
        for r in T.unroll(repetitions(token.hidden)):
            if token.element(r) < token.hidden:
                for v in T.vectorized(VECTOR):
                    token.gain_local[r * VECTOR + v] = output.norm_weight[token.element(r) + v]


@T.macro
def add_partials(partials, rows, token, sums_shared, total):
    """total[0] of lane c = sum of column c over the partial rows of the token, in every warp.

    Columns below ``rows`` are projections; the others but the squares' are not read.
    """
    lane = token.tx % WARP
    warp = token.tx // WARP
    splits = partials.shape[0]
    warps = sums_shared.shape[0]
    rows_local = T.alloc_local((ROWS_AT_ONCE,), "float32")
    total[0] = 0.0
    for s in T.serial(T.ceildiv(splits, ROWS_AT_ONCE * warps)):
        for u in T.unroll(ROWS_AT_ONCE):
            rows_local[u] = 0.0
            if (s * ROWS_AT_ONCE + u) * warps + warp < splits and (lane < rows or lane == SQUARES):
                rows_local[u] = partials[(s * ROWS_AT_ONCE + u) * warps + warp, token.t, lane]
        for u in T.unroll(ROWS_AT_ONCE):
            total[0] = total[0] + rows_local[u]
    sums_shared[warp, lane] = total[0]
    T.sync_threads()
    total[0] = sums_shared[0, lane]
    for w in T.unroll(warps - 1):
        total[0] = total[0] + sums_shared[w + 1, lane]


@T.macro
def logits(partials, mixing, token, sums_shared, logit_local):
    """logit_local[0] of lane c = logit c of the token, in every warp; with a barrier of the CTA."""
    scale_local = T.alloc_local((1,), "float32")
    base_local = T.alloc_local((1,), "float32")
    # They are loaded ahead of the barrier, behind which they would cost a trip to L2.
    load_scale_and_base(mixing, token.tx % WARP, scale_local, base_local)
    add_partials(partials, mixing.hc_base.shape[0], token, sums_shared, logit_local)
    logit_local[0] = logit(
        logit_local[0], T.shfl_sync(logit_local[0], SQUARES), HC_MULT * token.hidden,
        mixing.rms_eps, scale_local[0], base_local[0],
    )  # fmt: skip


@T.macro
def collapse(token, weight_local, squares):
    """v of this thread, rounded, and the sum of its squares; lane j has the weight of stream j."""
    weights_local = T.alloc_local((HC_MULT,), "float32")
    total_local = T.alloc_local((VECTOR,), "float32")
    for j in T.unroll(HC_MULT):
        weights_local[j] = T.shfl_sync(weight_local[0], j)
    squares[0] = 0.0
    for r in T.unroll(repetitions(token.hidden)):
        if token.element(r) < token.hidden:
            steps.collapse(token.streams_local, r * HC_MULT * VECTOR, weights_local, 0, total_local)
            steps.add_squares(total_local, squares, 0)
            steps.round_values(total_local, token.value_local, r * VECTOR)


@T.macro
def normalise(token, norm_eps, squares, norm_shared):
    """The RMSNorm of the token, whose squares the collapse warps add up."""
    threads = collapse_threads(token.hidden)
    total_local = T.alloc_local((VECTOR,), "float32")
    squares[0] = T.warp_reduce_sum(squares[0])
    if token.tx % WARP == 0:
        norm_shared[token.tx // WARP] = squares[0]
    T.sync_threads(NORM_BARRIER, threads)
    squares[0] = norm_shared[0]
    for w in T.unroll(threads // WARP - 1):
        squares[0] = squares[0] + norm_shared[w + 1]
    squares[0] = steps.norm_factor(squares[0], token.hidden, norm_eps)
    for r in T.unroll(repetitions(token.hidden)):
        steps.normalise(
            token.value_local, r * VECTOR, squares[0], token.gain_local, r * VECTOR, total_local
        )
        steps.round_values(total_local, token.value_local, r * VECTOR)


@T.macro
def finish_values(token, logit_local, mixing, output, norm_shared):
    """The collapse of the token, its RMSNorm if there is one, and the result to memory."""
    weight_local = T.alloc_local((1,), "float32")
    squares = T.alloc_local((1,), "float32")
    weight_local[0] = sigmoid(logit_local[0]) + mixing.hc_pre_eps
    collapse(token, weight_local, squares)
    if output.norm:
        normalise(token, output.norm_eps, squares, norm_shared)
    for r in T.unroll(repetitions(token.hidden)):
        if token.element(r) < token.hidden:
            for v in T.vectorized(VECTOR):
                output.out[token.t, token.element(r) + v] = token.value_local[r * VECTOR + v]

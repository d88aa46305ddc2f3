"""Steps of the kernels that finish a token, one CTA a token: ``finish`` and ``head``.

The CTA's collapse warps own the hidden dimension, 8 elements a thread and repetition; the loads of
the streams are issued before the partial rows are added up, so both travel at once.
"""

import tilelang.language as T

from ._device import HC_MULT, SQUARES, VECTOR, WARP

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


@T.macro
def load_streams(residual, i_t, tx, threads, reps, hidden, streams_local):
    """This thread's elements of the 4 streams of token ``i_t``."""
    for r in T.unroll(reps):
        if (r * threads + tx) * VECTOR < hidden:
            for i in T.unroll(HC_MULT):
                for v in T.vectorized(VECTOR):
                    streams_local[(r * HC_MULT + i) * VECTOR + v] = residual[
                        i_t, i, (r * threads + tx) * VECTOR + v
                    ]


@T.macro
def add_partials(partials, splits, rows, i_t, warp, warps, lane, sums_shared, total):
    """total[0] of lane c = sum of column c over the partial rows of token ``i_t``, in every warp.

    Columns below ``rows`` are projections; the others but the squares' are not read.
    """
    rows_local = T.alloc_local((ROWS_AT_ONCE,), "float32")
    total[0] = 0.0
    for s in T.serial(T.ceildiv(splits, ROWS_AT_ONCE * warps)):
        for u in T.unroll(ROWS_AT_ONCE):
            rows_local[u] = 0.0
            if (s * ROWS_AT_ONCE + u) * warps + warp < splits and (lane < rows or lane == SQUARES):
                rows_local[u] = partials[(s * ROWS_AT_ONCE + u) * warps + warp, i_t, lane]
        for u in T.unroll(ROWS_AT_ONCE):
            total[0] = total[0] + rows_local[u]
    sums_shared[warp, lane] = total[0]
    T.sync_threads()
    total[0] = sums_shared[0, lane]
    for w in T.unroll(warps - 1):
        total[0] = total[0] + sums_shared[w + 1, lane]


@T.macro
def logits(total, columns, rms_eps, scale, base, logit):
    """m * scale + base of lane c, m = total * rsqrt(mean of squares + rms_eps)."""
    logit[0] = T.rsqrt(T.shfl_sync(total[0], SQUARES) / columns + rms_eps)
    logit[0] = total[0] * logit[0] * scale[0] + base[0]


@T.macro
def sigmoid(value, out):
    """out[0] = 1 / (1 + exp(-value)), to the precision of fp32."""
    out[0] = T.call_extern("float32", "mhc::rcp", 1.0 + T.exp(-value))


@T.macro
def collapse(streams_local, weight, tx, threads, reps, hidden, value_local, squares):
    """v = sum_j weight_j * r_j; its rounding in value_local, sum of v^2 of this thread in squares.

    ``weight[0]`` of lane j < 4 is the weight of stream j.
    """
    weights_local = T.alloc_local((HC_MULT,), "float32")
    for j in T.unroll(HC_MULT):
        weights_local[j] = T.shfl_sync(weight[0], j)
    squares[0] = 0.0
    for r in T.unroll(reps):
        if (r * threads + tx) * VECTOR < hidden:
            for v in T.unroll(VECTOR):
                value = T.alloc_var("float32", init=0.0)
                value = weights_local[0] * T.cast(
                    streams_local[r * HC_MULT * VECTOR + v], "float32"
                )
                for j in T.unroll(HC_MULT - 1):
                    value = value + weights_local[j + 1] * T.cast(
                        streams_local[(r * HC_MULT + j + 1) * VECTOR + v], "float32"
                    )
                squares[0] = squares[0] + value * value
                value_local[r * VECTOR + v] = T.cast(value, "bfloat16")


@T.macro
def load_gain(norm_weight, tx, threads, reps, hidden, gain_local):
    """This thread's elements of the RMSNorm's weight."""
    for r in T.unroll(reps):
        if (r * threads + tx) * VECTOR < hidden:
            for v in T.vectorized(VECTOR):
                gain_local[r * VECTOR + v] = norm_weight[(r * threads + tx) * VECTOR + v]


@T.macro
def normalise(value_local, gain_local, squares, tx, threads, reps, hidden, norm_eps, norm_shared):
    """RMSNorm: v = bf16(bf16(v) * rsqrt(mean(v^2) + norm_eps) * g), over the collapse warps."""
    squares[0] = T.warp_reduce_sum(squares[0])
    if tx % WARP == 0:
        norm_shared[tx // WARP] = squares[0]
    T.sync_threads(NORM_BARRIER, threads)
    squares[0] = norm_shared[0]
    for w in T.unroll(threads // WARP - 1):
        squares[0] = squares[0] + norm_shared[w + 1]
    squares[0] = T.rsqrt(squares[0] / hidden + norm_eps)
    for q in T.unroll(reps * VECTOR):
        value_local[q] = T.cast(
            T.cast(value_local[q], "float32") * squares[0] * T.cast(gain_local[q], "float32"),
            "bfloat16",
        )


@T.macro
def store_values(value_local, i_t, tx, threads, reps, hidden, out):
    """The token's layer input (or hidden state) to memory."""
    for r in T.unroll(reps):
        if (r * threads + tx) * VECTOR < hidden:
            for v in T.vectorized(VECTOR):
                out[i_t, (r * threads + tx) * VECTOR + v] = value_local[r * VECTOR + v]

"""post: the output of a sublayer written back into the residual streams.

Algorithm: pure streaming. A thread owns 8 hidden elements of one token in all 4 streams: it reads
16 bytes of x and of each old stream and writes 16 bytes of each new one, 18 bytes of traffic per
hidden element and token. fp32 inside, one rounding.
"""

import tilelang.language as T

from ._device import HC_MULT, VECTOR
from ._steps import mix_stream

THREADS = 128


def post(hidden: int, *, pdl: bool):
    """Build the post kernel.

    Args:
        hidden: H, a multiple of 8.
        pdl: take part in programmatic dependent launch (sm_90 and later).

    Returns:
        The TileLang program: (x [n, H] bf16, residual [n, 4, H] bf16, post_layer_mix [n, 4] fp32,
        comb_res_mix [n, 4, 4] fp32, residual_out [n, 4, H] bf16).
    """
    tokens = T.dynamic("tokens", "int64")
    blocks = -(-hidden // (THREADS * VECTOR))

    @T.prim_func
    def mhc_post(
        x: T.Tensor((tokens, hidden), "bfloat16"),
        residual: T.Tensor((tokens, HC_MULT, hidden), "bfloat16"),
        post_layer_mix: T.Tensor((tokens, HC_MULT), "float32"),
        comb_res_mix: T.Tensor((tokens, HC_MULT, HC_MULT), "float32"),
        residual_out: T.Tensor((tokens, HC_MULT, hidden), "bfloat16"),
    ):
        # tokens in x: the y dimension of a grid ends at 65535
        with T.Kernel(tokens, blocks, threads=THREADS) as (i_t, i0_h):
            tx = T.get_thread_binding()
            post_local = T.alloc_local((HC_MULT,), "float32")
            comb_local = T.alloc_local((HC_MULT * HC_MULT,), "float32")
            x_local = T.alloc_local((VECTOR,), "bfloat16")
            streams_local = T.alloc_local((HC_MULT * VECTOR,), "bfloat16")
            new_local = T.alloc_local((VECTOR,), "bfloat16")
            h = (i0_h * THREADS + tx) * VECTOR

            if pdl:
                T.pdl_sync()
                T.pdl_trigger()
            if h < hidden:
                for v in T.vectorized(VECTOR):
                    x_local[v] = x[i_t, h + v]
                for i in T.unroll(HC_MULT):
                    for v in T.vectorized(VECTOR):
                        streams_local[i * VECTOR + v] = residual[i_t, i, h + v]
                for j in T.vectorized(HC_MULT):
                    post_local[j] = post_layer_mix[i_t, j]
                for i in T.unroll(HC_MULT):
                    for j in T.vectorized(HC_MULT):
                        comb_local[i * HC_MULT + j] = comb_res_mix[i_t, i, j]
                # post: r'[j] = bf16(post[j] * x + sum_i comb[i, j] * r[i])
                for j in T.unroll(HC_MULT):
                    mix_stream(
                        x_local, 0, streams_local, 0, post_local[j], comb_local, j, HC_MULT,
                        new_local, 0, VECTOR,
                    )  # fmt: skip
                    for v in T.vectorized(VECTOR):
                        residual_out[i_t, j, h + v] = new_local[v]

    return mhc_post

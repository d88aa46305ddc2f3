"""post: the output of a sublayer written back into the residual streams.

Algorithm: pure streaming. A thread owns 8 hidden elements of one token in all 4 streams: the thread
reads 16 bytes of x and of each old stream and writes 16 bytes of each new one, 18 bytes of traffic
for each hidden element of a token.
"""

import tilelang.language as T

from .arguments import Post
from .layout import HC_MULT, VECTOR
from .steps.post import Comb, Old, load_old, mix_stream

THREADS = 128


@T.macro
def load_mixes(post, t, post_local, comb_local):
    """The post weights and the comb of a token."""
    for j in T.vectorized(HC_MULT):
        post_local[j] = post.post_layer_mix[t, j]
    for i in T.unroll(HC_MULT):
        for j in T.vectorized(HC_MULT):
            comb_local[i * HC_MULT + j] = post.comb_res_mix[t, i, j]


def post(hidden: int, *, pdl: bool):
    """Build the post kernel.

    Args:
        hidden: H, a multiple of 8.
        pdl: take part in programmatic dependent launch (sm_90 and later).

    Returns:
        The TileLang program.
    """
    tokens = T.dynamic("tokens", "int32")
    blocks = -(-hidden // (THREADS * VECTOR))

    @T.prim_func
    def mhc_post(
        x: T.Tensor((tokens, hidden), "bfloat16"),
        residual: T.Tensor((tokens, HC_MULT, hidden), "bfloat16"),
        post_layer_mix: T.Tensor((tokens, HC_MULT), "float32"),
        comb_res_mix: T.Tensor((tokens, HC_MULT, HC_MULT), "float32"),
        residual_out: T.Tensor((tokens, HC_MULT, hidden), "bfloat16"),
    ):
        # The tokens are in x, because the y dimension of a grid ends at 65535.
        with T.Kernel(tokens, blocks, threads=THREADS) as (t, i0_h):
            post_local = T.alloc_local((HC_MULT,), "float32")
            comb_local = T.alloc_local((HC_MULT * HC_MULT,), "float32")
            x_local = T.alloc_local((VECTOR,), "bfloat16")
            streams_local = T.alloc_local((HC_MULT * VECTOR,), "bfloat16")
            new_local = T.alloc_local((VECTOR,), "bfloat16")
            h = (i0_h * THREADS + T.get_thread_binding()) * VECTOR
            post = Post(x, residual, post_layer_mix, comb_res_mix, residual_out)
            old = Old(x_local, streams_local, VECTOR)

            if pdl:
                T.pdl_sync()
                T.pdl_trigger()
            if h < hidden:
                load_old(post, t, h, old)
                load_mixes(post, t, post_local, comb_local)
                for j in T.unroll(HC_MULT):
                    mix_stream(old, post_local[j], Comb(comb_local, j, HC_MULT), new_local, 0)
                    for v in T.vectorized(VECTOR):
                        residual_out[t, j, h + v] = new_local[v]

    return mhc_post

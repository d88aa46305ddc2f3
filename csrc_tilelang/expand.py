"""expand: the residual streams that a model starts from, copies of its embedding.

Algorithm: pure streaming, as ``post``. A thread owns 8 hidden elements of one token: the thread
reads 16 bytes of x and writes these to each of the 4 streams.
"""

import tilelang.language as T

from .layout import HC_MULT, VECTOR

THREADS = 128


def expand(hidden: int, *, pdl: bool):
    """Build the expand kernel.

    Args:
        hidden: H, a multiple of 8.
        pdl: take part in programmatic dependent launch (sm_90 and later).

    Returns:
        The TileLang program.
    """
    tokens = T.dynamic("tokens", "int32")
    blocks = -(-hidden // (THREADS * VECTOR))

    @T.prim_func
    def mhc_expand(
        x: T.Tensor((tokens, hidden), "bfloat16"),
        residual_out: T.Tensor((tokens, HC_MULT, hidden), "bfloat16"),
    ):
        # The tokens are in x, because the y dimension of a grid ends at 65535.
        with T.Kernel(tokens, blocks, threads=THREADS) as (t, i0_h):
            x_local = T.alloc_local((VECTOR,), "bfloat16")
            h = (i0_h * THREADS + T.get_thread_binding()) * VECTOR

            if pdl:
                T.pdl_sync()
                T.pdl_trigger()
            if h < hidden:
                for v in T.vectorized(VECTOR):
                    x_local[v] = x[t, h + v]
                for j in T.unroll(HC_MULT):
                    for v in T.vectorized(VECTOR):
                        residual_out[t, j, h + v] = x_local[v]

    return mhc_expand

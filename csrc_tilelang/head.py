"""head: the last collapse of the streams, and the final RMSNorm, from their projection.

Algorithm: as ``finish`` without post weights and Sinkhorn. One CTA a token adds up the token's
partial rows, works out the 4 collapse weights and collapses streams already in registers.
"""

import tilelang.language as T

from .arguments import Collapse, Mixing
from .device import SOURCE
from .layout import HC_MULT, PARTIAL_WIDTH, WARP
from .steps import token as steps


def head(hidden: int, *, norm: bool, pdl: bool):
    """Build the head kernel.

    Args:
        hidden: H, a multiple of 256.
        norm: whether the RMSNorm follows; without it norm_weight and norm_eps are not read.
        pdl: take part in programmatic dependent launch (sm_90 and later).

    Returns:
        The TileLang program, whose ``partials`` are the rows of a projection.
    """
    tokens = T.dynamic("tokens", "int32")
    splits = T.dynamic("splits", "int32")
    threads = steps.collapse_threads(hidden)

    @T.prim_func
    def mhc_head(
        residual: T.Tensor((tokens, HC_MULT, hidden), "bfloat16"),
        partials: T.Tensor((splits, tokens, PARTIAL_WIDTH), "float32"),
        hc_scale: T.Tensor((1,), "float32"),
        hc_base: T.Tensor((HC_MULT,), "float32"),
        norm_weight: T.Tensor((hidden,), "bfloat16"),
        out: T.Tensor((tokens, hidden), "bfloat16"),
        rms_eps: T.float32,
        hc_eps: T.float32,
        norm_eps: T.float32,
    ):
        with T.Kernel(tokens, threads=threads) as t:
            T.import_source(SOURCE)
            T.annotate_min_blocks_per_sm(steps.ctas_per_sm(hidden))
            tx = T.get_thread_binding()
            mixing = Mixing(None, hc_scale, hc_base, rms_eps, hc_eps)
            output = Collapse(out, norm, norm_weight, norm_eps)
            token = steps.token_of_cta(t, hidden, tx)
            logit_local = T.alloc_local((1,), "float32")
            sums_shared = T.alloc_shared((threads // WARP, PARTIAL_WIDTH), "float32")
            norm_shared = T.alloc_shared((threads // WARP,), "float32")

            if pdl:
                T.pdl_sync()
                T.pdl_trigger()
            steps.load_token(residual, output, token)
            steps.logits(partials, mixing, token, sums_shared, logit_local)
            steps.finish_values(token, logit_local, mixing, output, norm_shared)

    return mhc_head

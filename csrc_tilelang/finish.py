"""finish: mixes, Sinkhorn, collapse and RMSNorm of one token from its projection.

Algorithm: one CTA a token. All warps add up the token's partial rows; after the only CTA-wide
barrier each warp knows all 25 sums, lane c the sum of column c. The collapse warps then work out
the 4 collapse weights and the layer input from streams that are already in registers; the norm
needs one barrier among the collapse warps. Meanwhile the last warp makes the post weights and runs
Sinkhorn, which takes longest, on the 4 x 4 matrix in registers: that warp waits for no other, and
no other waits for that warp.
"""

import tilelang.language as T

from .arguments import Collapse, Mixing
from .device import SOURCE
from .layout import HC_MULT, MIXES, PARTIAL_WIDTH, WARP
from .steps import token as steps
from .steps.mixes import finish_in_lanes


def finish(hidden: int, *, norm: bool, pdl: bool):
    """Build the finish kernel.

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
    def mhc_finish(
        residual: T.Tensor((tokens, HC_MULT, hidden), "bfloat16"),
        partials: T.Tensor((splits, tokens, PARTIAL_WIDTH), "float32"),
        hc_scale: T.Tensor((3,), "float32"),
        hc_base: T.Tensor((MIXES,), "float32"),
        norm_weight: T.Tensor((hidden,), "bfloat16"),
        post_mix: T.Tensor((tokens, HC_MULT), "float32"),
        comb_mix: T.Tensor((tokens, HC_MULT, HC_MULT), "float32"),
        layer_input: T.Tensor((tokens, hidden), "bfloat16"),
        rms_eps: T.float32,
        hc_pre_eps: T.float32,
        hc_sinkhorn_eps: T.float32,
        hc_post_mult_value: T.float32,
        sinkhorn_repeat: T.int32,
        norm_eps: T.float32,
    ):
        with T.Kernel(tokens, threads=threads + WARP) as t:
            T.import_source(SOURCE)
            T.annotate_min_blocks_per_sm(steps.ctas_per_sm(hidden))
            tx = T.get_thread_binding()
            mixing = Mixing(
                None, hc_scale, hc_base, rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value,
                sinkhorn_repeat, post_mix, comb_mix,
            )  # fmt: skip
            output = Collapse(layer_input, norm, norm_weight, norm_eps)
            token = steps.token_of_cta(t, hidden, tx)
            logit_local = T.alloc_local((1,), "float32")
            sums_shared = T.alloc_shared((threads // WARP + 1, PARTIAL_WIDTH), "float32")
            norm_shared = T.alloc_shared((threads // WARP,), "float32")

            if pdl:
                T.pdl_sync()
                T.pdl_trigger()
            if tx < threads:
                steps.load_token(residual, output, token)
            steps.logits(partials, mixing, token, sums_shared, logit_local)
            if tx < threads:
                steps.finish_values(token, logit_local, mixing, output, norm_shared)
            else:
                finish_in_lanes(logit_local, mixing, t, tx % WARP)

    return mhc_finish

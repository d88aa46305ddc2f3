"""From sums to mixes: logits, collapse weights, post weights and combs.

m     = sum * rsqrt(mean square + rms_eps)
pre   = sigmoid(m * scale[0] + base) + hc_pre_eps
post' = sigmoid(m * scale[1] + base) * hc_post_mult_value
comb' = Sinkhorn(softmax_rows(m * scale[2] + base))
"""

import tilelang.language as T

from ..device import rcp
from ..layout import COMB, HC_MULT
from .sinkhorn import sinkhorn, softmax_row


def sigmoid(value):
    """Return 1 / (1 + exp(-value)), to the precision of fp32."""
    return rcp(1.0 + T.exp(-value))


def logit(total, squares, columns, rms_eps, scale, base):
    """Return m * scale + base of one mix, whose projection and sum of squares are given."""
    return total * T.rsqrt(squares * (1.0 / columns) + rms_eps) * scale + base


def scale_of(column):
    """Return which scale belongs to a mix: 0 of pre, 1 of post, 2 of comb."""
    return T.if_then_else(column < HC_MULT, 0, T.if_then_else(column < COMB, 1, 2))


@T.macro
def load_scale_and_base(mixing, column, scale_local, base_local):
    """The scale and the base of mix ``column``; zeros past the mixes."""
    scale_local[0] = 0.0
    base_local[0] = 0.0
    if column < mixing.hc_base.shape[0]:
        scale_local[0] = mixing.hc_scale[scale_of(column)]
        base_local[0] = mixing.hc_base[column]


@T.macro
def store_comb(comb_local, mixing, t):
    """The comb of token ``t`` to memory, by one lane."""
    for i in T.unroll(HC_MULT):
        for j in T.vectorized(HC_MULT):
            mixing.comb_mix[t, i, j] = comb_local[i * HC_MULT + j]


@T.macro
def finish_in_lanes(logit_local, mixing, t, lane):
    """The post weights and the comb of token ``t``, whose logit c is logit_local[0] of lane c."""
    comb_local = T.alloc_local((HC_MULT * HC_MULT,), "float32")
    entry = T.alloc_local((1,), "float32")
    entry[0] = sigmoid(logit_local[0])
    if lane >= HC_MULT and lane < COMB:
        mixing.post_mix[t, lane - HC_MULT] = entry[0] * mixing.hc_post_mult_value
    softmax_row(logit_local, mixing.hc_sinkhorn_eps, entry)
    for q in T.unroll(HC_MULT * HC_MULT):
        comb_local[q] = T.shfl_sync(entry[0], COMB + q)
    sinkhorn(comb_local, mixing.hc_sinkhorn_eps, mixing.sinkhorn_repeat)
    if lane == 0:
        store_comb(comb_local, mixing, t)

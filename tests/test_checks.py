"""Refuse each wrong argument, with one message eagerly, on meta, fake and when compiled."""

import math
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from expecttest import assert_expected_inline
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers import OPS, STREAMS, assert_equal, call, clone, overload, tensors
from mhc_ops import _checks
from mhc_ops.testing import make_inputs

TOKENS, HIDDEN = 3, 256
HEAD = ("head", "post_head", "post_head_streams")
POST = ("post", "fused_post_pre", *HEAD[1:])
PRE = ("pre", "fused_post_pre", "expand_pre")
NORM = (*PRE, *HEAD)
RESIDUAL = tuple(op for op in OPS if STREAMS[op] == "residual")
MIX_ARGUMENTS = {"post_layer_mix", "comb_res_mix", "fn", "hc_scale", "hc_base", "scale", "base"}


class Case(NamedTuple):
    """Describe one wrong argument.

    Attributes:
        argument: the name of the argument that is made wrong.
        ops: the ops that take it.
        wrong: its right value to its wrong value.
    """

    argument: str
    ops: tuple[str, ...]
    wrong: Callable[[Any], Any]


def cast(dtype):
    return lambda t: t.to(dtype)


def gaps_in_rows(t):
    """Give the last dimension a stride of 2."""
    return t.new_zeros((*t.shape[:-1], 2 * t.shape[-1]))[..., ::2]


def resized(*shape):
    return lambda t: t.new_zeros(shape)


def value(v):
    return lambda _: v


ARGUMENTS = {
    "x": (*POST, "expand_pre"),
    "residual": RESIDUAL,
    "post_layer_mix": POST,
    "comb_res_mix": POST,
    "fn": NORM,
    "hc_scale": PRE,
    "hc_base": PRE,
    "scale": HEAD,
    "base": HEAD,
    "norm_weight": NORM,
}
ROWS = ("x", "residual", "comb_res_mix", "fn", "norm_weight")
EPSILONS = {
    "rms_eps": NORM,
    "hc_pre_eps": PRE,
    "hc_sinkhorn_eps": PRE,
    "hc_eps": HEAD,
    "norm_eps": NORM,
}

CASES: dict[str, Case] = {}
for name, ops in ARGUMENTS.items():
    other = torch.bfloat16 if name in MIX_ARGUMENTS else torch.float16
    CASES[f"{name} dtype"] = Case(name, ops, cast(other))
    # Most get one more dimension; residual gets two less, as pre and head take any number of
    # leading ones, or none.
    rank = (lambda t: t[0, 0]) if name == "residual" else (lambda t: t[None])
    CASES[f"{name} rank"] = Case(name, POST if name == "x" else ops, rank)
    if name != "norm_weight":
        CASES[f"{name} None"] = Case(name, ops, value(None))
for name in ROWS:
    CASES[f"{name} gaps in rows"] = Case(name, ARGUMENTS[name], gaps_in_rows)
for name, ops in EPSILONS.items():
    CASES[f"{name} negative"] = Case(name, ops, value(-1e-6))
    CASES[f"{name} NaN"] = Case(name, ops, value(math.nan))
    CASES[f"{name} infinite"] = Case(name, ops, value(math.inf))
    CASES[f"{name} infinite in fp32"] = Case(name, ops, value(1e39))
    CASES[f"{name} zero in fp32"] = Case(name, ops, value(1e-60))
    CASES[f"{name} subnormal in fp32"] = Case(name, ops, value(1e-38))
CASES |= {
    "x hidden": Case("x", (*POST, "expand_pre"), resized(TOKENS, 2 * HIDDEN)),
    "x tokens": Case("x", POST, resized(TOKENS + 1, HIDDEN)),
    "x without dimensions": Case("x", ("expand_pre",), resized()),
    "x no hidden": Case("x", ("expand_pre",), resized(TOKENS, 0)),
    "residual without streams": Case("residual", RESIDUAL, resized(TOKENS, HIDDEN)),
    "residual hidden": Case("residual", RESIDUAL, resized(TOKENS, 4, 2 * HIDDEN)),
    "residual hc_mult": Case("residual", RESIDUAL, resized(TOKENS, 3, HIDDEN)),
    "residual no streams": Case("residual", RESIDUAL, resized(TOKENS, 0, HIDDEN)),
    "residual no hidden": Case("residual", RESIDUAL, resized(TOKENS, 4, 0)),
    "residual float32": Case("residual", RESIDUAL, cast(torch.float32)),
    "post_layer_mix hc_mult": Case("post_layer_mix", POST, resized(TOKENS, 3, 1)),
    "post_layer_mix last dimension": Case("post_layer_mix", POST, resized(TOKENS, 4, 2)),
    "post_layer_mix without last": Case("post_layer_mix", POST, resized(TOKENS, 5)),
    "comb_res_mix hc_mult": Case("comb_res_mix", POST, resized(TOKENS, 4, 5)),
    "comb_res_mix tokens": Case("comb_res_mix", POST, resized(TOKENS + 1, 4, 4)),
    "fn rows": Case("fn", NORM, resized(23, 4 * HIDDEN)),
    "fn without rows": Case("fn", NORM, resized(0, 4 * HIDDEN)),
    "fn columns": Case("fn", NORM, lambda t: t.new_zeros((t.shape[0], HIDDEN))),
    "hc_scale size": Case("hc_scale", PRE, resized(1)),
    "hc_base size": Case("hc_base", PRE, resized(25)),
    "scale size": Case("scale", HEAD, resized(3)),
    "base size": Case("base", HEAD, resized(24)),
    "norm_weight size": Case("norm_weight", NORM, resized(2 * HIDDEN)),
    "norm_weight without norm_eps": Case("norm_eps", NORM, value(None)),
    "norm_eps without norm_weight": Case("norm_weight", NORM, value(None)),
    "hc_post_mult_value NaN": Case("hc_post_mult_value", PRE, value(math.nan)),
    "hc_post_mult_value infinite in fp32": Case("hc_post_mult_value", PRE, value(-1e39)),
    "hc_post_mult_value zero in fp32": Case("hc_post_mult_value", PRE, value(-1e-60)),
    "sinkhorn_repeat zero": Case("sinkhorn_repeat", PRE, value(0)),
    "sinkhorn_repeat negative": Case("sinkhorn_repeat", PRE, value(-3)),
    "sinkhorn_repeat of hours": Case("sinkhorn_repeat", PRE, value(10_001)),
}

CASES_OF = {op: [name for name, case in CASES.items() if op in case.ops] for op in OPS}
per_op = pytest.mark.parametrize("op", OPS)


def wrong_inputs(op, name, device="cpu"):
    case = CASES[name]
    inputs = make_inputs(op, TOKENS, HIDDEN, device=device, norm=True, sinkhorn_repeat=2)
    inputs[case.argument] = case.wrong(inputs[case.argument])
    return inputs


def refusal(op, inputs):
    """Return the message of the ValueError that the op raises."""
    with pytest.raises(ValueError, match=f"^mhc::{op}: expected ") as error:
        overload(op)(**inputs)
    return str(error.value)


def transcript(op):
    lines = [
        textwrap.fill(
            f"{name}: {refusal(op, wrong_inputs(op, name))}",
            width=90,
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for name in CASES_OF[op]
    ]
    return "\n".join(lines)


def test_messages_of_post():
    assert_expected_inline(
        transcript("post"),
        """\
x dtype: mhc::post: expected x of dtype torch.bfloat16, got torch.float16
x rank: mhc::post: expected x of shape (3, 256), got (1, 3, 256)
x None: mhc::post: expected x to be a tensor, got None
residual dtype: mhc::post: expected residual of dtype torch.bfloat16, got torch.float16
residual rank: mhc::post: expected residual of shape (..., hc_mult, hidden), got (256,)
residual None: mhc::post: expected residual to be a tensor, got None
post_layer_mix dtype: mhc::post: expected post_layer_mix of dtype torch.float32, got
    torch.bfloat16
post_layer_mix rank: mhc::post: expected post_layer_mix of shape (3, 4, 1), got (1, 3, 4,
    1)
post_layer_mix None: mhc::post: expected post_layer_mix to be a tensor, got None
comb_res_mix dtype: mhc::post: expected comb_res_mix of dtype torch.float32, got
    torch.bfloat16
comb_res_mix rank: mhc::post: expected comb_res_mix of shape (3, 4, 4), got (1, 3, 4, 4)
comb_res_mix None: mhc::post: expected comb_res_mix to be a tensor, got None
x gaps in rows: mhc::post: expected x with a contiguous last dimension, got strides (512,
    2)
residual gaps in rows: mhc::post: expected residual with a contiguous last dimension, got
    strides (2048, 512, 2)
comb_res_mix gaps in rows: mhc::post: expected comb_res_mix with a contiguous last
    dimension, got strides (32, 8, 2)
x hidden: mhc::post: expected x of shape (3, 256), got (3, 512)
x tokens: mhc::post: expected x of shape (3, 256), got (4, 256)
residual without streams: mhc::post: expected residual of shape (..., hc_mult, hidden),
    got (3, 256)
residual hidden: mhc::post: expected x of shape (3, 512), got (3, 256)
residual hc_mult: mhc::post: expected post_layer_mix of shape (3, 3, 1), got (3, 4, 1)
residual no streams: mhc::post: expected residual with hc_mult of at least 1, got 0
residual no hidden: mhc::post: expected residual with a hidden size of at least 1, got 0
residual float32: mhc::post: expected residual of dtype torch.bfloat16, got torch.float32
post_layer_mix hc_mult: mhc::post: expected post_layer_mix of shape (3, 4, 1), got (3, 3,
    1)
post_layer_mix last dimension: mhc::post: expected post_layer_mix of shape (3, 4, 1), got
    (3, 4, 2)
post_layer_mix without last: mhc::post: expected post_layer_mix of shape (3, 4), got (3,
    5)
comb_res_mix hc_mult: mhc::post: expected comb_res_mix of shape (3, 4, 4), got (3, 4, 5)
comb_res_mix tokens: mhc::post: expected comb_res_mix of shape (3, 4, 4), got (4, 4, 4)""",
    )


def test_messages_of_pre():
    assert_expected_inline(
        transcript("pre"),
        """\
residual dtype: mhc::pre: expected residual of dtype torch.bfloat16, got torch.float16
residual rank: mhc::pre: expected residual of shape (..., hc_mult, hidden), got (256,)
residual None: mhc::pre: expected residual to be a tensor, got None
fn dtype: mhc::pre: expected fn of dtype torch.float32, got torch.bfloat16
fn rank: mhc::pre: expected fn of shape (24, 1024), got (1, 24, 1024)
fn None: mhc::pre: expected fn to be a tensor, got None
hc_scale dtype: mhc::pre: expected hc_scale of dtype torch.float32, got torch.bfloat16
hc_scale rank: mhc::pre: expected hc_scale of shape (3,), got (1, 3)
hc_scale None: mhc::pre: expected hc_scale to be a tensor, got None
hc_base dtype: mhc::pre: expected hc_base of dtype torch.float32, got torch.bfloat16
hc_base rank: mhc::pre: expected hc_base of shape (24,), got (1, 24)
hc_base None: mhc::pre: expected hc_base to be a tensor, got None
norm_weight dtype: mhc::pre: expected norm_weight of dtype torch.bfloat16 or
    torch.float32, got torch.float16
norm_weight rank: mhc::pre: expected norm_weight of shape (256,), got (1, 256)
residual gaps in rows: mhc::pre: expected residual with a contiguous last dimension, got
    strides (2048, 512, 2)
fn gaps in rows: mhc::pre: expected fn with a contiguous last dimension, got strides
    (2048, 2)
norm_weight gaps in rows: mhc::pre: expected norm_weight with a contiguous last dimension,
    got strides (2,)
rms_eps negative: mhc::pre: expected rms_eps to be finite in fp32 and at least 0, got
    -1e-06
rms_eps NaN: mhc::pre: expected rms_eps to be finite in fp32 and at least 0, got nan
rms_eps infinite: mhc::pre: expected rms_eps to be finite in fp32 and at least 0, got inf
rms_eps infinite in fp32: mhc::pre: expected rms_eps to be finite in fp32 and at least 0,
    got 1e+39
rms_eps zero in fp32: mhc::pre: expected rms_eps to be 0 or at least
    1.1754943508222875e-38 in size, which fp32 holds, got 1e-60
rms_eps subnormal in fp32: mhc::pre: expected rms_eps to be 0 or at least
    1.1754943508222875e-38 in size, which fp32 holds, got 1e-38
hc_pre_eps negative: mhc::pre: expected hc_pre_eps to be finite in fp32 and at least 0,
    got -1e-06
hc_pre_eps NaN: mhc::pre: expected hc_pre_eps to be finite in fp32 and at least 0, got nan
hc_pre_eps infinite: mhc::pre: expected hc_pre_eps to be finite in fp32 and at least 0,
    got inf
hc_pre_eps infinite in fp32: mhc::pre: expected hc_pre_eps to be finite in fp32 and at
    least 0, got 1e+39
hc_pre_eps zero in fp32: mhc::pre: expected hc_pre_eps to be 0 or at least
    1.1754943508222875e-38 in size, which fp32 holds, got 1e-60
hc_pre_eps subnormal in fp32: mhc::pre: expected hc_pre_eps to be 0 or at least
    1.1754943508222875e-38 in size, which fp32 holds, got 1e-38
hc_sinkhorn_eps negative: mhc::pre: expected hc_sinkhorn_eps to be finite in fp32 and at
    least 0, got -1e-06
hc_sinkhorn_eps NaN: mhc::pre: expected hc_sinkhorn_eps to be finite in fp32 and at least
    0, got nan
hc_sinkhorn_eps infinite: mhc::pre: expected hc_sinkhorn_eps to be finite in fp32 and at
    least 0, got inf
hc_sinkhorn_eps infinite in fp32: mhc::pre: expected hc_sinkhorn_eps to be finite in fp32
    and at least 0, got 1e+39
hc_sinkhorn_eps zero in fp32: mhc::pre: expected hc_sinkhorn_eps to be 0 or at least
    1.1754943508222875e-38 in size, which fp32 holds, got 1e-60
hc_sinkhorn_eps subnormal in fp32: mhc::pre: expected hc_sinkhorn_eps to be 0 or at least
    1.1754943508222875e-38 in size, which fp32 holds, got 1e-38
norm_eps negative: mhc::pre: expected norm_eps to be finite in fp32 and at least 0, got
    -1e-06
norm_eps NaN: mhc::pre: expected norm_eps to be finite in fp32 and at least 0, got nan
norm_eps infinite: mhc::pre: expected norm_eps to be finite in fp32 and at least 0, got
    inf
norm_eps infinite in fp32: mhc::pre: expected norm_eps to be finite in fp32 and at least
    0, got 1e+39
norm_eps zero in fp32: mhc::pre: expected norm_eps to be 0 or at least
    1.1754943508222875e-38 in size, which fp32 holds, got 1e-60
norm_eps subnormal in fp32: mhc::pre: expected norm_eps to be 0 or at least
    1.1754943508222875e-38 in size, which fp32 holds, got 1e-38
residual without streams: mhc::pre: expected residual of shape (..., hc_mult, hidden), got
    (3, 256)
residual hidden: mhc::pre: expected fn of shape (24, 2048), got (24, 1024)
residual hc_mult: mhc::pre: expected fn of shape (15, 768), got (24, 1024)
residual no streams: mhc::pre: expected residual with hc_mult of at least 1, got 0
residual no hidden: mhc::pre: expected residual with a hidden size of at least 1, got 0
residual float32: mhc::pre: expected residual of dtype torch.bfloat16, got torch.float32
fn rows: mhc::pre: expected fn of shape (24, 1024), got (23, 1024)
fn without rows: mhc::pre: expected fn of shape (24, 1024), got (0, 1024)
fn columns: mhc::pre: expected fn of shape (24, 1024), got (24, 256)
hc_scale size: mhc::pre: expected hc_scale of shape (3,), got (1,)
hc_base size: mhc::pre: expected hc_base of shape (24,), got (25,)
norm_weight size: mhc::pre: expected norm_weight of shape (256,), got (512,)
norm_weight without norm_eps: mhc::pre: expected norm_weight and norm_eps together or
    neither, got norm_weight alone
norm_eps without norm_weight: mhc::pre: expected norm_weight and norm_eps together or
    neither, got norm_eps alone
hc_post_mult_value NaN: mhc::pre: expected hc_post_mult_value to be finite in fp32, got
    nan
hc_post_mult_value infinite in fp32: mhc::pre: expected hc_post_mult_value to be finite in
    fp32, got -1e+39
hc_post_mult_value zero in fp32: mhc::pre: expected hc_post_mult_value to be 0 or at least
    1.1754943508222875e-38 in size, which fp32 holds, got -1e-60
sinkhorn_repeat zero: mhc::pre: expected sinkhorn_repeat from 1 to 10000, got 0
sinkhorn_repeat negative: mhc::pre: expected sinkhorn_repeat from 1 to 10000, got -3
sinkhorn_repeat of hours: mhc::pre: expected sinkhorn_repeat from 1 to 10000, got 10001""",
    )


def test_messages_of_fused_post_pre():
    assert_expected_inline(
        transcript("fused_post_pre"),
        """\
x dtype: mhc::fused_post_pre: expected x of dtype torch.bfloat16, got torch.float16
x rank: mhc::fused_post_pre: expected x of shape (3, 256), got (1, 3, 256)
x None: mhc::fused_post_pre: expected x to be a tensor, got None
residual dtype: mhc::fused_post_pre: expected residual of dtype torch.bfloat16, got
    torch.float16
residual rank: mhc::fused_post_pre: expected residual of shape (..., hc_mult, hidden), got
    (256,)
residual None: mhc::fused_post_pre: expected residual to be a tensor, got None
post_layer_mix dtype: mhc::fused_post_pre: expected post_layer_mix of dtype torch.float32,
    got torch.bfloat16
post_layer_mix rank: mhc::fused_post_pre: expected post_layer_mix of shape (3, 4, 1), got
    (1, 3, 4, 1)
post_layer_mix None: mhc::fused_post_pre: expected post_layer_mix to be a tensor, got None
comb_res_mix dtype: mhc::fused_post_pre: expected comb_res_mix of dtype torch.float32, got
    torch.bfloat16
comb_res_mix rank: mhc::fused_post_pre: expected comb_res_mix of shape (3, 4, 4), got (1,
    3, 4, 4)
comb_res_mix None: mhc::fused_post_pre: expected comb_res_mix to be a tensor, got None
fn dtype: mhc::fused_post_pre: expected fn of dtype torch.float32, got torch.bfloat16
fn rank: mhc::fused_post_pre: expected fn of shape (24, 1024), got (1, 24, 1024)
fn None: mhc::fused_post_pre: expected fn to be a tensor, got None
hc_scale dtype: mhc::fused_post_pre: expected hc_scale of dtype torch.float32, got
    torch.bfloat16
hc_scale rank: mhc::fused_post_pre: expected hc_scale of shape (3,), got (1, 3)
hc_scale None: mhc::fused_post_pre: expected hc_scale to be a tensor, got None
hc_base dtype: mhc::fused_post_pre: expected hc_base of dtype torch.float32, got
    torch.bfloat16
hc_base rank: mhc::fused_post_pre: expected hc_base of shape (24,), got (1, 24)
hc_base None: mhc::fused_post_pre: expected hc_base to be a tensor, got None
norm_weight dtype: mhc::fused_post_pre: expected norm_weight of dtype torch.bfloat16 or
    torch.float32, got torch.float16
norm_weight rank: mhc::fused_post_pre: expected norm_weight of shape (256,), got (1, 256)
x gaps in rows: mhc::fused_post_pre: expected x with a contiguous last dimension, got
    strides (512, 2)
residual gaps in rows: mhc::fused_post_pre: expected residual with a contiguous last
    dimension, got strides (2048, 512, 2)
comb_res_mix gaps in rows: mhc::fused_post_pre: expected comb_res_mix with a contiguous
    last dimension, got strides (32, 8, 2)
fn gaps in rows: mhc::fused_post_pre: expected fn with a contiguous last dimension, got
    strides (2048, 2)
norm_weight gaps in rows: mhc::fused_post_pre: expected norm_weight with a contiguous last
    dimension, got strides (2,)
rms_eps negative: mhc::fused_post_pre: expected rms_eps to be finite in fp32 and at least
    0, got -1e-06
rms_eps NaN: mhc::fused_post_pre: expected rms_eps to be finite in fp32 and at least 0,
    got nan
rms_eps infinite: mhc::fused_post_pre: expected rms_eps to be finite in fp32 and at least
    0, got inf
rms_eps infinite in fp32: mhc::fused_post_pre: expected rms_eps to be finite in fp32 and
    at least 0, got 1e+39
rms_eps zero in fp32: mhc::fused_post_pre: expected rms_eps to be 0 or at least
    1.1754943508222875e-38 in size, which fp32 holds, got 1e-60
rms_eps subnormal in fp32: mhc::fused_post_pre: expected rms_eps to be 0 or at least
    1.1754943508222875e-38 in size, which fp32 holds, got 1e-38
hc_pre_eps negative: mhc::fused_post_pre: expected hc_pre_eps to be finite in fp32 and at
    least 0, got -1e-06
hc_pre_eps NaN: mhc::fused_post_pre: expected hc_pre_eps to be finite in fp32 and at least
    0, got nan
hc_pre_eps infinite: mhc::fused_post_pre: expected hc_pre_eps to be finite in fp32 and at
    least 0, got inf
hc_pre_eps infinite in fp32: mhc::fused_post_pre: expected hc_pre_eps to be finite in fp32
    and at least 0, got 1e+39
hc_pre_eps zero in fp32: mhc::fused_post_pre: expected hc_pre_eps to be 0 or at least
    1.1754943508222875e-38 in size, which fp32 holds, got 1e-60
hc_pre_eps subnormal in fp32: mhc::fused_post_pre: expected hc_pre_eps to be 0 or at least
    1.1754943508222875e-38 in size, which fp32 holds, got 1e-38
hc_sinkhorn_eps negative: mhc::fused_post_pre: expected hc_sinkhorn_eps to be finite in
    fp32 and at least 0, got -1e-06
hc_sinkhorn_eps NaN: mhc::fused_post_pre: expected hc_sinkhorn_eps to be finite in fp32
    and at least 0, got nan
hc_sinkhorn_eps infinite: mhc::fused_post_pre: expected hc_sinkhorn_eps to be finite in
    fp32 and at least 0, got inf
hc_sinkhorn_eps infinite in fp32: mhc::fused_post_pre: expected hc_sinkhorn_eps to be
    finite in fp32 and at least 0, got 1e+39
hc_sinkhorn_eps zero in fp32: mhc::fused_post_pre: expected hc_sinkhorn_eps to be 0 or at
    least 1.1754943508222875e-38 in size, which fp32 holds, got 1e-60
hc_sinkhorn_eps subnormal in fp32: mhc::fused_post_pre: expected hc_sinkhorn_eps to be 0
    or at least 1.1754943508222875e-38 in size, which fp32 holds, got 1e-38
norm_eps negative: mhc::fused_post_pre: expected norm_eps to be finite in fp32 and at
    least 0, got -1e-06
norm_eps NaN: mhc::fused_post_pre: expected norm_eps to be finite in fp32 and at least 0,
    got nan
norm_eps infinite: mhc::fused_post_pre: expected norm_eps to be finite in fp32 and at
    least 0, got inf
norm_eps infinite in fp32: mhc::fused_post_pre: expected norm_eps to be finite in fp32 and
    at least 0, got 1e+39
norm_eps zero in fp32: mhc::fused_post_pre: expected norm_eps to be 0 or at least
    1.1754943508222875e-38 in size, which fp32 holds, got 1e-60
norm_eps subnormal in fp32: mhc::fused_post_pre: expected norm_eps to be 0 or at least
    1.1754943508222875e-38 in size, which fp32 holds, got 1e-38
x hidden: mhc::fused_post_pre: expected x of shape (3, 256), got (3, 512)
x tokens: mhc::fused_post_pre: expected x of shape (3, 256), got (4, 256)
residual without streams: mhc::fused_post_pre: expected residual of shape (..., hc_mult,
    hidden), got (3, 256)
residual hidden: mhc::fused_post_pre: expected x of shape (3, 512), got (3, 256)
residual hc_mult: mhc::fused_post_pre: expected post_layer_mix of shape (3, 3, 1), got (3,
    4, 1)
residual no streams: mhc::fused_post_pre: expected residual with hc_mult of at least 1,
    got 0
residual no hidden: mhc::fused_post_pre: expected residual with a hidden size of at least
    1, got 0
residual float32: mhc::fused_post_pre: expected residual of dtype torch.bfloat16, got
    torch.float32
post_layer_mix hc_mult: mhc::fused_post_pre: expected post_layer_mix of shape (3, 4, 1),
    got (3, 3, 1)
post_layer_mix last dimension: mhc::fused_post_pre: expected post_layer_mix of shape (3,
    4, 1), got (3, 4, 2)
post_layer_mix without last: mhc::fused_post_pre: expected post_layer_mix of shape (3, 4),
    got (3, 5)
comb_res_mix hc_mult: mhc::fused_post_pre: expected comb_res_mix of shape (3, 4, 4), got
    (3, 4, 5)
comb_res_mix tokens: mhc::fused_post_pre: expected comb_res_mix of shape (3, 4, 4), got
    (4, 4, 4)
fn rows: mhc::fused_post_pre: expected fn of shape (24, 1024), got (23, 1024)
fn without rows: mhc::fused_post_pre: expected fn of shape (24, 1024), got (0, 1024)
fn columns: mhc::fused_post_pre: expected fn of shape (24, 1024), got (24, 256)
hc_scale size: mhc::fused_post_pre: expected hc_scale of shape (3,), got (1,)
hc_base size: mhc::fused_post_pre: expected hc_base of shape (24,), got (25,)
norm_weight size: mhc::fused_post_pre: expected norm_weight of shape (256,), got (512,)
norm_weight without norm_eps: mhc::fused_post_pre: expected norm_weight and norm_eps
    together or neither, got norm_weight alone
norm_eps without norm_weight: mhc::fused_post_pre: expected norm_weight and norm_eps
    together or neither, got norm_eps alone
hc_post_mult_value NaN: mhc::fused_post_pre: expected hc_post_mult_value to be finite in
    fp32, got nan
hc_post_mult_value infinite in fp32: mhc::fused_post_pre: expected hc_post_mult_value to
    be finite in fp32, got -1e+39
hc_post_mult_value zero in fp32: mhc::fused_post_pre: expected hc_post_mult_value to be 0
    or at least 1.1754943508222875e-38 in size, which fp32 holds, got -1e-60
sinkhorn_repeat zero: mhc::fused_post_pre: expected sinkhorn_repeat from 1 to 10000, got 0
sinkhorn_repeat negative: mhc::fused_post_pre: expected sinkhorn_repeat from 1 to 10000,
    got -3
sinkhorn_repeat of hours: mhc::fused_post_pre: expected sinkhorn_repeat from 1 to 10000,
    got 10001""",
    )


def test_messages_of_head():
    assert_expected_inline(
        transcript("head"),
        """\
residual dtype: mhc::head: expected residual of dtype torch.bfloat16, got torch.float16
residual rank: mhc::head: expected residual of shape (..., hc_mult, hidden), got (256,)
residual None: mhc::head: expected residual to be a tensor, got None
fn dtype: mhc::head: expected fn of dtype torch.float32, got torch.bfloat16
fn rank: mhc::head: expected fn of shape (4, 1024), got (1, 4, 1024)
fn None: mhc::head: expected fn to be a tensor, got None
scale dtype: mhc::head: expected scale of dtype torch.float32, got torch.bfloat16
scale rank: mhc::head: expected scale of shape (1,), got (1, 1)
scale None: mhc::head: expected scale to be a tensor, got None
base dtype: mhc::head: expected base of dtype torch.float32, got torch.bfloat16
base rank: mhc::head: expected base of shape (4,), got (1, 4)
base None: mhc::head: expected base to be a tensor, got None
norm_weight dtype: mhc::head: expected norm_weight of dtype torch.bfloat16 or
    torch.float32, got torch.float16
norm_weight rank: mhc::head: expected norm_weight of shape (256,), got (1, 256)
residual gaps in rows: mhc::head: expected residual with a contiguous last dimension, got
    strides (2048, 512, 2)
fn gaps in rows: mhc::head: expected fn with a contiguous last dimension, got strides
    (2048, 2)
norm_weight gaps in rows: mhc::head: expected norm_weight with a contiguous last
    dimension, got strides (2,)
rms_eps negative: mhc::head: expected rms_eps to be finite in fp32 and at least 0, got
    -1e-06
rms_eps NaN: mhc::head: expected rms_eps to be finite in fp32 and at least 0, got nan
rms_eps infinite: mhc::head: expected rms_eps to be finite in fp32 and at least 0, got inf
rms_eps infinite in fp32: mhc::head: expected rms_eps to be finite in fp32 and at least 0,
    got 1e+39
rms_eps zero in fp32: mhc::head: expected rms_eps to be 0 or at least
    1.1754943508222875e-38 in size, which fp32 holds, got 1e-60
rms_eps subnormal in fp32: mhc::head: expected rms_eps to be 0 or at least
    1.1754943508222875e-38 in size, which fp32 holds, got 1e-38
hc_eps negative: mhc::head: expected hc_eps to be finite in fp32 and at least 0, got
    -1e-06
hc_eps NaN: mhc::head: expected hc_eps to be finite in fp32 and at least 0, got nan
hc_eps infinite: mhc::head: expected hc_eps to be finite in fp32 and at least 0, got inf
hc_eps infinite in fp32: mhc::head: expected hc_eps to be finite in fp32 and at least 0,
    got 1e+39
hc_eps zero in fp32: mhc::head: expected hc_eps to be 0 or at least 1.1754943508222875e-38
    in size, which fp32 holds, got 1e-60
hc_eps subnormal in fp32: mhc::head: expected hc_eps to be 0 or at least
    1.1754943508222875e-38 in size, which fp32 holds, got 1e-38
norm_eps negative: mhc::head: expected norm_eps to be finite in fp32 and at least 0, got
    -1e-06
norm_eps NaN: mhc::head: expected norm_eps to be finite in fp32 and at least 0, got nan
norm_eps infinite: mhc::head: expected norm_eps to be finite in fp32 and at least 0, got
    inf
norm_eps infinite in fp32: mhc::head: expected norm_eps to be finite in fp32 and at least
    0, got 1e+39
norm_eps zero in fp32: mhc::head: expected norm_eps to be 0 or at least
    1.1754943508222875e-38 in size, which fp32 holds, got 1e-60
norm_eps subnormal in fp32: mhc::head: expected norm_eps to be 0 or at least
    1.1754943508222875e-38 in size, which fp32 holds, got 1e-38
residual without streams: mhc::head: expected residual of shape (..., hc_mult, hidden),
    got (3, 256)
residual hidden: mhc::head: expected fn of shape (4, 2048), got (4, 1024)
residual hc_mult: mhc::head: expected fn of shape (3, 768), got (4, 1024)
residual no streams: mhc::head: expected residual with hc_mult of at least 1, got 0
residual no hidden: mhc::head: expected residual with a hidden size of at least 1, got 0
residual float32: mhc::head: expected residual of dtype torch.bfloat16, got torch.float32
fn rows: mhc::head: expected fn of shape (4, 1024), got (23, 1024)
fn without rows: mhc::head: expected fn of shape (4, 1024), got (0, 1024)
fn columns: mhc::head: expected fn of shape (4, 1024), got (4, 256)
scale size: mhc::head: expected scale of shape (1,), got (3,)
base size: mhc::head: expected base of shape (4,), got (24,)
norm_weight size: mhc::head: expected norm_weight of shape (256,), got (512,)
norm_weight without norm_eps: mhc::head: expected norm_weight and norm_eps together or
    neither, got norm_weight alone
norm_eps without norm_weight: mhc::head: expected norm_weight and norm_eps together or
    neither, got norm_eps alone""",
    )


@per_op
def test_refused_inputs_are_left_alone(op, subtests):
    for name in CASES_OF[op]:
        with subtests.test(name):
            inputs = wrong_inputs(op, name)
            before = clone(inputs)
            refusal(op, inputs)
            for key in ("norm_eps", CASES[name].argument):  # NaN is not equal to itself.
                if not isinstance(inputs.get(key), torch.Tensor):
                    inputs.pop(key, None), before.pop(key, None)
            assert_equal(inputs, before)


def test_messages_of_expand_pre():
    assert_expected_inline(
        transcript("expand_pre"),
        """\
x dtype: mhc::expand_pre: expected x of dtype torch.bfloat16, got torch.float16
x None: mhc::expand_pre: expected x to be a tensor, got None
fn dtype: mhc::expand_pre: expected fn of dtype torch.float32, got torch.bfloat16
fn rank: mhc::expand_pre: expected fn with two dimensions, got (1, 24, 1024)
fn None: mhc::expand_pre: expected fn to be a tensor, got None
hc_scale dtype: mhc::expand_pre: expected hc_scale of dtype torch.float32, got
    torch.bfloat16
hc_scale rank: mhc::expand_pre: expected hc_scale of shape (3,), got (1, 3)
hc_scale None: mhc::expand_pre: expected hc_scale to be a tensor, got None
hc_base dtype: mhc::expand_pre: expected hc_base of dtype torch.float32, got
    torch.bfloat16
hc_base rank: mhc::expand_pre: expected hc_base of shape (24,), got (1, 24)
hc_base None: mhc::expand_pre: expected hc_base to be a tensor, got None
norm_weight dtype: mhc::expand_pre: expected norm_weight of dtype torch.bfloat16 or
    torch.float32, got torch.float16
norm_weight rank: mhc::expand_pre: expected norm_weight of shape (256,), got (1, 256)
x gaps in rows: mhc::expand_pre: expected x with a contiguous last dimension, got strides
    (512, 2)
fn gaps in rows: mhc::expand_pre: expected fn with a contiguous last dimension, got
    strides (2048, 2)
norm_weight gaps in rows: mhc::expand_pre: expected norm_weight with a contiguous last
    dimension, got strides (2,)
rms_eps negative: mhc::expand_pre: expected rms_eps to be finite in fp32 and at least 0,
    got -1e-06
rms_eps NaN: mhc::expand_pre: expected rms_eps to be finite in fp32 and at least 0, got
    nan
rms_eps infinite: mhc::expand_pre: expected rms_eps to be finite in fp32 and at least 0,
    got inf
rms_eps infinite in fp32: mhc::expand_pre: expected rms_eps to be finite in fp32 and at
    least 0, got 1e+39
rms_eps zero in fp32: mhc::expand_pre: expected rms_eps to be 0 or at least
    1.1754943508222875e-38 in size, which fp32 holds, got 1e-60
rms_eps subnormal in fp32: mhc::expand_pre: expected rms_eps to be 0 or at least
    1.1754943508222875e-38 in size, which fp32 holds, got 1e-38
hc_pre_eps negative: mhc::expand_pre: expected hc_pre_eps to be finite in fp32 and at
    least 0, got -1e-06
hc_pre_eps NaN: mhc::expand_pre: expected hc_pre_eps to be finite in fp32 and at least 0,
    got nan
hc_pre_eps infinite: mhc::expand_pre: expected hc_pre_eps to be finite in fp32 and at
    least 0, got inf
hc_pre_eps infinite in fp32: mhc::expand_pre: expected hc_pre_eps to be finite in fp32 and
    at least 0, got 1e+39
hc_pre_eps zero in fp32: mhc::expand_pre: expected hc_pre_eps to be 0 or at least
    1.1754943508222875e-38 in size, which fp32 holds, got 1e-60
hc_pre_eps subnormal in fp32: mhc::expand_pre: expected hc_pre_eps to be 0 or at least
    1.1754943508222875e-38 in size, which fp32 holds, got 1e-38
hc_sinkhorn_eps negative: mhc::expand_pre: expected hc_sinkhorn_eps to be finite in fp32
    and at least 0, got -1e-06
hc_sinkhorn_eps NaN: mhc::expand_pre: expected hc_sinkhorn_eps to be finite in fp32 and at
    least 0, got nan
hc_sinkhorn_eps infinite: mhc::expand_pre: expected hc_sinkhorn_eps to be finite in fp32
    and at least 0, got inf
hc_sinkhorn_eps infinite in fp32: mhc::expand_pre: expected hc_sinkhorn_eps to be finite
    in fp32 and at least 0, got 1e+39
hc_sinkhorn_eps zero in fp32: mhc::expand_pre: expected hc_sinkhorn_eps to be 0 or at
    least 1.1754943508222875e-38 in size, which fp32 holds, got 1e-60
hc_sinkhorn_eps subnormal in fp32: mhc::expand_pre: expected hc_sinkhorn_eps to be 0 or at
    least 1.1754943508222875e-38 in size, which fp32 holds, got 1e-38
norm_eps negative: mhc::expand_pre: expected norm_eps to be finite in fp32 and at least 0,
    got -1e-06
norm_eps NaN: mhc::expand_pre: expected norm_eps to be finite in fp32 and at least 0, got
    nan
norm_eps infinite: mhc::expand_pre: expected norm_eps to be finite in fp32 and at least 0,
    got inf
norm_eps infinite in fp32: mhc::expand_pre: expected norm_eps to be finite in fp32 and at
    least 0, got 1e+39
norm_eps zero in fp32: mhc::expand_pre: expected norm_eps to be 0 or at least
    1.1754943508222875e-38 in size, which fp32 holds, got 1e-60
norm_eps subnormal in fp32: mhc::expand_pre: expected norm_eps to be 0 or at least
    1.1754943508222875e-38 in size, which fp32 holds, got 1e-38
x hidden: mhc::expand_pre: expected fn of shape (24, 2048), got (24, 1024)
x without dimensions: mhc::expand_pre: expected x of shape (..., hidden), got ()
x no hidden: mhc::expand_pre: expected x with a hidden size of at least 1, got 0
fn rows: mhc::expand_pre: expected fn with hc_mult * (hc_mult + 2) rows, got 23
fn without rows: mhc::expand_pre: expected fn with hc_mult * (hc_mult + 2) rows, got 0
fn columns: mhc::expand_pre: expected fn of shape (24, 1024), got (24, 256)
hc_scale size: mhc::expand_pre: expected hc_scale of shape (3,), got (1,)
hc_base size: mhc::expand_pre: expected hc_base of shape (24,), got (25,)
norm_weight size: mhc::expand_pre: expected norm_weight of shape (256,), got (512,)
norm_weight without norm_eps: mhc::expand_pre: expected norm_weight and norm_eps together
    or neither, got norm_weight alone
norm_eps without norm_weight: mhc::expand_pre: expected norm_weight and norm_eps together
    or neither, got norm_eps alone
hc_post_mult_value NaN: mhc::expand_pre: expected hc_post_mult_value to be finite in fp32,
    got nan
hc_post_mult_value infinite in fp32: mhc::expand_pre: expected hc_post_mult_value to be
    finite in fp32, got -1e+39
hc_post_mult_value zero in fp32: mhc::expand_pre: expected hc_post_mult_value to be 0 or
    at least 1.1754943508222875e-38 in size, which fp32 holds, got -1e-60
sinkhorn_repeat zero: mhc::expand_pre: expected sinkhorn_repeat from 1 to 10000, got 0
sinkhorn_repeat negative: mhc::expand_pre: expected sinkhorn_repeat from 1 to 10000, got
    -3
sinkhorn_repeat of hours: mhc::expand_pre: expected sinkhorn_repeat from 1 to 10000, got
    10001""",
    )


def test_messages_of_post_head():
    assert_expected_inline(
        transcript("post_head"),
        """\
x dtype: mhc::post_head: expected x of dtype torch.bfloat16, got torch.float16
x rank: mhc::post_head: expected x of shape (3, 256), got (1, 3, 256)
x None: mhc::post_head: expected x to be a tensor, got None
residual dtype: mhc::post_head: expected residual of dtype torch.bfloat16, got
    torch.float16
residual rank: mhc::post_head: expected residual of shape (..., hc_mult, hidden), got
    (256,)
residual None: mhc::post_head: expected residual to be a tensor, got None
post_layer_mix dtype: mhc::post_head: expected post_layer_mix of dtype torch.float32, got
    torch.bfloat16
post_layer_mix rank: mhc::post_head: expected post_layer_mix of shape (3, 4, 1), got (1,
    3, 4, 1)
post_layer_mix None: mhc::post_head: expected post_layer_mix to be a tensor, got None
comb_res_mix dtype: mhc::post_head: expected comb_res_mix of dtype torch.float32, got
    torch.bfloat16
comb_res_mix rank: mhc::post_head: expected comb_res_mix of shape (3, 4, 4), got (1, 3, 4,
    4)
comb_res_mix None: mhc::post_head: expected comb_res_mix to be a tensor, got None
fn dtype: mhc::post_head: expected fn of dtype torch.float32, got torch.bfloat16
fn rank: mhc::post_head: expected fn of shape (4, 1024), got (1, 4, 1024)
fn None: mhc::post_head: expected fn to be a tensor, got None
scale dtype: mhc::post_head: expected scale of dtype torch.float32, got torch.bfloat16
scale rank: mhc::post_head: expected scale of shape (1,), got (1, 1)
scale None: mhc::post_head: expected scale to be a tensor, got None
base dtype: mhc::post_head: expected base of dtype torch.float32, got torch.bfloat16
base rank: mhc::post_head: expected base of shape (4,), got (1, 4)
base None: mhc::post_head: expected base to be a tensor, got None
norm_weight dtype: mhc::post_head: expected norm_weight of dtype torch.bfloat16 or
    torch.float32, got torch.float16
norm_weight rank: mhc::post_head: expected norm_weight of shape (256,), got (1, 256)
x gaps in rows: mhc::post_head: expected x with a contiguous last dimension, got strides
    (512, 2)
residual gaps in rows: mhc::post_head: expected residual with a contiguous last dimension,
    got strides (2048, 512, 2)
comb_res_mix gaps in rows: mhc::post_head: expected comb_res_mix with a contiguous last
    dimension, got strides (32, 8, 2)
fn gaps in rows: mhc::post_head: expected fn with a contiguous last dimension, got strides
    (2048, 2)
norm_weight gaps in rows: mhc::post_head: expected norm_weight with a contiguous last
    dimension, got strides (2,)
rms_eps negative: mhc::post_head: expected rms_eps to be finite in fp32 and at least 0,
    got -1e-06
rms_eps NaN: mhc::post_head: expected rms_eps to be finite in fp32 and at least 0, got nan
rms_eps infinite: mhc::post_head: expected rms_eps to be finite in fp32 and at least 0,
    got inf
rms_eps infinite in fp32: mhc::post_head: expected rms_eps to be finite in fp32 and at
    least 0, got 1e+39
rms_eps zero in fp32: mhc::post_head: expected rms_eps to be 0 or at least
    1.1754943508222875e-38 in size, which fp32 holds, got 1e-60
rms_eps subnormal in fp32: mhc::post_head: expected rms_eps to be 0 or at least
    1.1754943508222875e-38 in size, which fp32 holds, got 1e-38
hc_eps negative: mhc::post_head: expected hc_eps to be finite in fp32 and at least 0, got
    -1e-06
hc_eps NaN: mhc::post_head: expected hc_eps to be finite in fp32 and at least 0, got nan
hc_eps infinite: mhc::post_head: expected hc_eps to be finite in fp32 and at least 0, got
    inf
hc_eps infinite in fp32: mhc::post_head: expected hc_eps to be finite in fp32 and at least
    0, got 1e+39
hc_eps zero in fp32: mhc::post_head: expected hc_eps to be 0 or at least
    1.1754943508222875e-38 in size, which fp32 holds, got 1e-60
hc_eps subnormal in fp32: mhc::post_head: expected hc_eps to be 0 or at least
    1.1754943508222875e-38 in size, which fp32 holds, got 1e-38
norm_eps negative: mhc::post_head: expected norm_eps to be finite in fp32 and at least 0,
    got -1e-06
norm_eps NaN: mhc::post_head: expected norm_eps to be finite in fp32 and at least 0, got
    nan
norm_eps infinite: mhc::post_head: expected norm_eps to be finite in fp32 and at least 0,
    got inf
norm_eps infinite in fp32: mhc::post_head: expected norm_eps to be finite in fp32 and at
    least 0, got 1e+39
norm_eps zero in fp32: mhc::post_head: expected norm_eps to be 0 or at least
    1.1754943508222875e-38 in size, which fp32 holds, got 1e-60
norm_eps subnormal in fp32: mhc::post_head: expected norm_eps to be 0 or at least
    1.1754943508222875e-38 in size, which fp32 holds, got 1e-38
x hidden: mhc::post_head: expected x of shape (3, 256), got (3, 512)
x tokens: mhc::post_head: expected x of shape (3, 256), got (4, 256)
residual without streams: mhc::post_head: expected residual of shape (..., hc_mult,
    hidden), got (3, 256)
residual hidden: mhc::post_head: expected x of shape (3, 512), got (3, 256)
residual hc_mult: mhc::post_head: expected post_layer_mix of shape (3, 3, 1), got (3, 4,
    1)
residual no streams: mhc::post_head: expected residual with hc_mult of at least 1, got 0
residual no hidden: mhc::post_head: expected residual with a hidden size of at least 1,
    got 0
residual float32: mhc::post_head: expected residual of dtype torch.bfloat16, got
    torch.float32
post_layer_mix hc_mult: mhc::post_head: expected post_layer_mix of shape (3, 4, 1), got
    (3, 3, 1)
post_layer_mix last dimension: mhc::post_head: expected post_layer_mix of shape (3, 4, 1),
    got (3, 4, 2)
post_layer_mix without last: mhc::post_head: expected post_layer_mix of shape (3, 4), got
    (3, 5)
comb_res_mix hc_mult: mhc::post_head: expected comb_res_mix of shape (3, 4, 4), got (3, 4,
    5)
comb_res_mix tokens: mhc::post_head: expected comb_res_mix of shape (3, 4, 4), got (4, 4,
    4)
fn rows: mhc::post_head: expected fn of shape (4, 1024), got (23, 1024)
fn without rows: mhc::post_head: expected fn of shape (4, 1024), got (0, 1024)
fn columns: mhc::post_head: expected fn of shape (4, 1024), got (4, 256)
scale size: mhc::post_head: expected scale of shape (1,), got (3,)
base size: mhc::post_head: expected base of shape (4,), got (24,)
norm_weight size: mhc::post_head: expected norm_weight of shape (256,), got (512,)
norm_weight without norm_eps: mhc::post_head: expected norm_weight and norm_eps together
    or neither, got norm_weight alone
norm_eps without norm_weight: mhc::post_head: expected norm_weight and norm_eps together
    or neither, got norm_eps alone""",
    )


def test_messages_of_post_head_streams():
    """Give the messages of ``post_head``, under the op's own name."""
    short, long = (
        " ".join(transcript(op).split()).replace(f"mhc::{op}:", "")
        for op in ("post_head", "post_head_streams")
    )
    assert short == long


@per_op
def test_meta_tensors_are_refused_alike(op, subtests):
    for name in CASES_OF[op]:
        with subtests.test(name):
            message = refusal(op, wrong_inputs(op, name, "meta"))
            assert message == refusal(op, wrong_inputs(op, name))


@per_op
def test_fake_tensors_are_refused_alike(op, subtests):
    for name in CASES_OF[op]:
        with subtests.test(name):
            inputs = wrong_inputs(op, name)
            with FakeTensorMode() as mode:
                fakes = inputs | {key: mode.from_tensor(t) for key, t in tensors(inputs).items()}
                message = refusal(op, fakes)
            assert message == refusal(op, inputs)


@per_op
def test_compiled_code_is_refused_alike(op, subtests, fresh_dynamo):
    for name in CASES_OF[op]:
        with subtests.test(name):
            torch._dynamo.reset()
            inputs = wrong_inputs(op, name)
            compiled = torch.compile(
                lambda inputs=inputs: overload(op)(**inputs), backend="eager", fullgraph=True
            )
            with pytest.raises(torch._dynamo.exc.TorchRuntimeError) as error:
                compiled()
            assert refusal(op, inputs) in str(error.value)


def at_address(tensor, beyond):
    """Copy values to memory of somebody else's, so many bytes beyond a multiple of 16."""
    size = tensor.numel() * tensor.element_size()
    memory = torch.zeros(size + 64, dtype=torch.uint8, device=tensor.device)
    start = -memory.data_ptr() % 16 + beyond
    view = torch.from_dlpack(memory[start:][:size]).view(tensor.dtype).view(tensor.shape)
    assert view.data_ptr() % 16 == beyond
    assert view.storage_offset() == 0
    return view.copy_(tensor)


def at_odd_offset(tensor):
    """Copy values to an address that is aligned, at a storage offset that is not."""
    step = tensor.element_size()
    wide = at_address(tensor.new_zeros(tensor.numel() + 16), step)
    view = wide[(16 - step) // step :][: tensor.numel()].view(tensor.shape)
    assert view.data_ptr() % 16 == 0
    assert view.storage_offset() * step % 16 != 0
    return view.copy_(tensor)


ALIGNED = {op: [name for name in (*ROWS, "post_layer_mix") if op in ARGUMENTS[name]] for op in OPS}


@pytest.fixture(params=["as_on_cuda", pytest.param("cuda", marks=pytest.mark.gpu)])
def aligned_device(request, monkeypatch):
    """Name a device whose kernels load 16 bytes a thread."""
    if request.param == "cuda":
        return "cuda"
    monkeypatch.setattr(_checks, "ALIGNED_DEVICES", ("cpu",))
    return "cpu"


@per_op
def test_alignment_is_judged_by_address(op, aligned_device, subtests):
    """Judge by address: foreign memory starts anywhere, whatever its storage offset says."""
    inputs = make_inputs(op, TOKENS, HIDDEN, device=aligned_device, norm=True, sinkhorn_repeat=2)
    for name in ALIGNED[op]:
        with subtests.test(name):
            step = inputs[name].element_size()
            assert refusal(op, inputs | {name: at_address(inputs[name], step)}) == (
                f"mhc::{op}: expected {name} to start at a multiple of 16 bytes, "
                f"got an address {step} bytes beyond one"
            )
            # The context is alive after the refusal.
            odd = call(op, inputs | {name: at_odd_offset(inputs[name])})
            assert_equal(odd, call(op, inputs))


@per_op
def test_a_cpu_takes_any_address(op, subtests):
    """Take any address, such as that of weights that were mapped from a file."""
    inputs = make_inputs(op, TOKENS, HIDDEN, norm=True, sinkhorn_repeat=2)
    for name in ALIGNED[op]:
        with subtests.test(name):
            for beyond in (inputs[name].element_size(), 8):
                moved = inputs | {name: at_address(inputs[name], beyond)}
                assert_equal(call(op, moved), call(op, inputs))


@pytest.mark.gpu
@per_op
def test_cuda_tensors_are_refused_alike(op, subtests):
    for name in CASES_OF[op]:
        if name == "residual hc_mult":
            # CUDA refuses any hc_mult but 4 before other shapes; see test_hc_mult_on_cuda.
            continue
        with subtests.test(name):
            message = refusal(op, wrong_inputs(op, name, "cuda"))
            assert message == refusal(op, wrong_inputs(op, name))


@per_op
def test_mixed_devices(op, subtests):
    """Compare every tensor with the streams, which may be on another device than the rest."""
    inputs = make_inputs(op, TOKENS, HIDDEN, norm=True)
    for name in tensors(inputs):
        with subtests.test(name), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = inputs | {key: mode.from_tensor(t) for key, t in tensors(inputs).items()}
            fakes[name] = torch.empty_like(fakes[name], device="cuda:0")
            if name == STREAMS[op]:
                first, here, there = next(n for n in fakes if n != name), "cuda:0", "cpu"
            else:
                first, here, there = name, "cpu", "cuda:0"
            assert refusal(op, fakes) == f"mhc::{op}: expected {first} on {here}, got {there}"


@pytest.mark.gpu
@per_op
def test_mixed_devices_on_cuda(op, subtests):
    inputs = make_inputs(op, TOKENS, HIDDEN, device="cuda", norm=True)
    for name in tensors(inputs):
        with subtests.test(name):
            mixed = inputs | {name: inputs[name].cpu()}
            if name == STREAMS[op]:
                first, here, there = next(n for n in mixed if n != name), "cpu", "cuda:0"
            else:
                first, here, there = name, "cuda:0", "cpu"
            assert refusal(op, mixed) == f"mhc::{op}: expected {first} on {here}, got {there}"


def fake_cuda(op, hidden, hc_mult):
    """Make fake CUDA tensors without a GPU, inside an active FakeTensorMode."""
    inputs = make_inputs(op, TOKENS, hidden, hc_mult=hc_mult, device="meta", norm=True)
    return inputs | {key: torch.empty_like(t, device="cuda") for key, t in tensors(inputs).items()}


@per_op
def test_hc_mult_on_cuda(op):
    with FakeTensorMode(allow_non_fake_inputs=True):
        message = refusal(op, fake_cuda(op, HIDDEN, hc_mult=3))
    where = "fn for" if op == "expand_pre" else "residual with"
    assert message == f"mhc::{op}: expected {where} hc_mult 4 on CUDA, got 3"


@per_op
def test_hidden_size_on_cuda(op):
    with FakeTensorMode(allow_non_fake_inputs=True):
        message = refusal(op, fake_cuda(op, 384, hc_mult=4))
    assert message == (
        f"mhc::{op}: expected {STREAMS[op]} with a hidden size that is a multiple of 256 on CUDA, "
        "got 384"
    )


@pytest.mark.gpu
@per_op
def test_shapes_that_the_kernels_do_not_take(op, subtests):
    for hidden, hc_mult in ((HIDDEN, 3), (384, 4)):
        with subtests.test(hidden=hidden, hc_mult=hc_mult):
            inputs = make_inputs(op, TOKENS, hidden, hc_mult=hc_mult, device="cuda")
            with FakeTensorMode(allow_non_fake_inputs=True):
                message = refusal(op, fake_cuda(op, hidden, hc_mult))
            assert refusal(op, inputs) == message


@per_op
def test_any_hc_mult_is_taken_on_the_cpu(op, subtests):
    for hc_mult in (1, 2, 3, 5):
        with subtests.test(hc_mult=hc_mult):
            overload(op)(**make_inputs(op, TOKENS, 24, hc_mult=hc_mult, norm=True))


@pytest.mark.parametrize("op", POST)
def test_symbolic_token_counts_that_differ_are_refused(op, fresh_dynamo):
    inputs = make_inputs(op, TOKENS, HIDDEN)
    inputs["x"] = inputs["x"][:-1]
    compiled = torch.compile(
        lambda **inputs: overload(op)(**inputs), backend="eager", fullgraph=True, dynamic=True
    )
    with pytest.raises(
        torch._dynamo.exc.TorchRuntimeError, match=f"mhc::{op}: expected x of shape"
    ):
        compiled(**inputs)


@pytest.mark.parametrize("value", [1, 1.0])
def test_int_and_float_scalars_are_taken(value):
    overload("pre")(**(make_inputs("pre", TOKENS, HIDDEN) | {"hc_post_mult_value": value}))

"""Compute what every op has to return, with the reference in float64, and how far off it may be.

Each output is judged by its own step alone: the oracle is given the op's own ``residual_out``. A
comment beside each bound gives the reason for the bound. :mod:`mhc_ops.testing` exports everything
here that users need.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference

OUTPUTS: dict[str, tuple[str, ...]] = {
    "post": ("residual_out",),
    "pre": ("post_mix", "comb_mix", "layer_input"),
    "fused_post_pre": ("residual_out", "post_mix", "comb_mix", "layer_input"),
    "head": ("layer_input",),
    "expand_pre": ("residual_out", "post_mix", "comb_mix", "layer_input"),
    "post_head": ("layer_input",),
    "post_head_streams": ("residual_out", "layer_input"),
}

# A post step takes these arguments.
POST_ARGUMENTS = ("x", "residual", "post_layer_mix", "comb_res_mix")

# The ops compute in fp32, and this is its unit roundoff.
FP32_ROUNDOFF = 2.0**-24

# These bounds hold for post weights and combs. MIX_BOUND covers logits up to 10 in size: a sum of
# 4 * H products in fp32 puts such a logit off by some 1e-6, and 20 rounds of Sinkhorn add 40
# roundings of 6e-8 to entries below 1. The error of a larger logit grows with the logit.
MIX_BOUND = 5e-6
MIX_BOUND_LOGIT = 10.0
MIX_BOUND_BEYOND = 1e-6

# A copy must be exact. The bound is less than the distance to any other bf16 number, and more than
# 0 because errors are divided by it.
COPY_ULPS = 2.0**-10

# New streams are rounded once, so a value next to a midpoint may fall to either side.
RESIDUAL_ULPS = 1
# A layer input without norm is rounded once, too.
LAYER_INPUT_ULPS = 1
# With a norm v is rounded before the product is, and may fall to either side. One ulp of v is up to
# two ulps of the product when v is just above a power of two and the product just below one.
LAYER_INPUT_NORM_ULPS = 2


class Expected(NamedTuple):
    """Hold what an output has to be.

    ``|got - value| <= ulps * bf16_ulp(larger of got and value) + slack``.

    Attributes:
        value: the expected value, float64 on the output's rounding grid, in the output's shape.
        ulps: bf16 spacings by which the output may be off; 0 for fp32 outputs.
        slack: float64, absolute error allowed on top, broadcast to ``value``.
    """

    value: Tensor
    ulps: int
    slack: Tensor


def bf16_ulp(value: Tensor) -> Tensor:
    """Return the distance from a value to the next bf16 number away from zero.

    Args:
        value: any shape and floating dtype.

    Returns:
        float64 in the shape of ``value``: ``2 ** (floor(log2(|value|)) - 7)``, and the spacing of
        the subnormals, ``2 ** -133``, below the smallest normal number and at zero.
    """
    wide = value.double()
    exponent = torch.frexp(wide).exponent - 1
    exponent = torch.where(wide == 0, -126, exponent).clamp_min(-126)
    return torch.ldexp(torch.ones_like(wide), exponent - 7)


def mix_bound(logits: Tensor) -> Tensor:
    """Return the largest allowed error of post weights and combs that come from these logits.

    Args:
        logits: [..., k], all logits of a token that affect the values.

    Returns:
        [...]: 5e-6 up to a largest logit of 10, 1e-6 * (1 + largest logit) beyond.
    """
    largest = logits.abs().amax(-1)
    return torch.where(
        largest <= MIX_BOUND_LOGIT,
        torch.full_like(largest, MIX_BOUND),
        MIX_BOUND_BEYOND * (1 + largest),
    )


def _expected_residual(inputs: Mapping[str, Any]) -> Expected:
    x, residual, post, comb = (inputs[name] for name in POST_ARGUMENTS)
    value = reference.post(x, residual, post, comb, compute_dtype=torch.float64)
    # Where the terms cancel, fp32 cannot reach one ulp of the small result: n + 1 products and n
    # additions are off by up to (n + 1) roundings of the sum of the terms' sizes.
    size = reference.post(
        x.abs(), residual.abs().double(), post.abs(), comb.abs(), compute_dtype=torch.float64
    )
    terms = residual.shape[-2] + 1
    return Expected(value.double(), RESIDUAL_ULPS, terms * FP32_ROUNDOFF * size)


def _collapse_slack(residual: Tensor, weights: Tensor, bound: Tensor) -> Tensor:
    """Return the allowed error of ``v = sum_j w[j] * r[j]`` in fp32 where the terms cancel.

    A weight w is sigmoid(logit) + eps. A post weight, 2 * sigmoid(logit), stays within its bound
    when its logit is off by twice the bound, because the slope of a sigmoid is at most 1/4. The
    logits here may be off by as much. The relative error of sigmoid(logit) is at most the error of
    the logit, so twice the bound is the relative error of w. The roundings of the sum are added.
    """
    relative = 2 * bound + (residual.shape[-2] + 1) * FP32_ROUNDOFF
    size = torch.matmul(weights.unsqueeze(-2), residual.abs().double()).squeeze(-2)
    return relative.unsqueeze(-1) * size


def _expected_layer_input(
    value: Tensor, residual: Tensor, weights: Tensor, logits: Tensor, inputs: Mapping[str, Any]
) -> Expected:
    slack = _collapse_slack(residual, weights, mix_bound(logits))
    norm_weight = inputs.get("norm_weight")
    if norm_weight is None:
        return Expected(value.double(), LAYER_INPUT_ULPS, slack)
    v = torch.matmul(weights.unsqueeze(-2), residual.double()).squeeze(-2)
    inverse_rms = torch.rsqrt(v.square().mean(-1, keepdim=True) + inputs["norm_eps"])
    slack = slack * inverse_rms * norm_weight.to(residual.dtype).double().abs()
    return Expected(value.double(), LAYER_INPUT_NORM_ULPS, slack)


def _expected_pre(inputs: Mapping[str, Any], residual: Tensor) -> dict[str, Expected]:
    n = residual.shape[-2]
    arguments = {name: value for name, value in inputs.items() if name not in POST_ARGUMENTS}
    post_mix, comb_mix, layer_input = reference.pre(
        residual, **arguments, compute_dtype=torch.float64
    )
    m = reference.project(residual, inputs["fn"], inputs["rms_eps"], compute_dtype=torch.float64)
    scale, base = inputs["hc_scale"].double(), inputs["hc_base"].double()
    pre_logits = m[..., :n] * scale[0] + base[:n]
    post_logits = m[..., n : 2 * n] * scale[1] + base[n : 2 * n]
    comb_logits = m[..., 2 * n :] * scale[2] + base[2 * n :]
    weights = torch.sigmoid(pre_logits) + inputs["hc_pre_eps"]
    return {
        "post_mix": Expected(post_mix, 0, mix_bound(post_logits)[..., None, None]),
        "comb_mix": Expected(comb_mix, 0, mix_bound(comb_logits)[..., None, None]),
        "layer_input": _expected_layer_input(layer_input, residual, weights, pre_logits, inputs),
    }


def _expected_copies(inputs: Mapping[str, Any]) -> Expected:
    """Return the streams that ``expand_pre`` has to return exactly."""
    x = inputs["x"]
    copies = reference.expand(x, inputs["fn"].shape[1] // x.shape[-1]).double()
    return Expected(copies, 0, COPY_ULPS * bf16_ulp(copies))


def _expected_head(inputs: Mapping[str, Any], residual: Tensor) -> Expected:
    arguments = {name: value for name, value in inputs.items() if name not in POST_ARGUMENTS}
    value = reference.head(residual, **arguments, compute_dtype=torch.float64)
    m = reference.project(residual, inputs["fn"], inputs["rms_eps"], compute_dtype=torch.float64)
    logits = m * inputs["scale"].double() + inputs["base"].double()
    weights = torch.sigmoid(logits) + inputs["hc_eps"]
    return _expected_layer_input(value, residual, weights, logits, inputs)


def oracle(
    op: str, inputs: Mapping[str, Any], residual_out: Tensor | None = None
) -> dict[str, Expected]:
    """Compute what an op has to return, with the reference in float64.

    Args:
        op: name of an op, a key of :data:`OUTPUTS`.
        inputs: the op's arguments by name.
        residual_out: the new streams from which other outputs follow. For ``post_head`` pass those
            that :func:`mhc_ops.post` returns on the same device, for ops without a post step and
            for ``post`` None, for all others those that the op returned.

    Returns:
        Output name to value and bounds.

    Raises:
        ValueError: ``residual_out`` is missing.
    """
    if op == "post":
        return {"residual_out": _expected_residual(inputs)}
    if op == "pre":
        return _expected_pre(inputs, inputs["residual"])
    if op == "head":
        return {"layer_input": _expected_head(inputs, inputs["residual"])}
    if op == "expand_pre":
        copies = _expected_copies(inputs)
        return {"residual_out": copies} | _expected_pre(inputs, copies.value.to(inputs["x"].dtype))
    if residual_out is None:
        raise ValueError(f"mhc_ops.testing.oracle: expected residual_out for {op}, got None")
    if op == "post_head":
        return {"layer_input": _expected_head(inputs, residual_out)}
    streams = {"residual_out": _expected_residual(inputs)}
    if op == "post_head_streams":
        return streams | {"layer_input": _expected_head(inputs, residual_out)}
    return streams | _expected_pre(inputs, residual_out)

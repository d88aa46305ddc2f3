"""What several test files need: the ops by name, and their arguments in awkward layouts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from mhc_ops import config, routes
from mhc_ops.testing import (
    OUTPUTS,
    as_outputs,
    assert_matches_oracle,
    make_inputs,
    poisoned_memory,
)

OPS = tuple(OUTPUTS)
STREAMS = {op: "x" if op == "expand_pre" else "residual" for op in OPS}  # the largest input
NORMS = {op: (False,) if op == "post" else (False, True) for op in OPS}


# Seconds before what is waited for counts as hung: no limit for a slow machine, and below pytest's.
HANG = 1800

# Kernels of a size that nobody has built ahead.
needs_jit = pytest.mark.skipif(
    config.switch("MHC_OPS_DISABLE_JIT"), reason="compiles, which MHC_OPS_DISABLE_JIT forbids"
)


def overload(op: str) -> Any:
    """``torch.ops.mhc.<op>.default``."""
    return getattr(torch.ops.mhc, op).default


def call(op: str, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Run an op; output name to tensor."""
    return as_outputs(op, overload(op)(**inputs))


def split(op: str, inputs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs): what the schema takes by position, and its keyword-only arguments."""
    keyword_only = {a.name for a in overload(op)._schema.arguments if a.kwarg_only}
    args = tuple(value for name, value in inputs.items() if name not in keyword_only)
    return args, {name: value for name, value in inputs.items() if name in keyword_only}


def clone(inputs: dict[str, Any]) -> dict[str, Any]:
    """Copies of the tensors."""
    return {name: v.clone() if isinstance(v, Tensor) else v for name, v in inputs.items()}


def tensors(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors among the arguments."""
    return {name: v for name, v in inputs.items() if isinstance(v, Tensor)}


def assert_equal(got: dict[str, Any], want: dict[str, Any]) -> None:
    """Bit for bit, and NaN equal to NaN."""
    assert got.keys() == want.keys()
    for name, value in got.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(
                value, want[name], rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
            )
        else:
            assert value == want[name], name


def stride_out(name: str, tensor: Tensor) -> Tensor:
    """The same values as a view with gaps: between rows, and after each where rows stay aligned.

    ``norm_weight`` has one row, which has to be contiguous, so it only starts elsewhere.
    """
    if name == "norm_weight":
        wide = tensor.new_zeros(tensor.numel() + 8)
        view = wide[8:]
    elif tensor.dim() == 1:
        view = tensor.new_zeros(2 * tensor.numel())[::2]
    else:
        row = tensor.shape[-1]
        gap = row if row * tensor.element_size() % 16 == 0 else 0
        view = tensor.new_zeros((2 * tensor.shape[0], *tensor.shape[1:-1], row + gap))[
            ::2, ..., gap:
        ]
    view.copy_(tensor)
    assert view.shape == tensor.shape
    return view


def strided(inputs: dict[str, Any]) -> dict[str, Any]:
    """Every tensor as :func:`stride_out` lays it out."""
    return {name: stride_out(name, v) if isinstance(v, Tensor) else v for name, v in inputs.items()}


def samples(op: str, device: str) -> dict[str, dict[str, Any]]:
    """Arguments in every form that opcheck has to see, by form."""
    hidden = 256 if device == "cuda" else 64

    def inputs(tokens: int | tuple[int, ...] = 3, norm: bool = True) -> dict[str, Any]:
        return make_inputs(op, tokens, hidden, device=device, norm=norm, sinkhorn_repeat=3)

    forms = {
        "minimal": inputs(norm=False),
        "all": inputs(),
        "strided": strided(inputs()),
        "leading": inputs((2, 3)),
        "strided_leading": strided(inputs((2, 3))),
        "no_tokens": inputs(0),
        "requires_grad": {
            name: v.requires_grad_() if isinstance(v, Tensor) else v for name, v in inputs().items()
        },
    }
    if op != "post":
        fp32_norm = inputs()
        fp32_norm["norm_weight"] = fp32_norm["norm_weight"].float()
        forms["fp32_norm_weight"] = fp32_norm
    return forms


def check_against_oracle(
    op: str, device: str, changes: dict[str, Any] | None = None, **make: Any
) -> None:
    """Run an op in poisoned memory and hold every output to its bound.

    ``changes`` are put in place of what ``make_inputs(op, **make)`` made.
    """
    inputs = make_inputs(op, device=device, **make)
    inputs |= {name: v for name, v in (changes or {}).items() if name in inputs}
    before = clone(inputs)
    with poisoned_memory():
        outputs = call(op, inputs)
    assert_equal(inputs, before)
    assert_matches_oracle(op, inputs, tuple(outputs.values()))
    # and again without the fills between the launches, which would hide a missing wait
    assert_equal(call(op, inputs), outputs)


# Large enough that each shows in the outputs when it is left out or added in the wrong place;
# V4.1's own rms_eps; and none.
EPSILONS = {
    "large": {
        "rms_eps": 0.003,
        "hc_pre_eps": 0.05,
        "hc_eps": 0.05,
        "hc_sinkhorn_eps": 0.02,
        "norm_eps": 0.001,
        "hc_post_mult_value": 1.7,
    },
    "v4.1": {"rms_eps": 1e-20},
    "zero": dict.fromkeys(("rms_eps", "hc_pre_eps", "hc_eps", "hc_sinkhorn_eps", "norm_eps"), 0.0),
}


def path(op: str, hidden: int, tokens: int) -> str:
    """The kernels that serve a call on an H100, by name."""
    return routes.path(op, hidden, "sm_90a", tokens) or "nothing"


def bounds(hidden: int) -> set[int]:
    """Token counts on both sides of every bound of the table: every path at its ends."""
    starts = routes.bounds(hidden, "sm_90a", 5000)
    return {t for start in starts for t in (start - 1, start)} - {0}


def tokens_of(hidden: int, *tokens: int, at_bounds: bool = False) -> list[int]:
    """These token counts, and those on both sides of every bound of the table."""
    return sorted({*tokens, *(bounds(hidden) if at_bounds else ())})


def sizes(op: str, hidden: Iterable[int], *tokens: int, at_bounds: bool = False) -> list[Any]:
    """(hidden, tokens) as parameters, each with the path that it reaches on CUDA in its id."""
    return [
        pytest.param(h, t, id=f"{h}-{t}-{path(op, h, t)}")
        for h in hidden
        for t in tokens_of(h, *tokens, at_bounds=at_bounds)
    ]

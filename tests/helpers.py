"""Give test files the ops by name, and the ops' arguments in awkward layouts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
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
# Streams are the largest input.
STREAMS = {op: "x" if op == "expand_pre" else "residual" for op in OPS}
NORMS = {op: (False,) if op == "post" else (False, True) for op in OPS}


# After so many seconds a test takes what it waits for as hung: later than any slow machine needs,
# and before pytest's own limit.
HANG = 1800

# A test with this mark needs kernels of a size that nobody has built ahead.
needs_jit = pytest.mark.skipif(
    config.switch("MHC_OPS_DISABLE_JIT"), reason="compiles, which MHC_OPS_DISABLE_JIT forbids"
)


def folder_of_kernels(folder: Path) -> Path:
    """Make a folder that ``MHC_OPS_KERNELS`` may name, with no kernel that anything asks for."""
    folder.mkdir()
    (folder / "none.json").touch()
    return folder


def overload(op: str) -> Any:
    """Return ``torch.ops.mhc.<op>.default``."""
    return getattr(torch.ops.mhc, op).default


def call(op: str, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Run an op; return output name to tensor."""
    return as_outputs(op, overload(op)(**inputs))


def split(op: str, inputs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split inputs into what the schema takes by position, and its keyword-only arguments."""
    keyword_only = {a.name for a in overload(op)._schema.arguments if a.kwarg_only}
    args = tuple(value for name, value in inputs.items() if name not in keyword_only)
    return args, {name: value for name, value in inputs.items() if name in keyword_only}


def clone(inputs: dict[str, Any]) -> dict[str, Any]:
    """Copy the tensors."""
    return {name: v.clone() if isinstance(v, Tensor) else v for name, v in inputs.items()}


def tensors(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors among the arguments."""
    return {name: v for name, v in inputs.items() if isinstance(v, Tensor)}


def assert_equal(got: dict[str, Any], want: dict[str, Any]) -> None:
    """Compare bit for bit, with NaN equal to NaN."""
    assert got.keys() == want.keys()
    for name, value in got.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(
                value, want[name], rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
            )
        else:
            assert value == want[name], name


def stride_out(name: str, tensor: Tensor) -> Tensor:
    """Lay the values out with gaps: between rows, and in front of each where rows stay aligned.

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
    """Lay out every tensor as :func:`stride_out` does."""
    return {name: stride_out(name, v) if isinstance(v, Tensor) else v for name, v in inputs.items()}


def samples(op: str, device: str) -> dict[str, dict[str, Any]]:
    """Make arguments in every form that opcheck has to see, by form."""
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
    # The second call has no fills between the launches, which would hide a missing wait.
    assert_equal(call(op, inputs), outputs)


# The large values each show in the outputs when left out or added in the wrong place; the others
# are V4.1's own rms_eps, and none.
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
    """Name the kernels that serve a call on an H100."""
    return routes.path(op, hidden, "sm_90a", tokens) or "nothing"


def bounds(hidden: int) -> set[int]:
    """Return token counts on both sides of every bound of the table: every path at its ends."""
    starts = routes.bounds(hidden, "sm_90a", 5000)
    return {t for start in starts for t in (start - 1, start)} - {0}


def tokens_of(hidden: int, *tokens: int, at_bounds: bool = False) -> list[int]:
    """Return these token counts, and those on both sides of every bound of the table."""
    return sorted({*tokens, *(bounds(hidden) if at_bounds else ())})


def sizes(op: str, hidden: Iterable[int], *tokens: int, at_bounds: bool = False) -> list[Any]:
    """Make parameters of (hidden, tokens), each with the path that it reaches on CUDA in its id."""
    return [
        pytest.param(h, t, id=f"{h}-{t}-{path(op, h, t)}")
        for h in hidden
        for t in tokens_of(h, *tokens, at_bounds=at_bounds)
    ]

"""Test the ops with inputs, a float64 oracle and comparisons, as this package's own tests do.

:func:`make_inputs` makes the arguments of an op, easy or hard ones. :func:`assert_matches_oracle`
compares what the op returned with the reference in float64, which is given the op's own
``residual_out``, so that every output is judged by its own step alone. ``mhc_ops/oracle.py`` gives
the reason for each bound.

>>> import mhc_ops
>>> from mhc_ops.testing import assert_matches_oracle, make_inputs
>>> inputs = make_inputs("head", 3, 256, norm=True, kind="large_logits")
>>> errors = assert_matches_oracle("head", inputs, mhc_ops.head(**inputs))
>>> errors["layer_input"] <= 1  # an error is a fraction of the allowed error
True
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ._arguments import mixes
from .oracle import OUTPUTS, POST_ARGUMENTS, Expected, bf16_ulp, mix_bound, oracle

__all__ = [
    "EPS",
    "KINDS",
    "OUTPUTS",
    "POST_MULT",
    "Expected",
    "as_outputs",
    "assert_matches",
    "assert_matches_oracle",
    "bf16_ulp",
    "make_inputs",
    "mix_bound",
    "oracle",
    "poisoned_memory",
]

_PRE_TENSORS = ("fn", "hc_scale", "hc_base")
_HEADS = ("head", "post_head", "post_head_streams")

EPS = 1e-6  # every epsilon of DeepSeek-V4 has this value
POST_MULT = 2.0  # DeepSeek-V4 has this hc_post_mult_value


# ---------------------------------------------------------------------------------------- inputs


class _Random:
    """Draw random numbers on the CPU, so that a seed means the same numbers on every device."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def signs(self, *shape: int) -> Tensor:
        return self.uniform(*shape).sub(0.5).sign()


def _classical(t: dict[str, Tensor], random: _Random) -> None:
    """Draw small streams and logits below 2, as SGLang's own test of the boundary does."""
    columns = t["fn"].shape[1]
    t["fn"] = random.normal(t["fn"].shape[0], columns) * 0.01
    t["hc_scale"] = torch.tensor([0.5, 0.25, 0.25])
    t["hc_base"].zero_()
    t["norm_weight"].fill_(1.0)


def _signed_bases(t: dict[str, Tensor], random: _Random) -> None:
    """Set every bias to +8 or -8.

    Sigmoids are then near 0 and 1, and softmax rows have ties far above the rest.
    """
    t["hc_base"] = 8 * random.signs(t["hc_base"].numel())


def _large_streams(t: dict[str, Tensor], random: _Random) -> None:
    """Make streams and sublayer output of size 30, as deep layers have them."""
    for name in ("x", "residual"):
        t[name] = t[name] * 300


def _unequal_streams(t: dict[str, Tensor], random: _Random) -> None:
    """Make one stream a million times as large as another, before and after the post step."""
    n = t["residual"].shape[-2]
    size = torch.logspace(3, -3, n)
    t["residual"] = t["residual"] * size[:, None]
    t["post_layer_mix"] = t["post_layer_mix"] * size[:, None]
    # The comb is nearly the identity. Larger entries off the diagonal would make the streams alike
    # again.
    t["comb_res_mix"] = torch.eye(n) + t["comb_res_mix"] * 1e-8


def _skewed_comb(t: dict[str, Tensor], random: _Random) -> None:
    """Make the incoming comb far from uniform, with one entry a row near 1, and the posts too."""
    t["comb_res_mix"] = (8 * (t["comb_res_mix"] * 4 - 0.5)).softmax(-1)
    t["post_layer_mix"] = POST_MULT * torch.sigmoid(8 * (t["post_layer_mix"] - 0.5))


def _large_logits(t: dict[str, Tensor], random: _Random) -> None:
    """Let the projection make logits up to about 10 of either sign."""
    t["hc_scale"].fill_(2.5)


def _huge_logits(t: dict[str, Tensor], random: _Random) -> None:
    """Let the projection make logits up to about 40 of either sign."""
    t["hc_scale"].fill_(10.0)


def _near_permutation(t: dict[str, Tensor], random: _Random) -> None:
    """Put comb logits of 12 on a permutation, so that Sinkhorn starts at its fixed point."""
    n = t["residual"].shape[-2]
    t["hc_base"][2 * n :] = 12 * torch.eye(n).roll(1, 1).flatten()


def _slow_sinkhorn(t: dict[str, Tensor], random: _Random) -> None:
    """Put comb logits of -9 below the diagonal, near a matrix whose error falls as 1 / rounds."""
    n = t["residual"].shape[-2]
    t["hc_scale"][2] = 0.25
    t["hc_base"][2 * n :] = (-9 * torch.ones(n, n).tril(-1)).flatten()


KINDS: dict[str, Callable[[dict[str, Tensor], _Random], None]] = {
    edit.__name__[1:]: edit
    for edit in (
        _classical,
        _signed_bases,
        _large_streams,
        _unequal_streams,
        _skewed_comb,
        _large_logits,
        _huge_logits,
        _near_permutation,
        _slow_sinkhorn,
    )
}


def make_inputs(
    op: str,
    tokens: int | Sequence[int],
    hidden: int,
    *,
    hc_mult: int = 4,
    device: torch.device | str = "cpu",
    seed: int = 0,
    norm: bool = False,
    sinkhorn_repeat: int = 20,
    kind: str = "classical",
) -> dict[str, Any]:
    """Make the arguments of an op, by name and in the order of the op's schema.

    Unless the kind says otherwise, streams and sublayer output have the size 0.1, posts lie in
    [0, 1), combs in [0, 0.25), the projection makes m of size 1 at any hidden size, scales are 1
    and biases are 0.

    Args:
        op: name of an op, a key of :data:`OUTPUTS`.
        tokens: token count, or the sizes of several leading dimensions.
        hidden: hidden size.
        hc_mult: n, number of residual streams.
        device: device of the tensors; the numbers are the same on every device.
        seed: seed of the random numbers.
        norm: whether to add ``norm_weight`` and ``norm_eps``; ``post`` has neither.
        sinkhorn_repeat: rounds of Sinkhorn, for the ops that have this argument.
        kind: a key of :data:`KINDS`. The docstring of each kind says what is hard about the kind.

    Returns:
        Keyword arguments: ``torch.ops.mhc.<op>(**make_inputs("<op>", ...))``.

    Raises:
        ValueError: the op or the kind is unknown.
    """
    if op not in OUTPUTS:
        raise ValueError(
            f"mhc_ops.testing.make_inputs: expected op to be one of {', '.join(OUTPUTS)}, "
            f"got {op!r}"
        )
    if kind not in KINDS:
        raise ValueError(
            f"mhc_ops.testing.make_inputs: expected kind to be one of {', '.join(KINDS)}, "
            f"got {kind!r}"
        )
    leading = (tokens,) if isinstance(tokens, int) else tuple(tokens)
    random = _Random(seed)
    columns, rows = hc_mult * hidden, mixes(hc_mult)
    t = {
        "x": random.normal(*leading, hidden) * 0.1,
        "residual": random.normal(*leading, hc_mult, hidden) * 0.1,
        "post_layer_mix": random.uniform(*leading, hc_mult, 1),
        "comb_res_mix": random.uniform(*leading, hc_mult, hc_mult) * 0.25,
        "fn": random.normal(rows, columns) * columns**-0.5,
        "hc_scale": torch.ones(3),
        "hc_base": torch.zeros(rows),
        "norm_weight": 0.5 + random.uniform(hidden),
    }
    KINDS[kind](t, random)
    for name in ("x", "residual", "norm_weight"):
        t[name] = t[name].to(torch.bfloat16)

    inputs: dict[str, Any]
    if op in _HEADS:
        names = ("residual",) if op == "head" else POST_ARGUMENTS
        inputs = {name: t[name] for name in names} | {
            "fn": t["fn"][:hc_mult].contiguous(),
            "scale": t["hc_scale"][:1].clone(),
            "base": t["hc_base"][:hc_mult].clone(),
            "rms_eps": EPS,
            "hc_eps": EPS,
        }
    else:
        names = {"pre": ("residual",), "expand_pre": ("x",)}.get(op, POST_ARGUMENTS)
        inputs = {name: t[name] for name in names}
        if op != "post":
            inputs |= {name: t[name] for name in _PRE_TENSORS}
            inputs |= {
                "rms_eps": EPS,
                "hc_pre_eps": EPS,
                "hc_sinkhorn_eps": EPS,
                "hc_post_mult_value": POST_MULT,
                "sinkhorn_repeat": sinkhorn_repeat,
            }
    if norm and op != "post":
        inputs |= {"norm_weight": t["norm_weight"], "norm_eps": EPS}
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }


# ----------------------------------------------------------------------------------- comparisons


def _excess(got: Tensor, expected: Expected) -> Tensor:
    """Return |got - value| as a fraction of the allowed error; more than 1 and NaN are failures."""
    wide = got.double()
    error = (wide - expected.value).abs()
    allowed = expected.slack.expand_as(error)
    if expected.ulps:
        larger = torch.maximum(wide.abs(), expected.value.abs())
        allowed = allowed + expected.ulps * bf16_ulp(larger)
    return error / allowed


def assert_matches(name: str, got: Tensor, expected: Expected) -> float:
    """Compare one output with what it has to be.

    Args:
        name: name of the output, for the message.
        got: what the op returned.
        expected: value and bounds of the output.

    Returns:
        The largest error as a fraction of the allowed error; 0 for an empty output.

    Raises:
        AssertionError: the output has another shape, a NaN, or an element beyond the bound.
    """
    if got.shape != expected.value.shape:
        raise AssertionError(
            f"{name}: expected shape {tuple(expected.value.shape)}, got {tuple(got.shape)}"
        )
    if not got.numel():
        return 0.0
    excess = _excess(got, expected).nan_to_num(nan=torch.inf)
    worst = int(excess.argmax())
    ratio = float(excess.flatten()[worst])
    if ratio > 1:
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), got.shape))
        raise AssertionError(
            f"{name}: {int((excess > 1).sum())} of {got.numel()} elements beyond the bound; worst "
            f"at {index}: expected {float(expected.value[index])!r}, got {float(got[index])!r}, "
            f"{ratio:.3g} times the allowed error"
        )
    return ratio


def as_outputs(op: str, result: Any) -> dict[str, Tensor]:
    """Name what an op returned.

    Args:
        op: name of an op, a key of :data:`OUTPUTS`.
        result: a tensor or a tuple of tensors.

    Returns:
        Output name to tensor; the one output of ``post`` is ``residual_out``, and the hidden state
        of the heads is ``layer_input``.
    """
    tensors = (result,) if isinstance(result, Tensor) else tuple(result)
    return dict(zip(OUTPUTS[op], tensors, strict=True))


def assert_matches_oracle(
    op: str, inputs: Mapping[str, Any], result: Any, residual_out: Tensor | None = None
) -> dict[str, float]:
    """Compare what an op returned with the float64 oracle, output by output.

    Args:
        op: name of an op, a key of :data:`OUTPUTS`.
        inputs: the op's arguments by name, as they were passed.
        result: what the op returned.
        residual_out: the new streams, for ``post_head``, which does not return them. When None,
            :func:`mhc_ops.post` computes them.

    Returns:
        Output name to largest error as a fraction of the allowed error.

    Raises:
        AssertionError: an output is beyond its bound.
    """
    outputs = as_outputs(op, result)
    streams = outputs.get("residual_out", residual_out)
    if op == "post_head" and streams is None:
        streams = torch.ops.mhc.post.default(*(inputs[name] for name in POST_ARGUMENTS))
    expected = oracle(op, inputs, streams)
    return {name: assert_matches(name, got, expected[name]) for name, got in outputs.items()}


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill new uninitialised tensors with NaN (integers with their largest value).

    When an op runs inside, an element of its outputs or workspaces that it left unwritten shows as
    NaN.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        memory.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)

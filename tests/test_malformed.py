"""Test malformed calls by the thousand: each is refused clearly or gives a right answer.

Hypothesis spoils one to three arguments of a valid call. The call then runs on the CPU kernels and
on the fake ones; both must say the same.
"""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers import OPS, STREAMS, overload
from mhc_ops.native import host
from mhc_ops.testing import as_outputs, assert_matches_oracle, make_inputs

EXAMPLES = 750  # Each op gets so many.
SECONDS = 60  # A call that takes longer hangs; no slow machine is the cause.

# The ops document these. The dispatcher of torch refuses what no schema allows with a RuntimeError
# or a TypeError of its own that names the op.
DOCUMENTED = (RuntimeError, TypeError, ValueError)

BASES = [
    (leading, hidden, hc_mult, norm)
    for leading, hidden, hc_mult in (((3,), 32, 4), ((0,), 32, 4), ((2, 2), 16, 4), ((1,), 24, 2))
    for norm in (False, True)
]


@functools.cache
def base(op: str, number: int) -> dict[str, Any]:
    """Return a valid call, whose tensors are never written: every example looks at that."""
    leading, hidden, hc_mult, norm = BASES[number]
    return make_inputs(
        op, leading, hidden, hc_mult=hc_mult, norm=norm and op != "post", sinkhorn_repeat=3
    )


def with_gaps(t: Tensor) -> Tensor:
    """Return the same values, each followed by a gap."""
    wide = t.new_zeros((*t.shape, 2))
    wide[..., 0] = t
    return wide[..., 0]


def moved(t: Tensor, elements: int) -> Tensor:
    """Return the same values, so many elements into their storage."""
    flat = t.new_zeros(t.numel() + elements)[elements:]
    return flat.view(t.shape).copy_(t)


def resize_last(t: Tensor, by: int) -> Tensor:
    return t.new_ones((*t.shape[:-1], t.shape[-1] + by)) if t.dim() else t


def permuted(t: Tensor) -> Tensor:
    """Return the same shape, laid out with the first dimension innermost."""
    return t.mT.contiguous().mT if t.dim() >= 2 else t


TENSOR_CHANGES: dict[str, Callable[[Tensor], Any]] = {
    **{
        str(dtype): lambda t, d=dtype: t.to(d)
        for dtype in (
            torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.int64,
            torch.bool, torch.complex64, torch.float8_e4m3fn,
        )
    },
    "one dimension more in front": lambda t: t[None],
    "one dimension more at the end": lambda t: t[..., None],
    "one dimension less": lambda t: t[0] if t.shape[0] else t,
    "flat": lambda t: t.reshape(-1),
    "no dimension": lambda t: t.new_zeros(()),
    "empty": lambda t: t[:0],
    "empty at the end": lambda t: t[..., :0],
    "longer": lambda t: torch.cat([t, t]),
    "shorter": lambda t: t[:-1],
    "wider": lambda t: resize_last(t, 1),
    "narrower": lambda t: t[..., :-1],
    "ten dimensions": lambda t: t.reshape(*(1,) * (10 - t.dim()), *t.shape),
    "transposed": lambda t: t.mT if t.dim() >= 2 else t,
    "with gaps": with_gaps,
    "permuted": permuted,
    "expanded": lambda t: t[:1].expand(t.shape) if t.shape[0] else t,
    "one element off": lambda t: moved(t, 1),
    "sixteen bytes off": lambda t: moved(t, 16 // t.element_size()),
    "on meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "a parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
    "negated lazily": lambda t: torch._neg_view(t),
    "NaN": lambda t: torch.full_like(t, math.nan),
    "infinite": lambda t: torch.full_like(t, math.inf),
    "huge": lambda t: torch.full_like(t, 3e38),
    "None": lambda t: None,
    "a list": lambda t: t.tolist(),
    "an array": lambda t: np.zeros(tuple(t.shape), dtype=np.float32),
    "a number": lambda t: 1.0,
    "a text": lambda t: "x",
    "an object": lambda t: object(),
}  # fmt: skip

NUMBERS: dict[str, Any] = {
    "0": 0, "1": 1, "-1": -1, "0.0": 0.0, "-0.0": -0.0, "1.5": 1.5, "-1e-9": -1e-9,
    "1e-320": 1e-320, "1e30": 1e30, "1e300": 1e300, "-1e300": -1e300, "NaN": math.nan,
    "inf": math.inf, "-inf": -math.inf, "2**31": 2**31, "2**63-1": 2**63 - 1, "2**63": 2**63,
    "2**70": 2**70, "10**400": 10**400, "True": True, "None": None, "complex": 1 + 2j,
    "text": "1", "list": [1.0], "tensor": torch.tensor(1.0), "tensors": torch.ones(2),
    "numpy": np.float32(1.0), "object": object(), "dtype": torch.float32,
}  # fmt: skip

# Beyond this value fp32 and the float64 of the oracle part ways.
MODERATE = 1e3


class Outcome(NamedTuple):
    """Hold what a call came to: the results, or the error that was raised."""

    results: dict[str, Tensor] | None
    error: Exception | None


def outcome(op: str, args: tuple[Any, ...], inputs: dict[str, Any]) -> Outcome:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return Outcome(as_outputs(op, overload(op)(*args, **inputs)), None)
        except DOCUMENTED as error:
            return Outcome(None, error)


def assert_clear(op: str, error: Exception) -> None:
    """Check that the text names the op and, in our ValueErrors, what was expected and came."""
    text = str(error)
    if isinstance(error, ValueError):
        assert text.startswith(f"mhc::{op}: expected "), text
        assert ", got " in text
    else:
        assert f"mhc::{op}" in text, f"{type(error).__name__}: {text}"


def is_moderate(inputs: dict[str, Any]) -> bool:
    """Return whether the oracle can judge: fp32 can hold every value and its square."""
    for value in inputs.values():
        if isinstance(value, Tensor):
            if not (value.double().abs() <= MODERATE).all():
                return False
        elif isinstance(value, (int, float)):
            if not abs(value) <= MODERATE:
                return False
        elif value is not None:
            return False  # Torch takes a dtype for a number of its own.
    return inputs.get("hc_sinkhorn_eps", 1) > 0


def as_torch_takes_it(op: str, name: str, value: Any) -> Any:
    """Return the value of a tensor or of a numpy scalar, which torch takes instead of a number."""
    if isinstance(base(op, 1).get(name), Tensor) or not isinstance(value, (Tensor, np.generic)):
        return value
    if isinstance(value, Tensor) and value.numel() != 1:
        return value
    return int(value) if name == "sinkhorn_repeat" else float(value)


def facts(results: dict[str, Tensor]) -> dict[str, Any]:
    return {name: (tuple(t.shape), t.dtype, t.stride()) for name, t in results.items()}


def spoil(op: str, inputs: dict[str, Any], name: str, kind: str) -> None:
    """Change one argument; an absent norm_weight is given, without a norm_eps."""
    value = inputs.get(name)
    if kind == "left out":
        inputs.pop(name, None)
    elif isinstance(base(op, 1).get(name), Tensor):
        given = torch.ones(32, dtype=torch.bfloat16) if value is None else value
        inputs[name] = TENSOR_CHANGES[kind](given)
    else:
        inputs[name] = NUMBERS[kind]


def changes(op: str) -> list[tuple[str, str]]:
    """Return each (argument, kind of change)."""
    return [
        (name, kind)
        for name, value in base(op, 1).items()
        for kind in (*(TENSOR_CHANGES if isinstance(value, Tensor) else NUMBERS), "left out")
    ]


def storages(op: str) -> list[Tensor]:
    return [
        t for number in range(len(BASES)) for t in base(op, number).values() if
        isinstance(t, Tensor)
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_malformed_calls(op):
    host.load()  # The ops have the short way then, as after the first kernel on a GPU.
    before = [t.clone() for t in storages(op)]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    valid = {id(t): mode.from_tensor(t) for t in storages(op)}

    def fake(value):
        if id(value) in valid:
            return valid[id(value)]
        return mode.from_tensor(value) if isinstance(value, Tensor) else value

    seen = {"refused by us": 0, "refused by torch": 0, "judged": 0, "served": 0}

    @given(
        number=st.integers(0, len(BASES) - 1),
        spoiled=st.lists(
            st.sampled_from(changes(op)), min_size=1, max_size=3, unique_by=lambda change: change[0]
        ),
        positional=st.booleans(),
        surplus=st.sampled_from([None] * 9 + ["extra"]),
    )
    @settings(
        max_examples=EXAMPLES,
        deadline=SECONDS * 1000,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    def run(number, spoiled, positional, surplus):
        inputs = dict(base(op, number))
        for name, kind in spoiled:
            spoil(op, inputs, name, kind)
        if surplus:
            inputs[surplus] = 1
        given_tensors = [t for t in inputs.values() if isinstance(t, Tensor)]
        versions = [t._version for t in given_tensors]
        first = STREAMS[op]
        args = (inputs.pop(first),) if positional and next(iter(inputs)) == first else ()

        got = outcome(op, args, inputs)

        assert [t._version for t in given_tensors] == versions
        held = dict(zip([first], args, strict=False)) | {
            name: as_torch_takes_it(op, name, value) for name, value in inputs.items()
        }
        fakes = {name: fake(value) for name, value in held.items()}
        fake_args = (fakes.pop(first),) if args else ()
        with mode:
            faked = outcome(op, fake_args, fakes)
        if got.error is not None:
            assert_clear(op, got.error)
            assert faked.error is not None
            if isinstance(got.error, ValueError):
                assert str(faked.error) == str(got.error)
                seen["refused by us"] += 1
            else:
                seen["refused by torch"] += 1
            return
        assert faked.error is None, faked.error
        assert facts(faked.results) == facts(got.results)
        if is_moderate(held):
            assert_matches_oracle(op, held, tuple(got.results.values()))
            seen["judged"] += 1
        seen["served"] += 1

    run()
    for t, was in zip(storages(op), before, strict=True):
        assert torch.equal(t, was)
    # Each kind of end is met often, or the generator has gone blind.
    assert sum(seen.values()) - seen["judged"] >= EXAMPLES
    assert all(count >= EXAMPLES // 50 for count in seen.values()), seen

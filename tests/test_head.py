"""head: the last hidden state against the float64 oracle."""

import pytest
import torch

from helpers import EPSILONS, check_against_oracle, sizes
from mhc_ops.testing import KINDS, make_inputs

OP = "head"


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("hidden", [256, 4096])
@pytest.mark.parametrize("kind", KINDS)
def test_oracle(device, kind, hidden, norm):
    check_against_oracle(OP, device, tokens=17, hidden=hidden, norm=norm, kind=kind)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize(("hidden", "tokens"), sizes(OP, (4096,), 8, 64, 200, 513, at_bounds=True))
@pytest.mark.parametrize("kind", KINDS)
def test_oracle_on_every_path(kind, hidden, tokens, norm):
    check_against_oracle(OP, "cuda", tokens=tokens, hidden=hidden, norm=norm, kind=kind)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize(
    ("hidden", "tokens"), sizes(OP, (256, 768, 2816, 5120, 7168), 3, 300, at_bounds=True)
)
def test_oracle_at_other_hidden_sizes(hidden, tokens, norm):
    check_against_oracle(
        OP, "cuda", tokens=tokens, hidden=hidden, norm=norm, kind="large_logits", seed=1
    )


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_oracle_at_a_prefill(norm):
    check_against_oracle(OP, "cuda", tokens=4096, hidden=7168, norm=norm, kind="large_logits")


@pytest.mark.parametrize("epsilons", EPSILONS)
def test_epsilons(device, epsilons):
    check_against_oracle(
        OP, device, EPSILONS[epsilons], tokens=17, hidden=256, norm=True, kind="large_logits"
    )


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_streams_of_zero(device, norm):
    """Zero in, zero out: the epsilons keep every division finite."""
    make = {"tokens": 5, "hidden": 256, "norm": norm, "kind": "signed_bases"}
    inputs = make_inputs(OP, device=device, **make)
    zero = {name: torch.zeros_like(inputs[name]) for name in ("x", "residual") if name in inputs}
    check_against_oracle(OP, device, zero, **make)

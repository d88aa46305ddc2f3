"""pre: mixes and layer input against the float64 oracle."""

import pytest
import torch

from helpers import EPSILONS, PATH_TOKENS, check_against_oracle, token_rows
from mhc_ops.testing import KINDS, make_inputs

OP = "pre"


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("hidden", [256, 4096])
@pytest.mark.parametrize("kind", KINDS)
def test_oracle(device, kind, hidden, norm):
    check_against_oracle(OP, device, tokens=17, hidden=hidden, norm=norm, kind=kind)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("tokens", token_rows(OP, 8, *PATH_TOKENS))
@pytest.mark.parametrize("kind", KINDS)
def test_oracle_on_every_path(kind, tokens, norm):
    check_against_oracle(OP, "cuda", tokens=tokens, hidden=4096, norm=norm, kind=kind)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("tokens", token_rows(OP, 3, 129, 300))
@pytest.mark.parametrize("hidden", [256, 768, 2816, 5120, 7168])
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

"""expand_pre: copies, mixes and layer input against the float64 oracle."""

import pytest
import torch

from helpers import EPSILONS, assert_equal, call, check_against_oracle, sizes
from mhc_ops import nn
from mhc_ops.testing import KINDS, make_inputs

OP = "expand_pre"


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("hidden", [256])
@pytest.mark.parametrize("kind", KINDS)
def test_oracle(device, kind, hidden, norm):
    check_against_oracle(OP, device, tokens=17, hidden=hidden, norm=norm, kind=kind)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize(("hidden", "tokens"), sizes(OP, (4096,), 1, 8, 57, 129, 513))
@pytest.mark.parametrize("kind", KINDS)
def test_oracle_on_every_path(kind, hidden, tokens, norm):
    check_against_oracle(OP, "cuda", tokens=tokens, hidden=hidden, norm=norm, kind=kind)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize(("hidden", "tokens"), sizes(OP, (256, 768, 2816, 5120, 7168), 3, 64, 300))
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


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [4096, 7168])
def test_any_batch_gives_the_bits_of_single_tokens(hidden):
    inputs = make_inputs(OP, 300, hidden, device="cuda", norm=True, kind="large_logits")
    batch = call(OP, inputs)
    for token in (0, 7, 8, 31, 32, 150, 299):
        single = inputs | {"x": inputs["x"][token : token + 1]}
        assert_equal(call(OP, single), {name: v[token : token + 1] for name, v in batch.items()})


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_is_expand_then_pre(device, norm):
    """The copies bit for bit; all of it on the CPU, where the same functions run."""
    inputs = make_inputs(OP, (2, 3), 256, device=device, norm=norm)
    got = call(OP, inputs)
    rest = {name: value for name, value in inputs.items() if name != "x"}
    streams = nn.expand(inputs["x"])
    want = {"residual_out": streams} | call("pre", {"residual": streams} | rest)
    assert torch.equal(got["residual_out"], streams)
    if device == "cpu":
        assert_equal(got, want)


@pytest.mark.parametrize("hc_mult", [1, 2, 3])
def test_as_many_streams_as_fn_is_made_for(hc_mult):
    inputs = make_inputs(OP, 3, 64, hc_mult=hc_mult)
    assert call(OP, inputs)["residual_out"].shape == (3, hc_mult, 64)

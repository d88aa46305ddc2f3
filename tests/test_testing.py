"""Test mhc_ops.testing itself: the bounds are what they say, and the comparisons can fail."""

import math

import pytest
import torch

from helpers import NORMS, OPS, call, clone
from mhc_ops import reference, testing
from mhc_ops.testing import (
    KINDS,
    Expected,
    as_outputs,
    assert_matches,
    assert_matches_oracle,
    bf16_ulp,
    make_inputs,
    mix_bound,
    oracle,
    poisoned_memory,
)

OP_AND_NORM = [pytest.param(op, n, id=f"{op}-{n}") for op in OPS for n in NORMS[op]]


def test_bf16_ulp_is_the_distance_to_the_next_number():
    """Compare with the next bit pattern, for every positive finite bf16 number but the last."""
    bits = torch.arange(0, 0x7F7F, dtype=torch.int16)
    value = bits.view(torch.bfloat16).double()
    following = (bits + 1).view(torch.bfloat16).double()
    assert torch.equal(bf16_ulp(value), following - value)
    assert torch.equal(bf16_ulp(-value), following - value)


@pytest.mark.parametrize(
    ("largest", "bound"), [(0.0, 5e-6), (10.0, 5e-6), (10.5, 11.5e-6), (40.0, 41e-6)]
)
def test_mix_bound(largest, bound):
    logits = torch.tensor([[0.5, -largest, 0.25]], dtype=torch.float64)
    assert math.isclose(mix_bound(logits).item(), bound)


@pytest.mark.parametrize(
    ("ulps", "steps", "passes"), [(1, 1, True), (1, 2, False), (2, 2, True), (2, 3, False)]
)
def test_ulps_are_counted(ulps, steps, passes):
    value = torch.full((4, 4), 1.5, dtype=torch.bfloat16)
    got = value.clone()
    got.view(torch.int16)[2, 3] += steps
    expected = Expected(value.double(), ulps, torch.zeros(()))
    if passes:
        assert assert_matches("y", got, expected) == steps / ulps
    else:
        with pytest.raises(AssertionError, match=r"y: 1 of 16 .* at \(2, 3\): expected 1.5"):
            assert_matches("y", got, expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_do_not_pass(bad):
    expected = Expected(torch.zeros(3, dtype=torch.float64), 1, torch.ones(()))
    with pytest.raises(AssertionError, match="1 of 3"):
        assert_matches("y", torch.tensor([0.0, bad, 0.0]), expected)


def test_a_wrong_shape_does_not_pass():
    expected = Expected(torch.zeros(3, dtype=torch.float64), 1, torch.ones(()))
    with pytest.raises(AssertionError, match=r"expected shape \(3,\), got \(3, 1\)"):
        assert_matches("y", torch.zeros(3, 1), expected)


def check_that_an_error_does_not_pass(op, norm, kind):
    inputs = make_inputs(op, 3, 256, norm=norm, kind=kind)
    outputs = call(op, inputs)
    streams = outputs.get("residual_out")
    if op == "post_head":  # post_head does not return the streams.
        arguments = ("x", "residual", "post_layer_mix", "comb_res_mix")
        streams = call("post", {name: inputs[name] for name in arguments})["residual_out"]
    expected = oracle(op, inputs, streams)
    for name, out in outputs.items():
        value, ulps, slack = expected[name]
        allowed = slack.expand_as(value) + (ulps * bf16_ulp(value) if ulps else 0)
        wrong = out.double()
        wrong.flatten()[7] = (value + 2.5 * allowed).flatten()[7]
        with pytest.raises(AssertionError, match=f"{name}: 1 of"):
            assert_matches(name, wrong, expected[name])


@pytest.mark.parametrize(("op", "norm"), OP_AND_NORM)
def test_an_error_of_two_bounds_does_not_pass(op, norm, subtests):
    """Spoil every output of every op and kind, at one element."""
    for kind in KINDS:
        with subtests.test(kind):
            check_that_an_error_does_not_pass(op, norm, kind)


def rounded_fn(inputs, bits):
    """Round fn to so many bits of mantissa, as a projection in a narrower type would read it."""
    mantissa, exponent = torch.frexp(inputs["fn"])
    return inputs | {"fn": torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent)}


@pytest.mark.parametrize("op", ["pre", "fused_post_pre", "expand_pre"])
def test_a_projection_in_tf32_does_not_pass(op):
    """Refuse 11 bits of fn, because the bounds are those of fp32."""
    inputs = make_inputs(op, 64, 4096, kind="large_logits")
    with pytest.raises(AssertionError, match="post_mix"):
        assert_matches_oracle(op, inputs, tuple(call(op, rounded_fn(inputs, 11)).values()))


MISTAKES = {
    "comb transposed": ("post", lambda i: i | {"comb_res_mix": i["comb_res_mix"].mT.contiguous()}),
    "a round less": ("pre", lambda i: i | {"sinkhorn_repeat": i["sinkhorn_repeat"] - 1}),
    "no sinkhorn eps": ("pre", lambda i: i | {"hc_sinkhorn_eps": 0.0}),
    "half the post factor": ("pre", lambda i: i | {"hc_post_mult_value": 1.0}),
    "norm weight off by 2 %": ("pre", lambda i: i | {"norm_weight": i["norm_weight"] * 1.02}),
    "scales swapped": ("pre", lambda i: i | {"hc_scale": i["hc_scale"].flip(0)}),
    "base forgotten": ("head", lambda i: i | {"base": i["base"] * 0}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_does_not_pass(mistake):
    op, change = MISTAKES[mistake]
    kind = {"a round less": "slow_sinkhorn", "no sinkhorn eps": "near_permutation"}.get(
        mistake, "signed_bases"
    )
    inputs = make_inputs(op, 16, 256, norm=op != "post", kind=kind)
    if mistake == "scales swapped":
        inputs["hc_scale"] = torch.tensor([0.5, 1.0, 2.0])
    if mistake == "no sinkhorn eps":
        inputs["hc_sinkhorn_eps"] = 1e-4
    assert_matches_oracle(op, inputs, tuple(call(op, inputs).values()))
    with pytest.raises(AssertionError, match="beyond the bound"):
        assert_matches_oracle(op, inputs, tuple(call(op, change(inputs)).values()))


def test_the_oracle_of_a_boundary_takes_the_streams_that_came_out():
    """Judge the mixes by the streams that came out, even where those are an ulp off."""
    op = "fused_post_pre"
    inputs = make_inputs(op, 4, 256, kind="large_logits")
    residual = call(op, inputs)["residual_out"]
    residual.view(torch.int16).add_(1)
    rest = {k: v for k, v in inputs.items() if k not in ("x", "post_layer_mix", "comb_res_mix")}
    mixes = torch.ops.mhc.pre(**(rest | {"residual": residual}))
    assert_matches_oracle(op, inputs, (residual, *mixes))
    with pytest.raises(ValueError, match="expected residual_out"):
        oracle(op, inputs)


def test_the_kinds_are_as_hard_as_they_say():
    def logits(kind, part):
        i = make_inputs("pre", 200, 512, kind=kind)
        m = reference.project(i["residual"], i["fn"], 0.0)
        scaled = m * i["hc_scale"].repeat_interleave(torch.tensor([4, 4, 16])) + i["hc_base"]
        return scaled[:, part]

    every, comb = slice(None), slice(8, None)
    assert logits("classical", every).abs().max() < 10
    assert 8 < logits("large_logits", every).abs().max() < 15
    assert 30 < logits("huge_logits", every).abs().max() < 60
    assert set(make_inputs("pre", 1, 64, kind="signed_bases")["hc_base"].tolist()) == {-8.0, 8.0}
    size = make_inputs("post", 64, 512, kind="large_streams")["residual"].float().std()
    assert 28 < size < 32
    streams = make_inputs("post", 64, 512, kind="unequal_streams")
    for out in (streams["residual"], call("post", streams)["residual_out"]):
        sizes = out.float().square().mean((0, 2)).sqrt()
        assert 0.5e6 < sizes.max() / sizes.min() < 2e6
    assert make_inputs("post", 64, 64, kind="skewed_comb")["comb_res_mix"].amax(-1).mean() > 0.5

    def distance(kind, repeat):
        """Return how far the comb is from where many more rounds would take it."""
        i = logits(kind, comb).double().unflatten(-1, (4, 4))
        far = reference.sinkhorn(i, 0.0, 100 * repeat)
        return (reference.sinkhorn(i, 0.0, repeat) - far).abs().max()

    assert distance("classical", 20) < 1e-12
    assert distance("slow_sinkhorn", 20) > 1e-3
    assert logits("near_permutation", comb).unflatten(-1, (4, 4)).softmax(-1).amax(-1).min() > 0.99


def test_inputs_do_not_depend_on_the_device(device):
    here = make_inputs("fused_post_pre", 3, 256, norm=True, seed=5, kind="skewed_comb")
    there = make_inputs(
        "fused_post_pre", 3, 256, norm=True, seed=5, kind="skewed_comb", device=device
    )
    for name, value in here.items():
        if isinstance(value, torch.Tensor):
            assert there[name].device.type == device
            assert torch.equal(there[name].cpu(), value)
        else:
            assert there[name] == value


def test_seeds_differ():
    a, b = (make_inputs("post", 3, 64, seed=seed) for seed in (0, 1))
    assert not torch.equal(a["x"], b["x"])


def test_post_takes_no_norm():
    assert list(make_inputs("post", 1, 64, norm=True)) == list(make_inputs("post", 1, 64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mix", 1, 64), f"expected op to be one of {', '.join(OPS)}, got 'mix'"),
        (("pre", 1, 64, "odd"), "expected kind to be one of classical, .*, got 'odd'"),
    ],
)
def test_unknown_names_are_refused(arguments, message):
    op, tokens, hidden, *kind = arguments
    with pytest.raises(ValueError, match=message):
        make_inputs(op, tokens, hidden, **({"kind": kind[0]} if kind else {}))


def test_poisoned_memory(device):
    fill = torch.utils.deterministic.fill_uninitialized_memory
    with poisoned_memory():
        assert torch.empty(3, 5, device=device, dtype=torch.bfloat16).isnan().all()
        assert torch.ones(2, device=device).new_empty((7,)).isnan().all()
        assert torch.empty_like(torch.ones(2, device=device)).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory == fill


def test_outputs_by_name():
    one = torch.zeros(1)
    assert as_outputs("post", one) == {"residual_out": one}
    assert list(as_outputs("pre", (one, one, one))) == list(testing.OUTPUTS["pre"])
    with pytest.raises(ValueError, match="zip"):
        as_outputs("pre", (one, one))
    assert clone({"a": 1}) == {"a": 1}

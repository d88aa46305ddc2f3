"""pre: mixes and layer input against the float64 oracle."""

import pytest
import torch

import mhc_ops
from helpers import EPSILONS, assert_equal, call, check_against_oracle, sizes
from mhc_ops.testing import KINDS, assert_matches_oracle, make_inputs
from other_routes import other_routes

OP = "pre"


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


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("hidden", [256, 2816, 4096, 5120, 7168])
@pytest.mark.parametrize("tokens", [129, 300, 1111])
def test_batch_invariance(hidden, tokens, norm):
    """Bit for bit a few tokens alone, and after post the boundary in one launch."""
    inputs = make_inputs("fused_post_pre", tokens, hidden, device="cuda", norm=norm, seed=tokens)
    names = ("x", "residual", "post_layer_mix", "comb_res_mix")
    post = {name: inputs.pop(name) for name in names}
    boundary = call("fused_post_pre", post | inputs)
    inputs["residual"] = boundary.pop("residual_out")
    many = call(OP, inputs)
    assert_equal(many, boundary)
    assert_matches_oracle(OP, inputs, tuple(many.values()))
    for first in (0, tokens // 2, tokens - 1):
        part = slice(first, first + 7)
        few = call(OP, inputs | {"residual": inputs["residual"][part]})
        assert_equal(few, {name: value[part] for name, value in many.items()})


@pytest.mark.gpu
def test_more_elements_than_32_bits_count():
    """80,000 tokens at H = 7168: 2.3e9 elements; the last tokens against themselves."""
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB of free memory")
    inputs = make_inputs(OP, 16, 7168, device="cuda", norm=True)
    few = call(OP, inputs)
    many = call(OP, inputs | {"residual": inputs["residual"].repeat(5000, 1, 1)})
    for first in (0, 40_000, 79_984):
        assert_equal({name: value[first : first + 16] for name, value in many.items()}, few)


@pytest.mark.gpu
def test_no_memory_but_the_outputs():
    """Above the outputs less than 8 MB at 32,768 tokens."""
    inputs = make_inputs(OP, 16, 4096, device="cuda", norm=True)
    inputs["residual"] = inputs["residual"].repeat(2048, 1, 1)
    mhc_ops.pre(**inputs)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs = sum(value.numel() * value.element_size() for value in mhc_ops.pre(**inputs))
    assert torch.cuda.max_memory_allocated() - before - outputs < 8 << 20


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("tokens", [129, 131, 143])
def test_a_last_tile_without_tokens_for_every_warp(tokens, norm):
    """9 tiles of one cluster, again and again: warps without tokens may not be left behind."""
    inputs = make_inputs(OP, tokens, 256, device="cuda", norm=norm)
    with other_routes(CLUSTERS=1):
        want = call(OP, inputs)
        assert_matches_oracle(OP, inputs, tuple(want.values()))
        for _ in range(2000):
            got = call(OP, inputs)
    assert_equal(got, want)

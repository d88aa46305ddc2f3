"""Test pre: the bits of a boundary, any size, and tiles without tokens."""

import pytest
import torch

import mhc_ops
from helpers import assert_equal, call
from mhc_ops.testing import assert_matches_oracle, make_inputs
from other_routes import other_routes

OP = "pre"


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("hidden", [256, 2816, 4096, 5120, 7168])
@pytest.mark.parametrize("tokens", [129, 300, 1111])
def test_batch_invariance(hidden, tokens, norm):
    """Compare bits with those of a few tokens alone, and after post with the boundary."""
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
    """Run 80,000 tokens at H = 7168, 2.3e9 elements; compare the last tokens with a run alone."""
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB of free memory")
    inputs = make_inputs(OP, 16, 7168, device="cuda", norm=True)
    few = call(OP, inputs)
    many = call(OP, inputs | {"residual": inputs["residual"].repeat(5000, 1, 1)})
    for first in (0, 40_000, 79_984):
        assert_equal({name: value[first : first + 16] for name, value in many.items()}, few)


@pytest.mark.gpu
def test_no_memory_but_the_outputs():
    """Take less than 8 MB above the outputs at 32,768 tokens."""
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
    """Run 9 tiles of one cluster many times: warps without tokens must not be left behind."""
    inputs = make_inputs(OP, tokens, 256, device="cuda", norm=norm)
    with other_routes(CLUSTERS=1):
        want = call(OP, inputs)
        assert_matches_oracle(OP, inputs, tuple(want.values()))
        for _ in range(2000):
            got = call(OP, inputs)
    assert_equal(got, want)

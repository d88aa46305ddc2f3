"""Run fused_post_pre on many tokens, by the persistent kernel: the bits are those of few tokens."""

import pytest
import torch

import mhc_ops
from mhc_ops import routes
from mhc_ops.testing import assert_matches_oracle, make_inputs, poisoned_memory

pytestmark = pytest.mark.gpu

OP = "fused_post_pre"
TOKENWISE = ("x", "residual", "post_layer_mix", "comb_res_mix")


def some(inputs, rows):
    """Cut some tokens out of the inputs of a call."""
    return {name: value[rows] if name in TOKENWISE else value for name, value in inputs.items()}


def run(inputs):
    with poisoned_memory():
        return mhc_ops.fused_post_pre(**inputs)


def assert_same_bits(got, expected):
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("hidden", [256, 2816, 4096, 5120, 7168])
@pytest.mark.parametrize("tokens", [129, 300, 1111])
def test_batch_invariance(hidden, tokens, norm):
    """Compare with the oracle, and bit for bit with a few tokens alone, wherever they stand."""
    assert routes.path(OP, hidden, "sm_90a", tokens) == "fused_post_pre_persistent"
    inputs = make_inputs(OP, tokens, hidden, device="cuda", norm=norm, seed=tokens)
    many = run(inputs)
    assert_matches_oracle(OP, inputs, many)
    assert_same_bits(many, run(inputs))
    for first in (0, tokens // 2, tokens - 1):
        rows = slice(first, first + 7)
        assert_same_bits([value[rows] for value in many], run(some(inputs, rows)))


def test_nan_stays_in_its_token():
    inputs = make_inputs(OP, 200, 4096, device="cuda", norm=True)
    clean = run(inputs)
    inputs["residual"][77, 2, 4095] = torch.nan
    inputs["x"][130, 0] = torch.inf
    dirty = run(inputs)
    others = [token for token in range(200) if token not in (77, 130)]
    assert_same_bits([value[others] for value in dirty], [value[others] for value in clean])
    assert dirty.layer_input[77].isnan().all()


def test_more_elements_than_32_bits_count():
    """Run 80,000 tokens at H = 7168, 2.3e9 elements; compare the last ones with a small batch."""
    tokens, hidden = 80_000, 7168
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GB of free memory")
    inputs = make_inputs(OP, 16, hidden, device="cuda", norm=True)
    few = run(inputs)
    repeats = tokens // 16
    many = {
        name: value.repeat(repeats, *(1,) * (value.dim() - 1)) if name in TOKENWISE else value
        for name, value in inputs.items()
    }
    got = mhc_ops.fused_post_pre(**many)
    for first in (0, tokens // 2, tokens - 16):
        assert_same_bits([value[first : first + 16] for value in got], few)


def test_no_memory_but_the_outputs():
    """Take less than 8 MB above the outputs at 32,768 tokens."""
    tokens, hidden = 32_768, 4096
    inputs = make_inputs(OP, 16, hidden, device="cuda", norm=True)
    inputs |= {
        name: inputs[name].repeat(2048, *(1,) * (inputs[name].dim() - 1)) for name in TOKENWISE
    }
    mhc_ops.fused_post_pre(**inputs)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    got = mhc_ops.fused_post_pre(**inputs)
    outputs = sum(value.numel() * value.element_size() for value in got)
    assert got.layer_input.shape == (tokens, hidden)
    assert torch.cuda.max_memory_allocated() - before - outputs < 8 << 20

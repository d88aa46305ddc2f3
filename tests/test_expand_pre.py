"""Test expand_pre: copies then pre, in any batch and with any number of streams."""

import pytest
import torch

from helpers import assert_equal, call
from mhc_ops import nn
from mhc_ops.testing import make_inputs

OP = "expand_pre"


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [4096, 7168])
def test_any_batch_gives_the_bits_of_single_tokens(hidden):
    inputs = make_inputs(OP, 300, hidden, device="cuda", norm=True, kind="large_logits")
    batch = call(OP, inputs)
    for token in (0, 7, 8, 31, 32, 150, 299):
        single = inputs | {"x": inputs["x"][token : token + 1]}
        assert_equal(call(OP, single), {name: v[token : token + 1] for name, v in batch.items()})


@pytest.mark.gpu
def test_more_elements_than_32_bits_count():
    """Run 80,000 tokens at H = 7168, 2.3e9 elements of streams; compare some with a run alone."""
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GB of free memory")
    inputs = make_inputs(OP, 16, 7168, device="cuda", norm=True)
    few = call(OP, inputs)
    many = call(OP, inputs | {"x": inputs["x"].repeat(5000, 1)})
    for first in (0, 40_000, 79_984):
        assert_equal({name: value[first : first + 16] for name, value in many.items()}, few)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_is_expand_then_pre(device, norm):
    """Match the copies bit for bit, and all outputs on the CPU, where the same functions run."""
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

"""Show the ends of the ranges of values that docs/numbers.md states."""

import math
import re
from pathlib import Path

import pytest
import torch

import pages
from helpers import OPS, STREAMS, call
from mhc_ops.testing import assert_matches_oracle, make_inputs

LARGEST = torch.finfo(torch.float32).max
NUMBERS = pages.section(Path(__file__).parents[1] / "docs" / "numbers.md", "Ranges")
PROJECTED = [op for op in OPS if op != "post"]


def largest(hidden, streams=4):
    """Return the root mean square at which the sum of the squares overflows fp32."""
    return math.sqrt(LARGEST / (streams * hidden))


def inputs_of_size(op, hidden, size, device, norm=False):
    """Make inputs whose streams, also after a post step, have this root mean square."""
    inputs = make_inputs(op, 3, hidden, device=device, norm=norm, kind="large_logits")
    name = STREAMS[op]
    inputs[name] = torch.full_like(inputs[name], size) * inputs[name].sign()
    if "comb_res_mix" in inputs:  # The post step hands the streams on as they are.
        inputs["comb_res_mix"] = torch.eye(4, device=device).repeat(3, 1, 1)
        inputs["post_layer_mix"].zero_()
    return inputs


@pytest.mark.parametrize("hidden", [256, 4096, 7168])
def test_the_page_states_the_sizes(hidden):
    said = {int(at): float(size) for size, at in re.findall(r"(\d\.\de17) at H = (\d+)", NUMBERS)}
    assert said[hidden] == pytest.approx(largest(hidden), rel=0.05)


@pytest.mark.parametrize("hidden", [256, 7168])
@pytest.mark.parametrize("op", PROJECTED)
def test_streams_up_to_the_size_are_right(device, op, hidden):
    inputs = inputs_of_size(op, hidden, largest(hidden) / 2, device)
    assert_matches_oracle(op, inputs, tuple(call(op, inputs).values()))


@pytest.mark.parametrize("hidden", [256, 7168])
@pytest.mark.parametrize("op", PROJECTED)
def test_streams_beyond_the_size_have_the_mixes_of_no_projection(device, op, hidden):
    inputs = inputs_of_size(op, hidden, 2 * largest(hidden), device)
    outputs = call(op, inputs)
    without = call(op, inputs | {"fn": torch.zeros_like(inputs["fn"])})
    for name, out in outputs.items():
        assert out.isfinite().all()
        torch.testing.assert_close(out, without[name], rtol=2**-7, atol=1e-6)
    with pytest.raises(AssertionError, match="beyond the bound"):
        assert_matches_oracle(op, inputs, tuple(outputs.values()))


@pytest.mark.parametrize("op", ["head", "pre"])
def test_a_norm_of_a_row_beyond_its_size_is_zero(device, op):
    for factor, zero in ((0.5, False), (2, True)):
        # The collapse of four streams with weights of 1/2 each is twice a stream.
        inputs = inputs_of_size(op, 256, factor * largest(256, 1) / 2, device, norm=True)
        inputs["residual"] = inputs["residual"].abs()
        inputs["fn"].zero_()
        assert (call(op, inputs)["layer_input"] == 0).all().item() == zero


@pytest.mark.parametrize("op", ["pre", "head"])
def test_streams_of_zeros_need_an_epsilon(device, op):
    inputs = inputs_of_size(op, 256, 0.0, device)
    assert all(out.isfinite().all() for out in call(op, inputs).values())
    name = "comb_mix" if op == "pre" else "layer_input"
    assert call(op, inputs | {"rms_eps": 0.0})[name].isnan().all()

"""Test post_head, with and without the streams: both agree, also in any batch."""

import pytest
import torch

import mhc_ops
from helpers import assert_equal, call, sizes
from mhc_ops.testing import make_inputs

OP = "post_head"
OPS = (OP, "post_head_streams")
POST_ARGUMENTS = ("x", "residual", "post_layer_mix", "comb_res_mix")


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize(("hidden", "tokens"), sizes(OP, (256, 4096, 7168), 1, 33, 300))
def test_streams_are_those_of_post_and_change_nothing(hidden, tokens, norm):
    """Compare bits with and without the streams written."""
    inputs = make_inputs(OP, tokens, hidden, device="cuda", norm=norm, kind="large_streams")
    with_streams = call("post_head_streams", inputs)
    post = call("post", {name: inputs[name] for name in POST_ARGUMENTS})
    assert torch.equal(with_streams["residual_out"], post["residual_out"])
    assert torch.equal(with_streams["layer_input"], call(OP, inputs)["layer_input"])


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [4096, 5120, 7168])
@pytest.mark.parametrize("tokens", [168, 225, 600])
def test_any_batch_gives_the_bits_of_single_tokens(hidden, tokens):
    inputs = make_inputs(OP, tokens, hidden, device="cuda", norm=True, kind="large_logits")
    batch = call(OP, inputs)
    for token in (0, 7, 8, 31, 32, 150, tokens - 1):
        single = inputs | {name: inputs[name][token : token + 1] for name in POST_ARGUMENTS}
        assert_equal(call(OP, single), {name: v[token : token + 1] for name, v in batch.items()})


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_more_elements_than_32_bits_count(op):
    """Run 80,000 tokens at H = 7168, 2.3e9 elements; compare some tokens with a run alone."""
    if torch.cuda.mem_get_info()[0] < 14 << 30:
        pytest.skip("needs 14 GB of free memory")
    inputs = make_inputs(op, 16, 7168, device="cuda", norm=True)
    few = call(op, inputs)
    repeated = {
        name: inputs[name].repeat(5000, *(1,) * (inputs[name].dim() - 1)) for name in POST_ARGUMENTS
    }
    many = call(op, inputs | repeated)
    for first in (0, 40_000, 79_984):
        assert_equal({name: value[first : first + 16] for name, value in many.items()}, few)


def test_the_streams_are_returned_as_well(device):
    inputs = make_inputs(OP, 5, 256, device=device, norm=True)
    out = mhc_ops.post_head_streams(**inputs)
    assert torch.equal(out.residual_out, mhc_ops.post(*(inputs[n] for n in POST_ARGUMENTS)))
    assert torch.equal(out.hidden, mhc_ops.post_head(**inputs))

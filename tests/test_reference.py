"""The reference as the CPU's kernels: a token's bits are its own."""

import pytest
import torch

from helpers import OPS, assert_equal, call
from mhc_ops.testing import make_inputs

TOKEN = ("x", "residual", "post_layer_mix", "comb_res_mix")
TOKENS = 33


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("hc_mult", [3, 4])
@pytest.mark.parametrize("hidden", [5, 64, 4096])
@pytest.mark.parametrize("op", OPS)
def test_a_token_does_not_depend_on_those_beside_it(op, hidden, hc_mult, threads):
    """Whatever their number, wherever it stands; sharded tokens rely on it."""
    inputs = make_inputs(op, TOKENS, hidden, hc_mult=hc_mult, norm=True, kind="large_logits")
    whole = call(op, inputs)
    for first, last in ((0, 1), (1, 3), (2, 5), (5, 9), (9, 16), (16, 33), (20, 21)):
        part = {k: v[first:last].clone() if k in TOKEN else v for k, v in inputs.items()}
        assert_equal(call(op, part), {k: v[first:last] for k, v in whole.items()})


@pytest.mark.parametrize("op", [op for op in OPS if op != "post"])
def test_weights_that_do_not_start_at_a_cache_line(op):
    """As weights lie that were loaded from a file."""
    inputs = make_inputs(op, 3, 64, norm=True)
    memory = torch.empty(inputs["fn"].numel() + 4)
    fn = memory[4:].view_as(inputs["fn"]).copy_(inputs["fn"])
    assert fn.data_ptr() % 64 == 16
    assert_equal(call(op, inputs | {"fn": fn}), call(op, inputs))

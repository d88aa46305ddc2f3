"""Test post, alone and as the beginning of other ops."""

import pytest

from helpers import assert_equal, call
from mhc_ops.testing import make_inputs


@pytest.mark.parametrize("op", ["post", "fused_post_pre", "post_head", "post_head_streams"])
def test_posts_without_their_last_dimension(device, op):
    inputs = make_inputs(op, (2, 3), 256, device=device)
    squeezed = inputs | {"post_layer_mix": inputs["post_layer_mix"].squeeze(-1)}
    assert_equal(call(op, squeezed), call(op, inputs))

"""post: the new streams against the float64 oracle."""

import pytest

from helpers import check_against_oracle, sizes
from mhc_ops.testing import KINDS

OP = "post"


@pytest.mark.parametrize("hidden", [256, 4096])
@pytest.mark.parametrize("kind", KINDS)
def test_oracle(device, kind, hidden):
    check_against_oracle(OP, device, tokens=17, hidden=hidden, kind=kind)


@pytest.mark.gpu
@pytest.mark.parametrize(("hidden", "tokens"), sizes(OP, (4096,), 8, 64, 200, 513, at_bounds=True))
@pytest.mark.parametrize("kind", KINDS)
def test_oracle_on_every_path(kind, hidden, tokens):
    check_against_oracle(OP, "cuda", tokens=tokens, hidden=hidden, kind=kind)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("hidden", "tokens"), sizes(OP, (256, 768, 2816, 5120, 7168), 3, 300, at_bounds=True)
)
def test_oracle_at_other_hidden_sizes(hidden, tokens):
    check_against_oracle(OP, "cuda", tokens=tokens, hidden=hidden, kind="large_logits", seed=1)


@pytest.mark.gpu
def test_oracle_at_a_prefill():
    check_against_oracle(OP, "cuda", tokens=4096, hidden=7168, kind="large_logits")

"""post: the new streams against the float64 oracle."""

import pytest

from helpers import PATH_TOKENS, check_against_oracle, token_rows
from mhc_ops.testing import KINDS

OP = "post"


@pytest.mark.parametrize("hidden", [256, 4096])
@pytest.mark.parametrize("kind", KINDS)
def test_oracle(device, kind, hidden):
    check_against_oracle(OP, device, tokens=17, hidden=hidden, kind=kind)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", token_rows(OP, 8, *PATH_TOKENS))
@pytest.mark.parametrize("kind", KINDS)
def test_oracle_on_every_path(kind, tokens):
    check_against_oracle(OP, "cuda", tokens=tokens, hidden=4096, kind=kind)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", token_rows(OP, 3, 129, 300))
@pytest.mark.parametrize("hidden", [256, 768, 2816, 5120, 7168])
def test_oracle_at_other_hidden_sizes(hidden, tokens):
    check_against_oracle(OP, "cuda", tokens=tokens, hidden=hidden, kind="large_logits", seed=1)


@pytest.mark.gpu
def test_oracle_at_a_prefill():
    check_against_oracle(OP, "cuda", tokens=4096, hidden=7168, kind="large_logits")

"""head: the last hidden state against the float64 oracle."""

import pytest

from helpers import PATH_TOKENS, check_against_oracle, token_rows
from mhc_ops.testing import KINDS

OP = "head"


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("hidden", [256, 4096])
@pytest.mark.parametrize("kind", KINDS)
def test_oracle(device, kind, hidden, norm):
    check_against_oracle(OP, device, tokens=17, hidden=hidden, norm=norm, kind=kind)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("tokens", token_rows(OP, 8, *PATH_TOKENS))
@pytest.mark.parametrize("kind", KINDS)
def test_oracle_on_every_path(kind, tokens, norm):
    check_against_oracle(OP, "cuda", tokens=tokens, hidden=4096, norm=norm, kind=kind)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("tokens", token_rows(OP, 3, 129, 300))
@pytest.mark.parametrize("hidden", [256, 768, 2816, 5120, 7168])
def test_oracle_at_other_hidden_sizes(hidden, tokens, norm):
    check_against_oracle(
        OP, "cuda", tokens=tokens, hidden=hidden, norm=norm, kind="large_logits", seed=1
    )


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_oracle_at_a_prefill(norm):
    check_against_oracle(OP, "cuda", tokens=4096, hidden=7168, norm=norm, kind="large_logits")

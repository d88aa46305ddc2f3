"""Test ops against the float64 oracle: kinds of inputs, sizes on every path, epsilons, zeros."""

import pytest
import torch

from helpers import EPSILONS, NORMS, OPS, check_against_oracle, path, tokens_of
from mhc_ops.testing import KINDS, make_inputs

OTHER_HIDDEN = (256, 768, 2816, 5120, 7168)
# These ops have few kernels, so few token counts suffice.
ENDS = ("expand_pre", "post_head", "post_head_streams")

per_op_and_norm = pytest.mark.parametrize(
    ("op", "norm"),
    [
        pytest.param(op, norm, id=f"{op}-{'norm' if norm else 'plain'}")
        for op in OPS
        for norm in NORMS[op]
    ],
)


@per_op_and_norm
def test_kinds_of_inputs(device, op, norm, subtests):
    for hidden in (256, 4096):
        for kind in KINDS:
            with subtests.test(hidden=hidden, kind=kind):
                check_against_oracle(op, device, tokens=17, hidden=hidden, norm=norm, kind=kind)


@pytest.mark.gpu
@per_op_and_norm
@pytest.mark.parametrize("kind", KINDS)
def test_every_path(op, norm, kind, subtests):
    counts = (1, 8, 57, 129, 513) if op in ENDS else (8, 64, 200, 513)
    for tokens in tokens_of(4096, *counts, at_bounds=op not in ENDS):
        with subtests.test(path(op, 4096, tokens), tokens=tokens):
            check_against_oracle(op, "cuda", tokens=tokens, hidden=4096, norm=norm, kind=kind)


@pytest.mark.gpu
@per_op_and_norm
@pytest.mark.parametrize("hidden", OTHER_HIDDEN)
def test_other_hidden_sizes(op, norm, hidden, subtests):
    counts = (3, 64, 300) if op in ENDS else (3, 5, 300)
    for tokens in tokens_of(hidden, *counts, at_bounds=op not in ENDS):
        with subtests.test(path(op, hidden, tokens), tokens=tokens):
            check_against_oracle(
                op, "cuda", tokens=tokens, hidden=hidden, norm=norm, kind="large_logits", seed=1
            )


@pytest.mark.gpu
@per_op_and_norm
def test_a_prefill(op, norm):
    check_against_oracle(op, "cuda", tokens=4096, hidden=7168, norm=norm, kind="large_logits")


@pytest.mark.parametrize("op", [op for op in OPS if op != "post"])  # post has none.
def test_epsilons(device, op, subtests):
    for name, epsilons in EPSILONS.items():
        with subtests.test(name):
            check_against_oracle(
                op, device, epsilons, tokens=17, hidden=256, norm=True, kind="large_logits"
            )


@per_op_and_norm
def test_streams_of_zero(device, op, norm):
    """Turn zeros into zeros: the epsilons keep every division finite."""
    make = {"tokens": 5, "hidden": 256, "norm": norm, "kind": "signed_bases"}
    inputs = make_inputs(op, device=device, **make)
    zero = {name: torch.zeros_like(inputs[name]) for name in ("x", "residual") if name in inputs}
    check_against_oracle(op, device, zero, **make)

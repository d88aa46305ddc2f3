"""Refuse wrong arguments of a module when the module is made, not at its first forward."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from mhc_ops import nn

HIDDEN = 256


def identity(x):
    return x


def layer(**options):
    return nn.DecoderLayer(identity, identity, HIDDEN, **options)


def stack(**options):
    return nn.DecoderStack([(identity, identity)], HIDDEN, **options)


def nextn(**options):
    return nn.NextNLayer(identity, identity, layer(), **options)


def connection(**options):
    return nn.HyperConnection(**({"hidden_size": HIDDEN} | options))


def head(**options):
    return nn.HyperHead(**({"hidden_size": HIDDEN} | options))


def norm(**options):
    return nn.FoldedRMSNorm(**({"hidden_size": HIDDEN} | options))


SIZES = [
    (connection, "hidden_size"), (connection, "hc_mult"), (head, "hidden_size"), (head, "hc_mult"),
    (norm, "hidden_size"), (layer, "hc_mult"), (stack, "hc_mult"),
]  # fmt: skip
EPSILONS = [
    (connection, "rms_eps"), (connection, "hc_pre_eps"), (connection, "hc_sinkhorn_eps"),
    (head, "rms_eps"), (head, "hc_eps"), (norm, "eps"), (layer, "norm_eps"), (layer, "rms_eps"),
    (stack, "rms_eps"), (stack, "hc_eps"), (stack, "norm_eps"), (nextn, "norm_eps"),
    (nextn, "rms_eps"), (nextn, "hc_eps"),
]  # fmt: skip
ROUNDS = [(connection, "sinkhorn_repeat"), (layer, "sinkhorn_repeat"), (stack, "sinkhorn_repeat")]


def refusal(kind, make, argument, value):
    with pytest.raises(kind, match=rf"^mhc_ops\.nn\.\w+: expected {argument} .*, got ") as error:
        make(**{argument: value})
    return str(error.value)


@pytest.mark.parametrize(("make", "argument"), SIZES)
def test_sizes(make, argument):
    for value in ("256", 256.0, None, True, torch.ones(2)):
        assert "to be an integer, got" in refusal(TypeError, make, argument, value)
    for value in (0, -4):
        assert f"to be at least 1, got {value}" in refusal(ValueError, make, argument, value)


@pytest.mark.parametrize(("make", "argument"), EPSILONS)
def test_epsilons(make, argument):
    for value in ("1e-6", None, True, 1j, [1e-6], torch.tensor([1e-6, 1e-6])):
        assert "to be a number, got" in refusal(TypeError, make, argument, value)
    for value in (-1e-6, math.nan, math.inf, 1e39, 1e300):
        text = refusal(ValueError, make, argument, value)
        assert f"to be finite in fp32 and at least 0, got {value}" in text
    for value in (1e-60, 1e-40):
        assert "to be 0 or at least 1.17" in refusal(ValueError, make, argument, value)
    make(**{argument: 0})
    make(**{argument: np.float32(1e-6)})
    make(**{argument: Fraction(1, 1000)})


@pytest.mark.parametrize(("make", "argument"), ROUNDS)
def test_rounds(make, argument):
    for value in (20.0, "20", None, True):
        assert "to be an integer, got" in refusal(TypeError, make, argument, value)
    for value in (0, -1, 10_001):
        assert f"from 1 to 10000, got {value}" in refusal(ValueError, make, argument, value)


def test_the_factor_of_the_post_weights():
    for value in (math.nan, -math.inf, 1e39):
        text = refusal(ValueError, connection, "hc_post_mult_value", value)
        assert f"to be finite in fp32, got {value}" in text
    assert connection(hc_post_mult_value=-2).hc_post_mult_value == -2.0


def test_numbers_become_plain_ones():
    made = connection(
        hidden_size=np.int64(HIDDEN), rms_eps=np.float32(0.5), sinkhorn_repeat=np.int32(3)
    )
    assert [type(v) for v in (made.hidden_size, made.rms_eps, made.sinkhorn_repeat)] == [
        int, float, int,
    ]  # fmt: skip
    nn.wire(made)
    made.pre(torch.zeros(1, 4, HIDDEN).bfloat16())


def test_dtypes():
    for value in (torch.int32, torch.float8_e4m3fn, "float32", None):
        text = refusal(TypeError, norm, "dtype", value)
        assert "to be a floating dtype of at least 16 bits" in text


def test_sublayers():
    for wrong in (None, torch.ones(2), "f"):
        with pytest.raises(
            TypeError, match=r"DecoderLayer: expected attention to be callable, f\(x"
        ):
            nn.DecoderLayer(wrong, identity, HIDDEN)
        with pytest.raises(TypeError, match="DecoderLayer: expected mlp to be callable"):
            nn.DecoderLayer(identity, wrong, HIDDEN)
        with pytest.raises(TypeError, match="NextNLayer: expected h_proj to be callable"):
            nn.NextNLayer(identity, wrong, layer())
        with pytest.raises(TypeError, match=r"expected sublayers\[1\]\[0\] to be callable"):
            nn.DecoderStack([(identity, identity), (wrong, identity)], HIDDEN)
    with pytest.raises(
        TypeError, match="NextNLayer: expected layer to be a DecoderLayer, got Identity"
    ):
        nn.NextNLayer(identity, identity, torch.nn.Identity())
    with pytest.raises(
        TypeError, match=r"expected sublayers to be pairs \(attention, mlp\), got 3"
    ):
        nn.DecoderStack(3, HIDDEN)
    for pair in (identity, (identity,), (identity,) * 3):
        with pytest.raises(
            TypeError, match=r"expected sublayers\[0\] to be a pair \(attention, mlp"
        ):
            nn.DecoderStack([pair], HIDDEN)
    with pytest.raises(ValueError, match="expected at least one pair of sublayers, got none"):
        nn.DecoderStack(iter(()), HIDDEN)


def test_sublayers_from_an_iterator():
    made = nn.DecoderStack(((identity, identity) for _ in range(3)), HIDDEN)
    assert len(made.layers) == 3

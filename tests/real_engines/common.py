"""Share between the tests of both engines inputs, stand-ins for sublayers, and what close means."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import types
from unittest import mock

import torch
from torch import nn

from mhc_ops.integrations import _rebind

HIDDEN, HC_MULT, EPS, ROUNDS = 256, 4, 1e-6, 20
TOKENS = (0, 1, 3, 40)

# This allows one bf16 step, and what fp32 sums in another order leave of numbers of size 1.
STEP = {"rtol": 2**-7, "atol": 1e-3}
# Streams of two layers differ more: each boundary rounds to bf16, and a step in one boundary is a
# step in the next.
CHAIN = {"rtol": 2**-5, "atol": 2**-4}


class Sublayer(nn.Module):
    """Stand in for attention and for the experts of either engine."""

    tp_size = attn_tp_size = 1
    _shared_expert_tp1 = False

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.wo_b = types.SimpleNamespace(reduce_results=True)

    def forward(self, *args, **kwargs):
        given = [*args, *kwargs.values()]
        return torch.tanh(next(x for x in given if getattr(x, "dtype", None) == torch.bfloat16))

    def maybe_use_decode_attn_tp(self, batch):
        return contextlib.nullcontext()


class RMSNorm(nn.Module):
    """Carry a weight, which the boundary before the norm applies."""

    def __init__(self, hidden, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden), requires_grad=False)
        self.variance_epsilon = eps


def random_weights(module):
    """Fill every parameter: norms around 1 in bf16, the rest as trained mixes are, small."""
    for name, parameter in module.named_parameters():
        value = torch.randn_like(parameter) * 0.05
        parameter.data = (value + 1).bfloat16() if "norm" in name else value


def mixing(rows=24, hidden=HIDDEN):
    """Return (fn, scale, base) of a hyper-connection, or of a head with 4 rows."""
    return (
        torch.randn(rows, HC_MULT * hidden) * 0.05,
        torch.rand(3 if rows == 24 else 1) + 0.5,
        torch.randn(rows) * 0.1,
    )


def streams(tokens, hidden=HIDDEN, hc_mult=HC_MULT):
    return torch.randn(tokens, hc_mult, hidden).bfloat16()


def norm(y, weight, eps):
    """Apply RMSNorm to what has been rounded to bf16, as the reference of a fused norm."""
    y = y.float()
    scale = torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * scale * weight.float()).bfloat16()


def close(got, want, **tolerance):
    torch.testing.assert_close(got.float(), want.float(), **(tolerance or STEP))


@contextlib.contextmanager
def without_op(module, name):
    """Count the calls of an engine's own function that one of this package replaced."""
    ours = vars(module)[name]
    stock = mock.Mock(side_effect=_rebind.stock(ours))
    with mock.patch.dict(_rebind._stock, {ours: stock}):
        yield stock


def fresh_process(code, **environment):
    """Run code in a new interpreter; return what it printed on both streams."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr

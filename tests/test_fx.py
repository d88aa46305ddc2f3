"""Trace the public functions with torch.fx: one node each, and the same results."""

import operator

import pytest
import torch
from torch.utils import _pytree as pytree

import mhc_ops
from helpers import NORMS, OPS, overload, tensors
from mhc_ops import nn
from mhc_ops.testing import make_inputs

HIDDEN = 64


class Calls(torch.nn.Module):
    """Call a public function with tensors from outside and numbers of its own."""

    def __init__(self, op, numbers):
        super().__init__()
        self.function = getattr(mhc_ops, op)
        self.numbers = numbers

    def forward(self, given):
        return self.function(**given, **self.numbers)


def called(graph, op):
    """Return the calls of the op, after a look at all other calls."""
    calls = [node for node in graph.nodes if node.op == "call_function"]
    others = {node.target for node in calls if node.target is not overload(op)}
    # The outputs are taken apart, and a named tuple is made of them.
    assert all(o is operator.getitem or issubclass(o, tuple) for o in others)
    return [node for node in calls if node.target is overload(op)]


def assert_same(got, want):
    assert type(got) is type(want)
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("op", OPS)
def test_symbolic_trace(op):
    for norm in NORMS[op]:
        inputs = make_inputs(op, 3, HIDDEN, norm=norm)
        function = getattr(mhc_ops, op)
        traced = torch.fx.symbolic_trace(function)
        assert len(called(traced.graph, op)) == 1
        assert_same(traced(**inputs), function(**inputs))


@pytest.mark.parametrize("op", OPS)
def test_symbolic_trace_with_numbers_in_the_graph(op):
    inputs = make_inputs(op, 3, HIDDEN, norm=NORMS[op][-1])
    given = tensors(inputs)
    calls = Calls(op, {name: v for name, v in inputs.items() if name not in given})
    traced = torch.fx.symbolic_trace(
        calls, concrete_args={"given": dict.fromkeys(given, torch.fx.PH)}
    )
    assert len(called(traced.graph, op)) == 1
    assert_same(traced(given), calls(given))


def test_symbolic_trace_of_a_layer(monkeypatch):
    monkeypatch.setenv("MHC_OPS_FUSE_POST_PRE", "1")
    layer = nn.DecoderLayer(lambda x: -0.5 * x, lambda x: 0.25 * x, HIDDEN, sinkhorn_repeat=3)
    nn.wire(layer.requires_grad_(False))
    traced = torch.fx.symbolic_trace(layer)
    targets = [node.target for node in traced.graph.nodes]
    assert targets.count(overload("pre")) == targets.count(overload("fused_post_pre")) == 1
    streams = torch.randn(3, 4, HIDDEN).bfloat16()
    assert_same(traced(streams), layer(streams))

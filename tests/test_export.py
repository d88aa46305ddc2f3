"""Save, package and load a stack of ``mhc_ops.nn`` with torch.export and AOTInductor."""

import shutil
import subprocess
import sys

import pytest
import torch
from torch.utils import _pytree as pytree

import mhc_ops
from helpers import HANG
from mhc_ops import nn
from mhc_ops.testing import make_inputs

HIDDEN = 256


class Mlp(torch.nn.Module):
    """Stand in for any sublayer."""

    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(HIDDEN, HIDDEN, dtype=torch.bfloat16)

    def forward(self, x):
        return torch.nn.functional.silu(self.up(x))


def make_stack(monkeypatch, fused):
    for name in ("FUSE_POST_PRE", "TILELANG_PRE", "TILELANG_POST"):
        monkeypatch.setenv(f"MHC_OPS_{name}", str(int(fused or name != "FUSE_POST_PRE")))
    stack = nn.DecoderStack([(Mlp(), Mlp()) for _ in range(2)], HIDDEN)
    for name, parameter in stack.named_parameters():
        if name.endswith(("fn", "base")):
            torch.nn.init.normal_(parameter, std=0.05)
    nn.wire(stack.requires_grad_(False))
    return stack


def exported(module, *inputs):
    tokens = torch.export.Dim("tokens", min=1, max=4096)
    shapes = tuple({0: tokens} for _ in inputs)
    with torch.no_grad():
        return torch.export.export(module, inputs, dynamic_shapes=shapes)


def embedding(tokens):
    return torch.randn(tokens, HIDDEN).bfloat16()


def assert_same(got, want):
    assert type(got) is type(want)
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        assert torch.equal(a, b)


RETURNED = (
    mhc_ops.PreOutput, mhc_ops.FusedPostPreOutput, mhc_ops.ExpandPreOutput, mhc_ops.PostHeadOutput,
    nn.Copies, nn.StreamState, nn.SublayerEntry, nn.StackOutput, nn.NextNOutput,
)  # fmt: skip


@pytest.mark.parametrize("cls", RETURNED, ids=lambda cls: cls.__name__)
def test_what_is_returned_has_a_name_in_saved_programs(cls):
    value = cls(*range(len(cls._fields)))
    leaves, spec = pytree.tree_flatten(value)
    text = pytree.treespec_dumps(spec)
    assert f"mhc_ops.{cls.__name__}" in text
    assert pytree.tree_unflatten(leaves, pytree.treespec_loads(text)) == value


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_a_saved_program_gives_the_same_bits(monkeypatch, tmp_path, fused):
    stack = make_stack(monkeypatch, fused)
    program = exported(stack, embedding(8))
    ops = {str(node.target) for node in program.graph.nodes if "mhc" in str(node.target)}
    assert ("mhc.fused_post_pre.default" in ops) == fused
    torch.export.save(program, tmp_path / "stack.pt2")
    loaded = torch.export.load(tmp_path / "stack.pt2").module()
    for tokens in (8, 1, 5):
        x = embedding(tokens)
        with torch.no_grad():
            assert_same(loaded(x), stack(x))


def test_a_saved_layer_takes_and_returns_its_state(monkeypatch, tmp_path):
    layer = make_stack(monkeypatch, fused=True).layers[1]
    state = nn.StreamState(
        torch.randn(3, 4, HIDDEN).bfloat16(), embedding(3), torch.rand(3, 4, 1), torch.rand(3, 4, 4)
    )
    with torch.no_grad():
        program = torch.export.export(layer, (state,))
        torch.export.save(program, tmp_path / "layer.pt2")
        loaded = torch.export.load(tmp_path / "layer.pt2").module()
        assert_same(loaded(state), layer(state))


class EveryKind(torch.nn.Module):
    """Take every named tuple of the package, nested too, and return every one."""

    def __init__(self):
        super().__init__()
        self.weights = {
            name: value
            for name, value in make_inputs("pre", 1, HIDDEN, sinkhorn_repeat=3).items()
            if name != "residual"
        }
        self.of_head = {
            name: value
            for name, value in make_inputs("head", 1, HIDDEN).items()
            if name != "residual"
        }

    def forward(self, given):
        state = given["state"]
        entry = given["entry"].after(state.x)
        of_post = (state.x, state.residual, state.post, state.comb)
        captured = tuple(2 * value for value in given["stack"].captured)
        return {
            "pre": mhc_ops.pre(given["nextn"].streams, **self.weights),
            "fused": mhc_ops.fused_post_pre(*of_post, **self.weights),
            "expand": mhc_ops.expand_pre(given["copies"].x, **self.weights),
            "head": mhc_ops.post_head_streams(*of_post, **self.of_head),
            "copies": nn.Copies(given["pre"].layer_input + given["expand"].layer_input),
            "state": entry,
            "entry": nn.SublayerEntry(given["head"].residual_out, state.x, state.post, state.comb),
            "stack": nn.StackOutput(given["fused"].layer_input * 2, entry.residual * 2, captured),
            "nextn": nn.NextNOutput(given["stack"].hidden * 2, given["stack"].streams * 2),
        }


def every_kind(tokens):
    """Make an input for :class:`EveryKind`, which is made as its own output."""
    x, streams = embedding(tokens), torch.randn(tokens, 4, HIDDEN).bfloat16()
    mixes = torch.rand(tokens, 4, 1), torch.rand(tokens, 4, 4)
    return {
        "pre": mhc_ops.PreOutput(*mixes, x),
        "fused": mhc_ops.FusedPostPreOutput(streams, *mixes, x),
        "expand": mhc_ops.ExpandPreOutput(streams, *mixes, x),
        "head": mhc_ops.PostHeadOutput(streams, x),
        "copies": nn.Copies(x),
        "state": nn.StreamState(streams, x, *mixes),
        "entry": nn.SublayerEntry(streams, x, *mixes),
        "stack": nn.StackOutput(x, streams, (x, 2 * x)),
        "nextn": nn.NextNOutput(x, streams),
    }


def assert_same_kinds(got, want):
    assert pytree.tree_structure(got) == pytree.tree_structure(want)
    assert {name: type(value) for name, value in got.items()} == {
        name: type(value) for name, value in want.items()
    }
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("grad", [False, True])
def test_every_kind_goes_into_a_saved_program_and_comes_out(tmp_path, grad):
    module = EveryKind()
    with torch.set_grad_enabled(grad):
        given = every_kind(3)
        program = torch.export.export(module, (given,))
        torch.export.save(program, tmp_path / "kinds.pt2")
        loaded = torch.export.load(tmp_path / "kinds.pt2")
        assert_same_kinds(loaded.example_inputs[0][0], given)
        other = every_kind(3)
        assert_same_kinds(loaded.module()(other), module(other))


LOAD = """
import sys
import torch
import mhc_ops.nn
loaded = torch.export.load(sys.argv[1]).module()
given = torch.load(sys.argv[2])
torch.save(loaded(given), sys.argv[3])
"""


@pytest.mark.slow
def test_another_process_loads_it_with_safe_loading(tmp_path):
    """Load programs and tensors without pickled code, which torch.load refuses unless told."""
    module, given = EveryKind(), every_kind(3)
    with torch.no_grad():
        torch.export.save(torch.export.export(module, (given,)), tmp_path / "kinds.pt2")
    torch.save(given, tmp_path / "given.pt")
    paths = [str(tmp_path / name) for name in ("kinds.pt2", "given.pt", "got.pt")]
    subprocess.run([sys.executable, "-c", LOAD, *paths], check=True, timeout=HANG)
    assert_same_kinds(torch.load(paths[2]), module(given))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs g++")
def test_every_kind_goes_into_a_package_and_comes_out(tmp_path):
    module, given = EveryKind(), every_kind(3)
    with torch.no_grad():
        program = torch.export.export(module, (given,))
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "kinds.pt2")
        )
        loaded = torch._inductor.aoti_load_package(path)
        other = every_kind(3)
        assert_same_kinds(loaded(other), module(other))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs g++")
def test_a_package_of_aotinductor_gives_the_same_bits(monkeypatch, tmp_path):
    stack = make_stack(monkeypatch, fused=True)
    program = exported(stack, embedding(8))
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "stack.pt2")
    )
    loaded = torch._inductor.aoti_load_package(path)
    for tokens in (8, 1, 5):
        x = embedding(tokens)
        with torch.no_grad():
            assert_same(loaded(x), stack(x))

"""Save, package and load a stack of ``mhc_ops.nn`` with torch.export and AOTInductor."""

import shutil

import pytest
import torch
from torch.utils import _pytree as pytree

import mhc_ops
from mhc_ops import nn

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

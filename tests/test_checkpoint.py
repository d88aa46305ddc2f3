"""Load mHC parameters from DeepSeek's names and from those of transformers."""

import re
import sys
from pathlib import Path

import pytest
import torch

from mhc_ops import checkpoint, nn

HIDDEN, LAYERS = 64, 2

# The columns are this package's names, DeepSeek's and those of transformers, written out as the
# checkpoints have them.
NAMES = [
    *(
        (f"layers.1.{hc}.{part}", f"layers.1.hc_{name}_{part}", f"model.layers.1.{hc}.{part}")
        for hc, name in (("attn_hc", "attn"), ("ffn_hc", "ffn"))
        for part in ("fn", "base", "scale")
    ),
    (
        "layers.1.attn_norm.weight",
        "layers.1.attn_norm.weight",
        "model.layers.1.input_layernorm.weight",
    ),
    (
        "layers.1.ffn_norm.weight",
        "layers.1.ffn_norm.weight",
        "model.layers.1.post_attention_layernorm.weight",
    ),
    ("head.fn", "hc_head_fn", "model.hc_head.hc_fn"),
    ("head.base", "hc_head_base", "model.hc_head.hc_base"),
    ("head.scale", "hc_head_scale", "model.hc_head.hc_scale"),
    ("norm.weight", "norm.weight", "model.norm.weight"),
]
STYLES = ("deepseek", "transformers")


def make_stack():
    return nn.DecoderStack([(torch.tanh, torch.tanh)] * LAYERS, HIDDEN)


def make_nextn():
    return nn.NextNLayer(torch.tanh, torch.tanh, nn.DecoderLayer(torch.tanh, torch.tanh, HIDDEN))


def checkpoint_of(names, module):
    """Make random tensors under the names of a checkpoint, and others without mHC parameters."""
    tensors = {
        theirs: torch.randn_like(module.get_parameter(ours)) for ours, theirs in names.items()
    }
    return tensors | {
        "layers.0.attn.wq_a.weight": torch.zeros(2),
        "model.layers.0.self_attn.q_norm.weight": torch.zeros(2),
        "embed.weight": torch.zeros(2),
    }


@pytest.fixture(params=STYLES)
def stack_names(request):
    return checkpoint.stack_names(LAYERS, request.param)


@pytest.mark.parametrize(("ours", "deepseek", "transformers"), NAMES)
def test_table(ours, deepseek, transformers):
    assert checkpoint.stack_names(LAYERS, "deepseek")[ours] == deepseek
    assert checkpoint.stack_names(LAYERS, "transformers")[ours] == transformers


@pytest.mark.parametrize("style", STYLES)
def test_table_has_every_parameter(style):
    names = checkpoint.stack_names(LAYERS, style)
    assert set(names) == {name for name, _ in make_stack().named_parameters()}
    assert len(set(names.values())) == len(names)
    assert set(checkpoint.nextn_names()) == {n for n, _ in make_nextn().named_parameters()}


def test_another_style():
    with pytest.raises(ValueError, match="to be one of deepseek, transformers, got 'sglang'"):
        checkpoint.stack_names(1, "sglang")


def test_transformers_maps_the_one_to_the_other():
    """Find both columns in the conversion that transformers has for DeepSeek's checkpoints."""
    mapping = pytest.importorskip("transformers.conversion_mapping")
    renamings = [
        step
        for step in mapping.get_checkpoint_conversion_mapping("deepseek_v4")
        if type(step).__name__ == "WeightRenaming"
    ]
    theirs = checkpoint.stack_names(LAYERS, "transformers")
    for ours, name in checkpoint.stack_names(LAYERS, "deepseek").items():
        for step in renamings:
            (source,), (target,) = step._original_source_patterns, step._original_target_patterns
            name = re.sub(source, target, name)
        assert f"model.{name}" == theirs[ours]


def test_a_model_of_transformers_loads():
    """Make of a layer's streams, by the stack, what the model's own hyper-connection does."""
    pytest.importorskip("transformers")
    from mhc_ops.demo import models as demo
    from mhc_ops.integrations import transformers as integration

    model = demo.small_model(0, "cpu")
    config = model.config
    stack = nn.DecoderStack(
        [(torch.tanh, torch.tanh)] * config.num_hidden_layers, config.hidden_size
    ).requires_grad_(False)
    checkpoint.load_stack(stack, model.state_dict())
    nn.wire(stack)
    integration.apply(model)
    streams = torch.randn(3, 4, config.hidden_size).bfloat16()
    theirs, ours = model.model.layers[1], stack.layers[1]
    with torch.no_grad():
        want = theirs.ffn_hc.pre(streams, theirs.post_attention_layernorm)
        got = ours.ffn_hc.pre(streams, ours.ffn_norm)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


class TestLoadStack:
    def test_every_tensor_arrives_in_place(self, stack_names):
        stack = make_stack()
        tensors = checkpoint_of(stack_names, stack)
        addresses = {name: p.data_ptr() for name, p in stack.named_parameters()}
        checkpoint.load_stack(stack, tensors)
        for ours, theirs in stack_names.items():
            parameter = stack.get_parameter(ours)
            assert torch.equal(parameter, tensors[theirs].to(parameter.dtype)), ours
            assert parameter.data_ptr() == addresses[ours]

    def test_draft_layers_of_the_checkpoint_are_passed_over(self):
        stack, draft = make_stack(), make_nextn()
        names = checkpoint.stack_names(LAYERS, "deepseek")
        tensors = checkpoint_of(names, stack) | checkpoint_of(checkpoint.nextn_names(), draft)
        checkpoint.load_stack(stack, tensors)
        assert torch.equal(stack.head.fn, tensors["hc_head_fn"])

    def test_bf16_tensors_are_cast(self, stack_names):
        stack = make_stack()
        tensors = {k: v.bfloat16() for k, v in checkpoint_of(stack_names, stack).items()}
        checkpoint.load_stack(stack, tensors)
        assert torch.equal(stack.head.fn, tensors[stack_names["head.fn"]].float())


def missing(tensors, name):
    del tensors[name]
    return f"missing {name}"


def misshaped(tensors, name):
    shape = tuple(tensors[name].shape)
    tensors[name] = torch.zeros(7, 3)
    return f"{name} of shape (7, 3) instead of {shape}"


def quantised(tensors, name):
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    return f"{name} of dtype torch.float8_e4m3fn instead of a floating dtype of at least 16 bits"


def unexpected(tensors, name):
    other = re.sub(r"layers\.1|mtp\.0\.", lambda m: m[0].replace("1", "9"), name)
    other = other if other != name else re.sub(r"fn$", "gn", name)
    tensors[other] = tensors[name]
    return f"unexpected {other}"


FAULTS = (missing, misshaped, quantised, unexpected)


class TestRefusals:
    def refuse(self, load, module, tensors, faults):
        before = {name: p.clone() for name, p in module.named_parameters()}
        what = f"mhc_ops.checkpoint.{load.__name__}: expected a checkpoint that fits, got "
        with pytest.raises(ValueError, match=f"^{re.escape(what + '; '.join(faults))}$"):
            load(module, tensors)
        assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())

    @pytest.mark.parametrize("ours", ["layers.1.ffn_hc.fn", "layers.1.attn_norm.weight", "head.fn"])
    @pytest.mark.parametrize("fault", FAULTS)
    def test_stack(self, stack_names, fault, ours):
        stack = make_stack()
        tensors = checkpoint_of(stack_names, stack)
        faults = [fault(tensors, stack_names[ours])]
        self.refuse(checkpoint.load_stack, stack, tensors, faults)

    @pytest.mark.parametrize("ours", ["layer.attn_hc.fn", "head.fn"])
    @pytest.mark.parametrize("fault", FAULTS)
    def test_nextn(self, fault, ours):
        draft, names = make_nextn(), checkpoint.nextn_names()
        tensors = checkpoint_of(names, draft)
        self.refuse(checkpoint.load_nextn, draft, tensors, [fault(tensors, names[ours])])

    def test_all_faults_are_named(self, stack_names):
        stack = make_stack()
        tensors = checkpoint_of(stack_names, stack)
        faults = [
            missing(tensors, stack_names["layers.0.attn_hc.base"]),
            unexpected(tensors, stack_names["layers.1.attn_hc.fn"]),
            misshaped(tensors, stack_names["norm.weight"]),
        ]
        self.refuse(checkpoint.load_stack, stack, tensors, faults)

    def test_a_checkpoint_of_something_else(self):
        stack = make_stack()
        faults = [f"missing {name}" for name in checkpoint.stack_names(LAYERS, "deepseek").values()]
        self.refuse(checkpoint.load_stack, stack, {"weight": torch.zeros(2)}, faults)


@pytest.mark.parametrize("index", [0, 1])
def test_load_nextn(index):
    """Load a draft layer beside the target's tensors and those of another draft layer."""
    draft = make_nextn()
    names = checkpoint.nextn_names(index)
    assert names["head.fn"] == f"mtp.{index}.hc_head_fn"
    assert names["enorm.weight"] == f"mtp.{index}.enorm.weight"
    tensors = checkpoint_of(names, draft) | checkpoint_of(checkpoint.nextn_names(1 - index), draft)
    tensors |= checkpoint_of(checkpoint.stack_names(LAYERS, "deepseek"), make_stack())
    checkpoint.load_nextn(draft, tensors, index)
    for ours, theirs in names.items():
        parameter = draft.get_parameter(ours)
        assert torch.equal(parameter, tensors[theirs].to(parameter.dtype)), ours


def assert_loaded(module, names, tensors):
    for ours, theirs in names.items():
        parameter = module.get_parameter(ours)
        assert torch.equal(parameter, tensors[theirs].to(parameter.dtype))


class TestFiles:
    """Load checkpoints from safetensors files, as those of models come."""

    @pytest.fixture
    def safetensors(self):
        return pytest.importorskip("safetensors.torch")

    @pytest.mark.parametrize("kind", [str, Path], ids=["text", "path"])
    def test_a_file(self, safetensors, tmp_path, stack_names, kind):
        stack = make_stack()
        tensors = checkpoint_of(stack_names, stack)
        safetensors.save_file(tensors, tmp_path / "model.safetensors")
        checkpoint.load_stack(stack, kind(tmp_path / "model.safetensors"))
        assert_loaded(stack, stack_names, tensors)

    def test_a_folder_of_files(self, safetensors, tmp_path, stack_names):
        stack = make_stack()
        tensors = checkpoint_of(stack_names, stack)
        names = list(tensors)
        for shard in range(3):
            part = {name: tensors[name] for name in names[shard::3]}
            safetensors.save_file(part, tmp_path / f"model-{shard}.safetensors")
        (tmp_path / "config.json").write_text("{}")
        checkpoint.load_stack(stack, tmp_path)
        assert_loaded(stack, stack_names, tensors)

    def test_a_draft_layer(self, safetensors, tmp_path):
        layer, names = make_nextn(), checkpoint.nextn_names()
        tensors = checkpoint_of(names, layer)
        safetensors.save_file(tensors, tmp_path / "mtp.safetensors")
        checkpoint.load_nextn(layer, tmp_path / "mtp.safetensors")
        assert_loaded(layer, names, tensors)

    def test_a_home_folder(self, safetensors, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        stack, names = make_stack(), checkpoint.stack_names(LAYERS, "deepseek")
        safetensors.save_file(checkpoint_of(names, stack), tmp_path / "model.safetensors")
        checkpoint.load_stack(stack, "~/model.safetensors")

    def test_a_file_that_does_not_fit(self, safetensors, tmp_path):
        stack, names = make_stack(), checkpoint.stack_names(LAYERS, "deepseek")
        tensors = checkpoint_of(names, stack)
        del tensors["norm.weight"]
        before = stack.state_dict()["head.fn"].clone()
        safetensors.save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=r"load_stack: .* got missing norm\.weight$"):
            checkpoint.load_stack(stack, tmp_path / "model.safetensors")
        assert torch.equal(stack.state_dict()["head.fn"], before)

    def test_what_is_no_safetensors_file(self, safetensors, tmp_path):
        (tmp_path / "model.bin").write_bytes(b"PK not tensors")
        with pytest.raises(ValueError, match=r"got .*model\.bin, which is none: "):
            checkpoint.load_stack(make_stack(), tmp_path / "model.bin")

    def test_what_is_not_there(self, tmp_path):
        for path, text in (
            (tmp_path, "a folder without such a file"),
            (tmp_path / "model.safetensors", "which does not exist"),
        ):
            with pytest.raises(FileNotFoundError, match=rf"load_stack: expected .*, {text}$"):
                checkpoint.load_stack(make_stack(), str(path))

    def test_without_safetensors(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "safetensors", None)
        (tmp_path / "model.safetensors").touch()
        with pytest.raises(ImportError, match="needs the package safetensors, which is not inst"):
            checkpoint.load_stack(make_stack(), tmp_path / "model.safetensors")

    @pytest.mark.parametrize("given", [None, 3, [torch.ones(2)], torch.ones(2)])
    def test_what_is_taken(self, given):
        with pytest.raises(
            TypeError,
            match="load_stack: expected a mapping of names to tensors, or the path of a "
            f"safetensors file or of a folder of such files, got {type(given).__name__}$",
        ):
            checkpoint.load_stack(make_stack(), given)

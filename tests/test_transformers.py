"""Test DeepSeek-V4 of transformers on the ops: what runs, what comes out, what is put back."""

import copy
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

transformers = pytest.importorskip("transformers")

from call_counts import CallCounts  # noqa: E402

from mhc_ops import nn  # noqa: E402
from mhc_ops.demo import models as demo  # noqa: E402
from mhc_ops.integrations import transformers as integration  # noqa: E402

LAYERS = 4
TOKENS = 48
UNFUSED = {"pre": 2 * LAYERS, "post": 2 * LAYERS, "head": 1}
FUSED = {"pre": 1, "fused_post_pre": 2 * LAYERS - 1, "post_head": 1}
# Both kinds of bf16 run differ from float32 by less on average (tests/test_demo.py).
MEAN_DIFFERENCE = 0.05


@pytest.fixture(scope="module")
def stock():
    return demo.small_model(0, "cpu")


@pytest.fixture
def model(stock, device):
    return copy.deepcopy(stock).to(device)


@pytest.fixture
def tokens(device):
    return torch.randint(0, 256, (2, TOKENS), generator=torch.Generator().manual_seed(1)).to(device)


@pytest.fixture(autouse=True)
def fuse(monkeypatch):
    monkeypatch.setenv("MHC_OPS_FUSE_POST_PRE", "1")


@torch.no_grad()
def logits(model, tokens, **options):
    return model(tokens, **({"use_cache": False} | options)).logits


def snapshot(model):
    """Return everything that apply could change: classes, attributes, tables of every module."""
    tables = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    return {
        name: (
            type(module),
            sorted(vars(module)),
            [sorted(vars(module)[table]) for table in tables],
            {key: id(value) for key, value in module._parameters.items()},
        )
        for name, module in model.named_modules()
    }


def assert_close_to_stock(got, want):
    assert (got.float() - want.float()).abs().mean() < MEAN_DIFFERENCE


class TestApply:
    def test_every_boundary_is_fused_inside_and_across_layers(self, model, tokens):
        want = logits(model, tokens)
        integration.apply(model)
        with CallCounts() as calls:
            got = logits(model, tokens)
        assert dict(calls.counts) == FUSED
        assert_close_to_stock(got, want)
        assert not torch.equal(got, want)  # Every post has two roundings fewer.

    def test_unfused(self, model, tokens, monkeypatch):
        integration.apply(model)
        fused = logits(model, tokens)
        monkeypatch.setenv("MHC_OPS_FUSE_POST_PRE", "0")
        integration.apply(model)
        with CallCounts() as calls:
            unfused = logits(model, tokens)
        assert dict(calls.counts) == UNFUSED
        if tokens.device.type == "cpu":  # The same functions run in the same order.
            assert torch.equal(fused, unfused)
        else:
            assert_close_to_stock(fused, unfused)

    def test_plain_functions_with_one_line_in_the_log(self, model, tokens, monkeypatch, caplog):
        want = logits(model, tokens)
        for name in ("PRE", "POST"):
            monkeypatch.setenv(f"MHC_OPS_TILELANG_{name}", "0")
        integration.apply(model)
        with CallCounts() as calls:
            got = logits(model, tokens)
        assert not calls.counts
        assert len(caplog.records) == 1
        assert_close_to_stock(got, want)

    def test_decoder_without_the_language_model(self, model, tokens):
        integration.apply(model.model)
        with CallCounts() as calls, torch.no_grad():
            model.model(tokens)
        assert dict(calls.counts) == FUSED

    def test_parameters_stay_those_of_the_stock_modules(self, model):
        before, names = dict(model.named_parameters()), set(model.state_dict())
        integration.apply(model)
        after = dict(model.named_parameters())
        assert before.keys() == after.keys()
        assert all(after[name] is before[name] for name in before)
        assert set(model.state_dict()) == names

    def test_twice_is_once(self, model, tokens):
        integration.apply(model)
        once, state = logits(model, tokens), snapshot(model)
        integration.apply(model)
        assert snapshot(model) == state
        assert torch.equal(logits(model, tokens), once)

    def test_stock_modules_keep_their_meaning(self, model):
        """Call hyper-connection, head and norms by themselves, on plain tensors."""
        decoder = model.model
        device = decoder.norm.weight.device
        streams = torch.randn(1, 3, 4, 256, device=device).bfloat16()
        layer = decoder.layers[0]
        with torch.no_grad():
            want = (
                *layer.attn_hc(streams),
                layer.input_layernorm(streams),
                decoder.norm(streams),
                decoder.hc_head(streams),
            )
            integration.apply(model)
            got = (
                *layer.attn_hc(streams),
                layer.input_layernorm(streams),
                decoder.norm(streams),
                decoder.hc_head(streams),
            )
        for a, b in zip(got[:-1], want[:-1], strict=True):
            assert torch.equal(a, b)
        torch.testing.assert_close(got[-1], want[-1], rtol=2**-7, atol=1e-6)

    def test_copies_and_pickles_run_by_themselves(self, model, tokens):
        integration.apply(model)
        want = logits(model, tokens)
        twin, restored = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        integration.remove(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert torch.equal(logits(twin, tokens), want)
        assert torch.equal(logits(restored, tokens), want)

    def test_reloaded_weights_take_effect(self, model, tokens):
        """Refresh the norm weights by load_state_dict, where the graphs of a model see them."""
        model.requires_grad_(False)
        other = demo.small_model(3, tokens.device.type)
        integration.apply(model)
        addresses = [norm.folded_weight().data_ptr() for norm in norms(model)]
        model.load_state_dict(other.state_dict())
        integration.apply(other)
        assert torch.equal(logits(model, tokens), logits(other, tokens))
        assert [norm.folded_weight().data_ptr() for norm in norms(model)] == addresses

    def test_weights_written_in_place_take_effect(self, model, tokens):
        integration.apply(model)
        before = logits(model, tokens)
        with torch.no_grad():
            for norm in norms(model):
                norm.weight.mul_(1.5)
            after = logits(model, tokens)
            assert not torch.equal(after, before)
            assert all(torch.equal(n.folded_weight(), n.weight.bfloat16()) for n in norms(model))
        assert torch.equal(logits(integration.apply(model), tokens), after)


def norms(model):
    return [module for module in model.modules() if isinstance(module, nn.FoldedRMSNorm)]


class TestRemove:
    def test_puts_everything_back(self, model, tokens):
        before, want = snapshot(model), logits(model, tokens)
        integration.apply(model)
        assert snapshot(model) != before
        logits(model, tokens)
        integration.remove(model)
        assert snapshot(model) == before
        assert torch.equal(logits(model, tokens), want)

    def test_of_a_stock_model_does_nothing(self, model):
        before = snapshot(model)
        integration.remove(model)
        assert snapshot(model) == before

    def test_refuses_another_model(self):
        with pytest.raises(TypeError, match=r"expected a DeepseekV4ForCausalLM .* got Linear"):
            integration.remove(torch.nn.Linear(2, 2))


def bf16_connections(model):
    model.model.layers[1].ffn_hc.bfloat16()


def replaced_forward(model):
    model.model.layers[0].forward = lambda *args: None


def other_class(model):
    model.model.hc_head = torch.nn.Identity()


def no_rounds(model):
    model.config.hc_sinkhorn_iters = 0


def negative_eps(model):
    model.config.hc_eps = -1.0


def infinite_eps(model):
    model.config.rms_norm_eps = float("inf")


def nan_eps(model):
    model.config.hc_eps = float("nan")


REFUSED = [
    (lambda model: model.float(), "expected a model in torch.bfloat16, got torch.float32"),
    (bf16_connections, r"layers.1.ffn_hc.fn in torch.float32, got torch.bfloat16; from_pretrained"),
    (lambda model: model.gradient_checkpointing_enable(), "gradient checkpointing"),
    (replaced_forward, "expected layers.0 to run the forward of its class"),
    (other_class, "expected hc_head to be a DeepseekV4HyperHead, got Identity"),
    (no_rounds, "hc_sinkhorn_iters of at least 1, got 0"),
    (negative_eps, "expected hc_eps to be finite in fp32 and at least 0, got -1"),
    (infinite_eps, "expected rms_norm_eps to be finite in fp32 and at least 0, got inf"),
    (nan_eps, "expected hc_eps to be finite in fp32 and at least 0, got nan"),
]


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "text"), REFUSED, ids=[change.__name__ for change, _ in REFUSED]
    )
    def test_model_is_left_untouched(self, stock, change, text):
        model = copy.deepcopy(stock)
        change(model)
        before = snapshot(model)
        with pytest.raises(ValueError, match=text):
            integration.apply(model)
        assert snapshot(model) == before

    def test_misspelt_switch(self, stock, monkeypatch):
        monkeypatch.setenv("MHC_OPS_FUSE_POST_PRE", "maybe")
        model = copy.deepcopy(stock)
        before = snapshot(model)
        with pytest.raises(ValueError, match="MHC_OPS_FUSE_POST_PRE"):
            integration.apply(model)
        assert snapshot(model) == before

    @pytest.mark.parametrize("part", ["model.layers.0", "lm_head"])
    def test_another_model(self, stock, part):
        """Refuse also a part of the right model, which knows nothing of the layers beside it."""
        model = copy.deepcopy(stock).get_submodule(part)
        before = snapshot(model)
        name = type(model).__name__
        with pytest.raises(TypeError, match=rf"expected a DeepseekV4ForCausalLM .* got {name}$"):
            integration.apply(model)
        assert snapshot(model) == before

    def test_refused_again_leaves_what_was_applied(self, stock, tokens):
        """Change nothing of the first apply by a second one that is refused."""
        model = copy.deepcopy(stock).to(tokens.device)
        integration.apply(model)
        state, want = snapshot(model), logits(model, tokens)
        model.config.hc_eps = -1.0
        with pytest.raises(ValueError, match="hc_eps"):
            integration.apply(model)
        assert snapshot(model) == state
        assert torch.equal(logits(model, tokens), want)

    @pytest.mark.parametrize(("name", "value"), [("hc_mult", 2), ("hidden_size", 384 + 64)])
    def test_shapes_on_cuda(self, stock, name, value):
        """Show the refusal by a config alone, because settings are looked at before modules."""
        model = copy.deepcopy(stock)
        setattr(model.config, name, value)
        model.model.parameters = lambda: iter([FakeCuda()])
        with pytest.raises(ValueError, match=rf"{name}.* on CUDA, got {value}"):
            integration.apply(model)

    def test_training(self, model, tokens):
        integration.apply(model)
        model.train().requires_grad_(True)
        with pytest.raises(RuntimeError, match=r"forward only: expected model.eval\(\)"):
            model(tokens)
        logits(model, tokens)  # Without gradients the mode does not matter.

    def test_backward_in_eval_mode(self, model, tokens):
        integration.apply(model)
        model.requires_grad_(True)
        with pytest.raises(RuntimeError, match="forward only"):
            model(tokens).logits.float().sum().backward()


class FakeCuda:
    device = torch.device("cuda")


class TestHiddenStates:
    @pytest.mark.parametrize("by_config", [False, True])
    def test_are_those_of_the_stock_model(self, model, tokens, by_config):
        options = {} if by_config else {"output_hidden_states": True}
        model.config.output_hidden_states = by_config
        with torch.no_grad():
            want = model(tokens, **options)
            integration.apply(model)
            got = model(tokens, **options)
        assert len(got.hidden_states) == LAYERS + 1
        for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            assert_close_to_stock(a, b)
        assert torch.equal(got.hidden_states[0], want.hidden_states[0])

    def test_asking_for_them_changes_the_logits_by_roundings_only(self, model, tokens):
        integration.apply(model)
        with CallCounts() as calls:
            got = logits(model, tokens, output_hidden_states=True)
        # Each layer starts from plain streams.
        assert dict(calls.counts) == {
            "pre": LAYERS, "fused_post_pre": LAYERS, "post": LAYERS, "head": 1
        }  # fmt: skip
        assert_close_to_stock(got, logits(model, tokens))

    def test_attentions_and_router_logits(self, model, tokens):
        model.set_attn_implementation("eager")
        options = {"output_attentions": True, "output_router_logits": True}
        with torch.no_grad():
            want = model.model(tokens, **options)
            integration.apply(model)
            got = model.model(tokens, **options)
        for name in ("attentions", "router_logits"):
            assert len(got[name]) == len(want[name]) > 0
            for a, b in zip(got[name], want[name], strict=True):
                assert_close_to_stock(a, b)


def watch(module, before=False):
    """Register a hook that keeps what a module takes or returns, as hooks outside torch do."""
    seen = []
    if before:
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    else:
        module.register_forward_hook(lambda module, args, output: seen.extend((args[0], output)))
    return seen


WATCHED = (
    "layers.0", "layers.2", "layers.0.input_layernorm", "layers.2.input_layernorm", "hc_head",
    "norm",
)  # fmt: skip


class TestHooks:
    @pytest.mark.parametrize("before", [True, False], ids=["pre_hook", "hook"])
    @pytest.mark.parametrize("name", WATCHED)
    def test_sees_the_tensors_of_the_stock_model(self, model, tokens, name, before):
        seen = watch(model.model.get_submodule(name), before)
        stock_logits = logits(model, tokens)
        want = list(seen)
        seen.clear()
        integration.apply(model)
        got = logits(model, tokens)
        assert len(seen) == len(want) == (1 if before else 2)
        for a, b in zip(seen, want, strict=True):
            assert type(a) is torch.Tensor
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            difference = (a.float() - b.float()).abs().mean()
            assert difference < MEAN_DIFFERENCE * b.float().abs().mean()
        assert_close_to_stock(got, stock_logits)

    def test_only_the_boundaries_at_a_watched_layer_are_not_fused(self, model, tokens):
        integration.apply(model)
        watch(model.model.layers[1])
        with CallCounts() as calls:
            logits(model, tokens)
        assert dict(calls.counts) == {
            "pre": 3, "post": 2, "fused_post_pre": 2 * LAYERS - 3, "post_head": 1
        }  # fmt: skip

    def test_a_hook_changes_what_the_next_layer_takes(self, model, tokens):
        """Steer the streams, as interpretability tools do."""
        integration.apply(model)
        before = logits(model, tokens)

        def steer(module, args, output):
            return output * 1.5

        handle = model.model.layers[1].register_forward_hook(steer)
        steered = logits(model, tokens)
        handle.remove()
        assert not torch.equal(steered, before)
        integration.remove(model)
        model.model.layers[1].register_forward_hook(steer)
        assert_close_to_stock(steered, logits(model, tokens))

    def test_of_every_module(self, model, tokens):
        seen = []
        integration.apply(model)
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda module, args, output: seen.append((module, output))
        )
        try:
            logits(model, tokens)
        finally:
            handle.remove()
        layers = {output for module, output in seen if module in set(model.model.layers)}
        assert len(layers) == LAYERS
        assert {type(output) for output in layers} == {torch.Tensor}

    def test_capturing_once_costs_no_fusion_later(self, model, tokens):
        """Leave the hooks that transformers itself registers out of this."""
        integration.apply(model)
        logits(model, tokens, output_hidden_states=True)
        with CallCounts() as calls:
            logits(model, tokens)
        assert dict(calls.counts) == FUSED


class Adapted(torch.nn.Module):
    """Stand for a model that PEFT wraps; PEFT's own class has this method."""

    def __init__(self, model):
        super().__init__()
        self.base_model = torch.nn.ModuleDict({"model": model})

    def get_base_model(self):
        return self.base_model["model"]

    def forward(self, *args, **kwargs):
        return self.get_base_model()(*args, **kwargs)


def compiled(model):
    return torch.compile(model, backend="eager")


def data_parallel(model):
    return torch.nn.DataParallel(model)


def distributed(model):
    return torch.nn.parallel.DistributedDataParallel(model)


def compiled_adapted(model):
    return compiled(Adapted(model))


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


class TestWrapped:
    @pytest.mark.parametrize("wrap", [Adapted, data_parallel, distributed])
    def test_what_is_wrapped_runs_on_the_ops(self, stock, tokens, wrap, group):
        model = copy.deepcopy(stock).requires_grad_(True)  # DDP asks for it
        before = snapshot(model)
        wrapped = wrap(model)
        assert integration.apply(wrapped) is wrapped
        device = next(model.parameters()).device  # DataParallel moves the model to a GPU.
        tokens = tokens.to(device)
        with CallCounts() as calls:
            got = logits(wrapped, tokens)
        assert dict(calls.counts) == FUSED
        plain = integration.apply(copy.deepcopy(stock).to(device))
        assert torch.equal(got, logits(plain, tokens))
        assert integration.remove(wrapped) is wrapped
        assert snapshot(model) == before

    @pytest.mark.slow
    @pytest.mark.parametrize("wrap", [compiled, compiled_adapted])
    def test_a_compiled_model_is_compiled_again(self, stock, tokens, wrap, fresh_dynamo):
        """Apply after the model has run, and remove again: no code of the other model stays."""
        model = wrap(copy.deepcopy(stock))
        tokens = tokens.cpu()
        want = logits(model, tokens)
        assert integration.apply(model) is model
        got = logits(model, tokens)
        assert torch.equal(got, logits(integration.apply(copy.deepcopy(stock)), tokens))
        assert not torch.equal(got, want)
        integration.remove(model)
        assert torch.equal(logits(model, tokens), want)

    def test_apply_and_remove_return_the_model(self, stock):
        model = copy.deepcopy(stock)
        assert integration.apply(model) is model
        assert integration.remove(model) is model
        assert integration.apply(model.model) is model.model

    def test_an_unknown_wrapper_says_what_to_do(self, stock):
        wrapped = torch.nn.Sequential(copy.deepcopy(stock))
        for function in (integration.apply, integration.remove):
            with pytest.raises(
                TypeError, match=r"got Sequential around one; call the function with the model it"
            ):
                function(wrapped)

    def test_classes_of_fsdp2(self, stock, group):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (1,))
        first, then = copy.deepcopy(stock), integration.apply(copy.deepcopy(stock))
        for model in (first, then):
            fully_shard(model.model.layers[1].attn_hc, mesh=mesh)
        with pytest.raises(ValueError, match=r"got FSDPDeepseekV4HyperConnection; call apply bef"):
            integration.apply(first)
        before = snapshot(then)
        with pytest.raises(ValueError, match=r"layers.1.attn_hc to be .* remove before fully_sh"):
            integration.remove(then)
        assert snapshot(then) == before


def layer_back(model, stock):
    model.layers[1] = copy.deepcopy(stock.layers[1])


def norm_back(model, stock):
    model.layers[2].input_layernorm = copy.deepcopy(stock.layers[2].input_layernorm)


def connection_back(model, stock):
    model.layers[0].ffn_hc = copy.deepcopy(stock.layers[0].ffn_hc)


def head_back(model, stock):
    model.hc_head = copy.deepcopy(stock.hc_head)


def final_norm_back(model, stock):
    model.norm = copy.deepcopy(stock.norm)


BACK = [
    (layer_back, "layers.1 to be the MhcDecoderLayer .* got DeepseekV4DecoderLayer"),
    (norm_back, "layers.2.input_layernorm to be the MhcRMSNorm .* got DeepseekV4RMSNorm"),
    (connection_back, "layers.0.ffn_hc to be the MhcHyperConnection .* got DeepseekV4HyperConn"),
    (head_back, "hc_head to be the MhcHyperHead .* got DeepseekV4HyperHead"),
    (final_norm_back, "norm to be the MhcRMSNorm .* got DeepseekV4RMSNorm"),
]


@pytest.mark.parametrize(("back", "text"), BACK, ids=[back.__name__ for back, _ in BACK])
def test_a_stock_module_put_back_says_so(model, stock, tokens, back, text):
    integration.apply(model)
    want = logits(model, tokens)
    back(model.model, copy.deepcopy(stock).model.to(tokens.device))
    with pytest.raises(RuntimeError, match=rf"expected {text}.*; call apply\(model\) again"):
        logits(model, tokens)
    assert torch.equal(logits(integration.apply(model), tokens), want)


class TestGeneration:
    def test_padding_is_ignored(self, model, tokens):
        """Pad on the left under an attention mask, as generate() does."""
        integration.apply(model)
        mask = torch.ones_like(tokens)
        mask[0, :7] = 0
        other = tokens.clone()
        other[0, :7] = 5
        with torch.no_grad():
            a = model(tokens, attention_mask=mask, use_cache=False).logits
            integration.remove(model)
            b = model(tokens, attention_mask=mask, use_cache=False).logits
        assert_close_to_stock(a[mask.bool()], b[mask.bool()])

    def test_cache_gives_what_a_run_without_it_gives(self, model, tokens):
        """Take as greedy tokens the top tokens of a teacher-forced run, or near ties of them."""
        integration.apply(model)
        new = 24
        sequences = model.generate(tokens, max_new_tokens=new, do_sample=False)
        assert sequences.shape == (2, TOKENS + new)
        forced = logits(model, sequences)[:, TOKENS - 1 : -1].float()
        taken = forced.gather(-1, sequences[:, TOKENS:, None]).squeeze(-1)
        behind = forced.amax(-1) - taken
        assert behind.mean() < MEAN_DIFFERENCE  # A token at random is far behind.
        assert (behind == 0).float().mean() > 0.8

    def test_cache_step_by_step(self, model, tokens):
        integration.apply(model)
        whole = logits(model, tokens)
        with torch.no_grad():
            first = model(tokens[:, :-1], use_cache=True)
            last = model(tokens[:, -1:], past_key_values=first.past_key_values, use_cache=True)
        assert_close_to_stock(torch.cat((first.logits, last.logits), 1), whole)

    def test_beams(self, model, tokens):
        integration.apply(model)
        out = model.generate(tokens, max_new_tokens=4, num_beams=2, do_sample=False)
        assert out.shape == (2, TOKENS + 4)


@pytest.mark.slow
@pytest.mark.parametrize("switches", ["fused", "unfused", "plain"])
def test_compiles_to_one_graph(model, tokens, switches, monkeypatch, fresh_dynamo):
    """Get the bits of eager calls, because the backend runs the traced graph as it is."""
    monkeypatch.setenv("MHC_OPS_FUSE_POST_PRE", "01"[switches == "fused"])
    if switches == "plain":
        monkeypatch.setenv("MHC_OPS_TILELANG_PRE", "0")
        monkeypatch.setenv("MHC_OPS_TILELANG_POST", "0")
    integration.apply(model)
    want = logits(model, tokens)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    assert torch.equal(logits(compiled, tokens), want)
    assert counter.frame_count == 1


def test_from_pretrained(stock, tmp_path, device, monkeypatch):
    """Load a saved model with the dtypes that apply asks for, norms in float32."""
    reloaded = transformers.DeepseekV4ForCausalLM
    stock.save_pretrained(tmp_path)
    model = reloaded.from_pretrained(tmp_path, dtype=torch.bfloat16).to(device)
    assert model.model.norm.weight.dtype == torch.float32
    integration.apply(model)
    same = copy.deepcopy(stock).to(device)
    integration.apply(same)
    streams = torch.randn(1, 3, 4, 256, device=device).bfloat16()
    with torch.no_grad():
        entries = [
            m.model.layers[0].attn_hc.pre(streams, m.model.layers[0].input_layernorm)
            for m in (model, same)
        ]
    assert torch.equal(entries[0].layer_input, entries[1].layer_input)

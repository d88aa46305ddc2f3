"""Test the adapter in vLLM itself: the entry point, V4 layers and heads, custom ops."""

from __future__ import annotations

import importlib
import types

import pytest
import torch
from call_counts import CallCounts
from common import (
    CHAIN,
    EPS,
    HC_MULT,
    HIDDEN,
    ROUNDS,
    TOKENS,
    RMSNorm,
    Sublayer,
    close,
    fresh_process,
    mixing,
    norm,
    random_weights,
    streams,
    without_op,
)  # fmt: skip

from mhc_ops.integrations import _fallback
from mhc_ops.integrations import vllm as adapter

pytest.importorskip("vllm")

TILELANG = "vllm.model_executor.kernels.mhc.tilelang"
MODEL = "vllm.models.deepseek_v4.nvidia.model"
SAY = f"""
{{before}}
from vllm.plugins import load_general_plugins
load_general_plugins()
import {MODEL} as model, torch
print(model.mhc_pre_broadcast_tilelang.__module__)
assert not torch.cuda.is_initialized()
"""


def test_the_entry_point_in_a_new_process():
    assert "mhc_ops.integrations.vllm" in fresh_process(SAY.format(before=""))


def test_the_switch_of_vllm_leaves_the_plugin_out():
    assert TILELANG in fresh_process(SAY.format(before=""), VLLM_PLUGINS="another")


@pytest.mark.parametrize("error", ["OSError('no disk')", "RuntimeError('torn')", "MemoryError()"])
def test_a_plugin_that_fails_leaves_vllm_as_it_is(error):
    """Let no error out of the plugin: vLLM calls plugins without a guard, and would end."""
    before = f"""
from mhc_ops.integrations import _rebind
def install(*args): raise {error}
_rebind.install = install
"""
    said = fresh_process(SAY.format(before=before))
    assert TILELANG in said
    assert "vLLM keeps its own mHC functions" in said


@pytest.fixture(autouse=True)
def _installed():
    torch.manual_seed(0)
    adapter.install()
    yield
    adapter.uninstall()


@pytest.fixture
def model():
    return importlib.import_module(MODEL)


@pytest.fixture
def reference():
    return importlib.import_module("vllm.model_executor.kernels.mhc.torch")


@pytest.fixture
def layers(model, monkeypatch):
    """Make two of vLLM's decoder layers for NVIDIA GPUs, with stand-ins for the sublayers."""
    monkeypatch.setattr(model, "_select_dsv4_attn_cls", lambda config: Sublayer)
    monkeypatch.setattr(model, "DeepseekV4MoE", Sublayer)
    monkeypatch.setattr(model, "RMSNorm", RMSNorm)
    monkeypatch.setattr(model, "_use_sequence_parallel", lambda config: False)
    hf_config = types.SimpleNamespace(
        hidden_size=HIDDEN, hc_mult=HC_MULT, hc_eps=EPS, hc_sinkhorn_iters=ROUNDS,
        rms_norm_eps=EPS, mlp_layer_types=[],
    )  # fmt: skip
    config = types.SimpleNamespace(
        model_config=types.SimpleNamespace(hf_config=hf_config),
        kernel_config=types.SimpleNamespace(enable_jit_warmup=False),
    )
    made = [model.DeepseekV4DecoderLayer(config, f"model.layers.{layer}") for layer in range(2)]
    for layer in made:
        random_weights(layer)
    made[0].hc_attn_fn_broadcast = made[0].hc_attn_fn.view(-1, HC_MULT, HIDDEN).sum(1)
    return made


def run(model, layers, x):
    """Do what ``DeepseekV4Model`` does with its layers."""
    post_mix = comb_mix = residual = None
    with torch.inference_mode():
        for layer in layers:
            x, residual, post_mix, comb_mix = layer(
                x, torch.arange(x.shape[0]), None, post_mix, comb_mix, residual
            )
        return model.mhc_post_tilelang(x, residual, post_mix, comb_mix)


def references(reference):
    """Give vLLM's torch references the names and the norm of vLLM's functions."""

    def pre(residual, *fixed, norm_weight=None, norm_eps=EPS, **splits):
        post_mix, comb_mix, y = reference.mhc_pre_torch(residual, *fixed)
        return post_mix, comb_mix, y if norm_weight is None else norm(y, norm_weight, norm_eps)

    def broadcast(x, *fixed, fn_broadcast=None, **named):
        residual = x[:, None].repeat(1, HC_MULT, 1)
        return residual, *pre(residual, *fixed, **named)

    def fused(x, residual, post_mix, comb_mix, *fixed, **named):
        residual = reference.mhc_post_torch(x, residual, post_mix, comb_mix)
        return residual, *pre(residual, *fixed, **named)

    return {
        "mhc_pre_tilelang": pre,
        "mhc_pre_broadcast_tilelang": broadcast,
        "mhc_fused_post_pre_tilelang": fused,
        "mhc_post_tilelang": reference.mhc_post_torch,
    }


@pytest.mark.parametrize("first", ["embedding", "streams"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_decoder_layers(tokens, first, model, layers, reference, monkeypatch):
    """Run every boundary of two layers as one op, with the streams of vLLM's references."""
    given = streams(tokens)
    given = given[:, 0].contiguous() if first == "embedding" else given
    with CallCounts() as calls:
        got = run(model, layers, given)
    start = "expand_pre" if first == "embedding" else "pre"
    assert dict(calls.counts) == {start: 1, "fused_post_pre": 3, "post": 1}
    for name, function in references(reference).items():
        monkeypatch.setattr(model, name, function)
    with CallCounts() as calls:
        want = run(model, layers, given)
    assert not calls.counts
    close(got, want, **CHAIN)


@pytest.mark.parametrize("module", [MODEL, f"{MODEL[:-5]}mtp", f"{MODEL[:-5]}dspark"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_heads(tokens, module):
    head = importlib.import_module(module).hc_head_fused_kernel_tilelang
    x, (fn, scale, base) = streams(tokens), mixing(rows=4)
    flat = x.flatten(1).float()
    mixes = flat @ fn.T * torch.rsqrt(flat.square().mean(-1, keepdim=True) + EPS)
    pre = torch.sigmoid(mixes * scale + base) + EPS
    with CallCounts() as calls:
        got = head(x, fn, scale, base, EPS, EPS)
    assert dict(calls.counts) == {"head": 1}
    close(got, (pre[..., None] * x.float()).sum(1).bfloat16())


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "norm"])
def test_custom_ops(tokens, normed, reference, monkeypatch):
    """Call what GLM-5.3 calls: the layers ``MHCPreOp`` and so on, by ``torch.ops.vllm``."""
    ran = []
    for op in ("pre", "post", "fused_post_pre"):
        function = getattr(adapter.ops, op)
        monkeypatch.setattr(
            adapter.ops, op, lambda *a, op=op, f=function, **k: ran.append(op) or f(*a, **k)
        )
    residual, x, fixed = streams(tokens), streams(tokens)[:, 0].contiguous(), mixing()
    numbers = (EPS, EPS, EPS, 2.0, ROUNDS)
    weight = torch.rand(HIDDEN).bfloat16() + 0.5 if normed else None
    # The layers' forward_cuda calls the ops like this.
    post_mix, comb_mix, y = torch.ops.vllm.mhc_pre_tilelang(
        residual, *fixed, *numbers, 1, weight, EPS
    )
    written = torch.ops.vllm.mhc_post_tilelang(x, residual, post_mix, comb_mix)
    fused = torch.ops.vllm.mhc_fused_post_pre_tilelang(
        x, residual, post_mix, comb_mix, *fixed, *numbers, 1, 1, weight, EPS
    )
    assert ran == ["pre", "post", "fused_post_pre"]
    ours = references(reference)
    named = {"norm_weight": weight, "norm_eps": EPS}
    for got, want in zip(
        (post_mix, comb_mix, y, written, *fused),
        (
            *ours["mhc_pre_tilelang"](residual, *fixed, *numbers, **named),
            ours["mhc_post_tilelang"](x, residual, post_mix, comb_mix),
            *ours["mhc_fused_post_pre_tilelang"](
                x, residual, post_mix, comb_mix, *fixed, *numbers, **named
            ),
        ),
        strict=True,
    ):
        close(got, want)


def test_custom_ops_compiled():
    """Show that vLLM's own fakes describe what the ops return."""
    residual, fixed = streams(3), mixing()

    def call(residual):
        return torch.ops.vllm.mhc_pre_tilelang(
            residual, *fixed, EPS, EPS, EPS, 2.0, ROUNDS, 1, None, EPS
        )

    got = torch.compile(call, fullgraph=True, backend="aot_eager")(residual)
    for one, other in zip(got, call(residual), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("hidden", [100, 320])
def test_an_unsupported_hidden_size_is_vllms(hidden, caplog, monkeypatch):
    monkeypatch.setattr(_fallback, "_told", set())
    module = importlib.import_module(TILELANG)
    x, fixed = streams(3, hidden), mixing(4, hidden)
    with CallCounts() as calls, without_op(module, "hc_head_fused_kernel_tilelang") as stock:
        stock.side_effect = lambda x, *rest: x[:, 0]
        for _ in range(2):
            module.hc_head_fused_kernel_tilelang(x, *fixed, EPS, EPS)
    assert stock.call_count == 2
    assert not calls.counts
    told = [record.getMessage() for record in caplog.records if record.name == "mhc_ops"]
    assert told == [
        "the engine's own mHC functions run: expected a hidden size that is a multiple of 256, "
        f"got {hidden}"
    ]


def test_the_load_hook_decides_for_the_model(model, layers, monkeypatch):
    warmed = []
    monkeypatch.setattr(_fallback, "_decided", {})
    monkeypatch.setattr(_fallback, "load_kernels", lambda *place: warmed.append(place))
    monkeypatch.setattr(model, "get_pp_group", lambda: types.SimpleNamespace(is_first_rank=True))
    whole = types.SimpleNamespace(
        config=types.SimpleNamespace(hc_mult=HC_MULT, hidden_size=HIDDEN),
        layers=layers, start_layer=0, end_layer=2, parameters=layers[0].parameters,
    )  # fmt: skip
    layers[0].hc_attn_fn_broadcast = None
    model.DeepseekV4Model.finalize_mhc_broadcast_weights(whole)
    assert layers[0].hc_attn_fn_broadcast.shape == (24, HIDDEN)  # vLLM's own work is done.
    assert warmed == [(HIDDEN, torch.device("cpu"))]


def test_uninstall(model, monkeypatch):
    adapter.uninstall()
    assert model.mhc_pre_tilelang.__module__ == TILELANG
    assert model.DeepseekV4Model.finalize_mhc_broadcast_weights.__module__ == MODEL
    # vLLM's custom op runs vLLM's function again.
    module = importlib.import_module(f"{TILELANG}_kernels")
    ran = []
    monkeypatch.setattr(module, "_MHC_POST_TILELANG_KERNEL", lambda *args: ran.append(args))
    residual = streams(3)
    torch.ops.vllm.mhc_post_tilelang(
        residual[:, 0].contiguous(), residual, torch.rand(3, HC_MULT, 1), torch.rand(3, 4, 4)
    )
    assert len(ran) == 1

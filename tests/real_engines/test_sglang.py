"""Test the adapter in SGLang itself: the entry point, V4 layers, NextN, DSpark, GLM-5.3."""

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
    Sublayer,
    close,
    fresh_process,
    mixing,
    norm,
    random_weights,
    streams,
    without_op,
)  # fmt: skip

from mhc_ops.integrations import _fallback, _rebind
from mhc_ops.integrations import sglang as adapter

sglang = pytest.importorskip("sglang")

MHC = "sglang.kernels.ops.layernorm.mhc"
SAY = f"""
from sglang.srt.plugins import load_plugins
{{before}}
load_plugins()
import {MHC} as mhc, sglang.srt.models.deepseek_v4 as v4, torch
print(mhc.mhc_fused_post_pre.__module__, v4.hc_head_torch.__module__)
assert not torch.cuda.is_initialized()
"""
OURS = "mhc_ops.integrations.sglang mhc_ops.integrations.sglang"
STOCK = f"{MHC} sglang.srt.models.deepseek_v4"


def test_the_entry_point_in_a_new_process():
    assert OURS in fresh_process(SAY.format(before=""))


def test_the_switch_of_sglang_leaves_the_plugin_out():
    assert STOCK in fresh_process(SAY.format(before=""), SGLANG_PLUGINS="another")


@pytest.mark.parametrize("error", ["OSError('no disk')", "RuntimeError('torn')", "MemoryError()"])
def test_a_plugin_that_fails_leaves_sglang_as_it_is(error):
    before = f"""
from mhc_ops.integrations import _rebind
def install(*args): raise {error}
_rebind.install = install
"""
    said = fresh_process(SAY.format(before=before))
    assert STOCK in said
    assert "SGLang keeps its own mHC functions" in said


@pytest.fixture(autouse=True)
def _installed():
    torch.manual_seed(0)
    adapter.install()
    yield
    adapter.uninstall()


@pytest.fixture(scope="module")
def v4():
    return importlib.import_module("sglang.srt.models.deepseek_v4")


@pytest.fixture
def runtime():
    """Set SGLang's configuration and its groups, of one rank."""
    context = importlib.import_module("sglang.srt.runtime_context")
    with context._CONTEXT.override_server_args(), context.get_parallel().override(tp_size=1):
        yield


def config(**changes):
    values = {
        "hidden_size": HIDDEN, "hc_mult": HC_MULT, "hc_eps": EPS, "hc_sinkhorn_iters": ROUNDS,
        "rms_norm_eps": EPS, "hc_pre_from_prev_sublayer": False, "model_type": "deepseek_v4",
        "num_hidden_layers": 2,
    }  # fmt: skip
    return types.SimpleNamespace(**(values | changes))


@pytest.fixture
def layers(v4, runtime, monkeypatch):
    """Make two of SGLang's CUDA decoder layers, with stand-ins for the sublayers."""
    boundary = importlib.import_module("sglang.srt.models.deepseek_v4_boundary")
    factories = importlib.import_module("sglang.srt.layers.layer_boundary.factories")
    monkeypatch.setattr(v4, "MQALayer", Sublayer)
    monkeypatch.setattr(v4.deepseek_v2, "DeepseekV2MoE", Sublayer)
    with factories.layer_stack(final_read=boundary.FinalRead()):
        made = [v4.DeepseekV4CudaDecoderLayer(config(), layer) for layer in range(2)]
    for layer in made:
        random_weights(layer)
    return made


def run(layers, hidden_states):
    """Do what ``DeepseekV4Model`` does with its layers."""
    boundary = importlib.import_module("sglang.srt.models.deepseek_v4_boundary")
    residual_batch = importlib.import_module("sglang.srt.layers.layer_boundary.residual.batch")
    modes = importlib.import_module("sglang.srt.model_executor.forward_batch_info").ForwardMode
    batch = types.SimpleNamespace(residual_stream=None, forward_mode=modes.DECODE)
    tokens = hidden_states.shape[0]
    positions, ids = torch.arange(tokens), torch.zeros(tokens, dtype=torch.long)
    residual_batch.start(batch)
    with torch.inference_mode():
        for layer in layers:
            hidden_states = layer(positions, hidden_states, ids, batch, None)
        return residual_batch.read_output(hidden_states, batch, boundary.FinalRead(), None)


def torch_reference(monkeypatch):
    """Make SGLang run its own torch references instead of the ops."""
    adapter.uninstall()
    mhc = importlib.import_module(MHC)

    def pre(
        residual, *fixed, n_splits=1, n_splits_pre=32, norm_weight=None, norm_eps=None, **named
    ):
        post_mix, comb_mix, y = mhc._mhc_pre_torch(residual, *fixed, **named)
        return post_mix, comb_mix, y if norm_weight is None else norm(y, norm_weight, norm_eps)

    def fused(x, residual, post_mix, comb_mix, *fixed, **named):
        residual = mhc._mhc_post_torch(x, residual, post_mix, comb_mix)
        return residual, *pre(residual, *fixed, **named)

    def post(x, residual, post_mix, comb_mix):
        return mhc._mhc_post_torch(x, residual, post_mix.reshape(-1, HC_MULT, 1), comb_mix)

    monkeypatch.setattr(mhc, "mhc_pre", pre)
    monkeypatch.setattr(mhc, "mhc_post", post)
    monkeypatch.setattr(mhc, "mhc_fused_post_pre", fused)
    importlib.import_module("sglang.srt.models.deepseek_v4").get_mhc_ops.cache_clear()


@pytest.mark.parametrize("tokens", TOKENS)
def test_decoder_layers(tokens, layers, monkeypatch, v4):
    """Run every boundary of two layers as one op, with the streams of SGLang's references."""
    given = streams(tokens)
    with CallCounts() as calls:
        got = run(layers, given)
    assert dict(calls.counts) == {"pre": 1, "fused_post_pre": 3, "post": 1}
    with monkeypatch.context() as patched:
        torch_reference(patched)
        with CallCounts() as calls:
            want = run(layers, given)
    v4.get_mhc_ops.cache_clear()
    assert not calls.counts
    close(got, want, **CHAIN)


def test_decoder_layers_whatever_the_switches_say(layers, monkeypatch):
    """Serve layers with FlashInfer switched on, and without TileLang: SGLang fuses nothing then."""
    envs = importlib.import_module("sglang.srt.environ").envs
    given = streams(3)
    want = run(layers, given)
    fused, apart = {"pre": 1, "fused_post_pre": 3, "post": 1}, {"pre": 4, "post": 4}
    for switch, value, ran in (
        ("SGLANG_OPT_USE_FLASHINFER_MHC", True, fused),
        ("SGLANG_OPT_USE_TILELANG_MHC_PRE", False, apart),
        ("SGLANG_OPT_USE_TILELANG_MHC_POST", False, apart),
    ):
        with getattr(envs, switch).override(value), CallCounts() as calls:
            got = run(layers, given)
        assert dict(calls.counts) == ran
        assert torch.equal(got, want)


def test_layers_without_fusion(layers):
    """Obey SGLang's own switch, which says whether a boundary is one function."""
    given = streams(3)
    fused = run(layers, given)
    for layer in layers:
        layer.use_fused_mhc_post_pre = False
    with CallCounts() as calls:
        got = run(layers, given)
    assert dict(calls.counts) == {"pre": 4, "post": 4}
    assert torch.equal(got, fused)


def stock_head(v4):
    return _rebind.stock(adapter.hc_head_torch) or v4.hc_head_torch


@pytest.mark.parametrize("tokens", TOKENS)
def test_heads(tokens, v4):
    nextn = importlib.import_module("sglang.srt.models.deepseek_v4_nextn").DeepseekV4ModelNextN
    dspark = importlib.import_module("sglang.srt.models.deepseek_v4_dspark")
    fused = importlib.import_module(f"{MHC}_head").fused_hc_head
    x, (fn, scale, base) = streams(tokens), mixing(rows=4)
    want = stock_head(v4)(x, fn, scale, base, norm_eps=EPS, hc_eps=EPS)
    owner = types.SimpleNamespace(rms_norm_eps=EPS, hc_eps=EPS)
    with CallCounts() as calls:
        close(nextn.hc_head(owner, x, fn, scale, base), want)
        close(dspark.hc_head_torch(x, fn, scale, base, norm_eps=EPS, hc_eps=EPS), want)
        close(fused(x, fn, scale, base, EPS, EPS), want)
    assert dict(calls.counts) == {"head": 3}


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_glm(tokens, runtime):
    """Serve the three calls of GLM; the boundary is one op beyond SGLang's 16 tokens, too."""
    glm = importlib.import_module("sglang.srt.models.glm5_next")
    mhc = importlib.import_module(MHC)
    layer = types.SimpleNamespace(config=config())
    layer.hc_ffn_fn, layer.hc_ffn_scale, layer.hc_ffn_base = mixing()
    flat, x = streams(tokens).flatten(1), streams(tokens)[:, 0].contiguous()
    weight = torch.rand(HIDDEN).bfloat16() + 0.5
    pre = glm.Glm5NextDecoderLayer._hc_pre
    post = glm.Glm5NextDecoderLayer.hc_post
    fixed = layer.hc_ffn_fn, layer.hc_ffn_scale, layer.hc_ffn_base
    with CallCounts() as calls:
        _, comb, mix, normed = pre(layer, *fixed, flat, weight, EPS)
        got = glm.Glm5NextDecoderLayer.hc_ffn_post_pre(layer, x, flat, comb, mix, weight, EPS)
        layer.config.mhc = True
        written = post(layer, x, flat, comb, mix)
    assert normed
    assert dict(calls.counts) == {"pre": 1, "fused_post_pre": 1, "post": 1}
    y, residual, next_comb, next_mix, normed = got
    assert normed
    assert torch.equal(residual, written)
    want = mhc._mhc_post_torch(
        x, flat.view(tokens, HC_MULT, -1), mix.view(tokens, HC_MULT, 1),
        comb.view(tokens, HC_MULT, HC_MULT),
    )  # fmt: skip
    close(residual, want.flatten(1))
    want_mix, want_comb, want_y = mhc._mhc_pre_torch(
        residual.view(tokens, HC_MULT, -1), *fixed, EPS, EPS, EPS, 2.0, ROUNDS
    )
    close(next_mix, want_mix.flatten(1))
    close(next_comb, want_comb.flatten(1))
    close(y, norm(want_y, weight, EPS))


def test_the_post_step_of_v41_is_sglangs(v4):
    module = importlib.import_module("sglang.srt.models.deepseek_v4_mhc")
    cfg = module.HcConfig(HC_MULT, ROUNDS, EPS, EPS, HIDDEN, True, False)
    x, residual = streams(3)[:, 0].contiguous(), streams(3)
    with without_op(module, "post") as stock:
        stock.side_effect = None
        module.post(cfg, x, residual, torch.rand(3, HC_MULT), torch.rand(3, HC_MULT, HC_MULT))
    assert stock.call_count == 1


@pytest.mark.parametrize("hidden", [100, 320])
def test_an_unsupported_hidden_size_is_sglangs(hidden, v4, caplog, monkeypatch):
    monkeypatch.setattr(_fallback, "_told", set())
    x, (fn, scale, base) = streams(3, hidden), mixing(4, hidden)
    with CallCounts() as calls, without_op(v4, "hc_head_torch") as stock:
        got = [v4.hc_head_torch(x, fn, scale, base, norm_eps=EPS, hc_eps=EPS) for _ in range(2)]
    assert stock.call_count == 2
    assert not calls.counts
    assert got[0].shape == (3, hidden)
    assert [record.getMessage() for record in caplog.records if record.name == "mhc_ops"] == [
        "the engine's own mHC functions run: expected a hidden size that is a multiple of 256, "
        f"got {hidden}"
    ]


def test_the_load_hook_decides_for_the_model(runtime, monkeypatch):
    """Load the kernels at the first ``mhc_pre``, which SGLang calls once the weights are loaded."""
    mhc = importlib.import_module(MHC)
    warmed = []
    monkeypatch.setattr(_fallback, "_decided", {})
    monkeypatch.setattr(_fallback, "load_kernels", lambda *place: warmed.append(place))
    # SGLang asks a GPU how many token counts to try.
    monkeypatch.setattr(mhc, "get_mhc_pre_token_count_representatives", lambda *sizes: (1, 64))
    mhc.prewarm_mhc_pre(streams(1), *mixing(), EPS, EPS, EPS, 2.0, ROUNDS, 1, 32, None, None)
    assert warmed == [(HIDDEN, torch.device("cpu"))]


def test_uninstall(v4):
    adapter.uninstall()
    assert v4.hc_head_torch.__module__ == v4.__name__
    assert v4.DeepseekV4DecoderLayerBase.hc_pre.__module__ == v4.__name__
    assert importlib.import_module(MHC).mhc_pre.__module__ == MHC

"""Test DecoderStack, its layers one by one, and the draft layer that follows it."""

import copy

import pytest
import torch
from call_counts import CallCounts

import mhc_ops
from mhc_ops import checkpoint, nn

HIDDEN, LAYERS, TOKENS = 256, 3, 5
SWITCHES = {"fused": "1", "unfused": "0"}


def scaled(factor):
    return lambda x: factor * x


def randomise(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.requires_grad_(False)


@pytest.fixture(params=SWITCHES)
def fuse(request, monkeypatch):
    monkeypatch.setenv("MHC_OPS_FUSE_POST_PRE", SWITCHES[request.param])
    return request.param


@pytest.fixture
def stack(fuse, device):
    sublayers = [(scaled(-0.5), scaled(0.25 * (i + 1))) for i in range(LAYERS)]
    made = randomise(nn.DecoderStack(sublayers, HIDDEN, sinkhorn_repeat=5)).to(device)
    nn.wire(made)
    return made


@pytest.fixture
def embedding(device):
    return torch.randn(TOKENS, HIDDEN).bfloat16().to(device)


def by_hand(stack, embedding):
    """Run the model by single ops, nothing fused; return the result and each layer's streams."""
    streams = torch.stack([embedding] * 4, -2)
    after = []
    for layer in stack.layers:
        for hc, norm, sublayer in (
            (layer.attn_hc, layer.attn_norm, layer.attention),
            (layer.ffn_hc, layer.ffn_norm, layer.mlp),
        ):
            post, comb, y = mhc_ops.pre(
                *(streams, hc.fn, hc.scale, hc.base, 1e-6, 1e-6, 1e-6, 2.0, 5),
                norm_weight=norm.weight,
                norm_eps=1e-6,
            )
            streams = mhc_ops.post(sublayer(y), streams, post, comb)
        after.append(streams)
    head = stack.head
    hidden = mhc_ops.head(
        *(streams, head.fn, head.scale, head.base, 1e-6, 1e-6),
        norm_weight=stack.norm.weight,
        norm_eps=1e-6,
    )
    return hidden, after


def assert_as(got, want, fuse):
    """Compare bits where the same kernels ran, and by bounds where a fused kernel made a mix."""
    if fuse == "unfused" or got.device.type == "cpu":
        assert torch.equal(got, want)
    else:
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_is_the_model_step_by_step(stack, embedding, fuse):
    hidden, after = by_hand(stack, embedding)
    with CallCounts() as calls:
        out = stack(embedding)
    count = 2 * LAYERS
    assert dict(calls.counts) == (
        {"expand_pre": 1, "fused_post_pre": count - 1, "post_head_streams": 1}
        if fuse == "fused"
        else {"pre": count, "post": count, "head": 1}
    )
    assert_as(out.hidden, hidden, fuse)
    assert_as(out.streams, after[-1], fuse)
    assert out.captured == ()


def test_expand_copies_the_embedding(embedding):
    streams = nn.expand(embedding, 3)
    assert streams.is_contiguous()
    assert streams.shape == (TOKENS, 3, HIDDEN)
    assert all(torch.equal(streams[:, j], embedding) for j in range(3))
    assert nn.expand(embedding[None]).shape == (1, TOKENS, 4, HIDDEN)


@pytest.mark.parametrize("capture", [(0,), (2, 0), range(LAYERS)])
def test_captured_layers(stack, embedding, fuse, capture):
    """Capture the mean of the streams after each layer; nothing else changes by a bit."""
    _, after = by_hand(stack, embedding)
    plain, out = stack(embedding), stack(embedding, capture)
    assert torch.equal(out.hidden, plain.hidden)
    assert torch.equal(out.streams, plain.streams)
    assert len(out.captured) == len(capture)
    for index, got in zip(sorted(capture), out.captured, strict=True):
        assert_as(got, after[index].float().mean(-2).bfloat16(), fuse)


@pytest.mark.parametrize("index", [-1, LAYERS])
def test_a_layer_that_is_not_there(stack, embedding, index):
    with pytest.raises(ValueError, match=rf"capture to name layers from 0 to 2, got {index}"):
        stack(embedding, [0, index])


@pytest.mark.parametrize("cut", range(1, LAYERS))
def test_layers_one_by_one_and_a_pipeline_cut(stack, embedding, fuse, cut):
    """Show that the next process needs nothing but the streams at the cut."""
    state = nn.Copies(embedding)
    for layer in stack.layers[:cut]:
        state = layer(state)
        assert isinstance(state, nn.StreamState)
    streams = state.materialise()
    assert streams.shape == (TOKENS, 4, HIDDEN)
    uncut, state = state, streams
    for layer in stack.layers[cut:]:
        state, uncut = layer(state), layer(uncut)
        assert_as(state.materialise(), uncut.materialise(), fuse)
    want = stack(embedding)
    assert torch.equal(uncut.materialise(), want.streams)
    assert torch.equal(stack.head.collapse(uncut, stack.norm), want.hidden)
    assert_as(stack.head.collapse(state, stack.norm), want.hidden, fuse)


def test_the_streams_at_a_cut_are_those_of_the_fused_boundary(stack, embedding):
    """Send, bit for bit, what the next layer would have made."""
    first, second = stack.layers[:2]
    state = first(nn.expand(embedding))
    entry = second.attn_hc.boundary(state, second.attn_norm)
    assert torch.equal(entry.residual, state.materialise())


def test_copies_are_the_expanded_streams(stack, embedding, fuse):
    """Compare streams made by the first pre with streams made before it."""
    first = stack.layers[0]
    lazy, plain = first(nn.Copies(embedding)), first(nn.expand(embedding))
    assert_as(lazy.materialise(), plain.materialise(), fuse)
    entry = first.attn_hc.pre(nn.Copies(embedding), first.attn_norm)
    assert torch.equal(entry.residual, nn.expand(embedding))


def test_plain_streams_and_hidden_state_at_once(stack, embedding, fuse):
    state = stack.layers[0](nn.Copies(embedding))
    streams, hidden = stack.head.materialise_and_collapse(state, stack.norm)
    assert torch.equal(streams, state.materialise())
    assert torch.equal(hidden, stack.head.collapse(state, stack.norm))
    assert_as(hidden, stack.head.collapse(streams, stack.norm), fuse)


def test_sublayers_that_are_modules_are_part_of_the_stack():
    linear = torch.nn.Linear(HIDDEN, HIDDEN)
    stack = nn.DecoderStack([(linear, scaled(1.0))], HIDDEN)
    assert stack.layers[0].attention is linear
    assert "layers.0.attention.weight" in stack.state_dict()


def test_no_sublayers():
    with pytest.raises(ValueError, match="expected at least one pair of sublayers, got none"):
        nn.DecoderStack([], HIDDEN)


def test_unwired():
    stack = nn.DecoderStack([(scaled(1.0), scaled(1.0))], HIDDEN)
    with pytest.raises(RuntimeError, match="HyperHead is not wired"):
        stack(torch.zeros(1, HIDDEN).bfloat16())


def by_state_dict(stack, other):
    stack.load_state_dict(other.state_dict())


def by_checkpoint(stack, other):
    names = checkpoint.stack_names(LAYERS, "deepseek")
    checkpoint.load_stack(
        stack, {theirs: other.get_parameter(ours) for ours, theirs in names.items()}
    )


def by_hand_and_refresh(stack, other):
    with torch.no_grad():
        for parameter, value in zip(stack.parameters(), other.parameters(), strict=True):
            parameter.copy_(value)
    nn.refresh_norm_weight_cache(stack)


def memory(stack):
    """List the addresses of all parameters, and of what the norms hand to the ops."""
    norms = [module for module in stack.modules() if isinstance(module, nn.FoldedRMSNorm)]
    return [t.data_ptr() for t in (*stack.parameters(), *(n.folded_weight() for n in norms))]


RELOADS = (by_state_dict, by_checkpoint, by_hand_and_refresh)


class TestReload:
    """Reload weights under a model that runs, norms in float32 as transformers keeps them."""

    @pytest.fixture
    def other(self, stack):
        made = copy.deepcopy(stack)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.mul_(-1.5)
        return made

    @pytest.fixture
    def stack(self, fuse, device):
        made = nn.DecoderStack([(scaled(-0.5), scaled(0.25))] * LAYERS, HIDDEN, sinkhorn_repeat=5)
        for norm in made.modules():
            if isinstance(norm, nn.FoldedRMSNorm):
                norm.float()
        randomise(made).to(device)
        nn.wire(made)
        return made

    @pytest.mark.parametrize("reload", RELOADS)
    def test_in_place(self, stack, other, embedding, reload):
        """Keep the memory of parameters and of copies of norms, where a captured graph reads."""
        addresses = memory(stack)
        assert len(addresses) == len(list(stack.parameters())) + 2 * LAYERS + 1
        before, want = stack(embedding), other(embedding)
        assert not torch.equal(before.hidden, want.hidden)
        reload(stack, other)
        assert torch.equal(stack(embedding).hidden, want.hidden)
        assert memory(stack) == addresses

    @pytest.mark.gpu
    @pytest.mark.parametrize("reload", RELOADS)
    def test_capture_reload_replay(self, monkeypatch, reload):
        monkeypatch.setenv("MHC_OPS_FUSE_POST_PRE", "1")
        sublayers = [(scaled(-0.5), scaled(0.25))] * LAYERS
        stack, other = (randomise(nn.DecoderStack(sublayers, HIDDEN)).to("cuda") for _ in range(2))
        for model in (stack, other):
            nn.wire(model)
        embedding = torch.randn(TOKENS, HIDDEN, device="cuda").bfloat16()
        stack(embedding)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = stack(embedding)
        reload(stack, other)
        graph.replay()
        want = other(embedding)
        torch.cuda.synchronize()
        assert torch.equal(captured.streams, want.streams)
        assert torch.equal(captured.hidden, want.hidden)


class TestNextN:
    @pytest.fixture
    def draft(self, fuse, device):
        def projection():
            return torch.nn.Linear(HIDDEN, HIDDEN, bias=False, dtype=torch.bfloat16)

        layer = nn.DecoderLayer(scaled(-0.5), scaled(0.25), HIDDEN, sinkhorn_repeat=5)
        made = nn.NextNLayer(projection(), projection(), layer)
        randomise(made).to(device)
        nn.wire(made)
        return made

    def test_takes_streams_and_returns_its_own(self, stack, draft, embedding, fuse):
        """Apply the pending post of the draft's one layer before its head."""
        target = stack(embedding)
        following = embedding.roll(-1, 0)
        with CallCounts() as calls:
            out = draft(following, target.streams)
        assert dict(calls.counts) == (
            {"pre": 1, "fused_post_pre": 1, "post_head_streams": 1}
            if fuse == "fused"
            else {"pre": 2, "post": 2, "head": 1}
        )
        start = torch.stack(
            [
                draft.h_proj(draft.hnorm(target.streams[:, j]))
                + draft.e_proj(draft.enorm(following))
                for j in range(4)
            ],
            1,
        )
        state = draft.layer(start)
        want = mhc_ops.post(state.x, state.residual, state.post, state.comb)
        torch.testing.assert_close(out.streams, want, rtol=2e-2, atol=2e-2)
        head = draft.head
        want = mhc_ops.head(
            *(out.streams, head.fn, head.scale, head.base, 1e-6, 1e-6),
            norm_weight=draft.norm.weight,
            norm_eps=1e-6,
        )
        assert_as(out.hidden, want, fuse)

    def test_steps_one_behind_the_other(self, stack, draft, embedding):
        streams = stack(embedding).streams
        first = draft(embedding, streams)
        second = draft(embedding, first.streams)
        assert second.streams.shape == streams.shape
        assert not torch.equal(second.hidden, first.hidden)

    def test_fused_and_unfused_have_the_same_residual(self, draft, embedding, monkeypatch):
        """Compare bits at the draft's boundary, from the same state."""
        layer = draft.layer
        entry = layer.attn_hc.pre(nn.expand(embedding), layer.attn_norm)
        state = entry.after(layer.attention(entry.layer_input))
        residuals = []
        for switch in SWITCHES.values():
            monkeypatch.setenv("MHC_OPS_FUSE_POST_PRE", switch)
            nn.wire(draft)
            residuals.append(layer.ffn_hc.boundary(state, layer.ffn_norm).residual)
        assert torch.equal(*residuals)

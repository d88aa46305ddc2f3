"""Capture CUDA graphs on a side stream, replay on changed inputs, and run several at once."""

import pytest
import torch

import mhc_ops
from helpers import OPS, assert_equal, call, clone, needs_jit, path, sizes, tensors, tokens_of
from mhc_ops import jit
from mhc_ops.native import host
from mhc_ops.testing import make_inputs

HIDDEN = 4096

pytestmark = pytest.mark.gpu


def capture(op, inputs, pool=None):
    """Capture one call on a stream of its own, after a warm-up on it; return (graph, outputs)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(op, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        outputs = call(op, inputs)
    return graph, outputs


def overwrite(inputs, others):
    """Put other values where the graph reads."""
    for name, tensor in tensors(inputs).items():
        tensor.copy_(others[name])


def poison(outputs):
    for out in outputs.values():
        out.fill_(float("nan"))


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("hidden", [4096, 7168])
@pytest.mark.parametrize("op", OPS)
def test_replay_reads_the_inputs_anew(op, hidden, norm, subtests):
    make = {"device": "cuda", "norm": norm}
    for tokens in tokens_of(hidden, at_bounds=True):
        with subtests.test(path(op, hidden, tokens), tokens=tokens):
            inputs = make_inputs(op, tokens, hidden, **make)
            graph, outputs = capture(op, inputs)
            for seed, kind in enumerate(("classical", "large_logits", "signed_bases")):
                others = make_inputs(op, tokens, hidden, seed=seed, kind=kind, **make)
                overwrite(inputs, others)
                poison(outputs)
                graph.replay()
                torch.cuda.synchronize()
                assert_equal(clone(outputs), call(op, others))


@pytest.mark.parametrize("op", OPS)
def test_no_tokens(op):
    """Launch nothing for no tokens, also in a capture that launches other things."""
    inputs = make_inputs(op, 0, HIDDEN, device="cuda")
    some = make_inputs(op, 3, HIDDEN, device="cuda")
    call(op, some)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        empty = call(op, inputs)
        outputs = call(op, some)
    graph.replay()
    torch.cuda.synchronize()
    assert all(out.numel() == 0 for out in empty.values())
    assert_equal(outputs, call(op, some))


@pytest.mark.parametrize(("hidden", "tokens"), sizes("fused_post_pre", (4096,), at_bounds=True))
def test_a_chain_of_boundaries(hidden, tokens):
    """Keep the order inside the graph: each boundary reads what the one before wrote."""
    first = make_inputs("fused_post_pre", tokens, hidden, device="cuda", norm=True)
    fixed = [
        make_inputs("fused_post_pre", 1, hidden, device="cuda", norm=True, seed=seed)
        for seed in range(6)
    ]
    state = ("x", "residual", "post_layer_mix", "comb_res_mix")

    def chain():
        x, residual, post, comb = (first[name] for name in state)
        for weights in fixed:
            rest = {name: v for name, v in weights.items() if name not in state}
            residual, post, comb, x = mhc_ops.fused_post_pre(x, residual, post, comb, **rest)
        return {"x": x, "residual": residual, "post": post, "comb": comb}

    want = chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = chain()
    for _ in range(20):
        poison(outputs)
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(outputs, want)


@pytest.mark.parametrize(("hidden", "tokens"), sizes("fused_post_pre", (4096,), 8, 200))
def test_two_graphs_at_once(hidden, tokens):
    """Share nothing between two captured graphs that are replayed on two streams at once."""
    kinds = ("large_logits", "signed_bases")
    op = "fused_post_pre"
    inputs = [make_inputs(op, tokens, hidden, device="cuda", kind=kind) for kind in kinds]
    want = [call(op, i) for i in inputs]
    graphs = [capture(op, i) for i in inputs]
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(20):
        for _, outputs in graphs:
            poison(outputs)
        torch.cuda.synchronize()
        for _ in range(10):
            for (graph, _), stream in zip(graphs, streams, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
        torch.cuda.synchronize()
        for (_, outputs), expected in zip(graphs, want, strict=True):
            assert_equal(outputs, expected)


@pytest.mark.parametrize("op", OPS)
def test_capture_of_a_kernel_that_is_not_loaded_is_refused(op, monkeypatch):
    inputs = make_inputs(op, 3, HIDDEN, device="cuda")
    call(op, inputs)
    torch.cuda.synchronize()
    monkeypatch.setattr(jit, "_loaded", {})
    host.forget()  # The short way has the loaded kernel.
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match=r"before the capture call mhc_ops\.prewarm"),
        torch.cuda.graph(graph),
    ):
        call(op, inputs)


@needs_jit
def test_prewarm_is_enough_for_a_capture():
    """Call a hidden size that nothing else uses first inside the capture, after prewarm."""
    hidden = 1280
    mhc_ops.prewarm(hidden=[hidden], max_tokens=64, device="cuda")
    for op in OPS:
        inputs = make_inputs(op, 8, hidden, device="cuda", norm=True)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = call(op, inputs)
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(outputs, call(op, inputs))

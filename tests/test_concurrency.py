"""Run fused_post_pre on busy GPUs: 100,000 boundaries, each with the bits of a quiet call."""

import pytest
import torch

from helpers import assert_equal, call, clone
from mhc_ops.testing import make_inputs

pytestmark = pytest.mark.gpu

OP = "fused_post_pre"
HIDDEN = 4096
SIZES = (1, 3, 8, 17, 33, 64, 100, 128)
CHAIN = 125  # A graph has so many boundaries.


def inputs_of(tokens, seed=0):
    return make_inputs(OP, tokens, HIDDEN, device="cuda", norm=True, seed=seed)


def capture(inputs, stream):
    """Capture a graph of CHAIN calls; return the graph and what all the calls returned."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outputs = [call(OP, inputs) for _ in range(CHAIN)]
    return graph, outputs


def differs(outputs, want):
    """Say, on the GPU, whether any value of any call is another one."""
    bad = torch.zeros((), dtype=torch.bool, device="cuda")
    for got in outputs:
        for name, value in got.items():
            bad |= (value != want[name]).any()
    return bad


def poison(outputs):
    for got in outputs:
        for value in got.values():
            value.fill_(float("nan"))


@pytest.fixture
def busy():
    """Make a function that puts work for every multiprocessor on a stream of its own."""
    stream = torch.cuda.Stream()
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)

    def work():
        with torch.cuda.stream(stream):
            for _ in range(4):
                torch.mm(a, a)

    return work


def test_eager_calls_on_8_streams(busy):
    """Make 16,000 calls on 8 streams, each with another token count."""
    torch.cuda.synchronize()
    inputs = [inputs_of(tokens, seed) for seed, tokens in enumerate(SIZES)]
    want = [clone(call(OP, i)) for i in inputs]
    streams = [torch.cuda.Stream() for _ in SIZES]
    torch.cuda.synchronize()
    bad = [torch.zeros((), dtype=torch.bool, device="cuda") for _ in SIZES]
    torch.cuda.synchronize()
    for i in range(2000):
        if i % 50 == 0:
            busy()
        for n, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                outputs = call(OP, inputs[n])
                if i % 4 == 0:
                    bad[n] |= differs([outputs], want[n])
    torch.cuda.synchronize()
    assert not any(b.item() for b in bad)


def test_graphs_on_8_streams(busy):
    """Capture graphs on one stream and replay them on others at once: 84,000 boundaries."""
    inputs = [inputs_of(tokens, seed) for seed, tokens in enumerate(SIZES)]
    want = [clone(call(OP, i)) for i in inputs]
    captured_on = torch.cuda.Stream()
    torch.cuda.synchronize()
    graphs = [capture(i, captured_on) for i in inputs]
    streams = [torch.cuda.Stream() for _ in SIZES]
    for _ in range(84):
        for _, outputs in graphs:
            poison(outputs)
        torch.cuda.synchronize()
        busy()
        for (graph, _), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for (_, outputs), expected in zip(graphs, want, strict=True):
            assert not differs(outputs, expected).item()


@pytest.mark.parametrize("hidden", [4096, 5120, 7168])
def test_every_token_alone_and_in_any_batch(hidden):
    inputs = make_inputs(OP, 128, hidden, device="cuda", norm=True)
    batch = call(OP, inputs)
    state = ("x", "residual", "post_layer_mix", "comb_res_mix")
    for start, end in ((0, 1), (127, 128), (5, 12), (1, 17), (40, 73), (0, 65), (28, 128)):
        part = inputs | {name: inputs[name][start:end] for name in state}
        assert_equal(call(OP, part), {name: value[start:end] for name, value in batch.items()})


def test_fn_written_by_the_kernel_in_front():
    """Read fn early, but never before what wrote fn has finished."""
    inputs = inputs_of(4)
    others = [torch.randn_like(inputs["fn"]) / 128 for _ in range(4)]
    want = [clone(call(OP, inputs | {"fn": fn})) for fn in others]
    for _ in range(200):
        for fn, expected in zip(others, want, strict=True):
            inputs["fn"].copy_(fn)
            first, second = call(OP, inputs), call(OP, inputs)
            assert_equal(first, expected)
            assert_equal(second, expected)

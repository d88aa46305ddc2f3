"""Test torch.compile: one graph for every token count, the graph itself, and the bits of eager."""

import inspect
import operator
import textwrap

import pytest
import torch
from expecttest import assert_expected_inline
from torch._dynamo.decorators import mark_unbacked
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend

import mhc_ops
from helpers import OPS, call, overload, split, tensors
from mhc_ops.testing import make_inputs

STATE = ("x", "residual", "post_layer_mix", "comb_res_mix")  # These carry tokens.
TOKENS = (0, 1, 2, 3, 5, 7, 64, 8192)
RECIPES = {"plain": {}, "shape_id": {"shape_id": "tokens"}}


def weights(op, device, hidden=256, norm=True):
    """Make the arguments of an op that carry no tokens."""
    inputs = make_inputs(op, 1, hidden, device=device, norm=norm, kind="large_logits")
    return {name: value for name, value in inputs.items() if name not in STATE}


def state(tokens, device, hidden=256):
    inputs = make_inputs("fused_post_pre", tokens, hidden, device=device, seed=tokens)
    return [inputs[name] for name in STATE]


def sublayer(layer_input):
    """Stand in for attention or MLP; exact in bf16, so compiled and eager agree to the bit."""
    return -0.5 * layer_input


def two_layers(x, residual, post_mix, comb_mix, boundary, last):
    """Run the ops of a model in its order: boundary, boundary, last post, head; and a first pre."""
    for _ in range(2):
        residual, post_mix, comb_mix, layer_input = torch.ops.mhc.fused_post_pre(
            x, residual, post_mix, comb_mix, **boundary
        )
        x = sublayer(layer_input)
    residual = torch.ops.mhc.post(x, residual, post_mix, comb_mix)
    post_mix, comb_mix, layer_input = torch.ops.mhc.pre(residual, **boundary)
    residual = torch.ops.mhc.post(sublayer(layer_input), residual, post_mix, comb_mix)
    return residual, torch.ops.mhc.head(residual, **last)


def stack(device):
    """Make of ``two_layers`` a function of what carries tokens alone."""
    boundary, last = weights("fused_post_pre", device), weights("head", device)
    return lambda *args: two_layers(*args, boundary, last)


def assert_same_bits(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_one_graph_for_every_token_count(device, recipe, fresh_dynamo):
    """Follow the documented recipe: mark the tokens of every input that has tokens as unbacked."""
    marks = RECIPES[recipe]
    if not marks.keys() <= inspect.signature(mark_unbacked).parameters.keys():
        pytest.skip(f"this torch's mark_unbacked has no {', '.join(marks)}")
    counter = CompileCounterWithBackend("inductor")
    model = stack(device)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for tokens in TOKENS:
            args = state(tokens, device)
            for tensor in args:
                mark_unbacked(tensor, 0, **marks)
            assert_same_bits(compiled(*args), model(*args))
    assert counter.frame_count == 1


@pytest.mark.parametrize("op", OPS)
def test_one_graph_for_every_token_count_of_an_op(device, op, fresh_dynamo):
    """Compile each op alone, through its public function, and so with the sizes of its fake."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda **inputs: getattr(mhc_ops, op)(**inputs), backend=counter, fullgraph=True
    )
    fixed = weights(op, device)
    with torch.no_grad():
        for tokens in TOKENS:
            inputs = make_inputs(op, tokens, 256, device=device, norm=True)
            carried = {name: inputs[name] for name in STATE if name in inputs}
            for tensor in carried.values():
                mark_unbacked(tensor, 0)
            result = compiled(**carried, **fixed)
            got = result if isinstance(result, tuple) else (result,)
            assert_same_bits(got, tuple(call(op, carried | fixed).values()))
    assert counter.frame_count == 1


@pytest.mark.parametrize("tokens", [1, 17, 200])
def test_inductor_gives_the_bits_of_eager(device, tokens, fresh_dynamo):
    model = stack(device)
    args = state(tokens, device)
    with torch.no_grad():
        want = model(*args)
        got = torch.compile(model, fullgraph=True)(*args)
    assert_same_bits(got, want)


@pytest.mark.parametrize("op", OPS)
def test_inductor_gives_the_bits_of_eager_for_an_op(device, op, fresh_dynamo):
    inputs = make_inputs(op, (2, 3), 512, device=device, norm=True, kind="large_logits")
    args, kwargs = split(op, inputs)
    with torch.no_grad():
        got = torch.compile(overload(op), fullgraph=True)(*args, **kwargs)
    got = got if isinstance(got, tuple | list) else (got,)
    assert_same_bits(got, tuple(call(op, inputs).values()))


def test_inductor_keeps_strided_inputs_right(device, fresh_dynamo):
    """Hand views that were made inside the graph to the op with strides that the op takes."""

    def model(x, residual, post_mix, comb_mix):
        wide = torch.cat([residual, residual], -1)
        return (
            torch.ops.mhc.post(x, wide[..., 256:], post_mix, comb_mix),
            torch.ops.mhc.post(
                x, residual.flip(0), post_mix, comb_mix.transpose(-1, -2).contiguous()
            ),
        )

    args = state(6, device)
    with torch.no_grad():
        want = model(*args)
        got = torch.compile(model, fullgraph=True)(*args)
    assert_same_bits(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 17, 200])
def test_reduce_overhead_gives_the_bits_of_eager(tokens, fresh_dynamo):
    """Go through warm-up, capture and replays of Inductor's CUDA graphs."""
    model = stack("cuda")
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for seed in range(5):
            args = state(tokens, "cuda")
            args[0] = args[0] * (seed + 1)
            torch.compiler.cudagraph_mark_step_begin()
            got = [t.clone() for t in compiled(*args)]
            assert_same_bits(got, model(*args))
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


def listing(graph):
    """Write one line a node, with names and numbers that no version of torch changes."""
    names = {node: f"%{number}" for number, node in enumerate(graph.nodes)}

    def text(argument):
        if isinstance(argument, tuple | list):
            return f"({', '.join(map(text, argument))})"
        return names[argument] if isinstance(argument, torch.fx.Node) else str(argument)

    lines = []
    for node in graph.nodes:
        arguments = [*map(text, node.args), *(f"{k}={text(v)}" for k, v in node.kwargs.items())]
        if node.op == "placeholder":
            line = f"{names[node]} = input"
        elif node.op == "output":
            line = f"return {text(node.args[0])}"
        elif node.target is operator.getitem:
            line = f"{names[node]} = {arguments[0]}[{arguments[1]}]"
        else:
            line = f"{names[node]} = {node.target}({', '.join(arguments)})"
        lines.append(textwrap.fill(line, 96, subsequent_indent="    "))
    return "\n".join(lines)


def test_graph_of_two_layers(fresh_dynamo):
    recorder = AotEagerAndRecordGraphs()
    with torch.no_grad():
        torch.compile(stack("cpu"), backend=recorder, fullgraph=True)(*state(3, "cpu"))
    assert len(recorder.graphs) == len(recorder.fw_graphs) == 1
    graph = recorder.fw_graphs[0].graph
    # Inductor gets the ops whole, nothing decomposed, and no copy made for an op.
    called = [str(n.target) for n in graph.nodes if n.op == "call_function"]
    assert {t for t in called if "getitem" not in t} == {
        "aten.mul.Tensor",
        *(f"mhc.{op}.default" for op in ("post", "pre", "fused_post_pre", "head")),
    }
    assert_expected_inline(
        listing(graph),
        """\
%0 = input
%1 = input
%2 = input
%3 = input
%4 = input
%5 = input
%6 = input
%7 = input
%8 = input
%9 = input
%10 = input
%11 = input
%12 = mhc.fused_post_pre.default(%0, %1, %2, %3, %4, %5, %6, 1e-06, 1e-06, 1e-06, 2.0, 20,
    norm_weight=%7, norm_eps=1e-06)
%13 = %12[0]
%14 = %12[1]
%15 = %12[2]
%16 = %12[3]
%17 = aten.mul.Tensor(%16, -0.5)
%18 = mhc.fused_post_pre.default(%17, %13, %14, %15, %4, %5, %6, 1e-06, 1e-06, 1e-06, 2.0, 20,
    norm_weight=%7, norm_eps=1e-06)
%19 = %18[0]
%20 = %18[1]
%21 = %18[2]
%22 = %18[3]
%23 = aten.mul.Tensor(%22, -0.5)
%24 = mhc.post.default(%23, %19, %20, %21)
%25 = mhc.pre.default(%24, %4, %5, %6, 1e-06, 1e-06, 1e-06, 2.0, 20, norm_weight=%7,
    norm_eps=1e-06)
%26 = %25[0]
%27 = %25[1]
%28 = %25[2]
%29 = aten.mul.Tensor(%28, -0.5)
%30 = mhc.post.default(%29, %24, %26, %27)
%31 = mhc.head.default(%30, %8, %9, %10, 1e-06, 1e-06, norm_weight=%11, norm_eps=1e-06)
return (%30, %31)""",
    )


def test_tensors_of_the_weights_are_not_baked_in(fresh_dynamo):
    """Change the result of compiled code with a weight that changes in place."""
    boundary = weights("pre", "cpu")
    compiled = torch.compile(
        lambda residual: torch.ops.mhc.pre(residual, **boundary), fullgraph=True
    )
    residual = make_inputs("pre", 3, 256)["residual"]
    with torch.no_grad():
        before = compiled(residual)
        for tensor in tensors(boundary).values():
            tensor.mul_(1.5)
        after = compiled(residual)
        assert not torch.equal(before[0], after[0])
        assert_same_bits(after, torch.ops.mhc.pre(residual, **boundary))

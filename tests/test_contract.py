"""Hold every op to its promises about memory, layouts, tokens and repeatability."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mhc_ops
from helpers import (
    NORMS,
    OPS,
    STREAMS,
    assert_equal,
    call,
    check_against_oracle,
    clone,
    path,
    strided,
    tensors,
    tokens_of,
)
from mhc_ops.testing import KINDS, OUTPUTS, make_inputs, poisoned_memory

HIDDEN = 256
OP_AND_NORM = [pytest.param(op, n, id=f"{op}-{n}") for op in OPS for n in NORMS[op]]
EVERY_PATH = tokens_of(HIDDEN, 5, 200, at_bounds=True)


def shapes(leading, n, hidden):
    return {
        "residual_out": (*leading, n, hidden),
        "post_mix": (*leading, n, 1),
        "comb_mix": (*leading, n, n),
        "layer_input": (*leading, hidden),
    }


def check_outputs(device, op, norm, leading):
    inputs = make_inputs(op, leading, HIDDEN, device=device, norm=norm)
    before = clone(inputs)
    with poisoned_memory():
        outputs = call(op, inputs)
    assert_equal(inputs, before)
    want = shapes(leading, 4, HIDDEN)
    for name, out in outputs.items():
        mix = name in ("post_mix", "comb_mix")
        assert tuple(out.shape) == want[name], name
        assert out.dtype == (torch.float32 if mix else torch.bfloat16), name
        assert out.device.type == device, name
        assert out.is_contiguous(), name
        assert out.storage_offset() == 0, name
        assert out.untyped_storage().nbytes() == out.numel() * out.element_size(), name
        assert not out.isnan().any(), name
    if 0 not in leading:
        everything = [*outputs.values(), *tensors(inputs).values()]
        for a, b in itertools.combinations(everything, 2):
            assert a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr()


@pytest.mark.parametrize(("op", "norm"), OP_AND_NORM)
def test_outputs(device, op, norm, subtests):
    """Return the right shape and dtype, contiguous, written whole, each with memory of its own."""
    for leading in ((0,), (1,), (17,), (2, 3), (2, 0, 3), (1, 2, 1, 3)):
        with subtests.test(leading=leading):
            check_outputs(device, op, norm, leading)


@pytest.mark.parametrize(("op", "norm"), OP_AND_NORM)
def test_leading_dimensions_are_flattened_and_restored(device, op, norm):
    inputs = make_inputs(op, (2, 3), HIDDEN, device=device, norm=norm)
    flat = dict(inputs)
    for name in ("x", "residual", "post_layer_mix", "comb_res_mix"):
        if name in flat:
            flat[name] = flat[name].flatten(0, 1)
    outputs = call(op, inputs)
    assert_equal({name: out.flatten(0, 1) for name, out in outputs.items()}, call(op, flat))


@pytest.mark.parametrize(("op", "norm"), OP_AND_NORM)
def test_strided_inputs(device, op, norm, subtests):
    for leading in ((17,), (2, 3)):
        with subtests.test(leading=leading):
            inputs = make_inputs(op, leading, HIDDEN, device=device, norm=norm, kind="large_logits")
            assert_equal(call(op, strided(inputs)), call(op, inputs))


@pytest.mark.parametrize("op", ["post", "fused_post_pre", "post_head"])
def test_inputs_expanded_over_the_tokens(device, op):
    inputs = make_inputs(op, 5, HIDDEN, device=device)
    for name in ("x", "residual", "post_layer_mix", "comb_res_mix"):
        inputs[name] = inputs[name][:1].expand_as(inputs[name])
    dense = inputs | {
        name: v.clone(memory_format=torch.contiguous_format) for name, v in tensors(inputs).items()
    }
    assert inputs["x"].stride(0) == 0
    assert dense["x"].is_contiguous()
    assert_equal(call(op, inputs), call(op, dense))


@pytest.mark.parametrize("op", [op for op in OPS if op != "post"])
def test_float32_norm_weight_is_cast(device, op):
    inputs = make_inputs(op, 5, HIDDEN, device=device, norm=True, kind="large_logits")
    fp32 = inputs["norm_weight"].float() * (1 + 2**-10)
    assert not torch.equal(fp32, fp32.bfloat16().float())
    got = call(op, inputs | {"norm_weight": fp32})
    assert_equal(got, call(op, inputs | {"norm_weight": fp32.bfloat16()}))


@pytest.mark.parametrize(("op", "norm"), OP_AND_NORM)
def test_every_argument_matters(device, op, norm):
    """Change an output with every changed argument."""
    inputs = make_inputs(op, 5, HIDDEN, device=device, norm=norm, kind="large_logits")
    outputs = call(op, inputs)
    changes = {"sinkhorn_repeat": 2}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            changes[name] = value * 1.5 + 0.25
        elif isinstance(value, float):
            changes[name] = value + 0.5
    for name in inputs:
        changed = call(op, inputs | {name: changes[name]})
        assert any(not torch.equal(changed[k], outputs[k]) for k in outputs), name


@pytest.mark.parametrize("op", OPS)
def test_a_bad_value_stays_in_its_token(device, op, subtests):
    for tokens in EVERY_PATH:
        inputs = make_inputs(op, tokens, HIDDEN, device=device, norm=op != "post")
        clean = call(op, inputs)
        token = tokens // 2
        others = torch.arange(tokens, device=device) != token
        for bad in (float("nan"), float("inf")):
            with subtests.test(path(op, HIDDEN, tokens), tokens=tokens, bad=bad):
                poisoned = clone(inputs)
                poisoned[STREAMS[op]][token].view(-1, HIDDEN)[-1, 77] = bad
                for name, out in call(op, poisoned).items():
                    assert_equal({name: out[others]}, {name: clean[name][others]})
                    assert not out[token].isfinite().all(), name


@pytest.mark.parametrize("op", OPS)
def test_the_same_bits_every_time(device, op, subtests):
    for tokens in EVERY_PATH:
        with subtests.test(path(op, HIDDEN, tokens), tokens=tokens):
            inputs = make_inputs(op, tokens, HIDDEN, device=device, kind="large_logits")
            first = call(op, inputs)
            for _ in range(3):
                assert_equal(call(op, inputs), first)


@given(
    op=st.sampled_from(OPS),
    leading=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    hidden=st.integers(1, 12).map(lambda vectors: 8 * vectors),
    hc_mult=st.integers(1, 6),
    norm=st.booleans(),
    sinkhorn_repeat=st.integers(1, 6),
    kind=st.sampled_from(tuple(KINDS)),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_shape_on_the_cpu(op, leading, hidden, hc_mult, norm, sinkhorn_repeat, kind):
    """Compare any leading dimensions, hidden size and hc_mult with the float64 oracle."""
    check_against_oracle(
        op,
        "cpu",
        tokens=tuple(leading),
        hidden=hidden,
        hc_mult=hc_mult,
        norm=norm,
        sinkhorn_repeat=sinkhorn_repeat,
        kind=kind,
    )


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("op", OPS)
def test_inference_contexts(device, op, context):
    inputs = make_inputs(op, 3, HIDDEN, device=device)
    want = call(op, inputs)
    with context():
        got = call(op, inputs)
    assert_equal(got, want)


@pytest.mark.parametrize("op", OPS)
def test_public_function_and_op_agree(device, op):
    inputs = make_inputs(op, 3, HIDDEN, device=device, norm=True)
    result = getattr(mhc_ops, op)(**inputs)
    named = result if isinstance(result, tuple) else (result,)
    assert_equal(dict(zip(OUTPUTS[op], named, strict=True)), call(op, inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_the_current_stream_is_used(op):
    """See work queued before the call on the same stream, also on a side stream."""
    inputs = make_inputs(op, 64, 4096, device="cuda")
    want = call(op, inputs)
    late = clone(inputs)
    late[STREAMS[op]].zero_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late[STREAMS[op]].copy_(inputs[STREAMS[op]])
        got = call(op, late)
    stream.synchronize()
    assert_equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_two_streams_at_once(op):
    """Share nothing between calls: two streams that work at once do not disturb each other."""
    kinds = ("large_logits", "signed_bases")
    inputs = [make_inputs(op, 64, 4096, device="cuda", kind=kind) for kind in kinds]
    want = [call(op, i) for i in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    got = [[], []]
    for _ in range(50):
        for index, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[index].append(call(op, inputs[index]))
    torch.cuda.synchronize()
    for index in range(2):
        for outputs in got[index]:
            assert_equal(outputs, want[index])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("op", OPS)
def test_the_current_device_is_left_alone(op):
    inputs = make_inputs(op, 3, HIDDEN, device="cuda:1")
    with torch.cuda.device(0):
        there = call(op, inputs)
        assert torch.cuda.current_device() == 0
    here = call(op, make_inputs(op, 3, HIDDEN, device="cuda:0"))
    for name, out in there.items():
        assert torch.equal(out.cpu(), here[name].cpu())

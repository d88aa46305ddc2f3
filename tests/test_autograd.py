"""Refuse gradients with a clear text, never drop one in silence: the ops are forward only."""

import pytest
import torch

from helpers import NORMS, OPS, STREAMS, call, overload, split, tensors
from mhc_ops.testing import make_inputs

HIDDEN = 256
ARGUMENTS = {op: list(tensors(make_inputs(op, 1, 8, norm=NORMS[op][-1]))) for op in OPS}


def message(op):
    return (
        f"mhc::{op}: forward only: this op has no backward yet; call it under "
        "torch.no_grad() or torch.inference_mode(), or detach its inputs"
    )


def inputs_with_grad(op, name, device):
    inputs = make_inputs(op, 3, HIDDEN, device=device, norm=True)
    inputs[name].requires_grad_()
    return inputs


def loss(outputs):
    return sum(out.float().sum() for out in outputs.values())


@pytest.mark.parametrize("op", OPS)
def test_backward_is_refused(device, op, subtests):
    """Refuse a backward whichever one argument asks for a gradient, ``norm_weight`` alone too."""
    for name in ARGUMENTS[op]:
        with subtests.test(name):
            outputs = call(op, inputs_with_grad(op, name, device))
            assert all(out.requires_grad for out in outputs.values())
            for out in outputs.values():
                with pytest.raises(RuntimeError) as error:
                    out.float().sum().backward(retain_graph=True)
                assert str(error.value) == message(op)


@pytest.mark.parametrize("op", OPS)
def test_backward_of_compiled_code_is_refused(op, subtests, fresh_dynamo):
    def step(*args, **kwargs):
        result = overload(op)(*args, **kwargs)
        return result if isinstance(result, torch.Tensor) else result[-1]

    for name in ARGUMENTS[op]:
        with subtests.test(name):
            torch._dynamo.reset()
            args, kwargs = split(op, inputs_with_grad(op, name, "cpu"))
            compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
            # AOTAutograd traces the backward when it compiles, so the refusal may come before a
            # call ends.
            with pytest.raises(Exception) as error:  # noqa: PT011 - the text is what counts
                compiled(*args, **kwargs).float().sum().backward()
            assert message(op) in str(error.value)


@pytest.mark.parametrize("op", OPS)
def test_forward_is_the_same_with_and_without_grad(device, op):
    plain = make_inputs(op, 3, HIDDEN, device=device, norm=True)
    want = call(op, plain)
    got = call(op, inputs_with_grad(op, STREAMS[op], device))
    for name, out in got.items():
        assert torch.equal(out, want[name])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("op", OPS)
def test_no_gradient_is_asked_for_without_grad_mode(device, op, context):
    inputs = inputs_with_grad(op, STREAMS[op], device)
    with context():
        outputs = call(op, inputs)
    assert not any(out.requires_grad for out in outputs.values())


@pytest.mark.parametrize("op", OPS)
def test_no_gradient_is_asked_for_without_inputs_that_want_one(device, op):
    outputs = call(op, make_inputs(op, 3, HIDDEN, device=device, norm=True))
    assert not any(out.requires_grad for out in outputs.values())
    assert not loss(outputs).requires_grad

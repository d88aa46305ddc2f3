"""Refuse gradients with a clear text, never drop one in silence: the ops are forward only."""

import pytest
import torch
from torch.autograd import forward_ad

from helpers import NORMS, OPS, STREAMS, assert_equal, call, overload, split, tensors
from mhc_ops import nn, reference
from mhc_ops.testing import as_outputs, make_inputs

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


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_compiled_code_behaves_as_eager_code_does(op, device, subtests, fresh_dynamo):
    """Run the forward of compiled code whose inputs want gradients, and refuse its backward."""
    for name in ARGUMENTS[op]:
        with subtests.test(name):
            torch._dynamo.reset()
            inputs = inputs_with_grad(op, name, device)
            want = call(op, inputs)
            args, kwargs = split(op, inputs)
            compiled = torch.compile(overload(op), backend="aot_eager", fullgraph=True)
            outputs = as_outputs(op, compiled(*args, **kwargs))
            for output, out in outputs.items():
                assert torch.equal(out, want[output])
                assert out.requires_grad
            with pytest.raises(RuntimeError) as error:
                loss(outputs).backward()
            assert str(error.value) == message(op)


@pytest.mark.slow
@pytest.mark.parametrize("switch", ["0", "1"], ids=["unfused", "fused"])
def test_a_compiled_stack_behaves_as_the_eager_one(monkeypatch, device, switch, fresh_dynamo):
    monkeypatch.setenv("MHC_OPS_FUSE_POST_PRE", switch)
    linear = torch.nn.Linear(HIDDEN, HIDDEN, dtype=torch.bfloat16)
    stack = nn.DecoderStack([(linear, linear)] * 2, HIDDEN).to(device)
    nn.wire(stack)
    assert all(parameter.requires_grad for parameter in stack.parameters())
    embedding = torch.randn(3, HIDDEN, device=device).bfloat16()
    compiled = torch.compile(stack, backend="aot_eager", fullgraph=True)
    want, got = stack(embedding), compiled(embedding)
    assert torch.equal(got.hidden, want.hidden)
    assert torch.equal(got.streams, want.streams)
    errors = []
    for out in (want, got):
        with pytest.raises(RuntimeError, match="forward only") as error:
            out.hidden.float().sum().backward()
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def no_tangent(op):
    return (
        f"mhc::{op}: this op has no forward-mode derivative, which torch.func.jvp, "
        "jacfwd, hessian or torch.autograd.forward_ad asks for; detach its inputs, or "
        "differentiate the plain functions of mhc_ops.reference instead"
    )


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("op", OPS)
def test_a_tangent_is_refused(device, op, context, subtests):
    """Refuse a tangent of whichever one argument, and of a view, instead of dropping it."""
    inputs = make_inputs(op, 3, HIDDEN, device=device, norm=True)
    for name in ARGUMENTS[op]:
        with subtests.test(name), context(), forward_ad.dual_level():
            dual = forward_ad.make_dual(inputs[name], torch.ones_like(inputs[name]))
            for tensor in (dual, dual.view_as(dual), dual.detach().clone().copy_(dual)):
                with pytest.raises(RuntimeError) as error:
                    call(op, inputs | {name: tensor})
                assert str(error.value) == no_tangent(op)


@pytest.mark.parametrize("op", OPS)
def test_a_tangent_is_refused_of_an_input_that_wants_a_gradient(device, op):
    inputs = inputs_with_grad(op, STREAMS[op], device)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(inputs[STREAMS[op]], torch.ones_like(inputs[STREAMS[op]]))
        with pytest.raises(RuntimeError) as error:
            call(op, inputs | {STREAMS[op]: dual})
    assert str(error.value) == no_tangent(op)


@pytest.mark.parametrize("op", OPS)
def test_inputs_without_a_tangent_pass_beside_forward_mode(device, op):
    inputs = make_inputs(op, 3, HIDDEN, device=device, norm=True)
    want = call(op, inputs)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(3), torch.ones(3))
        assert forward_ad.unpack_dual(2 * dual).tangent is not None
        assert_equal(call(op, inputs), want)
        primal = forward_ad.make_dual(inputs[STREAMS[op]], torch.ones_like(inputs[STREAMS[op]]))
        primal = forward_ad.unpack_dual(primal).primal
        assert_equal(call(op, inputs | {STREAMS[op]: primal}), want)


TRANSFORMS = {
    "jvp": (no_tangent, lambda f, x: torch.func.jvp(f, (x,), (x,))),
    "jacfwd": (no_tangent, lambda f, x: torch.func.jacfwd(f)(x)),
    "hessian": (no_tangent, lambda f, x: torch.func.hessian(f)(x)),
    "grad": (message, lambda f, x: torch.func.grad(f)(x)),
    "grad_and_value": (message, lambda f, x: torch.func.grad_and_value(f)(x)),
    "vjp": (message, lambda f, x: torch.func.vjp(f, x)[1](torch.ones_like(f(x)))),
    "jacrev": (message, lambda f, x: torch.func.jacrev(f)(x)),
    "grad of grad": (
        message, lambda f, x: torch.func.grad(lambda y: torch.func.grad(f)(y).sum())(x),
    ),
    "autograd.functional.jvp": (
        message, lambda f, x: torch.autograd.functional.jvp(f, x, torch.ones_like(x)),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("op", OPS)
def test_transforms_of_torch_func_are_refused(device, op, subtests):
    for transform, (text, run) in TRANSFORMS.items():
        for name in ARGUMENTS[op]:
            inputs = make_inputs(op, 3, HIDDEN, device=device, norm=True)

            def function(value, inputs=inputs, name=name):
                return loss(call(op, inputs | {name: value}))

            with subtests.test(transform, argument=name):
                with pytest.raises(RuntimeError) as error:
                    run(function, inputs[name])
                assert str(error.value) == text(op)


@pytest.mark.parametrize("op", ["post", "pre", "head"])
def test_forward_mode_of_the_plain_function_is_the_way_out(op):
    """Compare the tangent that a plain function gives, in float64, with a difference quotient."""
    inputs = make_inputs(op, 2, 16)
    name, step = STREAMS[op], 1e-6
    options = {"compute_dtype": torch.float64}
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}

    def function(value):
        out = getattr(reference, op)(**(wide | {name: value}), **options)
        return out[-1] if isinstance(out, tuple) else out

    direction = torch.randn_like(wide[name])
    _, tangent = torch.func.jvp(function, (wide[name],), (direction,))
    ahead, behind = (function(wide[name] + sign * step * direction) for sign in (1, -1))
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-8)


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

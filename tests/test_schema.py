"""Test the schemas, and that everything registered for an op agrees with its schema."""

import inspect

import pytest
import torch
from expecttest import assert_expected_inline

import mhc_ops
from helpers import OPS, overload
from mhc_ops import reference, testing
from mhc_ops._arguments import NumberSpec, TensorSpec, recipe

PARAMETER = inspect.Parameter


def parameters_of_schema(op):
    """Return (name, is keyword-only, default) of each argument, in order."""
    return [
        (a.name, a.kwarg_only, a.default_value if a.has_default_value() else PARAMETER.empty)
        for a in overload(op)._schema.arguments
    ]


def parameters_of(function):
    parameters = inspect.signature(function).parameters.values()
    assert {p.kind for p in parameters} <= {PARAMETER.POSITIONAL_OR_KEYWORD, PARAMETER.KEYWORD_ONLY}
    return [(p.name, p.kind is PARAMETER.KEYWORD_ONLY, p.default) for p in parameters]


def test_schemas():
    assert_expected_inline(
        "\n".join(str(overload(op)._schema).replace(", ", ",\n    ") for op in OPS),
        """\
mhc::post(Tensor x,
    Tensor residual,
    Tensor post_layer_mix,
    Tensor comb_res_mix) -> Tensor
mhc::pre(Tensor residual,
    Tensor fn,
    Tensor hc_scale,
    Tensor hc_base,
    float rms_eps,
    float hc_pre_eps,
    float hc_sinkhorn_eps,
    float hc_post_mult_value,
    int sinkhorn_repeat,
    *,
    Tensor? norm_weight=None,
    float? norm_eps=None) -> (Tensor post_mix,
    Tensor comb_mix,
    Tensor layer_input)
mhc::fused_post_pre(Tensor x,
    Tensor residual,
    Tensor post_layer_mix,
    Tensor comb_res_mix,
    Tensor fn,
    Tensor hc_scale,
    Tensor hc_base,
    float rms_eps,
    float hc_pre_eps,
    float hc_sinkhorn_eps,
    float hc_post_mult_value,
    int sinkhorn_repeat,
    *,
    Tensor? norm_weight=None,
    float? norm_eps=None) -> (Tensor residual_out,
    Tensor post_mix,
    Tensor comb_mix,
    Tensor layer_input)
mhc::head(Tensor residual,
    Tensor fn,
    Tensor scale,
    Tensor base,
    float rms_eps,
    float hc_eps,
    *,
    Tensor? norm_weight=None,
    float? norm_eps=None) -> Tensor
mhc::expand_pre(Tensor x,
    Tensor fn,
    Tensor hc_scale,
    Tensor hc_base,
    float rms_eps,
    float hc_pre_eps,
    float hc_sinkhorn_eps,
    float hc_post_mult_value,
    int sinkhorn_repeat,
    *,
    Tensor? norm_weight=None,
    float? norm_eps=None) -> (Tensor residual_out,
    Tensor post_mix,
    Tensor comb_mix,
    Tensor layer_input)
mhc::post_head(Tensor x,
    Tensor residual,
    Tensor post_layer_mix,
    Tensor comb_res_mix,
    Tensor fn,
    Tensor scale,
    Tensor base,
    float rms_eps,
    float hc_eps,
    *,
    Tensor? norm_weight=None,
    float? norm_eps=None) -> Tensor
mhc::post_head_streams(Tensor x,
    Tensor residual,
    Tensor post_layer_mix,
    Tensor comb_res_mix,
    Tensor fn,
    Tensor scale,
    Tensor base,
    float rms_eps,
    float hc_eps,
    *,
    Tensor? norm_weight=None,
    float? norm_eps=None) -> (Tensor residual_out,
    Tensor hidden)""",
    )


def test_every_op_of_the_namespace_is_tested():
    registered = torch._C._dispatch_get_all_op_names()
    assert {name for name in registered if name.startswith("mhc::")} == {f"mhc::{op}" for op in OPS}


@pytest.mark.parametrize("op", OPS)
def test_a_recipe_has_the_arguments_and_outputs_of_the_schema(op):
    """Find arguments and outputs in order, tensors as tensors and integers as integers."""
    kinds = {"Tensor": TensorSpec, "Optional[Tensor]": TensorSpec}
    of = recipe(op)
    schema = overload(op)._schema
    assert list(of.arguments) == [argument.name for argument in schema.arguments]
    for argument in schema.arguments:
        spec = of.arguments[argument.name]
        assert isinstance(spec, kinds.get(str(argument.type), NumberSpec)), argument.name
        if isinstance(spec, NumberSpec):
            assert spec.integer == (str(argument.type) == "int"), argument.name
    assert len(of.outputs) == len(schema.returns)
    assert all(a.name in ("", b) for a, b in zip(schema.returns, of.outputs, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_public_function_has_the_signature_of_the_schema(op):
    assert parameters_of(getattr(mhc_ops, op)) == parameters_of_schema(op)


@pytest.mark.parametrize("op", ["post", "pre", "head"])
def test_reference_takes_the_arguments_of_the_schema(op):
    *parameters, compute_dtype = parameters_of(getattr(reference, op))
    assert compute_dtype == ("compute_dtype", True, torch.float32)
    assert parameters == parameters_of_schema(op)


@pytest.mark.parametrize("op", ["fused_post_pre", "pre", "expand_pre"])
def test_public_outputs_are_named_as_in_the_schema(op):
    result = getattr(mhc_ops, op)(**testing.make_inputs(op, 2, 16))
    names = tuple(r.name for r in overload(op)._schema.returns)
    assert type(result)._fields == names == testing.OUTPUTS[op]


@pytest.mark.parametrize("op", OPS)
def test_inputs_come_in_the_order_of_the_schema(op):
    given = list(testing.make_inputs(op, 2, 16, norm=True))
    assert given == [name for name, _, _ in parameters_of_schema(op)]


@pytest.mark.parametrize("key", ["CPU", "CUDA", "Meta"])
@pytest.mark.parametrize("op", OPS)
def test_an_implementation_is_registered(op, key):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mhc::{op}", key)


@pytest.mark.parametrize("op", OPS)
def test_tags(op):
    """Find the tags by which Inductor keeps the strides of inputs and may compile the op."""
    assert torch.Tag.needs_exact_strides in overload(op).tags
    assert torch.Tag.pt2_compliant_tag in overload(op).tags

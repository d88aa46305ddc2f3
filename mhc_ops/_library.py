"""Hold the schemas of ``torch.ops.mhc.*`` and the one helper that registers an op.

The schemas are written out by hand, here and nowhere else; ``tests/test_schema.py`` pins them.
``Library`` is used instead of ``torch.library.custom_op``, which makes each call several times as
expensive (benchmarks/NOTES.md, "Registration by Library"). The tests check what ``custom_op`` would
check (opcheck, signature equality, recompile counts).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

SCHEMAS: dict[str, str] = {
    "post": (
        "post(Tensor x, Tensor residual, Tensor post_layer_mix, Tensor comb_res_mix) -> Tensor"
    ),
    "pre": (
        "pre(Tensor residual, Tensor fn, Tensor hc_scale, Tensor hc_base, float rms_eps,"
        " float hc_pre_eps, float hc_sinkhorn_eps, float hc_post_mult_value, int sinkhorn_repeat,"
        " *, Tensor? norm_weight=None, float? norm_eps=None)"
        " -> (Tensor post_mix, Tensor comb_mix, Tensor layer_input)"
    ),
    "fused_post_pre": (
        "fused_post_pre(Tensor x, Tensor residual, Tensor post_layer_mix, Tensor comb_res_mix,"
        " Tensor fn, Tensor hc_scale, Tensor hc_base, float rms_eps, float hc_pre_eps,"
        " float hc_sinkhorn_eps, float hc_post_mult_value, int sinkhorn_repeat,"
        " *, Tensor? norm_weight=None, float? norm_eps=None)"
        " -> (Tensor residual_out, Tensor post_mix, Tensor comb_mix, Tensor layer_input)"
    ),
    "head": (
        "head(Tensor residual, Tensor fn, Tensor scale, Tensor base, float rms_eps, float hc_eps,"
        " *, Tensor? norm_weight=None, float? norm_eps=None) -> Tensor"
    ),
    "expand_pre": (
        "expand_pre(Tensor x, Tensor fn, Tensor hc_scale, Tensor hc_base, float rms_eps,"
        " float hc_pre_eps, float hc_sinkhorn_eps, float hc_post_mult_value, int sinkhorn_repeat,"
        " *, Tensor? norm_weight=None, float? norm_eps=None)"
        " -> (Tensor residual_out, Tensor post_mix, Tensor comb_mix, Tensor layer_input)"
    ),
    "post_head": (
        "post_head(Tensor x, Tensor residual, Tensor post_layer_mix, Tensor comb_res_mix,"
        " Tensor fn, Tensor scale, Tensor base, float rms_eps, float hc_eps,"
        " *, Tensor? norm_weight=None, float? norm_eps=None) -> Tensor"
    ),
    "post_head_streams": (
        "post_head_streams(Tensor x, Tensor residual, Tensor post_layer_mix, Tensor comb_res_mix,"
        " Tensor fn, Tensor scale, Tensor base, float rms_eps, float hc_eps,"
        " *, Tensor? norm_weight=None, float? norm_eps=None)"
        " -> (Tensor residual_out, Tensor hidden)"
    ),
}

LIBRARY = torch.library.Library("mhc", "FRAGMENT")

# Without needs_exact_strides Inductor may choose another memory layout for the inputs of an op. The
# kernels need contiguous rows, so a changed layout would cost a copy in every layer.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def _forward_only(name: str) -> Callable[..., Any]:
    """Make the autograd kernel of an op, whose forward passes through and whose backward raises.

    ``torch.library.register_autograd`` refuses schemas with keyword-only tensors, so the
    ``autograd.Function`` is written out. The keyword arguments are passed to ``apply`` by
    position, because ``apply`` tracks only tensors that are its own arguments.
    """
    op = getattr(torch.ops.mhc, name).default

    def below_autograd(keyset: Any, args: Any, kwargs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    class ForwardOnly(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, names: tuple[str, ...], *values: Any) -> Any:
            split = len(values) - len(names)
            return below_autograd(
                keyset, values[:split], dict(zip(names, values[split:], strict=True))
            )

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
            raise RuntimeError(
                f"mhc::{name}: forward only: this op has no backward yet; call it under "
                "torch.no_grad() or torch.inference_mode(), or detach its inputs"
            )

    def autograd(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args, **kwargs):
            return ForwardOnly.apply(keyset, tuple(kwargs), *args, *kwargs.values())
        return below_autograd(keyset, args, kwargs)

    return autograd


def register(
    name: str, *, fake: Callable[..., Any], cuda: Callable[..., Any], cpu: Callable[..., Any]
) -> None:
    """Define ``mhc::name`` from its schema and register its four implementations.

    Args:
        name: a key of :data:`SCHEMAS`.
        fake: the shape function, run under fake tensors and on the meta device.
        cuda: the implementation for CUDA tensors.
        cpu: the implementation for CPU tensors.

    The autograd implementation is the same for every op: forward passes through and backward
    raises. Without an autograd implementation a gradient would be dropped silently.
    """
    LIBRARY.define(SCHEMAS[name], tags=_TAGS)
    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"mhc::{name}", fake, lib=LIBRARY)
    LIBRARY.impl(name, _forward_only(name), "Autograd", with_keyset=True)

"""Hold the schemas of ``torch.ops.mhc.*`` and the one helper that registers an op.

The schemas are written out by hand, here and nowhere else; ``tests/test_schema.py`` pins them.
``Library`` is used instead of ``torch.library.custom_op``, which makes each call several times as
expensive (benchmarks/NOTES.md, "Registration by Library"). The tests check what ``custom_op`` would
check (opcheck, signature equality, recompile counts).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NoReturn

import torch
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled

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


# The backward of every op calls this op, which raises when it runs. A backward that raised by
# itself would raise already when AOTAutograd traces it, and so in the forward of compiled code. The
# op is for this package alone, so it has another namespace than the ops.
_INTERNAL = torch.library.Library("mhc_internal", "FRAGMENT")
_INTERNAL.define("refuse_backward(Tensor grad, str op) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


def _refuse_backward(grad: torch.Tensor, op: str) -> NoReturn:
    raise RuntimeError(
        f"mhc::{op}: forward only: this op has no backward yet; call it under "
        "torch.no_grad() or torch.inference_mode(), or detach its inputs"
    )


for _key in ("CompositeExplicitAutograd", "FuncTorchBatched"):
    _INTERNAL.impl("refuse_backward", _refuse_backward, _key)
torch.library.register_fake(
    "mhc_internal::refuse_backward", lambda grad, op: grad.new_empty(()), lib=_INTERNAL
)


def _refuse_tangents(name: str, values: Iterable[Any]) -> None:
    """Refuse inputs that carry a tangent, which would be dropped in silence.

    This is called where forward-mode differentiation is under way, be it by dual tensors or by
    ``torch.func``, which uses dual tensors.
    """
    for value in values:
        if isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise RuntimeError(
                f"mhc::{name}: this op has no forward-mode derivative, which torch.func.jvp, "
                "jacfwd, hessian or torch.autograd.forward_ad asks for; detach its inputs, or "
                "differentiate the plain functions of mhc_ops.reference instead"
            )


def _for_torch_func(*contexts: Callable[[], AbstractContextManager[Any]]) -> ExitStack:
    """Enter contexts where a level of ``torch.func`` is at work."""
    stack = ExitStack()
    if torch._C._are_functorch_transforms_active():
        for context in contexts:
            stack.enter_context(context())
    return stack


def _forward_only(name: str) -> Callable[..., Any]:
    """Make the autograd kernel of an op, whose forward passes through and whose backward raises.

    ``torch.library.register_autograd`` refuses schemas with keyword-only tensors, so the
    ``autograd.Function`` is written out. The keyword arguments are passed to ``apply`` by
    position, because ``apply`` tracks only tensors that are its own arguments.

    ``torch.func`` calls the kernel once for each of its levels, as it calls torch's own autograd
    kernels. The function is therefore one of a single level, whose ``apply`` does not ask
    ``torch.func`` for its levels again, and whose forward, which runs without gradients and
    tangents, gives both back to the levels below.
    """
    op = getattr(torch.ops.mhc, name).default

    def below_autograd(keyset: Any, args: Any, kwargs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    class ForwardOnly(torch.autograd.function._SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, keyset: Any, names: tuple[str, ...], *values: Any) -> Any:
            ctx.like = [(v.shape, v.dtype) if torch.is_tensor(v) else None for v in values]
            split = len(values) - len(names)
            kwargs = dict(zip(names, values[split:], strict=True))
            with _for_torch_func(torch.enable_grad, lambda: _set_fwd_grad_enabled(True)):
                return below_autograd(keyset, values[:split], kwargs)

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> Any:
            nothing = torch.ops.mhc_internal.refuse_backward.default(grads[0], name)
            # Only a trace comes here, which needs gradients of the right kind.
            return None, None, *(like and nothing.to(like[1]).expand(like[0]) for like in ctx.like)

    def autograd(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, (*args, *kwargs.values()))
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args, **kwargs):
            with _for_torch_func(enable_single_level_autograd_function):
                return ForwardOnly.apply(  # type: ignore[attr-defined]
                    keyset, tuple(kwargs), *args, *kwargs.values()
                )
        return below_autograd(keyset, args, kwargs)

    return autograd


def register(
    name: str,
    *,
    fake: Callable[..., Any],
    cuda: Callable[..., Any],
    cpu: Callable[..., Any],
    batched: Callable[..., Any],
) -> None:
    """Define ``mhc::name`` from its schema and register its five implementations.

    Args:
        name: a key of :data:`SCHEMAS`.
        fake: the shape function, run under fake tensors and on the meta device.
        cuda: the implementation for CUDA tensors.
        cpu: the implementation for CPU tensors.
        batched: the implementation for tensors under ``torch.func.vmap``.

    The autograd implementation is the same for every op: forward passes through, backward and
    forward-mode differentiation raise. Without it a gradient would be dropped silently.
    """
    LIBRARY.define(SCHEMAS[name], tags=_TAGS)
    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY.impl(name, cuda, "CUDA")
    LIBRARY.impl(name, batched, "FuncTorchBatched")
    torch.library.register_fake(f"mhc::{name}", fake, lib=LIBRARY)
    LIBRARY.impl(name, _forward_only(name), "Autograd", with_keyset=True)

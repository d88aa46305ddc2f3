"""Choose which function runs each step of a model, once for every module of the model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import config, geometry, ops, reference, support
from .._arguments import ACTIVATION
from .norm import refresh_norm_weight_cache

logger = logging.getLogger("mhc_ops")


class Steps(NamedTuple):
    """Hold the functions that run the steps of a wired module.

    Attributes:
        post: as :func:`mhc_ops.post`.
        pre: as :func:`mhc_ops.pre`; may return a plain tuple.
        head: as :func:`mhc_ops.head`.
        fused_post_pre: as :func:`mhc_ops.fused_post_pre`; None where a boundary runs as post,
            then pre.
        expand_pre: as :func:`mhc_ops.expand_pre`; None where copies are made, then pre runs.
        post_head, post_head_streams: as :func:`mhc_ops.post_head` and
            :func:`mhc_ops.post_head_streams`; None where the end runs as post, then head.
    """

    post: Callable[..., Tensor]
    pre: Callable[..., tuple[Tensor, Tensor, Tensor]]
    head: Callable[..., Tensor]
    fused_post_pre: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] | None
    expand_pre: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] | None
    post_head: Callable[..., Tensor] | None
    post_head_streams: Callable[..., tuple[Tensor, Tensor]] | None


class Wired(torch.nn.Module):
    """Hold the steps that :func:`wire` chooses for a module."""

    fn: Tensor
    hc_mult: int
    steps: Steps | None = None

    def _steps(self) -> Steps:
        if self.steps is None:
            raise RuntimeError(
                f"{type(self).__name__} is not wired: expected mhc_ops.nn.wire(model) once the "
                "model stands on its device, before the first forward"
            )
        return self.steps


def _device_refusal(device: torch.device, hc_mult: int, hidden_size: int) -> str | None:
    """Say why the ops cannot serve streams of this shape on a device; None where they can."""
    if device.type in ("cpu", "meta"):
        return None
    supported, reason = support.is_supported(device)
    if not supported:
        return reason
    if hc_mult != geometry.HC_MULT:
        return f"hc_mult is {hc_mult}, the CUDA kernels take {geometry.HC_MULT}"
    if hidden_size % geometry.HIDDEN_MULTIPLE != 0:
        return (
            f"the hidden size is {hidden_size}, the CUDA kernels take multiples of "
            f"{geometry.HIDDEN_MULTIPLE}"
        )
    return None


def _refusal(modules: Sequence[Wired], dtype: torch.dtype) -> str | None:
    """Say why the ops cannot run these modules.

    Args:
        modules: modules to wire, on the device where they will run.
        dtype: dtype of the activations.

    Returns:
        The reason; None where the ops can serve them all.
    """
    if dtype != ACTIVATION:
        return f"the activations are {dtype}, the ops take {ACTIVATION}"
    places = {
        (module.fn.device, module.hc_mult, module.fn.shape[1] // module.hc_mult)
        for module in modules
    }
    reasons = (_device_refusal(*place) for place in sorted(places, key=str))
    return next((reason for reason in reasons if reason is not None), None)


def wire(model: torch.nn.Module, *, dtype: torch.dtype = ACTIVATION) -> None:
    """Choose what runs each step of a model's hyper-connections.

    The switches are read when this function is called. A step runs on its op where its switch is on
    and the op can serve the device; otherwise a plain function of :mod:`mhc_ops.reference` runs the
    step, and one line in the log says why. Where all three switches are on and the ops can serve
    the device, boundaries are fused, and so are the ends of the model: expand with pre, and post
    with head. Norm weights that are not in bf16 get their bf16 copy, as
    :class:`~mhc_ops.nn.FoldedRMSNorm` says.

    Call this function when the model is on its device, and again after moving the model, replacing
    norm weights by other parameters, or changing a switch.

    Args:
        model: any module; every :class:`~mhc_ops.nn.HyperConnection` and
            :class:`~mhc_ops.nn.HyperHead` in it is wired.
        dtype: dtype of the activations.

    Raises:
        ValueError: the model has no hyper-connection, or a switch is neither on nor off.
    """
    modules = [module for module in model.modules() if isinstance(module, Wired)]
    if not modules:
        raise ValueError(
            f"mhc_ops.nn.wire: expected a model with hyper-connections, got {type(model).__name__} "
            "without any"
        )
    switches = config.switches()
    reason = _refusal(modules, dtype)
    if reason is not None:
        tilelang_pre = tilelang_post = False
        plain = f"every step: {reason}"
    else:
        tilelang_pre, tilelang_post = switches.tilelang_pre, switches.tilelang_post
        plain = "; ".join(
            f"{steps}: {name} is off"
            for steps, name, on in (
                ("pre and head", "MHC_OPS_TILELANG_PRE", tilelang_pre),
                ("post", "MHC_OPS_TILELANG_POST", tilelang_post),
            )
            if not on
        )
    if plain:
        logger.warning("%s runs on plain PyTorch functions: %s", type(model).__name__, plain)
    fuse = reason is None and switches.fuse
    chosen = Steps(
        post=ops.post if tilelang_post else reference.post,
        pre=ops.pre if tilelang_pre else reference.pre,
        head=ops.head if tilelang_pre else reference.head,
        fused_post_pre=ops.fused_post_pre if fuse else None,
        expand_pre=ops.expand_pre if fuse else None,
        post_head=ops.post_head if fuse else None,
        post_head_streams=ops.post_head_streams if fuse else None,
    )
    for module in modules:
        module.steps = chosen
    refresh_norm_weight_cache(model)

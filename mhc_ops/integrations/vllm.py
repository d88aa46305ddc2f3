"""Run vLLM's models with hyper-connections on the mHC ops: :func:`install`, :func:`uninstall`.

:func:`install` rebinds ``mhc_post_tilelang``, ``mhc_pre_tilelang``,
``mhc_pre_broadcast_tilelang``, ``mhc_fused_post_pre_tilelang`` and
``hc_head_fused_kernel_tilelang`` of ``vllm.model_executor.kernels.mhc.tilelang``, which
DeepSeek-V4, its MTP layers and DSpark call on NVIDIA GPUs. It also makes vLLM's custom ops of the
same names (``torch.ops.vllm.mhc_pre_tilelang`` and so on), which GLM-5.3 calls, run the ops.
vLLM keeps its own functions for GLM-5.3's copy of the embedding and mean over the streams, and for
all of DeepSeek-V4.1 but the post step.

Where mhc-ops is installed beside vLLM, the entry point ``mhc_ops`` of the group
``vllm.general_plugins`` calls :func:`plugin` in each of vLLM's processes. ``VLLM_PLUGINS``, a list
of names, says which plugins vLLM loads; vLLM loads all when the variable is not set.

A call that the ops do not serve runs vLLM's own function, and the log says why, once. The reason
may be another device, ``hc_mult``, hidden size or dtype, a layout or an address that the kernels do
not read, or kernels that are neither built ahead nor cached and cannot be compiled. Only a call
looks at the device, so that CUDA is not initialised before vLLM does it. DeepSeek-V4 loads every
kernel of its hidden size when it has loaded its weights; any other model does so at its first call.

This adapter is tested with vLLM 0.33.0.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .. import ops
from . import _fallback, _rebind

TESTED = "0.33.0"


@_fallback.falls_back("residual")
def mhc_post_tilelang(
    x: Tensor, residual: Tensor, post_layer_mix: Tensor, comb_res_mix: Tensor
) -> Tensor:
    """Run :func:`mhc_ops.post` with the signature of vLLM's function.

    Args:
        x, residual, post_layer_mix, comb_res_mix: as in :func:`mhc_ops.post`.

    Returns:
        The new streams.
    """
    return ops.post(x, residual, post_layer_mix, comb_res_mix)


@_fallback.falls_back("residual")
def mhc_pre_tilelang(
    residual: Tensor,
    fn: Tensor,
    hc_scale: Tensor,
    hc_base: Tensor,
    rms_eps: float,
    hc_pre_eps: float,
    hc_sinkhorn_eps: float,
    hc_post_mult_value: float,
    sinkhorn_repeat: int,
    n_splits: int = 1,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run :func:`mhc_ops.pre` with the signature of vLLM's function.

    Args:
        residual, fn, hc_scale, hc_base, rms_eps, hc_pre_eps: as in :func:`mhc_ops.pre`.
        hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat: as in :func:`mhc_ops.pre`.
        norm_weight: as in :func:`mhc_ops.pre`.
        n_splits: how vLLM's kernels cut the projection; the op does not need it.
        norm_eps: as in :func:`mhc_ops.pre`, but ignored without ``norm_weight``.

    Returns:
        (post_mix, comb_mix, layer_input).
    """
    return ops.pre(
        residual, fn, hc_scale, hc_base, rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value,
        sinkhorn_repeat,
        norm_weight=_fallback.bf16(norm_weight),
        norm_eps=None if norm_weight is None else norm_eps,
    )  # fmt: skip


@_fallback.falls_back("residual", flat="fn")
def mhc_pre_broadcast_tilelang(
    residual: Tensor,
    fn: Tensor,
    hc_scale: Tensor,
    hc_base: Tensor,
    rms_eps: float,
    hc_pre_eps: float,
    hc_sinkhorn_eps: float,
    hc_post_mult_value: float,
    sinkhorn_repeat: int,
    n_splits: int = 1,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    fn_broadcast: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run :func:`mhc_ops.expand_pre` for the first layer of vLLM's DeepSeek-V4.

    Args:
        residual: the embedding, x of :func:`mhc_ops.expand_pre`.
        fn, hc_scale, hc_base, rms_eps, hc_pre_eps: as in :func:`mhc_ops.expand_pre`.
        hc_sinkhorn_eps, hc_post_mult_value: as in :func:`mhc_ops.expand_pre`.
        sinkhorn_repeat, norm_weight: as in :func:`mhc_ops.expand_pre`.
        n_splits: how vLLM's kernels cut the projection; the op does not need it.
        norm_eps: as in :func:`mhc_ops.expand_pre`, but ignored without ``norm_weight``.
        fn_broadcast: fn summed over the streams, which the op does not need.

    Returns:
        (residual_out, post_mix, comb_mix, layer_input).
    """
    return ops.expand_pre(
        residual, fn, hc_scale, hc_base, rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value,
        sinkhorn_repeat,
        norm_weight=_fallback.bf16(norm_weight),
        norm_eps=None if norm_weight is None else norm_eps,
    )  # fmt: skip


@_fallback.falls_back("residual")
def mhc_fused_post_pre_tilelang(
    x: Tensor,
    residual: Tensor,
    post_layer_mix: Tensor,
    comb_res_mix: Tensor,
    fn: Tensor,
    hc_scale: Tensor,
    hc_base: Tensor,
    rms_eps: float,
    hc_pre_eps: float,
    hc_sinkhorn_eps: float,
    hc_post_mult_value: float,
    sinkhorn_repeat: int,
    n_splits: int = 1,
    tile_n: int = 1,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run :func:`mhc_ops.fused_post_pre` with the signature of vLLM's function.

    Args:
        x, residual, post_layer_mix, comb_res_mix, fn: as in :func:`mhc_ops.fused_post_pre`.
        hc_scale, hc_base, rms_eps, hc_pre_eps: as in :func:`mhc_ops.fused_post_pre`.
        hc_sinkhorn_eps, hc_post_mult_value: as in :func:`mhc_ops.fused_post_pre`.
        sinkhorn_repeat, norm_weight: as in :func:`mhc_ops.fused_post_pre`.
        n_splits, tile_n: how vLLM's kernels cut their work; the op needs neither.
        norm_eps: as in :func:`mhc_ops.fused_post_pre`, but ignored without ``norm_weight``.

    Returns:
        (residual_out, post_mix, comb_mix, layer_input).
    """
    return ops.fused_post_pre(
        x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, rms_eps, hc_pre_eps,
        hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat,
        norm_weight=_fallback.bf16(norm_weight),
        norm_eps=None if norm_weight is None else norm_eps,
    )  # fmt: skip


@_fallback.falls_back("hs_flat")
def hc_head_fused_kernel_tilelang(
    hs_flat: Tensor, fn: Tensor, hc_scale: Tensor, hc_base: Tensor, rms_eps: float, hc_eps: float
) -> Tensor:
    """Run :func:`mhc_ops.head` with the signature of vLLM's function.

    Args:
        hs_flat, fn, hc_scale, hc_base, rms_eps, hc_eps: residual, fn, scale, base, rms_eps and
            hc_eps of :func:`mhc_ops.head`.

    Returns:
        The last hidden state, to which vLLM applies its final norm.
    """
    return ops.head(hs_flat, fn, hc_scale, hc_base, rms_eps, hc_eps)


def finalize_mhc_broadcast_weights(self: Any) -> None:
    """Do what ``DeepseekV4Model`` does when its weights are loaded, then load the kernels.

    Args:
        self: the model, which has ``config``.
    """
    stock = _rebind.stock(finalize_mhc_broadcast_weights)
    assert stock is not None  # this function is called only where it replaced vLLM's own
    stock(self)
    try:
        sizes = self.config.hc_mult, self.config.hidden_size
        device = next(self.parameters()).device
    except (AttributeError, StopIteration):
        return  # the first call of such a model decides instead
    _fallback.warm(*sizes, device)


_TILELANG = "vllm.model_executor.kernels.mhc.tilelang"
# Each of these functions has a custom op of the same name; mhc_pre_broadcast_tilelang has none.
_CUSTOM_OPS = (
    mhc_post_tilelang,
    mhc_pre_tilelang,
    mhc_fused_post_pre_tilelang,
    hc_head_fused_kernel_tilelang,
)
REPLACEMENTS = (
    *(_rebind.Replacement(_TILELANG, function.__name__, function) for function in _CUSTOM_OPS),
    _rebind.Replacement(_TILELANG, "mhc_pre_broadcast_tilelang", mhc_pre_broadcast_tilelang),
    _rebind.Replacement(
        "vllm.models.deepseek_v4.nvidia.model",
        "DeepseekV4Model.finalize_mhc_broadcast_weights",
        finalize_mhc_broadcast_weights,
        late=True,
    ),
)

# The custom ops run the functions above as long as this library lives.
_library: torch.library.Library | None = None


def _override_custom_ops() -> None:
    global _library
    if _library is not None:
        return
    from vllm.platforms import current_platform

    library = torch.library.Library("vllm", "IMPL")
    with warnings.catch_warnings():
        # The dispatcher would warn of every kernel that replaces another.
        warnings.simplefilter("ignore")
        for function in _CUSTOM_OPS:
            if hasattr(torch.ops.vllm, function.__name__):
                library.impl(
                    function.__name__, function, current_platform.dispatch_key, allow_override=True
                )
    _library = library


def install(*, hidden: int | None = None) -> None:
    """Make vLLM's mHC functions run the ops, in this process; a second call is harmless.

    Args:
        hidden: hidden size of the model. With it the current CUDA device and the availability of
            the kernels are checked now; without it the first call checks both.

    Raises:
        RuntimeError: vLLM is not installed, one of its functions is missing or has another
            signature, torch is built for ROCm, or there are no kernels for ``hidden``. Nothing is
            replaced then.
    """
    if hidden is not None:
        _fallback.require("vllm", hidden)
    _rebind.install("vllm", TESTED, REPLACEMENTS)
    _override_custom_ops()


def uninstall() -> None:
    """Put vLLM's own functions back; without an :func:`install` before, do nothing."""
    global _library
    if _library is not None:
        _library._destroy()
        _library = None
    _rebind.uninstall("vllm", REPLACEMENTS)


def plugin() -> None:
    """Call :func:`install` for vLLM's entry point, and log a failure as a warning.

    vLLM calls this in every process, with any model. Where the ops do not fit, vLLM has to start as
    it would without them.
    """
    _rebind.guarded("vLLM", install)

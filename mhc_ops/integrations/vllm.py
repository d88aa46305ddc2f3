"""vLLM's models with hyper-connections on the mHC ops: :func:`install`, :func:`uninstall`.

:func:`install` rebinds ``mhc_post_tilelang``, ``mhc_pre_tilelang``,
``mhc_pre_broadcast_tilelang``, ``mhc_fused_post_pre_tilelang`` and
``hc_head_fused_kernel_tilelang`` of ``vllm.model_executor.kernels.mhc.tilelang``, which
DeepSeek-V4, its MTP layers and DSpark call on NVIDIA GPUs, and makes vLLM's custom ops of the
same names (``torch.ops.vllm.mhc_pre_tilelang`` and so on), which GLM-5.3 calls, run them too.
vLLM keeps its own: GLM-5.3's copy of the embedding and mean over the streams, and all of
DeepSeek-V4.1 but its post step.

Where mhc-ops is installed beside vLLM, the entry point ``mhc_ops`` of the group
``vllm.general_plugins`` calls :func:`plugin` in each of vLLM's processes. ``VLLM_PLUGINS``, a list
of names, says which plugins vLLM loads; all when it is not set.

A call that the ops do not serve runs vLLM's own function, and the log says why, once: another
device, ``hc_mult``, hidden size or dtype, a layout or an address that the kernels do not read,
kernels that are neither there nor can be compiled. The device is first looked at by a call, so
that CUDA is not initialised before vLLM does it. DeepSeek-V4 loads every kernel of its hidden size
when it has loaded its weights; any other model does so at its first call.

Tested with vLLM 0.33.0.
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
    """:func:`mhc_ops.post` as vLLM calls it.

    Args:
        x, residual, post_layer_mix, comb_res_mix: as there.

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
    """:func:`mhc_ops.pre` as vLLM calls it.

    Args:
        residual, fn, hc_scale, hc_base, rms_eps, hc_pre_eps, hc_sinkhorn_eps: as there.
        hc_post_mult_value, sinkhorn_repeat, norm_weight: as there.
        n_splits: how vLLM's kernels cut the projection; the ops cut it themselves.
        norm_eps: as there; without ``norm_weight`` it means nothing.

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
    """:func:`mhc_ops.expand_pre` as the first layer of vLLM's DeepSeek-V4 calls it.

    Args:
        residual: the embedding, x there.
        fn, hc_scale, hc_base, rms_eps, hc_pre_eps, hc_sinkhorn_eps: as there.
        hc_post_mult_value, sinkhorn_repeat, norm_weight: as there.
        n_splits: how vLLM's kernels cut the projection; the ops cut it themselves.
        norm_eps: as there; without ``norm_weight`` it means nothing.
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
    """:func:`mhc_ops.fused_post_pre` as vLLM calls it.

    Args:
        x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base: as there.
        rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value: as there.
        sinkhorn_repeat, norm_weight: as there.
        n_splits, tile_n: how vLLM's kernels cut their work; the ops cut it themselves.
        norm_eps: as there; without ``norm_weight`` it means nothing.

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
    """:func:`mhc_ops.head` as vLLM calls it.

    Args:
        hs_flat, fn, hc_scale, hc_base, rms_eps, hc_eps: residual, fn, scale, base, rms_eps and
            hc_eps there; vLLM's final norm follows by itself.

    Returns:
        The last hidden state, not normed.
    """
    return ops.head(hs_flat, fn, hc_scale, hc_base, rms_eps, hc_eps)


def finalize_mhc_broadcast_weights(self: Any) -> None:
    """Do what ``DeepseekV4Model`` does when its weights are loaded, then load the kernels.

    Args:
        self: the model, which has ``config``.
    """
    stock = _rebind.stock(finalize_mhc_broadcast_weights)
    assert stock is not None  # nobody else calls this function
    stock(self)
    try:
        sizes = self.config.hc_mult, self.config.hidden_size
        device = next(self.parameters()).device
    except (AttributeError, StopIteration):
        return  # whatever model this is, its first call decides
    _fallback.warm(*sizes, device)


_TILELANG = "vllm.model_executor.kernels.mhc.tilelang"
# Each has a custom op of its name, but for the one of the first layer.
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

# It lives as long as the custom ops run the functions above.
_library: torch.library.Library | None = None


def _override_custom_ops() -> None:
    global _library
    if _library is not None:
        return
    from vllm.platforms import current_platform

    library = torch.library.Library("vllm", "IMPL")
    with warnings.catch_warnings():
        # The dispatcher warns of every kernel that takes the place of another.
        warnings.simplefilter("ignore")
        for function in _CUSTOM_OPS:
            if hasattr(torch.ops.vllm, function.__name__):
                library.impl(
                    function.__name__, function, current_platform.dispatch_key, allow_override=True
                )
    _library = library


def install(*, hidden: int | None = None) -> None:
    """Make vLLM's mHC functions run the ops, in this process; again is harmless.

    Args:
        hidden: of the model. Where it is given, the current CUDA device is looked at now, and
            whether its kernels can be had; otherwise each is at the first call.

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
    """Put vLLM's own functions back; without :func:`install` before it, do nothing."""
    global _library
    if _library is not None:
        _library._destroy()
        _library = None
    _rebind.uninstall("vllm", REPLACEMENTS)


def plugin() -> None:
    """What vLLM's entry point calls: :func:`install`, or a warning that says why not.

    It runs in every process of vLLM, whatever the model: where the ops do not fit, vLLM has to
    start as it would without them.
    """
    _rebind.guarded("vLLM", install)

"""vLLM's DeepSeek-V4 on the mHC ops: :func:`install`, :func:`uninstall` and a plugin.

:func:`install` rebinds ``mhc_post_tilelang``, ``mhc_pre_tilelang``,
``mhc_fused_post_pre_tilelang`` and ``hc_head_fused_kernel_tilelang`` of
``vllm.model_executor.kernels.mhc.tilelang``, which the models for NVIDIA GPUs call. vLLM's custom
ops ``torch.ops.vllm.*`` and its first ``pre`` on the embedding stay its own.

Where mhc-ops is installed beside vLLM, the entry point ``mhc_ops`` of the group
``vllm.general_plugins`` calls :func:`plugin` in each of vLLM's processes. ``VLLM_PLUGINS``, a list
of names, says which plugins vLLM loads; all when it is not set.

A call that the ops do not serve runs vLLM's own function, and the log says why, once: another
device, ``hc_mult``, hidden size or dtype, a layout or an address that the kernels do not read,
kernels that are neither there nor can be compiled. The device is first looked at by a call, so
that CUDA is not initialised before vLLM does it.

Tested against the signatures of vLLM 0.33.0.
"""

from __future__ import annotations

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
        residual, fn, hc_scale, hc_base, rms_eps, hc_pre_eps, hc_sinkhorn_eps,
            hc_post_mult_value, sinkhorn_repeat, norm_weight: as there.
        n_splits: how vLLM's kernels cut the projection; the ops cut it themselves.
        norm_eps: as there; without ``norm_weight`` it means nothing.

    Returns:
        (post_mix, comb_mix, layer_input).
    """
    return ops.pre(
        residual, fn, hc_scale, hc_base, rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value,
        sinkhorn_repeat,
        norm_weight=norm_weight, norm_eps=None if norm_weight is None else norm_eps,
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
        x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, rms_eps, hc_pre_eps,
            hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat, norm_weight: as there.
        n_splits, tile_n: how vLLM's kernels cut their work; the ops cut it themselves.
        norm_eps: as there; without ``norm_weight`` it means nothing.

    Returns:
        (residual_out, post_mix, comb_mix, layer_input).
    """
    return ops.fused_post_pre(
        x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, rms_eps, hc_pre_eps,
        hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat,
        norm_weight=norm_weight, norm_eps=None if norm_weight is None else norm_eps,
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


REPLACEMENTS = tuple(
    _rebind.Replacement("vllm.model_executor.kernels.mhc.tilelang", function.__name__, function)
    for function in (
        mhc_post_tilelang,
        mhc_pre_tilelang,
        mhc_fused_post_pre_tilelang,
        hc_head_fused_kernel_tilelang,
    )
)


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


def uninstall() -> None:
    """Put vLLM's own functions back; without :func:`install` before it, do nothing."""
    _rebind.uninstall("vllm", REPLACEMENTS)


def plugin() -> None:
    """What vLLM's entry point calls: :func:`install`, or a warning that says why not.

    It runs in every process of vLLM, whatever the model: where the ops do not fit, vLLM has to
    start as it would without them.
    """
    _rebind.guarded("vLLM", install)

"""SGLang's DeepSeek-V4 on the mHC ops: :func:`install` and :func:`uninstall`.

:func:`install` rebinds ``mhc_post``, ``mhc_pre`` and ``mhc_fused_post_pre`` of
``sglang.kernels.ops.layernorm.mhc`` and ``fused_hc_head`` of ``mhc_head`` beside it. SGLang still
decides which of its paths runs: its switches for other implementations of a step (FlashInfer's,
DeepGEMM's) come before these functions.

SGLang runs the model in processes of its own. Where mhc-ops is installed beside it, the entry
point ``mhc_ops`` of the group ``sglang.srt.plugins`` calls :func:`plugin` in each of them.
``SGLANG_PLUGINS``, a list of names, says which plugins SGLang loads; all when it is not set.
Without the entry point call ``install()`` at the top level of the script that starts the engine,
not under ``if __name__ == "__main__"``: a spawned process imports that script too.

A call that the ops do not serve runs SGLang's own function, and the log says why, once: another
device, ``hc_mult``, hidden size or dtype, a layout or an address that the kernels do not read,
kernels that are neither there nor can be compiled. The device is first looked at by a call, so
that CUDA is not initialised before SGLang does it.

``layer_input`` comes from torch's allocator, not from SGLang's pool of symmetric memory: an
all-reduce that writes into it takes NCCL's usual way.

Tested against the signatures of SGLang 0.5.23.
"""

from __future__ import annotations

import sys

from torch import Tensor

from .. import ops
from . import _fallback, _rebind

TESTED = "0.5.23"


@_fallback.falls_back("residual")
def mhc_post(x: Tensor, residual: Tensor, post_layer_mix: Tensor, comb_res_mix: Tensor) -> Tensor:
    """:func:`mhc_ops.post` as SGLang calls it.

    Args:
        x, residual, post_layer_mix, comb_res_mix: as there.

    Returns:
        The new streams.
    """
    return ops.post(x, residual, post_layer_mix, comb_res_mix)


@_fallback.falls_back("residual")
def mhc_pre(
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
    n_splits_pre: int = 32,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`mhc_ops.pre` as SGLang calls it.

    Args:
        residual, fn, hc_scale, hc_base, rms_eps, hc_pre_eps, hc_sinkhorn_eps,
            hc_post_mult_value, sinkhorn_repeat, norm_weight, norm_eps: as there.
        n_splits, n_splits_pre: how SGLang's kernels cut the projection; the ops cut it themselves.

    Returns:
        (post_mix, comb_mix, layer_input).
    """
    return ops.pre(
        residual, fn, hc_scale, hc_base, rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value,
        sinkhorn_repeat, norm_weight=norm_weight, norm_eps=norm_eps,
    )  # fmt: skip


@_fallback.falls_back("residual")
def mhc_fused_post_pre(
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
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`mhc_ops.fused_post_pre` as SGLang calls it.

    Args:
        x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, rms_eps, hc_pre_eps,
            hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat, norm_weight, norm_eps: as there.
        n_splits, tile_n: how SGLang's kernels cut their work; the ops cut it themselves.

    Returns:
        (residual_out, post_mix, comb_mix, layer_input).
    """
    return ops.fused_post_pre(
        x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, rms_eps, hc_pre_eps,
        hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat,
        norm_weight=norm_weight, norm_eps=norm_eps,
    )  # fmt: skip


@_fallback.falls_back("x")
def fused_hc_head(
    x: Tensor, hc_fn: Tensor, hc_scale: Tensor, hc_base: Tensor, norm_eps: float, hc_eps: float
) -> Tensor:
    """:func:`mhc_ops.head` as SGLang calls it.

    Args:
        x, hc_fn, hc_scale, hc_base, norm_eps, hc_eps: residual, fn, scale, base, rms_eps and
            hc_eps there; SGLang's final norm follows by itself.

    Returns:
        The last hidden state, not normed.
    """
    return ops.head(x, hc_fn, hc_scale, hc_base, norm_eps, hc_eps)


_MHC = "sglang.kernels.ops.layernorm.mhc"
REPLACEMENTS = (
    _rebind.Replacement(_MHC, "mhc_post", mhc_post),
    _rebind.Replacement(_MHC, "mhc_pre", mhc_pre),
    _rebind.Replacement(_MHC, "mhc_fused_post_pre", mhc_fused_post_pre),
    _rebind.Replacement(f"{_MHC}_head", "fused_hc_head", fused_hc_head),
)


def _forget_cached() -> None:
    """SGLang's model keeps functions that it looked up once."""
    model = sys.modules.get("sglang.srt.models.deepseek_v4")
    forget = getattr(getattr(model, "get_mhc_ops", None), "cache_clear", None)
    if forget is not None:
        forget()


def install(*, hidden: int | None = None) -> None:
    """Make SGLang's mHC functions run the ops, in this process; again is harmless.

    Args:
        hidden: of the model. Where it is given, the current CUDA device is looked at now, and
            whether its kernels can be had; otherwise each is at the first call.

    Raises:
        RuntimeError: SGLang is not installed, one of its functions is missing or has another
            signature, torch is built for ROCm, or there are no kernels for ``hidden``. Nothing is
            replaced then.
    """
    if hidden is not None:
        _fallback.require("sglang", hidden)
    _rebind.install("sglang", TESTED, REPLACEMENTS)
    _forget_cached()


def uninstall() -> None:
    """Put SGLang's own functions back; without :func:`install` before it, do nothing."""
    _rebind.uninstall("sglang", REPLACEMENTS)
    _forget_cached()


def plugin() -> None:
    """What SGLang's entry point calls: :func:`install`, or a warning that says why not.

    It runs in every process of SGLang, whatever the model: where the ops do not fit, SGLang has to
    start as it would without them.
    """
    _rebind.guarded("SGLang", install)

"""Run SGLang's models with hyper-connections on the mHC ops: :func:`install`, :func:`uninstall`.

:func:`install` rebinds, in modules of ``sglang``:

* ``mhc_pre``, ``mhc_post`` and ``mhc_fused_post_pre`` of ``kernels.ops.layernorm.mhc``, which
  DeepSeek-V4 and GLM-5.3 call, and ``fused_hc_head`` of ``mhc_head`` beside it;
* of DeepSeek-V4, with any setting of SGLang's switches for other implementations (FlashInfer's,
  DeepGEMM's): ``DeepseekV4DecoderLayerBase.hc_pre``, ``deepseek_v4_mhc.post``, and the heads
  ``hc_head_torch`` (DSpark) and ``DeepseekV4ModelNextN.hc_head``;
* of GLM-5.3, ``Glm5NextDecoderLayer.hc_ffn_post_pre``, for any number of tokens.

SGLang keeps its own functions for the copy of the embedding into the streams, for GLM-5.3's mean
over the streams, and for all of DeepSeek-V4.1, whose pre step differs, but the post step of more
than 64 tokens.

SGLang runs the model in processes of its own. Where mhc-ops is installed beside it, the entry
point ``mhc_ops`` of the group ``sglang.srt.plugins`` calls :func:`plugin` in each of them.
``SGLANG_PLUGINS``, a list of names, says which plugins SGLang loads; SGLang loads all when the
variable is not set. Without the entry point call ``install()`` at the top level of the script that
starts the engine, not under ``if __name__ == "__main__"``, because a spawned process imports that
script too.

A call that the ops do not serve runs SGLang's own function, and the log says why, once. The reason
may be another device, ``hc_mult``, hidden size or dtype, a layout or an address that the kernels do
not read, or kernels that are neither built ahead nor cached and cannot be compiled. Only a call
looks at the device, so that CUDA is not initialised before SGLang does it. The first call loads
every kernel of the hidden size; SGLang makes that call when it has loaded the weights of
DeepSeek-V4.

``layer_input`` comes from torch's allocator and not from SGLang's pool of symmetric memory, so
NCCL runs an all-reduce that writes into it without symmetric memory.

This adapter is tested with SGLang 0.5.23.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from .. import ops
from . import _fallback, _rebind

TESTED = "0.5.23"


@_fallback.falls_back("residual")
def mhc_post(x: Tensor, residual: Tensor, post_layer_mix: Tensor, comb_res_mix: Tensor) -> Tensor:
    """Run :func:`mhc_ops.post` with the signature of SGLang's function.

    Args:
        x, residual, post_layer_mix, comb_res_mix: as in :func:`mhc_ops.post`.

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
    """Run :func:`mhc_ops.pre` with the signature of SGLang's function.

    Args:
        residual, fn, hc_scale, hc_base, rms_eps, hc_pre_eps: as in :func:`mhc_ops.pre`.
        hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat: as in :func:`mhc_ops.pre`.
        norm_weight, norm_eps: as in :func:`mhc_ops.pre`.
        n_splits, n_splits_pre: how SGLang's kernels cut the projection; the op needs neither.

    Returns:
        (post_mix, comb_mix, layer_input).
    """
    return ops.pre(
        residual, fn, hc_scale, hc_base, rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value,
        sinkhorn_repeat, norm_weight=_fallback.bf16(norm_weight), norm_eps=norm_eps,
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
    """Run :func:`mhc_ops.fused_post_pre` with the signature of SGLang's function.

    Args:
        x, residual, post_layer_mix, comb_res_mix, fn: as in :func:`mhc_ops.fused_post_pre`.
        hc_scale, hc_base, rms_eps, hc_pre_eps: as in :func:`mhc_ops.fused_post_pre`.
        hc_sinkhorn_eps, hc_post_mult_value: as in :func:`mhc_ops.fused_post_pre`.
        sinkhorn_repeat, norm_weight, norm_eps: as in :func:`mhc_ops.fused_post_pre`.
        n_splits, tile_n: how SGLang's kernels cut their work; the op needs neither.

    Returns:
        (residual_out, post_mix, comb_mix, layer_input).
    """
    return ops.fused_post_pre(
        x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, rms_eps, hc_pre_eps,
        hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat,
        norm_weight=_fallback.bf16(norm_weight), norm_eps=norm_eps,
    )  # fmt: skip


@_fallback.falls_back("x")
def fused_hc_head(
    x: Tensor, hc_fn: Tensor, hc_scale: Tensor, hc_base: Tensor, norm_eps: float, hc_eps: float
) -> Tensor:
    """Run :func:`mhc_ops.head` with the signature of SGLang's function.

    Args:
        x, hc_fn, hc_scale, hc_base, norm_eps, hc_eps: residual, fn, scale, base, rms_eps and
            hc_eps of :func:`mhc_ops.head`.

    Returns:
        The last hidden state, to which SGLang applies its final norm.
    """
    return ops.head(x, hc_fn, hc_scale, hc_base, norm_eps, hc_eps)


# -------------------------------------------------------------------- DeepSeek-V4, by its modules

_POST_MULT_VALUE = 2.0  # every model has this value, which is a constant in SGLang, too


@_fallback.falls_back("x")
def hc_head_torch(
    x: Tensor,
    hc_fn: Tensor,
    hc_scale: Tensor,
    hc_base: Tensor,
    *,
    norm_eps: float,
    hc_eps: float,
) -> Tensor:
    """Run :func:`mhc_ops.head` as DSpark calls its head.

    Args:
        x, hc_fn, hc_scale, hc_base, norm_eps, hc_eps: as in :func:`fused_hc_head`.

    Returns:
        The last hidden state, not normed.
    """
    return ops.head(x, hc_fn, hc_scale, hc_base, norm_eps, hc_eps)


@_fallback.falls_back("x")
def nextn_hc_head(self: Any, x: Tensor, hc_fn: Tensor, hc_scale: Tensor, hc_base: Tensor) -> Tensor:
    """Run :func:`mhc_ops.head` as a method of ``DeepseekV4ModelNextN``.

    Args:
        self: the model, which has ``rms_norm_eps`` and ``hc_eps``.
        x, hc_fn, hc_scale, hc_base: as in :func:`fused_hc_head`.

    Returns:
        The last hidden state, not normed.
    """
    return ops.head(x, hc_fn, hc_scale, hc_base, self.rms_norm_eps, self.hc_eps)


@_fallback.falls_back("x")
def layer_hc_pre(
    self: Any,
    x: Tensor,
    hc_fn: Tensor,
    hc_scale: Tensor,
    hc_base: Tensor,
    norm: Any = None,
    forward_batch: Any = None,
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Run :func:`mhc_ops.pre` as a method of ``DeepseekV4DecoderLayerBase``.

    Args:
        self: the layer, which has ``rms_norm_eps``, ``hc_eps`` and ``hc_sinkhorn_iters``.
        x: the streams [T, n, H].
        hc_fn, hc_scale, hc_base: as in :func:`mhc_pre`.
        norm: RMSNorm of the sublayer that follows, or None.
        forward_batch: SGLang's batch, which the op does not need.

    Returns:
        (layer_input, post_mix [T, n], comb_mix, whether layer_input is normed).
    """
    weight, eps = (None, None) if norm is None else (norm.weight.data, norm.variance_epsilon)
    post_mix, comb_mix, layer_input = ops.pre(
        x, hc_fn, hc_scale, hc_base, self.rms_norm_eps, self.hc_eps, self.hc_eps,
        _POST_MULT_VALUE, self.hc_sinkhorn_iters,
        norm_weight=_fallback.bf16(weight), norm_eps=eps,
    )  # fmt: skip
    return layer_input, post_mix.squeeze(-1), comb_mix, norm is not None


@_fallback.falls_back("residual")
def post(cfg: Any, x: Tensor, residual: Tensor, post_mix: Tensor, comb: Tensor) -> Tensor:
    """Run :func:`mhc_ops.post` as DeepSeek-V4's layers call their post step.

    Args:
        cfg: SGLang's configuration of the hyper-connection.
        x, residual, post_mix, comb: x, residual, post_layer_mix and comb_res_mix of
            :func:`mhc_ops.post`.

    Returns:
        The new streams.
    """
    if cfg.pre_from_prev:  # this is DeepSeek-V4.1, for which SGLang has kernels by token count
        raise _fallback.NotServed
    return ops.post(x, residual, post_mix, comb)


@_fallback.falls_back("hidden_states", flat="residual")
def glm_hc_ffn_post_pre(
    self: Any,
    hidden_states: Tensor,
    residual: Tensor,
    h_res: Tensor,
    h_post: Tensor,
    out_norm_weight: Tensor | None,
    out_norm_eps: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, bool] | None:
    """Run :func:`mhc_ops.fused_post_pre` as a method of ``Glm5NextDecoderLayer``.

    Args:
        self: the layer, which has ``hc_ffn_fn``, ``hc_ffn_scale``, ``hc_ffn_base`` and ``config``.
        hidden_states: the attention's output [T, H].
        residual: the streams [T, n*H].
        h_res: comb_res_mix [T, n*n].
        h_post: post_layer_mix [T, n].
        out_norm_weight, out_norm_eps: norm_weight and norm_eps.

    Returns:
        (layer_input, residual_out, comb_mix, post_mix, whether layer_input is normed), each in the
        shape that SGLang keeps. SGLang's own function returns None where it does not fuse.
    """
    config = self.config
    (tokens, hidden), n = hidden_states.shape, config.hc_mult
    residual_out, post_mix, comb_mix, layer_input = ops.fused_post_pre(
        hidden_states, residual.view(tokens, n, hidden), h_post.view(tokens, n),
        h_res.view(tokens, n, n), self.hc_ffn_fn, self.hc_ffn_scale, self.hc_ffn_base,
        config.rms_norm_eps, config.hc_eps, config.hc_eps, _POST_MULT_VALUE,
        config.hc_sinkhorn_iters,
        norm_weight=_fallback.bf16(out_norm_weight), norm_eps=out_norm_eps,
    )  # fmt: skip
    return (
        layer_input,
        residual_out.flatten(1),
        comb_mix.flatten(1),
        post_mix.flatten(1),
        out_norm_weight is not None,
    )


# ------------------------------------------------------------------------------------ the adapter

_MHC = "sglang.kernels.ops.layernorm.mhc"
_MODELS = "sglang.srt.models"
REPLACEMENTS = (
    _rebind.Replacement(_MHC, "mhc_post", mhc_post),
    _rebind.Replacement(_MHC, "mhc_pre", mhc_pre),
    _rebind.Replacement(_MHC, "mhc_fused_post_pre", mhc_fused_post_pre),
    _rebind.Replacement(f"{_MHC}_head", "fused_hc_head", fused_hc_head),
    _rebind.Replacement(f"{_MODELS}.deepseek_v4", "hc_head_torch", hc_head_torch, late=True),
    _rebind.Replacement(
        f"{_MODELS}.deepseek_v4", "DeepseekV4DecoderLayerBase.hc_pre", layer_hc_pre, late=True
    ),
    _rebind.Replacement(f"{_MODELS}.deepseek_v4_mhc", "post", post, late=True),
    _rebind.Replacement(
        f"{_MODELS}.deepseek_v4_nextn", "DeepseekV4ModelNextN.hc_head", nextn_hc_head, late=True
    ),
    _rebind.Replacement(
        f"{_MODELS}.glm5_next", "Glm5NextDecoderLayer.hc_ffn_post_pre", glm_hc_ffn_post_pre,
        late=True,
    ),
)  # fmt: skip


def _forget_cached() -> None:
    """Make SGLang's model look up its mHC functions again, which it keeps after the first time."""
    model = sys.modules.get("sglang.srt.models.deepseek_v4")
    forget = getattr(getattr(model, "get_mhc_ops", None), "cache_clear", None)
    if forget is not None:
        forget()


def install(*, hidden: int | None = None) -> None:
    """Make SGLang's mHC functions run the ops, in this process; a second call is harmless.

    Args:
        hidden: hidden size of the model. With it the current CUDA device and the availability of
            the kernels are checked now; without it the first call checks both.

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
    """Put SGLang's own functions back; without an :func:`install` before, do nothing."""
    _rebind.uninstall("sglang", REPLACEMENTS)
    _forget_cached()


def plugin() -> None:
    """Call :func:`install` for SGLang's entry point, and log a failure as a warning.

    SGLang calls this in every process, with any model. Where the ops do not fit, SGLang has to
    start as it would without them.
    """
    _rebind.guarded("SGLang", install)

"""Define every op readably in fp32, as its reference and as its CPU kernel.

The functions take tensors of any floating dtype and any device and compute in ``compute_dtype``
(float32 unless told): called with ``torch.float64`` they are the oracle of the tests. Rounding
points are those of the ops: the new streams are rounded once, the projection reads the rounded
streams, the layer input is rounded before and after the norm.

On the CPU and without gradients a token has the same bits alone and at any place in any batch.
PyTorch does not ensure that by itself; the private functions at the head of this file do.

Formulas: mHC (Xie et al., 2026) as used in DeepSeek-V4, ``DeepseekV4HyperConnection`` of
transformers. n is the number of residual streams (hc_mult), H the hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

# The projection, the one long sum of products here, is summed in float64 on these devices and
# rounded once. torch lets settings of the whole process (the fp32_precision of its backends,
# autocast) make float32 products coarser, but leaves those of float64 as they are. Devices of other
# types may have no float64.
WITH_FLOAT64 = ("cpu", "cuda")

# Columns of fn that a CPU multiplies at a time, so that all rows of fn stay in its cache.
COLUMNS_AT_A_TIME = 1024


def _is_alone(values: Tensor) -> bool:
    """Return whether [..., a, b] is of one token and on the CPU; callers compute that token twice.

    PyTorch treats one token unlike several: a batch of one matrix product goes to another function
    of the BLAS, and threads share a sum that is the only one. The shape of a DTensor does not say
    how many tokens a process has; the ops never see a DTensor.
    """
    return type(values) is Tensor and values.is_cpu and values.shape[:-2].numel() == 1


def _mix(streams: Tensor, weights: Tensor) -> Tensor:
    """Compute ``sum_i weights[i, j] * streams[i]``: [..., n, H] and [..., n, m] to [..., m, H].

    n is small, so the sum is written out term by term; each product and each sum is rounded to the
    dtype, whatever other tokens there are and whatever precision torch uses in matrix products.
    """
    result = weights[..., 0, :, None] * streams[..., 0, None, :]
    for i in range(1, streams.shape[-2]):
        result += weights[..., i, :, None] * streams[..., i, None, :]
    return result


def _linear(values: Tensor, weights: Tensor) -> Tensor:
    """Compute ``values @ weights^T``: [..., K] and [M, K] to [..., M]."""
    wide = torch.float64 if values.device.type in WITH_FLOAT64 else values.dtype
    if not values.is_cpu or (weights.requires_grad and torch.is_grad_enabled()):
        # This is faster, and memory holds no gradient of the weights for every token.
        return torch.matmul(values.to(wide), weights.to(wide).t()).to(values.dtype)
    # The products of a matrix that holds several tokens are added up in an order that depends on
    # the number of tokens; in a batch of matrices of one token each, every token meets the same
    # shape. The sum's order depends on the address of the weights too, which a copy aligns.
    result = values.new_zeros((), dtype=wide)
    for part, columns in zip(
        values.split(COLUMNS_AT_A_TIME, -1), weights.split(COLUMNS_AT_A_TIME, -1), strict=True
    ):
        left = part.unsqueeze(-2).to(wide)
        right = columns.to(wide, memory_format=torch.contiguous_format, copy=True).t()
        right = right.expand(*values.shape[:-1], -1, -1)
        if _is_alone(left):
            left, right = left.expand(2, *left.shape), right.expand(2, *right.shape)
            result = result + torch.matmul(left, right)[0]
        else:
            result = result + torch.matmul(left, right)
    return result.squeeze(-2).to(values.dtype)


def _mean_square(values: Tensor) -> Tensor:
    """Compute ``mean_k(values[k]^2)`` of each token: [..., K] to [..., 1]."""
    rows = values.square().unsqueeze(-2)
    if _is_alone(rows):
        return rows.expand(2, *rows.shape).mean(-1)[0]
    return rows.mean(-1)


def _sigmoid(logits: Tensor) -> Tensor:
    """Compute ``1 / (1 + exp(-logits))``.

    On the CPU PyTorch computes 16 or 32 neighbours at once, and the last few of a stretch of memory
    one by one, with another exp. A gap after each token makes each token a stretch by itself.
    """
    if logits.is_cpu:
        logits = pad(logits, (0, 1))[..., :-1]
    return torch.sigmoid(logits)


def post(
    x: Tensor,
    residual: Tensor,
    post_layer_mix: Tensor,
    comb_res_mix: Tensor,
    *,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Compute the new streams in ``compute_dtype`` and round them once::

        residual_out[j] = round(post_layer_mix[j] * x + sum_i comb_res_mix[i, j] * residual[i])

    Args:
        x: [..., H], output of the sublayer.
        residual: [..., n, H], the residual streams before the sublayer.
        post_layer_mix: [..., n, 1] or [..., n], the post weights of the sublayer.
        comb_res_mix: [..., n, n], indexed [old stream, new stream].
        compute_dtype: dtype of the arithmetic.

    Returns:
        The new streams, [..., n, H], dtype of ``residual``.
    """
    if post_layer_mix.dim() == x.dim():
        post_layer_mix = post_layer_mix.unsqueeze(-1)
    x, streams = x.to(compute_dtype), residual.to(compute_dtype)
    mixed = _mix(streams, comb_res_mix.to(compute_dtype))
    return (post_layer_mix.to(compute_dtype) * x.unsqueeze(-2) + mixed).to(residual.dtype)


def expand(x: Tensor, hc_mult: int) -> Tensor:
    """Copy the embedding into every stream j that a model starts from::

        streams[j] = x

    Args:
        x: [..., H], the embedding.
        hc_mult: number of residual streams, n.

    Returns:
        [..., n, H], contiguous.
    """
    return x.unsqueeze(-2).repeat(*[1] * (x.dim() - 1), hc_mult, 1)


def project(
    residual: Tensor, fn: Tensor, rms_eps: float, *, compute_dtype: torch.dtype = torch.float32
) -> Tensor:
    """Project the streams, k over all their n * H elements, and divide by their size::

        m = (sum_k residual[k] * fn[:, k]) * rsqrt(mean_k(residual[k]^2) + rms_eps)

    Args:
        residual: [..., n, H].
        fn: [M, n * H], column index = stream * H + h.
        rms_eps: added to the mean square.
        compute_dtype: dtype of the arithmetic.

    Returns:
        [..., M] in ``compute_dtype``.
    """
    flat = residual.flatten(-2).to(compute_dtype)
    inverse_rms = torch.rsqrt(_mean_square(flat) + rms_eps)
    return _linear(flat, fn.to(compute_dtype)) * inverse_rms


def sinkhorn(logits: Tensor, eps: float, repeat: int) -> Tensor:
    """Make a matrix whose rows and columns sum to 1, nearly, by Sinkhorn's iteration::

        C  = softmax_rows(logits) + eps
        C /= sum of each column + eps
        repeat - 1 times:
            C /= sum of each row + eps
            C /= sum of each column + eps

    Args:
        logits: [..., n, n].
        eps: added to the softmax and to every sum.
        repeat: rounds, counting the first, which has no row step.

    Returns:
        [..., n, n], near doubly stochastic.
    """
    comb = logits.softmax(-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(repeat - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return comb


def collapse(
    residual: Tensor,
    weights: Tensor,
    norm_weight: Tensor | None,
    norm_eps: float | None,
) -> Tensor:
    """Collapse the streams j into one row, followed by an RMSNorm where there is one::

        v = sum_j weights[j] * residual[j]
        y = round(v), or with a norm
            round(round(v) * rsqrt(mean(v^2) + norm_eps) * norm_weight)

    Args:
        residual: [..., n, H].
        weights: [..., n], in the dtype of the arithmetic.
        norm_weight: [H], weight of the RMSNorm, or None for no norm.
        norm_eps: the epsilon of the RMSNorm; given exactly when ``norm_weight`` is.

    Returns:
        [..., H], dtype of ``residual``.
    """
    dtype, compute_dtype = residual.dtype, weights.dtype
    value = _mix(residual.to(compute_dtype), weights.unsqueeze(-1)).squeeze(-2)
    rounded = value.to(dtype)
    if norm_weight is None or norm_eps is None:
        return rounded
    inverse_rms = torch.rsqrt(_mean_square(value) + norm_eps)
    gain = norm_weight.to(dtype).to(compute_dtype)
    return (rounded.to(compute_dtype) * inverse_rms * gain).to(dtype)


def pre(
    residual: Tensor,
    fn: Tensor,
    hc_scale: Tensor,
    hc_base: Tensor,
    rms_eps: float,
    hc_pre_eps: float,
    hc_sinkhorn_eps: float,
    hc_post_mult_value: float,
    sinkhorn_repeat: int,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Make the mixes of the next sublayer and its input, each formula in a function above::

        m           = project(residual, fn, rms_eps)
        w           = sigmoid(m[0:n] * hc_scale[0] + hc_base[0:n]) + hc_pre_eps
        post_mix    = sigmoid(m[n:2n] * hc_scale[1] + hc_base[n:2n]) * hc_post_mult_value
        comb_mix    = sinkhorn(m[2n:] * hc_scale[2] + hc_base[2n:])
        layer_input = collapse(residual, w)

    Args:
        residual, fn, hc_scale, hc_base: as in :func:`mhc_ops.pre`.
        rms_eps, hc_pre_eps, hc_sinkhorn_eps: as there.
        hc_post_mult_value, sinkhorn_repeat, norm_weight, norm_eps: as there.
        compute_dtype: dtype of the arithmetic.

    Returns:
        (post_mix [..., n, 1], comb_mix [..., n, n], layer_input [..., H]); the mixes in
        ``compute_dtype``, the layer input in the dtype of ``residual``.
    """
    n = residual.shape[-2]
    scale, base = hc_scale.to(compute_dtype), hc_base.to(compute_dtype)
    m = project(residual, fn, rms_eps, compute_dtype=compute_dtype)
    pre_mix = _sigmoid(m[..., :n] * scale[0] + base[:n]) + hc_pre_eps
    post_mix = _sigmoid(m[..., n : 2 * n] * scale[1] + base[n : 2 * n]) * hc_post_mult_value
    logits = (m[..., 2 * n :] * scale[2] + base[2 * n :]).unflatten(-1, (n, n))
    comb_mix = sinkhorn(logits, hc_sinkhorn_eps, sinkhorn_repeat)
    return post_mix.unsqueeze(-1), comb_mix, collapse(residual, pre_mix, norm_weight, norm_eps)


def head(
    residual: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    rms_eps: float,
    hc_eps: float,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Collapse the streams after the last layer::

        m      = project(residual, fn, rms_eps)
        hidden = collapse(residual, sigmoid(m * scale + base) + hc_eps)

    Args:
        residual, fn, scale, base, rms_eps, hc_eps, norm_weight, norm_eps: as in
            :func:`mhc_ops.head`.
        compute_dtype: dtype of the arithmetic.

    Returns:
        [..., H], dtype of ``residual``.
    """
    m = project(residual, fn, rms_eps, compute_dtype=compute_dtype)
    weights = _sigmoid(m * scale.to(compute_dtype) + base.to(compute_dtype)) + hc_eps
    return collapse(residual, weights, norm_weight, norm_eps)

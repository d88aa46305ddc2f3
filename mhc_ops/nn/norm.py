"""Hold RMSNorms whose weight the ops fold in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._arguments import ACTIVATION
from . import _checked


class FoldedRMSNorm(torch.nn.Module):
    """Hold the weight of an RMSNorm that the pre step or the head folds in::

        y = bf16(x * rsqrt(mean(x^2) + eps) * weight)

    The ops want the weight in bf16. A model that keeps it in fp32 would cast it in every call, so
    a bf16 copy stands in the buffer ``norm_weight_cache``: no parameter, not in checkpoints, moved
    with the module. It is refreshed in place, which keeps captured CUDA graphs valid: by
    ``load_state_dict``, and by :meth:`refresh_norm_weight_cache` after any other write.

    Args:
        hidden_size: the hidden size, H.
        eps: added to the mean square.
        device: device of the weight.
        dtype: dtype of the weight.

    Raises:
        TypeError, ValueError: an argument of a wrong type, or out of the range that the ops take.
    """

    weight: Tensor
    norm_weight_cache: Tensor
    norm_eps: float

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = ACTIVATION,
    ) -> None:
        super().__init__()
        hidden_size = _checked.size("FoldedRMSNorm", "hidden_size", hidden_size)
        dtype = _checked.dtype("FoldedRMSNorm", "dtype", dtype)
        self.norm_eps = _checked.number("FoldedRMSNorm", "eps", eps)
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.add_norm_weight_cache()

    def add_norm_weight_cache(self) -> None:
        """Register the buffer with a bf16 copy of the weight."""
        self.register_buffer(
            "norm_weight_cache",
            self.weight.detach().to(ACTIVATION, copy=True),
            persistent=False,
        )

    @torch.no_grad()
    def refresh_norm_weight_cache(self) -> None:
        """Copy the weight into its bf16 cache, in place."""
        self.norm_weight_cache.copy_(self.weight)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Move the cache along, and keep it in bf16, when ``.to()`` or ``.float()`` is called."""
        super()._apply(*args, **kwargs)
        if self.norm_weight_cache.dtype != ACTIVATION:
            self.add_norm_weight_cache()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.refresh_norm_weight_cache()

    def forward(self, x: Tensor) -> Tensor:
        """Norm a tensor by itself, where no op folds the norm in::

            y = round(x * rsqrt(mean(x^2) + eps) * weight)

        Args:
            x: [..., H].

        Returns:
            [..., H], dtype of ``x``.
        """
        value = x.float()
        inverse_rms = torch.rsqrt(value.square().mean(-1, keepdim=True) + self.norm_eps)
        return (value * inverse_rms * self.norm_weight_cache.float()).to(x.dtype)


def norm_arguments(norm: FoldedRMSNorm | None) -> dict[str, Any]:
    """Name the arguments of a pre step or a head that folds a norm in; none without a norm."""
    if norm is None:
        return {}
    return {"norm_weight": norm.norm_weight_cache, "norm_eps": norm.norm_eps}


def refresh_norm_weight_cache(model: torch.nn.Module) -> None:
    """Copy every norm weight of a model into its bf16 cache, in place.

    Call this after weights were written other than by ``load_state_dict``. Captured CUDA graphs see
    the new weights.

    Args:
        model: any module; every :class:`FoldedRMSNorm` in it is refreshed.
    """
    for module in model.modules():
        if isinstance(module, FoldedRMSNorm):
            module.refresh_norm_weight_cache()

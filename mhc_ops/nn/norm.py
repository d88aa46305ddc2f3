"""Hold RMSNorms whose weight the ops fold in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .._arguments import ACTIVATION
from . import _checked

T = TypeVar("T")


class _Cache(NamedTuple):
    """Hold the bf16 copy of a parameter, and what the parameter was when the copy was made."""

    source: torch.nn.Parameter
    version: int
    address: int
    copy: Tensor

    def current(self) -> bool:
        """Say whether nothing has written the parameter since, as far as PyTorch can tell."""
        return self.source._version == self.version and self.source.data_ptr() == self.address


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _traced(value: Any) -> bool:
    """Say whether torch.fx traces a value symbolically."""
    return isinstance(value, torch.fx.Proxy)


class FoldedRMSNorm(torch.nn.Module):
    """Hold the weight of an RMSNorm that the pre step or the head folds in::

        y = bf16(x * rsqrt(mean(x^2) + eps) * weight)

    The ops want the weight in bf16. A weight in bf16 is handed to them as it is. Of a parameter in
    another dtype, such as fp32, the module keeps a bf16 copy, which saves a cast in every call. The
    copy is made by :func:`mhc_ops.nn.wire`, by ``load_state_dict`` and by
    :meth:`refresh_norm_weight_cache`, and is written anew, in place, by the first eager call that
    finds the parameter changed. It is neither a parameter nor a buffer.

    A traced graph (``torch.compile``, ``torch.export``) and a tensor that stands in for the
    parameter (``torch.func.functional_call``, a sharded parameter that was gathered) have nothing
    to do with the copy: they cast. So does a module that has recorded gradients of its weight,
    until the copy is made again, because some optimizers write weights without PyTorch's counting
    it.

    Args:
        hidden_size: the hidden size, H.
        eps: added to the mean square.
        device: device of the weight.
        dtype: dtype of the weight.

    Raises:
        TypeError, ValueError: an argument of a wrong type, or out of the range that the ops take.
    """

    weight: Tensor
    norm_eps: float
    _norm_weight_cache: _Cache | None = None
    _trained: bool = False

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

    def folded_weight(self) -> Tensor:
        """Return the weight as the ops take it.

        Returns:
            [H] bf16: the weight itself where it is in bf16, otherwise the copy or a cast.
        """
        weight = self.weight
        if _traced(weight) or weight.dtype == ACTIVATION:
            return weight  # torch.fx knows no dtype; the op casts a weight of another one
        if weight.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_exporting():
            self._trained = True
        if torch.compiler.is_compiling():
            return weight.to(ACTIVATION)  # a copy would be a constant of the graph
        cache = self._norm_weight_cache
        if cache is None or weight is not cache.source or self._trained:
            return weight.to(ACTIVATION)
        if not cache.current():
            if _capturing(weight):
                return weight.to(ACTIVATION)  # a capture runs nothing, so it can write no copy
            self.refresh_norm_weight_cache()
            cache = self._norm_weight_cache
        return weight.to(ACTIVATION) if cache is None else cache.copy

    @torch.no_grad()
    def refresh_norm_weight_cache(self) -> None:
        """Write the bf16 copy of the weight anew, in place; do nothing where the weight is bf16.

        Raises:
            RuntimeError: the call is part of a CUDA-graph capture.
        """
        weight, cache = self.weight, self._norm_weight_cache
        self._trained = False
        if (
            weight.dtype == ACTIVATION
            or type(weight) is not torch.nn.Parameter
            or weight.is_meta
            or weight.is_inference()  # such a tensor does not count the writes to it
        ):
            self._norm_weight_cache = None
            return
        if _capturing(weight):
            raise RuntimeError(
                "mhc_ops.nn.refresh_norm_weight_cache: expected a call outside of a CUDA-graph "
                "capture, got one inside, where nothing is copied before the graph is replayed"
            )
        version, address = weight._version, weight.data_ptr()
        with torch.inference_mode(False):  # a copy made in inference mode could not be written
            copy = None if cache is None else cache.copy
            if copy is None or copy.device != weight.device or copy.shape != weight.shape:
                copy = torch.empty_like(weight, dtype=ACTIVATION, requires_grad=False)
            copy.copy_(weight)
        if weight.is_cuda:
            # Calls on other streams take the copy as current from here on.
            torch.cuda.current_stream(weight.device).synchronize()
        self._norm_weight_cache = _Cache(weight, version, address, copy)

    def _renew(self) -> None:
        if self._norm_weight_cache is not None:
            self.refresh_norm_weight_cache()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Let the copy follow the weight when ``.to()`` or ``.float()`` is called."""
        super()._apply(*args, **kwargs)
        self._renew()
        return self

    def __setstate__(self, state: Any) -> None:
        """Give what was copied or unpickled a copy of its own weight."""
        super().__setstate__(state)
        self._renew()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.refresh_norm_weight_cache()

    def forward(self, x: Tensor | Callable[..., T], *arguments: Any) -> Tensor | T:
        """Norm a tensor by itself, or run a step that folds the norm in::

            y = round(x * rsqrt(mean(x^2) + eps) * weight)

        The norm is called also where a step folds it in, so that hooks of the module run before its
        weight is read: those of FSDP2, for one, gather the weight.

        Args:
            x: [..., H]; or the step, which takes ``norm_weight`` and ``norm_eps`` by name.
            arguments: the other arguments of the step; none for a tensor.

        Returns:
            [..., H], dtype of ``x``; or what the step returns.
        """
        given: Any = x
        if not isinstance(given, Tensor) and not _traced(given):
            return given(*arguments, norm_weight=self.folded_weight(), norm_eps=self.norm_eps)
        value = given.float()
        inverse_rms = torch.rsqrt(value.square().mean(-1, keepdim=True) + self.norm_eps)
        return (value * inverse_rms * self.folded_weight().float()).to(given.dtype)


def run_folded(norm: FoldedRMSNorm | None, step: Callable[..., T], *arguments: Any) -> T:
    """Call a step through the norm that it folds in, or by itself where there is none."""
    return step(*arguments) if norm is None else norm(step, *arguments)


def refresh_norm_weight_cache(model: torch.nn.Module) -> None:
    """Write every bf16 copy of a norm weight in a model anew, in place.

    Norm weights in bf16 have no copy and need no call. Of other dtypes, call this function after a
    write that PyTorch does not count, such as ``weight.data.copy_()`` or a collective of
    ``torch.distributed``; and, before a CUDA graph is replayed, after any write. Captured graphs
    stay valid and see the new weights.

    Args:
        model: any module; every :class:`FoldedRMSNorm` in it is refreshed.

    Raises:
        RuntimeError: the call is part of a CUDA-graph capture.
    """
    for module in model.modules():
        if isinstance(module, FoldedRMSNorm):
            module.refresh_norm_weight_cache()

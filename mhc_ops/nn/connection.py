"""Hold the parameters of a hyper-connection and of the head, and run their steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import geometry
from .._arguments import MIX, mixes
from . import _checked
from .norm import FoldedRMSNorm, norm_arguments
from .state import Copies, StreamState, SublayerEntry, expand
from .wiring import Wired

POST_MULT_VALUE = 2.0  # with this factor post weights lie in (0, 2), as in DeepSeek-V4


class HyperConnection(Wired):
    """Hold the hyper-connection of one sublayer: its parameters and its pre step::

        post, comb, layer_input = mhc_ops.pre(residual, fn, scale, base, ...)

    Args:
        hidden_size: the hidden size, H.
        hc_mult: number of residual streams, n.
        rms_eps: added to the mean square of the streams.
        hc_pre_eps: added to the collapse weights.
        hc_sinkhorn_eps: added to the softmax and to every row and column sum.
        sinkhorn_repeat: rounds of Sinkhorn, counting the first.
        hc_post_mult_value: factor of the post weights.
        device: device of the parameters.

    Attributes:
        fn: [n * (n + 2), n * H] fp32, projection; column index = stream * H + h.
        base: [n * (n + 2)] fp32, biases.
        scale: [3] fp32, scales of the pre, post and comb weights.

    Raises:
        TypeError, ValueError: an argument of a wrong type, or out of the range that the ops take.
    """

    base: Tensor
    scale: Tensor
    rms_eps: float
    hc_pre_eps: float
    hc_sinkhorn_eps: float
    sinkhorn_repeat: int
    hc_post_mult_value: float

    def __init__(
        self,
        hidden_size: int,
        hc_mult: int = geometry.HC_MULT,
        *,
        rms_eps: float = 1e-6,
        hc_pre_eps: float = 1e-6,
        hc_sinkhorn_eps: float = 1e-6,
        sinkhorn_repeat: int = 20,
        hc_post_mult_value: float = POST_MULT_VALUE,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        name = "HyperConnection"
        self.hidden_size = _checked.size(name, "hidden_size", hidden_size)
        self.hc_mult = _checked.size(name, "hc_mult", hc_mult)
        self.rms_eps = _checked.number(name, "rms_eps", rms_eps)
        self.hc_pre_eps = _checked.number(name, "hc_pre_eps", hc_pre_eps)
        self.hc_sinkhorn_eps = _checked.number(name, "hc_sinkhorn_eps", hc_sinkhorn_eps)
        self.sinkhorn_repeat = _checked.number(
            name, "sinkhorn_repeat", sinkhorn_repeat, "sinkhorn_repeat"
        )
        self.hc_post_mult_value = _checked.number(
            name, "hc_post_mult_value", hc_post_mult_value, "hc_post_mult_value"
        )
        rows = mixes(self.hc_mult)
        self.fn = _normal_parameter(rows, self.hc_mult * self.hidden_size, device)
        self.base = torch.nn.Parameter(torch.zeros(rows, device=device, dtype=MIX))
        self.scale = torch.nn.Parameter(torch.ones(3, device=device, dtype=MIX))

    def _arguments(self) -> tuple[Any, ...]:
        """Return the arguments of a pre step that follow the streams."""
        return (
            self.fn, self.scale, self.base, self.rms_eps, self.hc_pre_eps, self.hc_sinkhorn_eps,
            self.hc_post_mult_value, self.sinkhorn_repeat,
        )  # fmt: skip

    def pre(self, residual: Tensor | Copies, norm: FoldedRMSNorm | None = None) -> SublayerEntry:
        """Run the pre step on plain streams, with the formula of :func:`mhc_ops.pre`::

            post, comb, layer_input = mhc_ops.pre(residual, fn, scale, base, ...)

        Args:
            residual: [..., n, H] bf16, the streams; or the copies that a model starts from, which
                one ``expand_pre`` makes where the model is wired fused.
            norm: the RMSNorm before the sublayer, folded in; None for none.

        Returns:
            The sublayer's input, with the streams and the weights of its post step.

        Raises:
            RuntimeError: the module is not wired.
        """
        steps = self._steps()
        if isinstance(residual, Copies):
            if steps.expand_pre is not None:
                streams, post, comb, layer_input = steps.expand_pre(
                    residual.x, *self._arguments(), **norm_arguments(norm)
                )
                return SublayerEntry(streams, layer_input, post, comb)
            residual = expand(residual.x, self.hc_mult)
        post, comb, layer_input = steps.pre(residual, *self._arguments(), **norm_arguments(norm))
        return SublayerEntry(residual, layer_input, post, comb)

    def boundary(self, state: StreamState, norm: FoldedRMSNorm | None = None) -> SublayerEntry:
        """Run the post step that is pending, then the pre step of this connection::

            residual = mhc_ops.post(x, residual, post, comb)     # of the state
            post, comb, layer_input = mhc_ops.pre(residual, fn, scale, base, ...)

        One ``fused_post_pre`` where the model is wired fused; ``post``, then ``pre`` otherwise.

        Args:
            state: the streams and what the previous sublayer left pending.
            norm: the RMSNorm before this sublayer, folded in; None for none.

        Returns:
            The sublayer's input, with the new streams and the weights of its post step.

        Raises:
            RuntimeError: the module is not wired.
        """
        steps = self._steps()
        if steps.fused_post_pre is None:
            return self.pre(state.materialise(steps.post), norm)
        residual, post, comb, layer_input = steps.fused_post_pre(
            state.x,
            state.residual,
            state.post,
            state.comb,
            *self._arguments(),
            **norm_arguments(norm),
        )
        return SublayerEntry(residual, layer_input, post, comb)


class HyperHead(Wired):
    """Collapse the streams after the last layer::

        hidden = mhc_ops.head(streams, fn, scale, base, ...)

    Args:
        hidden_size: the hidden size, H.
        hc_mult: number of residual streams, n.
        rms_eps: added to the mean square of the streams.
        hc_eps: added to the weights.
        device: device of the parameters.

    Attributes:
        fn: [n, n * H] fp32, projection; column index = stream * H + h.
        base: [n] fp32, biases.
        scale: [1] fp32, scale of the weights.

    Raises:
        TypeError, ValueError: an argument of a wrong type, or out of the range that the ops take.
    """

    base: Tensor
    scale: Tensor
    rms_eps: float
    hc_eps: float

    def __init__(
        self,
        hidden_size: int,
        hc_mult: int = geometry.HC_MULT,
        *,
        rms_eps: float = 1e-6,
        hc_eps: float = 1e-6,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        name = "HyperHead"
        self.hidden_size = _checked.size(name, "hidden_size", hidden_size)
        self.hc_mult = _checked.size(name, "hc_mult", hc_mult)
        self.rms_eps = _checked.number(name, "rms_eps", rms_eps)
        self.hc_eps = _checked.number(name, "hc_eps", hc_eps)
        self.fn = _normal_parameter(self.hc_mult, self.hc_mult * self.hidden_size, device)
        self.base = torch.nn.Parameter(torch.zeros(self.hc_mult, device=device, dtype=MIX))
        self.scale = torch.nn.Parameter(torch.ones(1, device=device, dtype=MIX))

    def _arguments(self, norm: FoldedRMSNorm | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a head that follow the streams, by position and by name."""
        positional = (self.fn, self.scale, self.base, self.rms_eps, self.hc_eps)
        return positional, norm_arguments(norm)

    def collapse(self, streams: Tensor | StreamState, norm: FoldedRMSNorm | None = None) -> Tensor:
        """Compute the last hidden state, with the formula of :func:`mhc_ops.head`::

            hidden = mhc_ops.head(streams, fn, scale, base, ...)

        Args:
            streams: [..., n, H] bf16, or a state, whose pending post step is applied first: one
                ``post_head`` where the model is wired fused, which does not write the streams.
            norm: the final RMSNorm, folded in; None for none.

        Returns:
            [..., H] bf16.

        Raises:
            RuntimeError: the module is not wired.
        """
        steps = self._steps()
        arguments, options = self._arguments(norm)
        if isinstance(streams, StreamState):
            state = streams
            if steps.post_head is not None:
                return steps.post_head(
                    state.x, state.residual, state.post, state.comb, *arguments, **options
                )
            streams = state.materialise(steps.post)
        return steps.head(streams, *arguments, **options)

    def materialise_and_collapse(
        self, state: StreamState, norm: FoldedRMSNorm | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute the plain streams, which a draft layer starts from, and the last hidden state.

        This is one ``post_head_streams`` where the model is wired fused; ``post``, then ``head``
        otherwise.

        Args:
            state: the streams and what the last sublayer left pending.
            norm: the final RMSNorm, folded in; None for none.

        Returns:
            (streams [..., n, H] bf16, hidden [..., H] bf16).

        Raises:
            RuntimeError: the module is not wired.
        """
        steps = self._steps()
        arguments, options = self._arguments(norm)
        if steps.post_head_streams is not None:
            streams, hidden = steps.post_head_streams(
                state.x, state.residual, state.post, state.comb, *arguments, **options
            )
            return streams, hidden
        streams = state.materialise(steps.post)
        return streams, steps.head(streams, *arguments, **options)


def _normal_parameter(
    rows: int, columns: int, device: torch.device | str | None
) -> torch.nn.Parameter:
    weight = torch.empty(rows, columns, device=device, dtype=MIX)
    return torch.nn.Parameter(torch.nn.init.normal_(weight, std=0.02))

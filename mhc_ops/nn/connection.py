"""Hold the parameters of a hyper-connection and of the head, and run their steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import geometry
from .._arguments import MIX, mixes
from . import _checked
from .norm import FoldedRMSNorm, run_folded
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

    def forward(
        self,
        streams: Tensor | Copies | StreamState,
        *,
        norm_weight: Tensor | None = None,
        norm_eps: float | None = None,
    ) -> SublayerEntry:
        """Run the pre step, after the post step that is pending where there is one.

        :meth:`pre` and :meth:`boundary` call the module, so that its hooks run before ``fn``,
        ``scale`` and ``base`` are read: those of FSDP2, for one, gather the parameters.

        Args:
            streams: as the argument of :meth:`pre` or of :meth:`boundary`.
            norm_weight, norm_eps: the norm to fold in, as in :func:`mhc_ops.pre`.

        Returns:
            As :meth:`pre` and :meth:`boundary`.

        Raises:
            RuntimeError: the module is not wired.
        """
        steps = self._steps()
        options = _norm_options(norm_weight, norm_eps)
        if isinstance(streams, StreamState):
            if steps.fused_post_pre is not None:
                residual, post, comb, layer_input = steps.fused_post_pre(
                    *_pending(streams), *self._arguments(), **options
                )
                return SublayerEntry(residual, layer_input, post, comb)
            streams = streams.materialise(steps.post)
        elif isinstance(streams, Copies):
            if steps.expand_pre is not None:
                residual, post, comb, layer_input = steps.expand_pre(
                    streams.x, *self._arguments(), **options
                )
                return SublayerEntry(residual, layer_input, post, comb)
            streams = expand(streams.x, self.hc_mult)
        post, comb, layer_input = steps.pre(streams, *self._arguments(), **options)
        return SublayerEntry(streams, layer_input, post, comb)

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
        return run_folded(norm, self, residual)

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
        return run_folded(norm, self, state)


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

    def forward(
        self,
        streams: Tensor | StreamState,
        keep_streams: bool = False,
        *,
        norm_weight: Tensor | None = None,
        norm_eps: float | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run the head, after the post step that is pending where there is one.

        :meth:`collapse` and :meth:`materialise_and_collapse` call the module, so that its hooks run
        before ``fn``, ``scale`` and ``base`` are read.

        Args:
            streams: as the argument of :meth:`collapse`.
            keep_streams: whether the plain streams are returned, too.
            norm_weight, norm_eps: the norm to fold in, as in :func:`mhc_ops.head`.

        Returns:
            As :meth:`collapse`; with ``keep_streams`` as :meth:`materialise_and_collapse`.

        Raises:
            RuntimeError: the module is not wired.
        """
        steps = self._steps()
        arguments = (self.fn, self.scale, self.base, self.rms_eps, self.hc_eps)
        options = _norm_options(norm_weight, norm_eps)
        if isinstance(streams, StreamState):
            if keep_streams and steps.post_head_streams is not None:
                plain, hidden = steps.post_head_streams(*_pending(streams), *arguments, **options)
                return plain, hidden
            if not keep_streams and steps.post_head is not None:
                return steps.post_head(*_pending(streams), *arguments, **options)
            streams = streams.materialise(steps.post)
        hidden = steps.head(streams, *arguments, **options)
        return (streams, hidden) if keep_streams else hidden

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
        return run_folded(norm, self, streams)

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
        return run_folded(norm, self, state, True)


def _pending(state: StreamState) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the first arguments of an op that begins with the post step."""
    return state.x, state.residual, state.post, state.comb


def _norm_options(norm_weight: Tensor | None, norm_eps: float | None) -> dict[str, Any]:
    """Name the arguments of a norm; none without a norm, which plain functions may not take."""
    return {} if norm_weight is None else {"norm_weight": norm_weight, "norm_eps": norm_eps}


def _normal_parameter(
    rows: int, columns: int, device: torch.device | str | None
) -> torch.nn.Parameter:
    weight = torch.empty(rows, columns, device=device, dtype=MIX)
    return torch.nn.Parameter(torch.nn.init.normal_(weight, std=0.02))

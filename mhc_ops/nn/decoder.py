"""Run decoder layers on hyper-connections: a whole stack, a single layer, and a draft layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import geometry
from .._exportable import exportable
from . import _checked
from .connection import HyperConnection, HyperHead
from .norm import FoldedRMSNorm
from .state import Copies, StreamState


class DecoderLayer(torch.nn.Module):
    """Run attention and MLP, or any other two sublayers, on hyper-connections.

    Args:
        attention, mlp: ``f(x) -> x`` on [..., H] bf16; modules become submodules.
        hidden_size: the hidden size, H.
        hc_mult: number of residual streams, n.
        norm_eps: of the RMSNorm before each sublayer.
        device: device of the parameters.
        options: the other arguments of :class:`HyperConnection`, for both.

    Attributes:
        attn_hc, ffn_hc: the hyper-connections.
        attn_norm, ffn_norm: the norms, folded into their pre steps.

    Raises:
        TypeError, ValueError: an argument of a wrong type, or out of the range that the ops take.
    """

    def __init__(
        self,
        attention: Callable[[Tensor], Tensor],
        mlp: Callable[[Tensor], Tensor],
        hidden_size: int,
        hc_mult: int = geometry.HC_MULT,
        *,
        norm_eps: float = 1e-6,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        name = "DecoderLayer"
        hidden_size = _checked.size(name, "hidden_size", hidden_size)
        norm_eps = _checked.number(name, "norm_eps", norm_eps)
        self.attention = _checked.function(name, "attention", attention)
        self.mlp = _checked.function(name, "mlp", mlp)
        self.attn_hc = HyperConnection(hidden_size, hc_mult, device=device, **options)
        self.attn_norm = FoldedRMSNorm(hidden_size, norm_eps, device=device)
        self.ffn_hc = HyperConnection(hidden_size, hc_mult, device=device, **options)
        self.ffn_norm = FoldedRMSNorm(hidden_size, norm_eps, device=device)

    def forward(self, streams: Tensor | Copies | StreamState) -> StreamState:
        """Run boundary, attention, boundary and MLP.

        Args:
            streams: the state that the layer before returned; or the copies of the embedding, for
                the first layer of a model; or plain streams [..., n, H] bf16, for the first layer
                behind the cut of a pipeline.

        Returns:
            The state after the MLP, whose post step is pending.

        Raises:
            RuntimeError: the layer is not wired.
        """
        if isinstance(streams, StreamState):
            entry = self.attn_hc.boundary(streams, self.attn_norm)
        else:
            entry = self.attn_hc.pre(streams, self.attn_norm)
        state = entry.after(self.attention(entry.layer_input))
        entry = self.ffn_hc.boundary(state, self.ffn_norm)
        return entry.after(self.mlp(entry.layer_input))


@exportable
class StackOutput(NamedTuple):
    """Hold what a :class:`DecoderStack` returns.

    Attributes:
        hidden: [..., H] bf16, after the head and the final norm.
        streams: [..., n, H] bf16, the streams before the head: what a draft layer takes.
        captured: [..., H] bf16 each, the mean of the streams after every layer that was asked for.
    """

    hidden: Tensor
    streams: Tensor
    captured: tuple[Tensor, ...]


class DecoderStack(torch.nn.Module):
    """Run decoder layers from the embedding to the final norm.

    The order is: expand, the first pre, [sublayer, boundary]..., the last post, head, final norm.

    Args:
        sublayers: (attention, MLP) of every layer, ``f(x) -> x`` on [..., H] bf16.
        hidden_size: the hidden size, H.
        hc_mult: number of residual streams, n.
        rms_eps: added to the mean square of the streams, in layers and head.
        hc_eps: added to the collapse weights and to Sinkhorn's sums, in layers and head.
        norm_eps: of every RMSNorm.
        sinkhorn_repeat: rounds of Sinkhorn, counting the first.
        device: device of the parameters.

    Attributes:
        layers: the :class:`DecoderLayer` of every pair; usable one by one.
        head: the collapse after the last layer.
        norm: the final norm, folded into it.

    Raises:
        TypeError, ValueError: there are no sublayers, or an argument is of a wrong type, or out of
            the range that the ops take.
    """

    def __init__(
        self,
        sublayers: Sequence[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]],
        hidden_size: int,
        hc_mult: int = geometry.HC_MULT,
        *,
        rms_eps: float = 1e-6,
        hc_eps: float = 1e-6,
        norm_eps: float = 1e-6,
        sinkhorn_repeat: int = 20,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        name = "DecoderStack"
        sublayers = _checked.pairs(name, "sublayers", sublayers)
        hidden_size = _checked.size(name, "hidden_size", hidden_size)
        self.hc_mult = hc_mult = _checked.size(name, "hc_mult", hc_mult)
        rms_eps = _checked.number(name, "rms_eps", rms_eps)
        hc_eps = _checked.number(name, "hc_eps", hc_eps)
        norm_eps = _checked.number(name, "norm_eps", norm_eps)
        sinkhorn_repeat = _checked.number(
            name, "sinkhorn_repeat", sinkhorn_repeat, "sinkhorn_repeat"
        )
        self.layers = torch.nn.ModuleList(
            DecoderLayer(
                attention, mlp, hidden_size, hc_mult, norm_eps=norm_eps, device=device,
                rms_eps=rms_eps, hc_pre_eps=hc_eps, hc_sinkhorn_eps=hc_eps,
                sinkhorn_repeat=sinkhorn_repeat,
            )
            for attention, mlp in sublayers
        )  # fmt: skip
        self.head = HyperHead(hidden_size, hc_mult, rms_eps=rms_eps, hc_eps=hc_eps, device=device)
        self.norm = FoldedRMSNorm(hidden_size, norm_eps, device=device)

    def forward(self, embedding: Tensor, capture: Collection[int] = ()) -> StackOutput:
        """Run every layer.

        Args:
            embedding: [..., H] bf16.
            capture: indices of layers after which the mean of the streams is taken, for a draft
                model. It costs a post step each, but for the last layer, and changes nothing else.

        Returns:
            The hidden state, the streams before the head, and what was captured, in the order of
            the layers.

        Raises:
            ValueError: ``capture`` has an index that no layer has.
            RuntimeError: the stack is not wired.
        """
        count = len(self.layers)
        for index in capture:
            if not 0 <= index < count:
                raise ValueError(
                    "mhc_ops.nn.DecoderStack: expected capture to name layers from 0 to "
                    f"{count - 1}, got {index}"
                )
        post = self.head._steps().post
        captured = []
        state: Any = Copies(embedding)  # each layer replaces the state
        for index, layer in enumerate(self.layers):
            state = layer(state)
            if index in capture and index < count - 1:
                captured.append(_mean(state.materialise(post)))
        streams, hidden = self.head.materialise_and_collapse(state, self.norm)
        if count - 1 in capture:
            captured.append(_mean(streams))
        return StackOutput(hidden, streams, tuple(captured))


def _mean(streams: Tensor) -> Tensor:
    return streams.float().mean(-2).to(streams.dtype)


@exportable
class NextNOutput(NamedTuple):
    """Hold what a :class:`NextNLayer` returns.

    Attributes:
        hidden: [..., H] bf16, after its head and norm: the draft model's LM head takes it.
        streams: [..., n, H] bf16, the streams before its head: what the next draft step takes.
    """

    hidden: Tensor
    streams: Tensor


class NextNLayer(torch.nn.Module):
    """Run the draft layer of DeepSeek-V4 (NextN, multi-token prediction)::

        start[j] = h_proj(hnorm(streams[j])) + e_proj(enorm(embedding))

    and from there one decoder layer, its pending post step, head and norm. ``streams`` are those of
    the target before its head, or those of the draft step before; ``embedding`` is that of the next
    token.

    Args:
        e_proj, h_proj: ``f(x) -> x`` on [..., H] bf16: the projections, however they are quantised.
        layer: the decoder layer.
        norm_eps: of every RMSNorm.
        rms_eps: added to the mean square of the streams, in the head.
        hc_eps: added to the collapse weights of the head.
        device: device of the parameters.

    Attributes:
        enorm, hnorm: the norms of the embedding and of each stream.
        layer: the decoder layer.
        head, norm: the collapse after it, and the norm that is folded into it.

    Raises:
        TypeError, ValueError: an argument of a wrong type, or out of the range that the ops take.
    """

    def __init__(
        self,
        e_proj: Callable[[Tensor], Tensor],
        h_proj: Callable[[Tensor], Tensor],
        layer: DecoderLayer,
        *,
        norm_eps: float = 1e-6,
        rms_eps: float = 1e-6,
        hc_eps: float = 1e-6,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        name = "NextNLayer"
        if not isinstance(layer, DecoderLayer):
            raise TypeError(
                f"mhc_ops.nn.{name}: expected layer to be a DecoderLayer, got {layer!r}"
            )
        norm_eps = _checked.number(name, "norm_eps", norm_eps)
        rms_eps = _checked.number(name, "rms_eps", rms_eps)
        hc_eps = _checked.number(name, "hc_eps", hc_eps)
        hidden_size, hc_mult = layer.attn_hc.hidden_size, layer.attn_hc.hc_mult
        self.e_proj = _checked.function(name, "e_proj", e_proj)
        self.h_proj = _checked.function(name, "h_proj", h_proj)
        self.enorm = FoldedRMSNorm(hidden_size, norm_eps, device=device)
        self.hnorm = FoldedRMSNorm(hidden_size, norm_eps, device=device)
        self.layer = layer
        self.head = HyperHead(hidden_size, hc_mult, rms_eps=rms_eps, hc_eps=hc_eps, device=device)
        self.norm = FoldedRMSNorm(hidden_size, norm_eps, device=device)

    def forward(self, embedding: Tensor, streams: Tensor) -> NextNOutput:
        """Run one draft step.

        Args:
            embedding: [..., H] bf16, embedding of the tokens that follow the streams' tokens.
            streams: [..., n, H] bf16, of the target before its head, or of the step before.

        Returns:
            The hidden state, and the streams that it was made from.

        Raises:
            RuntimeError: the layer is not wired.
        """
        start = self.h_proj(self.hnorm(streams)) + self.e_proj(self.enorm(embedding)).unsqueeze(-2)
        state: StreamState = self.layer(start)
        streams, hidden = self.head.materialise_and_collapse(state, self.norm)
        return NextNOutput(hidden, streams)

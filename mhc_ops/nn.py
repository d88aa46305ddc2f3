"""Hyper-connections as modules, with the state that a model carries from layer to layer.

A model built on this module runs::

    entry = layer.attn_hc.pre(Copies(embedding), layer.input_norm)  # the first layer only
    state = entry.after(attention(entry.layer_input))
    entry = layer.mlp_hc.boundary(state, layer.mlp_norm)            # inside a layer
    state = entry.after(mlp(entry.layer_input))
    entry = next_layer.attn_hc.boundary(state, next_layer.input_norm)   # across layers
    ...
    hidden = model.head(state, model.norm)

:class:`DecoderStack` is that loop, for sublayers of any kind; :class:`DecoderLayer` is one turn of
it, for model code with a loop of its own, and :class:`NextNLayer` a draft layer behind it.
:mod:`mhc_ops.checkpoint` loads their parameters.

A :class:`StreamState` keeps the last sublayer's output beside the streams, so that its post step
meets the pre step of whatever sublayer comes next, in this layer or in the next one.

:func:`wire` reads the switches of :mod:`mhc_ops.config` once and decides for every module which
function runs each step; nothing is decided inside a forward, so a model is traced as one graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import config, geometry, ops, reference, support
from ._arguments import ACTIVATION, MIX, mixes

logger = logging.getLogger("mhc_ops")

POST_MULT_VALUE = 2.0  # post weights lie in (0, 2) in DeepSeek-V4


class Steps(NamedTuple):
    """The functions that run the steps of a wired module.

    Attributes:
        post: as :func:`mhc_ops.post`.
        pre: as :func:`mhc_ops.pre`; may return a plain tuple.
        head: as :func:`mhc_ops.head`.
        fused_post_pre: as :func:`mhc_ops.fused_post_pre`; None where a boundary runs as post,
            then pre.
        expand_pre: as :func:`mhc_ops.expand_pre`; None where copies are made, then pre runs.
        post_head, post_head_streams: as :func:`mhc_ops.post_head` and
            :func:`mhc_ops.post_head_streams`; None where the end runs as post, then head.
    """

    post: Callable[..., Tensor]
    pre: Callable[..., tuple[Tensor, Tensor, Tensor]]
    head: Callable[..., Tensor]
    fused_post_pre: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] | None
    expand_pre: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] | None
    post_head: Callable[..., Tensor] | None
    post_head_streams: Callable[..., tuple[Tensor, Tensor]] | None


class Copies(NamedTuple):
    """The streams that a model starts from, which are all the same and need not be written yet.

    Attributes:
        x: [..., H] bf16, what each of them is: the embedding.
    """

    x: Tensor


class StreamState(NamedTuple):
    """The state that a model carries: residual streams with a post step still to be applied.

    Attributes:
        residual: [..., n, H] bf16, the streams before the sublayer that just ran.
        x: [..., H] bf16, output of that sublayer.
        post: [..., n, 1] fp32, its post weights.
        comb: [..., n, n] fp32, its stream mixing, indexed [old stream, new stream].
    """

    residual: Tensor
    x: Tensor
    post: Tensor
    comb: Tensor

    def materialise(self, post: Callable[..., Tensor] = ops.post) -> Tensor:
        """Apply the pending post step::

            streams[j] = bf16(post[j] * x + sum_i comb[i, j] * residual[i])

        Args:
            post: the function that applies it; a wired module passes its own ``steps.post``.

        Returns:
            The plain streams, [..., n, H] bf16.
        """
        return post(self.x, self.residual, self.post, self.comb)


class SublayerEntry(NamedTuple):
    """What a hyper-connection hands to its sublayer.

    Attributes:
        residual: [..., n, H] bf16, the streams that the sublayer starts from.
        layer_input: [..., H] bf16, its input, normed where the pre step had a norm.
        post: [..., n, 1] fp32, weight of its output in each new stream.
        comb: [..., n, n] fp32, stream mixing, indexed [old stream, new stream].
    """

    residual: Tensor
    layer_input: Tensor
    post: Tensor
    comb: Tensor

    def after(self, x: Tensor) -> StreamState:
        """The state once the sublayer has run.

        Args:
            x: [..., H] bf16, the sublayer's output.

        Returns:
            The state with the post step of this sublayer pending.
        """
        return StreamState(self.residual, x, self.post, self.comb)


class _Wired(torch.nn.Module):
    """A module whose steps are chosen by :func:`wire`."""

    fn: Tensor
    hc_mult: int
    steps: Steps | None = None

    def _steps(self) -> Steps:
        if self.steps is None:
            raise RuntimeError(
                f"{type(self).__name__} is not wired: expected mhc_ops.nn.wire(model) once the "
                "model stands on its device, before the first forward"
            )
        return self.steps


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
        self.norm_eps = eps
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
        """What ``.to()`` and ``.float()`` go through: the cache moves along, and stays bf16."""
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


def _norm_arguments(norm: FoldedRMSNorm | None) -> dict[str, Any]:
    if norm is None:
        return {}
    return {"norm_weight": norm.norm_weight_cache, "norm_eps": norm.norm_eps}


class HyperConnection(_Wired):
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
        self.hidden_size = hidden_size
        self.hc_mult = hc_mult
        self.rms_eps = rms_eps
        self.hc_pre_eps = hc_pre_eps
        self.hc_sinkhorn_eps = hc_sinkhorn_eps
        self.sinkhorn_repeat = sinkhorn_repeat
        self.hc_post_mult_value = hc_post_mult_value
        rows = mixes(hc_mult)
        self.fn = _normal_parameter(rows, hc_mult * hidden_size, device)
        self.base = torch.nn.Parameter(torch.zeros(rows, device=device, dtype=MIX))
        self.scale = torch.nn.Parameter(torch.ones(3, device=device, dtype=MIX))

    def _arguments(self) -> tuple[Any, ...]:
        """The arguments of a pre step, after its streams."""
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
                    residual.x, *self._arguments(), **_norm_arguments(norm)
                )
                return SublayerEntry(streams, layer_input, post, comb)
            residual = expand(residual.x, self.hc_mult)
        post, comb, layer_input = steps.pre(residual, *self._arguments(), **_norm_arguments(norm))
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
            **_norm_arguments(norm),
        )
        return SublayerEntry(residual, layer_input, post, comb)


class HyperHead(_Wired):
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
        self.hidden_size = hidden_size
        self.hc_mult = hc_mult
        self.rms_eps = rms_eps
        self.hc_eps = hc_eps
        self.fn = _normal_parameter(hc_mult, hc_mult * hidden_size, device)
        self.base = torch.nn.Parameter(torch.zeros(hc_mult, device=device, dtype=MIX))
        self.scale = torch.nn.Parameter(torch.ones(1, device=device, dtype=MIX))

    def _arguments(self, norm: FoldedRMSNorm | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a head after its streams, by position and by name."""
        positional = (self.fn, self.scale, self.base, self.rms_eps, self.hc_eps)
        return positional, _norm_arguments(norm)

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
        """The plain streams, which a draft layer starts from, and the last hidden state.

        One ``post_head_streams`` where the model is wired fused; ``post``, then ``head`` otherwise.

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


def expand(embedding: Tensor, hc_mult: int = geometry.HC_MULT) -> Tensor:
    """Copy the embedding into every stream j that a model starts from::

        streams[j] = embedding

    Args:
        embedding: [..., H] bf16.
        hc_mult: number of residual streams, n.

    Returns:
        [..., n, H] bf16, contiguous.
    """
    return reference.expand(embedding, hc_mult)


class DecoderLayer(torch.nn.Module):
    """Attention and MLP, or any other two sublayers, on hyper-connections.

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
        self.attention = attention
        self.mlp = mlp
        self.attn_hc = HyperConnection(hidden_size, hc_mult, device=device, **options)
        self.attn_norm = FoldedRMSNorm(hidden_size, norm_eps, device=device)
        self.ffn_hc = HyperConnection(hidden_size, hc_mult, device=device, **options)
        self.ffn_norm = FoldedRMSNorm(hidden_size, norm_eps, device=device)

    def forward(self, streams: Tensor | Copies | StreamState) -> StreamState:
        """Boundary, attention, boundary, MLP.

        Args:
            streams: the state that the layer before returned; or the copies of the embedding, as
                the first layer takes them; or [..., n, H] bf16, plain streams, as they come behind
                a cut.

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


class StackOutput(NamedTuple):
    """What a :class:`DecoderStack` returns.

    Attributes:
        hidden: [..., H] bf16, after the head and the final norm.
        streams: [..., n, H] bf16, the streams before the head: what a draft layer takes.
        captured: [..., H] bf16 each, the mean of the streams after every layer that was asked for.
    """

    hidden: Tensor
    streams: Tensor
    captured: tuple[Tensor, ...]


class DecoderStack(torch.nn.Module):
    """Decoder layers from the embedding to the final norm.

    Expand, the first pre, [sublayer, boundary]..., the last post, head, final norm.

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
        ValueError: there are no sublayers.
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
        if not sublayers:
            raise ValueError("DecoderStack: expected at least one pair of sublayers, got none")
        self.hc_mult = hc_mult
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
            ValueError: an index is not that of a layer.
            RuntimeError: the stack is not wired.
        """
        count = len(self.layers)
        for index in capture:
            if not 0 <= index < count:
                raise ValueError(
                    f"DecoderStack: expected capture to name layers from 0 to {count - 1}, "
                    f"got {index}"
                )
        post = self.head._steps().post
        captured = []
        state: Any = Copies(embedding)  # then what the layers return
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


class NextNOutput(NamedTuple):
    """What a :class:`NextNLayer` returns.

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
        hidden_size, hc_mult = layer.attn_hc.hidden_size, layer.attn_hc.hc_mult
        self.e_proj = e_proj
        self.h_proj = h_proj
        self.enorm = FoldedRMSNorm(hidden_size, norm_eps, device=device)
        self.hnorm = FoldedRMSNorm(hidden_size, norm_eps, device=device)
        self.layer = layer
        self.head = HyperHead(hidden_size, hc_mult, rms_eps=rms_eps, hc_eps=hc_eps, device=device)
        self.norm = FoldedRMSNorm(hidden_size, norm_eps, device=device)

    def forward(self, embedding: Tensor, streams: Tensor) -> NextNOutput:
        """One draft step.

        Args:
            embedding: [..., H] bf16, of the tokens that follow those of the streams.
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


def _normal_parameter(
    rows: int, columns: int, device: torch.device | str | None
) -> torch.nn.Parameter:
    weight = torch.empty(rows, columns, device=device, dtype=MIX)
    return torch.nn.Parameter(torch.nn.init.normal_(weight, std=0.02))


_Module = TypeVar("_Module", bound=torch.nn.Module)


def _modules(model: torch.nn.Module, kind: type[_Module]) -> Iterator[_Module]:
    return (module for module in model.modules() if isinstance(module, kind))


def refresh_norm_weight_cache(model: torch.nn.Module) -> None:
    """Copy every norm weight of a model into its bf16 cache, in place.

    Needed after weights were written other than by ``load_state_dict``. Captured CUDA graphs see
    the new weights.

    Args:
        model: any module; every :class:`FoldedRMSNorm` in it is refreshed.
    """
    for norm in _modules(model, FoldedRMSNorm):
        norm.refresh_norm_weight_cache()


def _device_refusal(device: torch.device, hc_mult: int, hidden_size: int) -> str | None:
    """Why the ops cannot serve streams of this shape on a device; None where they can."""
    if device.type in ("cpu", "meta"):
        return None
    supported, reason = support.is_supported(device)
    if not supported:
        return reason
    if hc_mult != geometry.HC_MULT:
        return f"hc_mult is {hc_mult}, the CUDA kernels take {geometry.HC_MULT}"
    if hidden_size % geometry.HIDDEN_MULTIPLE != 0:
        return (
            f"the hidden size is {hidden_size}, the CUDA kernels take multiples of "
            f"{geometry.HIDDEN_MULTIPLE}"
        )
    return None


def _refusal(modules: list[_Wired], dtype: torch.dtype) -> str | None:
    """Why the ops cannot run these modules.

    Args:
        modules: wired modules, on the device where they will run.
        dtype: dtype of the activations.

    Returns:
        The reason; None where the ops can serve them all.
    """
    if dtype != ACTIVATION:
        return f"the activations are {dtype}, the ops take {ACTIVATION}"
    places = {
        (module.fn.device, module.hc_mult, module.fn.shape[1] // module.hc_mult)
        for module in modules
    }
    reasons = (_device_refusal(*place) for place in sorted(places, key=str))
    return next((reason for reason in reasons if reason is not None), None)


def wire(model: torch.nn.Module, *, dtype: torch.dtype = ACTIVATION) -> None:
    """Choose what runs each step of a model's hyper-connections.

    Reads the switches once. A step runs on its op where its switch is on and the op can serve the
    device; the plain functions of :mod:`mhc_ops.reference` run it otherwise, and one line in the
    log says why. A boundary is fused where all three switches are on and the ops can serve, and so
    are the ends of the model, expand with pre and post with head.

    Call it once the model stands on its device, and again after moving it or changing a switch.

    Args:
        model: any module; every :class:`HyperConnection` and :class:`HyperHead` in it is wired.
        dtype: dtype of the activations.

    Raises:
        ValueError: the model has no hyper-connection, or a switch is neither on nor off.
    """
    modules = list(_modules(model, _Wired))
    if not modules:
        raise ValueError(
            f"wire: expected a model with hyper-connections, got {type(model).__name__} without any"
        )
    switches = config.switches()
    reason = _refusal(modules, dtype)
    if reason is not None:
        tilelang_pre = tilelang_post = False
        plain = f"every step: {reason}"
    else:
        tilelang_pre, tilelang_post = switches.tilelang_pre, switches.tilelang_post
        plain = "; ".join(
            f"{steps}: {name} is off"
            for steps, name, on in (
                ("pre and head", "MHC_OPS_TILELANG_PRE", tilelang_pre),
                ("post", "MHC_OPS_TILELANG_POST", tilelang_post),
            )
            if not on
        )
    if plain:
        logger.warning("%s runs on plain PyTorch functions: %s", type(model).__name__, plain)
    fuse = reason is None and switches.fuse
    chosen = Steps(
        post=ops.post if tilelang_post else reference.post,
        pre=ops.pre if tilelang_pre else reference.pre,
        head=ops.head if tilelang_pre else reference.head,
        fused_post_pre=ops.fused_post_pre if fuse else None,
        expand_pre=ops.expand_pre if fuse else None,
        post_head=ops.post_head if fuse else None,
        post_head_streams=ops.post_head_streams if fuse else None,
    )
    for module in modules:
        module.steps = chosen

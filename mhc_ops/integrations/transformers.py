"""Run DeepSeek-V4 of transformers on the mHC ops: :func:`apply` and :func:`remove`.

:func:`apply` gives some modules another class with the same parameters, so checkpoints, ``.to()``
and copies of the model work as before, and :func:`remove` only has to put the stock class back:

* A decoder layer takes plain streams or a :class:`~mhc_ops.nn.StreamState` and returns a state, so
  that the pending post step runs together with the pre step of the next layer.
* The hyper-connections and norms of a layer lend the ops their parameters. When called directly,
  they do what the stock modules do.
* ``hc_head`` hands the state on to ``norm``, which runs post and head with the norm folded in. Both
  modules do what the stock modules do with plain tensors.

Forward hooks on decoder layers see a ``StreamState``; ``state.materialise()`` gives its streams.
Where hidden states are asked for, every layer returns plain streams, so that transformers captures
the same tensors as with the stock model; boundaries are then fused inside the layers only.

This adapter is tested with transformers 5.17 and 5.23.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4DecoderLayer,
    DeepseekV4ForCausalLM,
    DeepseekV4HyperConnection,
    DeepseekV4HyperHead,
    DeepseekV4Model,
    DeepseekV4RMSNorm,
)

from .. import config, geometry
from .._arguments import ACTIVATION, EPSILON, MIX
from ..nn import (
    POST_MULT_VALUE,
    FoldedRMSNorm,
    HyperConnection,
    HyperHead,
    StreamState,
    wire,
)
from . import _fallback


def _view(path: str) -> Any:
    """Make a property that reads an attribute of the stock module by the name in mhc_ops.nn."""
    names = path.split(".")
    return property(lambda module: functools.reduce(getattr, names, module))


# The stock class comes first among the bases, so what it defines stays in force, above all forward.
class MhcRMSNorm(DeepseekV4RMSNorm, FoldedRMSNorm):
    """Lend the weight of a decoder layer's norm to the pre step, which folds the norm in."""

    norm_eps = _view("variance_epsilon")


class MhcHyperConnection(DeepseekV4HyperConnection, HyperConnection):
    """Lend the parameters of a stock hyper-connection to the ops."""

    rms_eps = _view("input_norm.eps")
    hc_pre_eps = _view("hc_eps")
    hc_sinkhorn_eps = _view("hc_eps")
    sinkhorn_repeat = _view("hc_sinkhorn_iters")
    hc_post_mult_value = POST_MULT_VALUE  # the stock forward has this value as a constant


class PendingHead(NamedTuple):
    """Hold what ``hc_head`` hands to the final norm: the last state and the head to apply."""

    state: StreamState
    head: HyperHead


class MhcHyperHead(DeepseekV4HyperHead, HyperHead):
    """Lend the parameters of the stock head to the op."""

    fn = _view("hc_fn")
    base = _view("hc_base")
    scale = _view("hc_scale")
    rms_eps = _view("input_norm.eps")
    hc_eps = _view("eps")

    def forward(self, x: Tensor | StreamState) -> Tensor | PendingHead:
        """Leave a state to the final norm; collapse plain streams, without a norm."""
        return PendingHead(x, self) if isinstance(x, StreamState) else self.collapse(x)


class MhcFinalRMSNorm(MhcRMSNorm):
    """Run the last post step and the head with the final norm folded in."""

    def forward(self, hidden_states: Tensor | PendingHead) -> Tensor:
        """Run the last post step and the head with this norm; run the stock norm on a tensor."""
        if isinstance(hidden_states, PendingHead):
            return hidden_states.head.collapse(hidden_states.state, self)
        return super().forward(hidden_states)


class MhcDecoderLayer(DeepseekV4DecoderLayer):
    """Carry a :class:`~mhc_ops.nn.StreamState` from decoder layer to decoder layer."""

    def forward(
        self,
        hidden_states: Tensor | StreamState,
        input_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | StreamState:
        """Run attention and MLP, each between a boundary and its pending post step.

        Args:
            hidden_states: the previous layer's state, or plain streams [B, S, n, H].
            input_ids: [B, S], for hash routing.
            kwargs: as the stock layer takes them.

        Returns:
            The state after the MLP; plain streams where hidden states are asked for.

        Raises:
            RuntimeError: the layer is in training mode with gradients enabled.
        """
        if self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "mhc_ops is forward only: expected model.eval() or torch.no_grad(), got a forward "
                "in training mode with gradients enabled; to train the model call "
                "mhc_ops.integrations.transformers.remove(model)"
            )
        if isinstance(hidden_states, StreamState):
            entry = self.attn_hc.boundary(hidden_states, self.input_layernorm)
        else:
            entry = self.attn_hc.pre(hidden_states, self.input_layernorm)
        attention_output, _ = self.self_attn(entry.layer_input, **kwargs)
        entry = self.ffn_hc.boundary(entry.after(attention_output), self.post_attention_layernorm)
        state = entry.after(self.mlp(entry.layer_input, input_ids=input_ids))
        # capture_outputs of transformers tests the same expression to decide whether it captures.
        settings = self.self_attn.config
        if kwargs.get("output_hidden_states", getattr(settings, "output_hidden_states", False)):
            return state.materialise(self.ffn_hc.steps.post)
        return state


def _parts(decoder: DeepseekV4Model) -> Iterator[tuple[str, torch.nn.Module, type, type]]:
    """Yield name, module, stock class and class on the ops of every module that changes class."""
    for index, layer in enumerate(decoder.layers):
        name = f"layers.{index}"
        yield name, layer, DeepseekV4DecoderLayer, MhcDecoderLayer
        for part in ("attn_hc", "ffn_hc"):
            connection = getattr(layer, part)
            yield f"{name}.{part}", connection, DeepseekV4HyperConnection, MhcHyperConnection
        for part in ("input_layernorm", "post_attention_layernorm"):
            yield f"{name}.{part}", getattr(layer, part), DeepseekV4RMSNorm, MhcRMSNorm
    yield "hc_head", decoder.hc_head, DeepseekV4HyperHead, MhcHyperHead
    yield "norm", decoder.norm, DeepseekV4RMSNorm, MhcFinalRMSNorm


def _decoder(model: torch.nn.Module) -> DeepseekV4Model:
    if isinstance(model, DeepseekV4ForCausalLM):
        return model.model
    if isinstance(model, DeepseekV4Model):
        return model
    raise TypeError(
        "mhc_ops.integrations.transformers: expected a DeepseekV4ForCausalLM or DeepseekV4Model of "
        f"transformers, got {type(model).__name__}"
    )


def _check_settings(decoder: DeepseekV4Model) -> None:
    """Refuse a model whose dtypes or settings no op takes."""
    activation = decoder.embed_tokens.weight.dtype
    if activation != ACTIVATION:
        raise ValueError(
            f"mhc_ops.integrations.transformers: expected a model in {ACTIVATION}, got {activation}"
        )
    config = decoder.config
    if config.hc_sinkhorn_iters < 1:
        raise ValueError(
            "mhc_ops.integrations.transformers: expected hc_sinkhorn_iters of at least 1, got "
            f"{config.hc_sinkhorn_iters}"
        )
    for name in ("hc_eps", "rms_norm_eps"):
        expected = EPSILON.fault(getattr(config, name))
        if expected is not None:
            raise ValueError(
                f"mhc_ops.integrations.transformers: expected {name} {expected}, "
                f"got {getattr(config, name)}"
            )
    devices = {parameter.device for parameter in decoder.parameters()}
    cuda = next((device for device in devices if device.type == "cuda"), None)
    if cuda is not None:
        if config.hc_mult != geometry.HC_MULT:
            raise ValueError(
                f"mhc_ops.integrations.transformers: expected hc_mult {geometry.HC_MULT} on CUDA, "
                f"got {config.hc_mult}"
            )
        if config.hidden_size % geometry.HIDDEN_MULTIPLE != 0:
            raise ValueError(
                "mhc_ops.integrations.transformers: expected a hidden_size that is a multiple of "
                f"{geometry.HIDDEN_MULTIPLE} on CUDA, got {config.hidden_size}"
            )
        reason = _fallback.no_kernels(config.hidden_size, cuda)
        if reason is not None:
            raise RuntimeError(
                "mhc_ops.integrations.transformers: expected kernels for hidden size "
                f"{config.hidden_size} on {cuda}: {reason}"
            )


def _check_parts(decoder: DeepseekV4Model) -> None:
    """Refuse a model with modules that were changed, or with parameters in a wrong dtype."""
    for name, module, stock, swapped in _parts(decoder):
        if type(module) not in (stock, swapped):
            raise ValueError(
                f"mhc_ops.integrations.transformers: expected {name} to be a {stock.__name__}, "
                f"got {type(module).__qualname__}"
            )
        if "forward" in vars(module):
            raise ValueError(
                f"mhc_ops.integrations.transformers: expected {name} to run the forward of its "
                "class, got a forward that is set on the module; call apply before other code "
                "replaces forwards"
            )
        if isinstance(module, (DeepseekV4HyperConnection, DeepseekV4HyperHead)):
            for parameter, value in module.named_parameters():
                if value.dtype != MIX:
                    raise ValueError(
                        f"mhc_ops.integrations.transformers: expected {name}.{parameter} in {MIX}, "
                        f"got {value.dtype}; from_pretrained(dtype=torch.bfloat16) keeps the "
                        "parameter in this dtype, model.bfloat16() does not"
                    )


def apply(model: torch.nn.Module) -> None:
    """Make a DeepSeek-V4 model run its hyper-connections on the ops.

    The switches are read when this function is called. With ``MHC_OPS_FUSE_POST_PRE=1`` every
    boundary is one ``fused_post_pre``, inside a layer (attention's post, the MLP's pre and its
    norm) and across layers (the MLP's post, the next attention's pre and its norm); otherwise a
    boundary is ``post``, then ``pre``. The parameters stay those of the stock modules. Call this
    function when the model is on its device. A second call reads the switches and the norm weights
    again.

    Args:
        model: a ``DeepseekV4ForCausalLM`` or ``DeepseekV4Model`` in bf16, its hyper-connections
            in fp32 (as ``from_pretrained(dtype=torch.bfloat16)`` loads it).

    Raises:
        TypeError: the model is another one.
        ValueError: the model has a dtype or a setting that the ops cannot serve, gradient
            checkpointing, or modules that other code has already replaced.
        RuntimeError: the model is on a GPU that the kernels cannot serve, or the kernels are not
            available. Whatever is raised, the model is left untouched.
    """
    decoder = _decoder(model)
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError(
            "mhc_ops.integrations.transformers: expected a model without gradient checkpointing, "
            "got a model that has it enabled; mhc_ops is forward only"
        )
    _check_settings(decoder)
    _check_parts(decoder)
    config.switches()  # a misspelt switch is refused before anything is changed
    for _, module, _, swapped in _parts(decoder):
        module.__class__ = swapped
        if isinstance(module, MhcRMSNorm):
            if "norm_weight_cache" in module._buffers:
                module.refresh_norm_weight_cache()
            else:
                module.add_norm_weight_cache()
    wire(decoder)


def remove(model: torch.nn.Module) -> None:
    """Undo :func:`apply`: put back the stock forwards, and remove every added attribute.

    Args:
        model: a ``DeepseekV4ForCausalLM`` or ``DeepseekV4Model``. A model that :func:`apply` was
            never called on is left as it is.

    Raises:
        TypeError: the model is another one.
    """
    for _, module, stock, swapped in _parts(_decoder(model)):
        if type(module) is not swapped:
            continue
        if isinstance(module, (HyperConnection, HyperHead)):
            del module.steps
        if isinstance(module, FoldedRMSNorm):
            del module.norm_weight_cache
        module.__class__ = stock

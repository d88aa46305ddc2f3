"""Run DeepSeek-V4 of transformers on the mHC ops: :func:`apply` and :func:`remove`.

:func:`apply` gives some modules another class with the same parameters, so checkpoints, ``.to()``
and copies of the model work as before, and :func:`remove` only has to put the stock class back:

* A decoder layer takes plain streams or a :class:`~mhc_ops.nn.StreamState` and returns a state, so
  that the pending post step runs together with the pre step of the next layer.
* The hyper-connections and norms of a layer lend the ops their parameters. When called directly
  with a tensor, they do what the stock modules do.
* ``hc_head`` hands the state on to ``norm``, which runs post and head with the norm folded in. Both
  modules do what the stock modules do with plain tensors.

A hook that other code sets on a decoder layer, a norm or ``hc_head`` sees the tensors that the hook
sees in the stock model: the steps around that module then run one by one. Hooks of torch and of
transformers themselves, such as those of FSDP2, are left out of this, because they take whatever a
module takes. Where hidden states are asked for, every layer returns plain streams, so that
transformers captures the same tensors as with the stock model; boundaries are then fused inside the
layers only.

This adapter is tested with transformers 5.17 and 5.23.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

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
    SublayerEntry,
    wire,
)
from . import _fallback

Model = TypeVar("Model", bound=torch.nn.Module)

_HERE = "mhc_ops.integrations.transformers"
# Hooks of these packages take whatever a module takes and returns.
_INDIFFERENT = ("torch", "transformers")


def _view(path: str) -> Any:
    """Make a property that reads an attribute of the stock module by the name in mhc_ops.nn."""
    names = path.split(".")
    return property(lambda module: functools.reduce(getattr, names, module))


def _watched(module: torch.nn.Module) -> bool:
    """Say whether a hook of other code sees what a module takes and returns."""
    every = torch.nn.modules.module
    return any(
        (getattr(hook, "__module__", None) or "").partition(".")[0] not in _INDIFFERENT
        for hooks in (
            module._forward_pre_hooks,
            module._forward_hooks,
            every._global_forward_pre_hooks,
            every._global_forward_hooks,
        )
        for hook in hooks.values()
    )


class PendingHead(NamedTuple):
    """Hold what ``hc_head`` hands to the final norm: the last state and the head to apply."""

    state: StreamState
    head: HyperHead


# The stock class comes first among the bases, so what it defines stays in force, above all forward.
class MhcRMSNorm(DeepseekV4RMSNorm, FoldedRMSNorm):
    """Lend the weight of a norm to the pre step or to the head, which folds the norm in."""

    norm_eps = _view("variance_epsilon")

    def __call__(self, hidden_states: Any, *arguments: Any) -> Any:
        """Let hooks of other code see the stock norm, which then runs after the step by itself."""
        if isinstance(hidden_states, Tensor) or not _watched(self):
            return super().__call__(hidden_states, *arguments)
        if isinstance(hidden_states, PendingHead):
            return super().__call__(hidden_states.head.collapse(hidden_states.state))
        entry: SublayerEntry = hidden_states(*arguments, norm_weight=None)
        return entry._replace(layer_input=super().__call__(entry.layer_input))

    def forward(self, hidden_states: Any, *arguments: Any) -> Any:
        """Run a step with this norm folded in; run the stock norm on a tensor."""
        if isinstance(hidden_states, Tensor):
            return super().forward(hidden_states)
        if isinstance(hidden_states, PendingHead):
            return FoldedRMSNorm.forward(self, hidden_states.head, hidden_states.state)
        return FoldedRMSNorm.forward(self, hidden_states, *arguments)


class MhcHyperConnection(DeepseekV4HyperConnection, HyperConnection):
    """Lend the parameters of a stock hyper-connection to the ops."""

    rms_eps = _view("input_norm.eps")
    hc_pre_eps = _view("hc_eps")
    hc_sinkhorn_eps = _view("hc_eps")
    sinkhorn_repeat = _view("hc_sinkhorn_iters")
    hc_post_mult_value = POST_MULT_VALUE  # the stock forward has this value as a constant

    def forward(self, streams: Any, **norm: Any) -> Any:
        """Run a step of a layer, which names a norm or None; run the stock module without."""
        if isinstance(streams, Tensor) and not norm:
            return super().forward(streams)
        return HyperConnection.forward(self, streams, **norm)


class MhcHyperHead(DeepseekV4HyperHead, HyperHead):
    """Lend the parameters of the stock head to the op."""

    fn = _view("hc_fn")
    base = _view("hc_base")
    scale = _view("hc_scale")
    rms_eps = _view("input_norm.eps")
    hc_eps = _view("eps")

    def __call__(self, x: Any, **norm: Any) -> Any:
        """Let hooks of other code see plain streams."""
        if isinstance(x, StreamState) and _watched(self):
            x = x.materialise(self._steps().post)
        return super().__call__(x, **norm)

    def forward(self, streams: Any, keep_streams: bool = False, **norm: Any) -> Any:
        """Leave a state to the final norm; collapse where the norm asks, and plain streams."""
        if isinstance(streams, StreamState) and not norm and not keep_streams:
            return PendingHead(streams, self)
        return HyperHead.forward(self, streams, keep_streams, **norm)

    def collapse(self, streams: Tensor | StreamState, norm: FoldedRMSNorm | None = None) -> Tensor:
        """Collapse as :meth:`mhc_ops.nn.HyperHead.collapse` does, also without a norm."""
        if isinstance(streams, StreamState) and norm is None:
            streams = streams.materialise(self._steps().post)
        return super().collapse(streams, norm)


class MhcDecoderLayer(DeepseekV4DecoderLayer):
    """Carry a :class:`~mhc_ops.nn.StreamState` from decoder layer to decoder layer."""

    def __call__(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        """Let hooks of other code see plain streams."""
        if isinstance(hidden_states, StreamState) and _watched(self):
            hidden_states = hidden_states.materialise(self.attn_hc.steps.post)
        return super().__call__(hidden_states, *args, **kwargs)

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
            The state after the MLP; plain streams where hidden states are asked for, or where a
            hook of other code sees them.

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
        captured = kwargs.get(
            "output_hidden_states", getattr(settings, "output_hidden_states", False)
        )
        if captured or _watched(self):
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
    yield "norm", decoder.norm, DeepseekV4RMSNorm, MhcRMSNorm


def _unwrapped(model: Any) -> torch.nn.Module:
    """Take a model out of what torch.compile, PEFT and data parallelism wrapped around it."""
    while True:
        if hasattr(model, "_orig_mod"):  # of torch.compile
            model = model._orig_mod
        elif isinstance(model, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "get_base_model"):  # of PEFT, which puts its adapters inside the model
            model = model.get_base_model()
        else:
            return model


def _decoder(model: torch.nn.Module) -> DeepseekV4Model:
    inner = _unwrapped(model)
    if isinstance(inner, DeepseekV4ForCausalLM):
        return inner.model
    if isinstance(inner, DeepseekV4Model):
        return inner
    held = any(isinstance(module, DeepseekV4Model) for module in inner.modules())
    around = " around one; call the function with the model itself, before it is wrapped"
    raise TypeError(
        f"{_HERE}: expected a DeepseekV4ForCausalLM or DeepseekV4Model of transformers, got "
        f"{type(inner).__name__}{around if held else ''}"
    )


def _check_settings(decoder: DeepseekV4Model) -> None:
    """Refuse a model whose dtypes or settings no op takes."""
    activation = decoder.embed_tokens.weight.dtype
    if activation != ACTIVATION:
        raise ValueError(f"{_HERE}: expected a model in {ACTIVATION}, got {activation}")
    config = decoder.config
    if config.hc_sinkhorn_iters < 1:
        raise ValueError(
            f"{_HERE}: expected hc_sinkhorn_iters of at least 1, got {config.hc_sinkhorn_iters}"
        )
    for name in ("hc_eps", "rms_norm_eps"):
        expected = EPSILON.fault(getattr(config, name))
        if expected is not None:
            raise ValueError(f"{_HERE}: expected {name} {expected}, got {getattr(config, name)}")
    devices = {parameter.device for parameter in decoder.parameters()}
    cuda = next((device for device in devices if device.type == "cuda"), None)
    if cuda is not None:
        if config.hc_mult != geometry.HC_MULT:
            raise ValueError(
                f"{_HERE}: expected hc_mult {geometry.HC_MULT} on CUDA, got {config.hc_mult}"
            )
        if config.hidden_size % geometry.HIDDEN_MULTIPLE != 0:
            raise ValueError(
                f"{_HERE}: expected a hidden_size that is a multiple of "
                f"{geometry.HIDDEN_MULTIPLE} on CUDA, got {config.hidden_size}"
            )
        reason = _fallback.no_kernels(config.hidden_size, cuda)
        if reason is not None:
            raise RuntimeError(
                f"{_HERE}: expected kernels for hidden size "
                f"{config.hidden_size} on {cuda}: {reason}"
            )


def _check_parts(decoder: DeepseekV4Model) -> None:
    """Refuse a model with modules that were changed, or with parameters in a wrong dtype."""
    for name, module, stock, swapped in _parts(decoder):
        if type(module) not in (stock, swapped):
            raise ValueError(
                f"{_HERE}: expected {name} to be a {stock.__name__}, got "
                f"{type(module).__qualname__}; call apply before other code replaces modules or "
                "their classes, as fully_shard does"
            )
        if "forward" in vars(module):
            raise ValueError(
                f"{_HERE}: expected {name} to run the forward of its "
                "class, got a forward that is set on the module; call apply before other code "
                "replaces forwards"
            )
        if isinstance(module, (DeepseekV4HyperConnection, DeepseekV4HyperHead)):
            for parameter, value in module.named_parameters():
                if value.dtype != MIX:
                    raise ValueError(
                        f"{_HERE}: expected {name}.{parameter} in {MIX}, "
                        f"got {value.dtype}; from_pretrained(dtype=torch.bfloat16) keeps the "
                        "parameter in this dtype, model.bfloat16() does not"
                    )


def _require_applied(decoder: torch.nn.Module, args: Any = None) -> None:
    """Refuse a forward, before it begins, of a model in which stock modules were put back."""
    for name, module, _, swapped in _parts(decoder):
        if not isinstance(module, swapped):
            raise RuntimeError(
                f"{_HERE}: expected {name} to be the {swapped.__name__} that apply made of it, got "
                f"{type(module).__qualname__}; call apply(model) again after replacing modules, or "
                "remove(model) before"
            )


def apply(model: Model) -> Model:
    """Make a DeepSeek-V4 model run its hyper-connections on the ops.

    The switches are read when this function is called. With ``MHC_OPS_FUSE_POST_PRE=1`` every
    boundary is one ``fused_post_pre``, inside a layer (attention's post, the MLP's pre and its
    norm) and across layers (the MLP's post, the next attention's pre and its norm); otherwise a
    boundary is ``post``, then ``pre``. The parameters stay those of the stock modules. Call this
    function when the model is on its device. A second call reads the switches and the norm weights
    again, and takes in stock modules that were put back.

    Args:
        model: a ``DeepseekV4ForCausalLM`` or ``DeepseekV4Model`` in bf16, its hyper-connections
            in fp32 (as ``from_pretrained(dtype=torch.bfloat16)`` loads it). It may be wrapped by
            ``torch.compile``, by PEFT, or by ``DataParallel`` or ``DistributedDataParallel``; what
            they wrap is changed in place. Call this function before ``fully_shard``.

    Returns:
        The model that was given.

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
            f"{_HERE}: expected a model without gradient checkpointing, "
            "got a model that has it enabled; mhc_ops is forward only"
        )
    _check_settings(decoder)
    _check_parts(decoder)
    config.switches()  # a misspelt switch is refused before anything is changed
    for _, module, _, swapped in _parts(decoder):
        module.__class__ = swapped
    if _require_applied not in decoder._forward_pre_hooks.values():
        decoder.register_forward_pre_hook(_require_applied)
    wire(decoder)
    return model


def remove(model: Model) -> Model:
    """Undo :func:`apply`: put back the stock forwards, and remove every added attribute.

    Args:
        model: a ``DeepseekV4ForCausalLM`` or ``DeepseekV4Model``, which may be wrapped as
            :func:`apply` says. A model that :func:`apply` was never called on is left as it is.

    Returns:
        The model that was given.

    Raises:
        TypeError: the model is another one.
        ValueError: other code has changed the class of a module since, as ``fully_shard`` does. The
            model is left untouched.
    """
    decoder = _decoder(model)
    parts = list(_parts(decoder))
    for name, module, _, swapped in parts:
        if isinstance(module, swapped) and type(module) is not swapped:
            raise ValueError(
                f"{_HERE}: expected {name} to be the {swapped.__name__} that apply made of it, got "
                f"{type(module).__qualname__}; call remove before fully_shard"
            )
    for key, hook in list(decoder._forward_pre_hooks.items()):
        if hook is _require_applied:
            del decoder._forward_pre_hooks[key]
    for _, module, stock, swapped in parts:
        if type(module) is not swapped:
            continue
        for attribute in ("steps", "_norm_weight_cache", "_trained"):
            vars(module).pop(attribute, None)
        module.__class__ = stock
    return model

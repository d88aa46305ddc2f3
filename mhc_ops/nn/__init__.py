"""Provide hyper-connections as modules, with the state that a model carries between layers.

A model built on this module runs::

    entry = layer.attn_hc.pre(Copies(embedding), layer.input_norm)  # the first layer only
    state = entry.after(attention(entry.layer_input))
    entry = layer.mlp_hc.boundary(state, layer.mlp_norm)            # inside a layer
    state = entry.after(mlp(entry.layer_input))
    entry = next_layer.attn_hc.boundary(state, next_layer.input_norm)   # across layers
    ...
    hidden = model.head(state, model.norm)

:class:`DecoderStack` is that loop, for sublayers of any kind. :class:`DecoderLayer` is one turn of
the loop, for model code with a loop of its own, and :class:`NextNLayer` is a draft layer.
:mod:`mhc_ops.checkpoint` loads the parameters of all three.

A :class:`StreamState` keeps the last sublayer's output beside the streams, so that the pending post
step runs together with the pre step of the next sublayer, in this layer or in the next one.

:func:`wire` reads the switches of :mod:`mhc_ops.config` once and decides for every module which
function runs each step. No forward decides anything, so a model is traced as one graph.
"""

from .connection import POST_MULT_VALUE, HyperConnection, HyperHead
from .decoder import DecoderLayer, DecoderStack, NextNLayer, NextNOutput, StackOutput
from .norm import FoldedRMSNorm, refresh_norm_weight_cache
from .state import Copies, StreamState, SublayerEntry, expand
from .wiring import Steps, wire

__all__ = [
    "POST_MULT_VALUE",
    "Copies",
    "DecoderLayer",
    "DecoderStack",
    "FoldedRMSNorm",
    "HyperConnection",
    "HyperHead",
    "NextNLayer",
    "NextNOutput",
    "StackOutput",
    "Steps",
    "StreamState",
    "SublayerEntry",
    "expand",
    "refresh_norm_weight_cache",
    "wire",
]

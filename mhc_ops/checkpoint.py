"""Load mHC parameters from a checkpoint with DeepSeek's names or with those of transformers.

::

    here               DeepSeek                   transformers
    -----------------  -------------------------  ----------------------------------------------
    layers.0.attn_hc.* layers.0.hc_attn_*         model.layers.0.attn_hc.*
    layers.0.ffn_hc.*  layers.0.hc_ffn_*          model.layers.0.ffn_hc.*
    layers.0.attn_norm layers.0.attn_norm.weight  model.layers.0.input_layernorm.weight
    layers.0.ffn_norm  layers.0.ffn_norm.weight   model.layers.0.post_attention_layernorm.weight
    head.*             hc_head_*                  model.hc_head.hc_*
    norm               norm.weight                model.norm.weight

``*`` stands for fn, base and scale. Only DeepSeek's checkpoints hold the parameters of a draft
layer. Their names begin with ``mtp.0.``: those of a layer, of a head and a norm, and
``enorm.weight`` and ``hnorm.weight``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .nn import DecoderStack, NextNLayer, refresh_norm_weight_cache

# A checkpoint is given as tensors by name, or as the path of a file, or of a folder of files.
Checkpoint = Mapping[str, Tensor] | str | os.PathLike[str]

_PARAMETERS = ("fn", "base", "scale")

# These tables map a name here to the name in the checkpoint. "*" stands for each of the parameters.
_LAYER = {
    "deepseek": {
        "attn_hc.*": "hc_attn_*",
        "ffn_hc.*": "hc_ffn_*",
        "attn_norm.weight": "attn_norm.weight",
        "ffn_norm.weight": "ffn_norm.weight",
    },
    "transformers": {
        "attn_hc.*": "attn_hc.*",
        "ffn_hc.*": "ffn_hc.*",
        "attn_norm.weight": "input_layernorm.weight",
        "ffn_norm.weight": "post_attention_layernorm.weight",
    },
}
_ENDS = {
    "deepseek": {"head.*": "hc_head_*", "norm.weight": "norm.weight"},
    "transformers": {"head.*": "hc_head.hc_*", "norm.weight": "norm.weight"},
}
_NEXTN = _ENDS["deepseek"] | {"enorm.weight": "enorm.weight", "hnorm.weight": "hnorm.weight"}
_PREFIX = {"deepseek": "", "transformers": "model."}

# A name that matches belongs to mHC, in whichever layer; one that no parameter has is unexpected.
_DEEPSEEK_KINDS = r"hc_\w+|attn_norm\.weight|ffn_norm\.weight"
_KINDS = {
    "deepseek": rf"(layers\.\d+\.)?({_DEEPSEEK_KINDS})",
    "transformers": (
        r"model\.(layers\.\d+\.(\w+_hc\.\w+|(input|post_attention)_layernorm\.weight)|hc_head\.\w+)"
    ),
}


def _written_out(table: Mapping[str, str]) -> dict[str, str]:
    return {
        ours.replace("*", parameter): theirs.replace("*", parameter)
        for ours, theirs in table.items()
        for parameter in (_PARAMETERS if "*" in ours else ("",))
    }


def stack_names(layers: int, style: str) -> dict[str, str]:
    """Map every mHC parameter of a :class:`~mhc_ops.nn.DecoderStack` to its name in a checkpoint.

    Args:
        layers: number of layers.
        style: ``deepseek`` or ``transformers``.

    Returns:
        Name of the parameter in the stack to its name in the checkpoint.

    Raises:
        ValueError: the style is another one.
    """
    if style not in _PREFIX:
        raise ValueError(
            f"mhc_ops.checkpoint.stack_names: expected style to be one of {', '.join(_PREFIX)}, "
            f"got {style!r}"
        )
    prefix = _PREFIX[style]
    names = {
        f"layers.{index}.{ours}": f"{prefix}layers.{index}.{theirs}"
        for index in range(layers)
        for ours, theirs in _written_out(_LAYER[style]).items()
    }
    return names | {
        ours: f"{prefix}{theirs}" for ours, theirs in _written_out(_ENDS[style]).items()
    }


def nextn_names(index: int = 0) -> dict[str, str]:
    """Map every mHC parameter of a :class:`~mhc_ops.nn.NextNLayer` to its name in a checkpoint.

    Args:
        index: which of the checkpoint's draft layers.

    Returns:
        Name of the parameter in the layer to its name in the checkpoint.
    """
    names = {f"layer.{ours}": theirs for ours, theirs in _written_out(_LAYER["deepseek"]).items()}
    return {
        ours: f"mtp.{index}.{theirs}" for ours, theirs in (names | _written_out(_NEXTN)).items()
    }


class _Files(Mapping[str, Tensor]):
    """Read tensors of safetensors files by name, each when it is asked for."""

    def __init__(self, files: list[Any]) -> None:
        self._files = {name: file for file in files for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


@contextmanager
def _opened(what: str, tensors: Checkpoint) -> Iterator[Mapping[str, Tensor]]:
    """Give the tensors of a checkpoint by name."""
    if isinstance(tensors, Mapping):
        yield tensors
        return
    taken = (
        "a mapping of names to tensors, or the path of a safetensors file or of a folder of such "
        "files"
    )
    if not isinstance(tensors, (str, os.PathLike)):
        raise TypeError(f"{what}: expected {taken}, got {type(tensors).__name__}")
    path = Path(tensors).expanduser()
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not path.exists() or not files:
        missing = "which does not exist" if not path.exists() else "a folder without such a file"
        raise FileNotFoundError(f"{what}: expected {taken}, got {tensors}, {missing}")
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(
            f"{what}: reading {tensors} needs the package safetensors, which is not installed; "
            "without it, hand over a mapping of names to tensors"
        ) from error
    with ExitStack() as stack:
        opened = []
        for file in files:
            try:
                opened.append(stack.enter_context(safetensors.safe_open(file, framework="pt")))
            except safetensors.SafetensorError as error:
                raise ValueError(
                    f"{what}: expected {taken}, got {file}, which is none: {error}"
                ) from error
        yield _Files(opened)


def _load(
    what: str,
    model: torch.nn.Module,
    names: Mapping[str, str],
    kinds: str,
    tensors: Mapping[str, Tensor],
) -> None:
    """Copy tensors into parameters, but only after every tensor was found to fit."""
    parameters = {theirs: model.get_parameter(ours) for ours, theirs in names.items()}
    faults = [f"missing {name}" for name in parameters if name not in tensors]
    faults += [
        f"unexpected {name}"
        for name in tensors
        if name not in parameters and re.fullmatch(kinds, name)
    ]
    for name, parameter in parameters.items():
        tensor = tensors.get(name)
        if tensor is None:
            continue
        if tensor.shape != parameter.shape:
            faults.append(
                f"{name} of shape {tuple(tensor.shape)} instead of {tuple(parameter.shape)}"
            )
        elif not tensor.is_floating_point() or tensor.element_size() < 2:
            faults.append(
                f"{name} of dtype {tensor.dtype} instead of a floating dtype of at least 16 bits"
            )
    if faults:
        raise ValueError(f"{what}: expected a checkpoint that fits, got " + "; ".join(faults))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    refresh_norm_weight_cache(model)


def load_stack(stack: DecoderStack, tensors: Checkpoint) -> None:
    """Load the mHC parameters and norms of a stack, in place.

    Other tensors of the checkpoint, including those of its draft layers, are ignored. The
    parameters keep their memory and the norm-weight caches are refreshed, so captured CUDA graphs
    stay valid.

    Args:
        stack: the stack.
        tensors: the checkpoint, by DeepSeek's names or by those of transformers: a mapping, or the
            path of a safetensors file, or of a folder of such files, of which those tensors alone
            are read that the stack takes. Paths need the package safetensors.

    Raises:
        TypeError: the checkpoint is neither a mapping nor a path.
        FileNotFoundError: there is no such file, or no safetensors file in the folder.
        ImportError: a path is given, and safetensors is not installed.
        ValueError: an mHC tensor is missing, belongs to a layer that the stack does not have, or
            has another shape or no usable dtype. The message names every such tensor, and nothing
            is overwritten. Or a file is no safetensors file.
    """
    what, layers = "mhc_ops.checkpoint.load_stack", len(stack.layers)
    with _opened(what, tensors) as opened:
        held = {
            style: sum(name in opened for name in stack_names(layers, style).values())
            for style in _PREFIX
        }
        style = max(held, key=lambda style: held[style])
        _load(what, stack, stack_names(layers, style), _KINDS[style], opened)


def load_nextn(layer: NextNLayer, tensors: Checkpoint, index: int = 0) -> None:
    """Load the mHC parameters and norms of a draft layer, in place.

    Args:
        layer: the draft layer. This function does not load its projections.
        tensors: the checkpoint, by DeepSeek's names, as :func:`load_stack` takes it; its other
            tensors are ignored.
        index: which of the checkpoint's draft layers.

    Raises:
        TypeError, FileNotFoundError, ImportError, ValueError: as :func:`load_stack` raises them.
    """
    what, kinds = "mhc_ops.checkpoint.load_nextn", rf"mtp\.{index}\.({_DEEPSEEK_KINDS})"
    with _opened(what, tensors) as opened:
        _load(what, layer, nextn_names(index), kinds, opened)

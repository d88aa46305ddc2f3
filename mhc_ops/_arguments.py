"""What the arguments and outputs of the ops are, by name: dtype, shape, alignment and range.

The schemas in ``_library`` say which op takes which of them, and in what order. Both together are
an op's recipe, which the checks, the fake implementation and both ways of a CUDA call follow.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._library import SCHEMAS

ACTIVATION = torch.bfloat16
MIX = torch.float32
LARGEST = sys.float_info.max  # any finite number is at most this
# Sinkhorn has long converged; without a bound a wrong number keeps a CPU or GPU busy for hours.
MOST_ROUNDS = 10_000


class TensorSpec(NamedTuple):
    """A tensor of an op.

    Attributes:
        dtypes: what it may be; the first is what the kernels take, others are cast.
        tail: its sizes behind the token dimensions: numbers, and names of :class:`Sizes`.
        per_token: whether it has the token dimensions.
        rows: whether the kernels read it 16 bytes at a time, so that its last dimension must be
            contiguous and it must start at a multiple of 16 bytes.
        may_drop_last: whether the last size, which is 1, may be left out.
    """

    dtypes: tuple[torch.dtype, ...]
    tail: tuple[int | str, ...]
    per_token: bool = False
    rows: bool = True
    may_drop_last: bool = False


class NumberSpec(NamedTuple):
    """A number of an op, finite.

    Attributes:
        least, most: its range.
        integer: whether it is an integer.
    """

    least: float
    most: float
    integer: bool = False


Spec = TensorSpec | NumberSpec

_EPSILON = NumberSpec(0, LARGEST)

ARGUMENTS: dict[str, Spec] = {
    "x": TensorSpec((ACTIVATION,), ("hidden",), per_token=True),
    "residual": TensorSpec((ACTIVATION,), ("hc_mult", "hidden"), per_token=True),
    "post_layer_mix": TensorSpec((MIX,), ("hc_mult", 1), per_token=True, may_drop_last=True),
    "comb_res_mix": TensorSpec((MIX,), ("hc_mult", "hc_mult"), per_token=True),
    "fn": TensorSpec((MIX,), ("rows", "columns")),
    "hc_scale": TensorSpec((MIX,), (3,), rows=False),
    "hc_base": TensorSpec((MIX,), ("rows",), rows=False),
    "scale": TensorSpec((MIX,), (1,), rows=False),
    "base": TensorSpec((MIX,), ("rows",), rows=False),
    "rms_eps": _EPSILON,
    "hc_pre_eps": _EPSILON,
    "hc_eps": _EPSILON,
    "hc_sinkhorn_eps": _EPSILON,
    "hc_post_mult_value": NumberSpec(-LARGEST, LARGEST),
    "sinkhorn_repeat": NumberSpec(1, MOST_ROUNDS, integer=True),
    "norm_weight": TensorSpec((ACTIVATION, MIX), ("hidden",)),
    "norm_eps": _EPSILON,
}

OUTPUTS: dict[str, TensorSpec] = {
    "residual_out": TensorSpec((ACTIVATION,), ("hc_mult", "hidden"), per_token=True),
    "post_mix": TensorSpec((MIX,), ("hc_mult", 1), per_token=True),
    "comb_mix": TensorSpec((MIX,), ("hc_mult", "hc_mult"), per_token=True),
    "layer_input": TensorSpec((ACTIVATION,), ("hidden",), per_token=True),
    "hidden": TensorSpec((ACTIVATION,), ("hidden",), per_token=True),
}

# What the schemas of ops with one output leave without a name.
_SINGLE_OUTPUT = {"post": "residual_out", "head": "hidden", "post_head": "hidden"}


class Sizes(NamedTuple):
    """The sizes of a call; symbols where it is traced.

    Attributes:
        leading: the token dimensions.
        hc_mult: n, the number of residual streams.
        hidden: H.
        rows: of ``fn``: n pre, n post and n * n comb weights, or n of a head.
    """

    leading: tuple[Any, ...]
    hc_mult: Any
    hidden: Any
    rows: Any

    @property
    def columns(self) -> Any:
        """Columns of ``fn``."""
        return self.hc_mult * self.hidden

    def tail(self, spec: TensorSpec) -> tuple[Any, ...]:
        """The sizes of a tensor behind the token dimensions."""
        return tuple([getattr(self, s) if isinstance(s, str) else s for s in spec.tail])

    def shape(self, spec: TensorSpec) -> tuple[Any, ...]:
        """The shape of a tensor."""
        return (*(self.leading if spec.per_token else ()), *self.tail(spec))


class Recipe(NamedTuple):
    """An op as its schema and the tables above describe it.

    Attributes:
        op: its name.
        arguments: in the order of the schema.
        tensors: those of them that are tensors.
        outputs: in the order of the schema.
        streams: the argument that tells the token dimensions and the hidden size.
    """

    op: str
    arguments: Mapping[str, Spec]
    tensors: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    streams: str

    def rows(self, hc_mult: Any) -> Any:
        """Rows of ``fn`` for so many streams."""
        return hc_mult if "base" in self.arguments else mixes(hc_mult)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Name to value of a call as the dispatcher makes it; what was left out is None."""
        values = dict.fromkeys(self.arguments)
        values.update(zip(self.arguments, args, strict=False))
        values.update(kwargs)
        return values

    def empty(self, streams: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
        """The outputs, uninitialised, on the device of the streams."""
        return tuple(
            streams.new_empty(sizes.shape(spec), dtype=spec.dtypes[0])
            for spec in self.outputs.values()
        )


def mixes(hc_mult: Any) -> Any:
    """Rows of ``fn``: hc_mult pre, hc_mult post and hc_mult squared comb weights."""
    return hc_mult * (hc_mult + 2)


def streams_of(rows: int) -> int | None:
    """The number of streams that so many rows of ``fn`` are for; None where it is none's."""
    hc_mult = math.isqrt(rows + 1) - 1
    return hc_mult if hc_mult >= 1 and mixes(hc_mult) == rows else None


@functools.cache
def recipe(op: str) -> Recipe:
    """The recipe of an op.

    Args:
        op: a key of :data:`mhc_ops._library.SCHEMAS`.
    """
    schema = torch._C.parse_schema(f"mhc::{SCHEMAS[op]}")
    names = [argument.name for argument in schema.arguments]
    outputs = [output.name or _SINGLE_OUTPUT[op] for output in schema.returns]
    arguments = {name: ARGUMENTS[name] for name in names}
    return Recipe(
        op,
        arguments,
        {name: spec for name, spec in arguments.items() if isinstance(spec, TensorSpec)},
        {name: OUTPUTS[name] for name in outputs},
        "residual" if "residual" in names else "x",
    )

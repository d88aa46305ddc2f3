"""State dtype, shape, alignment and range of every argument and output of the ops, by name.

The schemas in ``_library`` say which op takes which arguments, and in what order. A schema and
these tables together are the op's recipe, which the checks, the fake implementation, the short way
and the long way of a CUDA call follow.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._library import SCHEMAS

ACTIVATION = torch.bfloat16
MIX = torch.float32
# The kernels take numbers as fp32. A number beyond these would be infinite there, or zero, or a
# subnormal number, which loses digits and which some modes of a CPU take as zero.
LARGEST = torch.finfo(torch.float32).max
SMALLEST = torch.finfo(torch.float32).smallest_normal
# Sinkhorn has converged long before this many rounds. Without a bound a mistyped number of rounds
# would keep a CPU or GPU busy for hours.
MOST_ROUNDS = 10_000


class TensorSpec(NamedTuple):
    """Describe a tensor argument or an output of an op.

    Attributes:
        dtypes: the allowed dtypes; the kernels take the first, and tensors of another are cast.
        tail: the sizes behind the token dimensions: numbers, and names of :class:`Sizes`.
        per_token: whether the tensor has the token dimensions.
        rows: whether the kernels read the tensor 16 bytes at a time, so that its last dimension
            must be contiguous and its address a multiple of 16 bytes.
        may_drop_last: whether the last size, which is 1, may be left out.
    """

    dtypes: tuple[torch.dtype, ...]
    tail: tuple[int | str, ...]
    per_token: bool = False
    rows: bool = True
    may_drop_last: bool = False


class NumberSpec(NamedTuple):
    """Describe a number among the arguments of an op, which fp32 can hold.

    Attributes:
        least, most: the smallest and the largest allowed value.
        integer: whether the number is an integer.
    """

    least: float
    most: float
    integer: bool = False

    def fault(self, value: float) -> str | None:
        """Say what is expected instead of a value, which may be NaN; None where the value will do.

        Args:
            value: a finite number, an infinite one or NaN.
        """
        if not self.least <= value <= self.most:
            if self.integer:
                return f"from {self.least} to {self.most}"
            least = "" if self.least == -LARGEST else f" and at least {self.least}"
            return f"to be finite in fp32{least}"
        if value != 0 and abs(value) < SMALLEST:
            return f"to be 0 or at least {SMALLEST} in size, which fp32 holds"
        return None


Spec = TensorSpec | NumberSpec

EPSILON = NumberSpec(0, LARGEST)

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
    "rms_eps": EPSILON,
    "hc_pre_eps": EPSILON,
    "hc_eps": EPSILON,
    "hc_sinkhorn_eps": EPSILON,
    "hc_post_mult_value": NumberSpec(-LARGEST, LARGEST),
    "sinkhorn_repeat": NumberSpec(1, MOST_ROUNDS, integer=True),
    "norm_weight": TensorSpec((ACTIVATION, MIX), ("hidden",)),
    "norm_eps": EPSILON,
}

OUTPUTS: dict[str, TensorSpec] = {
    "residual_out": TensorSpec((ACTIVATION,), ("hc_mult", "hidden"), per_token=True),
    "post_mix": TensorSpec((MIX,), ("hc_mult", 1), per_token=True),
    "comb_mix": TensorSpec((MIX,), ("hc_mult", "hc_mult"), per_token=True),
    "layer_input": TensorSpec((ACTIVATION,), ("hidden",), per_token=True),
    "hidden": TensorSpec((ACTIVATION,), ("hidden",), per_token=True),
}

# The schema of an op with a single output gives that output no name, so the name stands here.
_SINGLE_OUTPUT = {"post": "residual_out", "head": "hidden", "post_head": "hidden"}


class Sizes(NamedTuple):
    """Hold the sizes of a call; they are symbols where the call is traced.

    Attributes:
        leading: the token dimensions.
        hc_mult: n, the number of residual streams.
        hidden: H, the hidden size.
        rows: rows of ``fn``: n pre, n post and n * n comb weights, or n weights of a head.
    """

    leading: tuple[Any, ...]
    hc_mult: Any
    hidden: Any
    rows: Any

    @property
    def columns(self) -> Any:
        """Return the number of columns of ``fn``."""
        return self.hc_mult * self.hidden

    def tail(self, spec: TensorSpec) -> tuple[Any, ...]:
        """Return the sizes of a tensor behind the token dimensions."""
        return tuple([getattr(self, s) if isinstance(s, str) else s for s in spec.tail])

    def shape(self, spec: TensorSpec) -> tuple[Any, ...]:
        """Return the shape of a tensor."""
        return (*(self.leading if spec.per_token else ()), *self.tail(spec))


class Recipe(NamedTuple):
    """Describe an op as its schema and the tables of this module do.

    Attributes:
        op: name of the op.
        arguments: name to description of every argument, in the order of the schema.
        tensors: the arguments that are tensors, in the same order.
        outputs: name to description of every output, in the order of the schema.
        streams: name of the argument that tells the token dimensions and the hidden size.
    """

    op: str
    arguments: Mapping[str, Spec]
    tensors: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    streams: str

    def rows(self, hc_mult: Any) -> Any:
        """Return the number of rows that ``fn`` has for ``hc_mult`` streams."""
        return hc_mult if "base" in self.arguments else mixes(hc_mult)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Map every argument's name to its value in a call as the dispatcher makes it.

        An argument that the call leaves out maps to None.
        """
        values = dict.fromkeys(self.arguments)
        values.update(zip(self.arguments, args, strict=False))
        values.update(kwargs)
        return values

    def empty(self, streams: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
        """Allocate the outputs, uninitialised, on the device of the streams."""
        return tuple(
            streams.new_empty(sizes.shape(spec), dtype=spec.dtypes[0])
            for spec in self.outputs.values()
        )


def mixes(hc_mult: Any) -> Any:
    """Count the rows of ``fn``: hc_mult pre, hc_mult post and hc_mult squared comb weights."""
    return hc_mult * (hc_mult + 2)


def streams_of(rows: int) -> int | None:
    """Return the number of streams whose ``fn`` has this many rows, or None if no ``fn`` has."""
    hc_mult = math.isqrt(rows + 1) - 1
    return hc_mult if hc_mult >= 1 and mixes(hc_mult) == rows else None


@functools.cache
def recipe(op: str) -> Recipe:
    """Return the recipe of an op.

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

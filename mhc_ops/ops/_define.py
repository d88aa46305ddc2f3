"""Define an op: make all implementations from the op's recipe and CPU function.

The recipe is the op's schema together with the description of each argument in ``_arguments``. The
check, the fake implementation, the short way and the long way of a CUDA call follow from the
recipe; autograd is the same for every op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .._arguments import recipe
from .._batching import batched
from .._checks import check
from .._library import register
from ..native.serve import serve


def define(op: str, cpu: Callable[..., Tensor | tuple[Tensor, ...]]) -> None:
    """Define ``mhc::op`` and register its implementations.

    Args:
        op: a key of :data:`mhc_ops._library.SCHEMAS`.
        cpu: the CPU implementation; it is called with the arguments of the schema by name, after
            the check.
    """
    of = recipe(op)

    def unwrap(outputs: tuple[Tensor, ...]) -> Any:
        return outputs[0] if len(of.outputs) == 1 else outputs

    def fake(*args: Any, **kwargs: Any) -> Any:
        values = of.bind(args, kwargs)
        return unwrap(of.empty(values[of.streams], check(op, values)))

    def cuda_implementation(*args: Any, **kwargs: Any) -> Any:
        return unwrap(serve(op, of.bind(args, kwargs)))

    def cpu_implementation(*args: Any, **kwargs: Any) -> Any:
        values = of.bind(args, kwargs)
        check(op, values)
        return cpu(**values)

    register(
        op,
        fake=fake,
        cuda=cuda_implementation,
        cpu=cpu_implementation,
        batched=batched(of),
    )

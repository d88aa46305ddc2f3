"""Run the ops under ``torch.func.vmap``: a batch of tokens goes through an op in one call.

The ops take any leading dimensions, so a batch of streams, sublayer outputs and mixes is one more
leading dimension. Where a batch has weights of its own, such as the ``fn`` of several models, each
element of the batch is one call. ``torch.library.register_vmap`` refuses schemas with keyword-only
tensors, so the kernel of the batching key is written out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import unwrap_batched
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

from ._arguments import Recipe


def _one_call(
    of: Recipe, values: dict[str, Any], dims: dict[str, int | None], size: int
) -> dict[str, Any]:
    """Return the arguments of one call for a whole batch, all of whose elements share weights."""
    given = dict(values)
    for name, spec in of.tensors.items():
        value, dim = values[name], dims[name]
        if dim is not None and spec.per_token:
            given[name] = value.movedim(dim, 0).contiguous()
        elif dim is not None:  # Only an empty batch comes here, and its outputs are empty.
            given[name] = value.new_zeros(value.movedim(dim, 0).shape[1:])
        elif spec.per_token and isinstance(value, Tensor):
            given[name] = value.expand(size, *value.shape)
    return given


def _element(values: dict[str, Any], dims: dict[str, int | None], index: int) -> dict[str, Any]:
    """Return the arguments of the call that serves one element of a batch."""
    given = dict(values)
    for name, dim in dims.items():
        if dim is not None:
            given[name] = values[name].select(dim, index).contiguous()
    return given


def batched(of: Recipe) -> Callable[..., Any]:
    """Make the kernel that serves an op's calls under ``vmap``.

    Args:
        of: the recipe of the op.
    """

    def op() -> Any:
        return getattr(torch.ops.mhc, of.op).default

    def call(values: dict[str, Any]) -> tuple[Tensor, ...]:
        result = op()(**{name: value for name, value in values.items() if value is not None})
        return (result,) if isinstance(result, Tensor) else tuple(result)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        interpreter: Any = retrieve_current_functorch_interpreter()
        level, size = interpreter.level(), interpreter.batch_size()
        values, dims = unwrap_batched(of.bind(args, kwargs), level)
        per_element = any(
            dims[name] is not None for name, spec in of.tensors.items() if not spec.per_token
        )
        with torch._C._ExcludeDispatchKeyGuard(
            torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)
        ):
            if all(dim is None for dim in dims.values()):
                return op()(*args, **kwargs)
            if per_element and size > 0:
                calls = [call(_element(values, dims, index)) for index in range(size)]
                outputs = tuple(torch.stack(output) for output in zip(*calls, strict=True))
            else:
                outputs = call(_one_call(of, values, dims, size))
        wrapped = tuple(torch._C._functorch._add_batch_dim(o, 0, level) for o in outputs)
        return wrapped[0] if len(wrapped) == 1 else wrapped

    return kernel

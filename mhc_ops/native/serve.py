"""Serve a CUDA call by the long way, in Python, or say what is wrong with the call.

The short way (``host.cpp``) is tried first. It serves nearly all calls, once the kernels that a
call needs are loaded, and leaves the others to the long way. Both ways follow the same plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import jit, support
from .._arguments import TensorSpec, recipe
from .._checks import check
from ..formula import evaluate
from . import host, launcher
from .plan import Plan, Range, Step, plan


def _dense(value: Tensor, spec: TensorSpec) -> Tensor:
    """Make a tensor as the kernels read it: contiguous, and of the kernels' dtype."""
    return value.to(spec.dtypes[0]).contiguous()


def current_stream(device: torch.device) -> int:
    """Return the handle of torch's current stream of a device."""
    handle: int = torch.cuda.current_stream(device).cuda_stream
    return handle


def _launch(
    op: str,
    step: Step,
    kernel: launcher.Kernel,
    tokens: int,
    values: Mapping[str, Any],
    stream: int,
) -> None:
    """Run one launch of a call; ``values`` are the op's arguments and outputs by name."""
    scalars = {name: evaluate(f, {"tokens": tokens}) for name, f in step.scalars.items()}
    read = None
    if kernel.takes("early"):
        allowed, read = host.early_reads().look(
            values["fn"], lambda: launcher.capture(kernel, stream)
        )
        scalars["early"] = int(allowed)
    bound = {
        name: scalars[name] if name in scalars else values[step.source(name)]
        for name, _ in kernel.compiled.parameters
    }
    grid = [evaluate(extent, scalars) for extent in kernel.compiled.grid]
    launcher.launch(op, kernel, grid, scalars | bound, stream)
    if read is not None:
        host.early_reads().add(read)


def _launch_all(
    of: Plan, served: Range, tokens: int, values: Mapping[str, Any], device: torch.device
) -> None:
    """Load the missing kernels, then launch; where a kernel is refused, launch nothing."""
    kernels = [jit.loaded(step.key, device) for step in served.steps]
    host.load()
    stream = current_stream(device)
    memory = {
        name: torch.empty(
            [evaluate(size, {"tokens": tokens}) for size in needed.shape],
            dtype=needed.dtype,
            device=device,
        )
        for name, needed in served.memory.items()
    }
    for step, kernel in zip(served.steps, kernels, strict=True):
        _launch(of.recipe.op, step, kernel, tokens, {**values, **memory}, stream)


def serve(op: str, values: dict[str, Any]) -> tuple[Tensor, ...]:
    """Serve a call on CUDA tensors.

    Args:
        op: name of the op.
        values: every argument of the op's schema by name; None for one that was left out.

    Returns:
        The outputs, in the order of the schema.

    Raises:
        ValueError: :func:`mhc_ops._checks.check` refuses an argument.
        RuntimeError: the kernels cannot serve the device, or a kernel is not available or cannot be
            launched.
    """
    sizes = check(op, values)
    streams: Tensor = values[recipe(op).streams]
    device = streams.device
    support.require(op, device)
    norm = values.get("norm_weight") is not None
    of = plan(op, sizes.hidden, support.arch(device), support.sm_count(device), norm)
    outputs = of.recipe.empty(streams, sizes)
    tokens = math.prod(sizes.leading)
    if tokens == 0:
        return outputs
    dense = {
        name: _dense(value, of.recipe.tensors[name]) if isinstance(value, Tensor) else value
        for name, value in values.items()
    }
    named = dict(zip(of.recipe.outputs, outputs, strict=True))
    _launch_all(of, of.range(tokens), tokens, {**dense, **named}, device)
    host.remember(of, device)
    return outputs

"""Calls that the ops do not serve, handed to the engine's own functions; a line in the log why.

What is the same for all calls of a model, device and sizes, is decided at its first call. The rest
(layouts, addresses, numbers) is what the ops check themselves before they launch anything, so that
a call that they serve costs nothing more.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
from collections.abc import Callable
from operator import index
from typing import Any, ParamSpec, TypeVar

import torch

from .. import geometry, jit, support
from .._arguments import ACTIVATION
from . import _rebind

logger = logging.getLogger("mhc_ops")

P = ParamSpec("P")
T = TypeVar("T")

_NUMBERS = re.compile(r"\d+")

Place = tuple[int, int, torch.dtype, torch.device]  # hc_mult, hidden, and of the streams

# The reason why the ops do not serve a place; None where they do.
_decided: dict[Place, str | None] = {}
_told: set[str] = set()


def _tell(reason: str) -> None:
    """Log a reason once; other numbers in it, such as a token count, make no other reason."""
    sort = _NUMBERS.sub("#", reason)
    if sort not in _told:
        _told.add(sort)
        logger.warning("the engine's own mHC functions run: %s", reason)


def no_kernels(hidden: int, device: torch.device) -> str | None:
    """Look for the kernels of a hidden size, without compiling any.

    Args:
        hidden: H.
        device: where they would run; CUDA is initialised if it is a CUDA device.

    Returns:
        The reason why there are none, or None where they can be had.
    """
    multiple = geometry.HIDDEN_MULTIPLE
    if hidden < 1 or hidden % multiple != 0:
        return f"expected a hidden size that is a multiple of {multiple}, got {hidden}"
    served, reason = support.is_supported(device)
    if served:
        served, reason = jit.obtainable(hidden, support.arch(support.cuda_device(device)))
    return None if served else reason


def require(engine: str, hidden: int) -> None:
    """Refuse an install that would serve nothing.

    Args:
        engine: of the adapter, for the message.
        hidden: of the model that will run on the current CUDA device.

    Raises:
        RuntimeError: the device is not served, or the kernels cannot be had, with the reason.
    """
    reason = no_kernels(hidden, torch.device("cuda"))
    if reason is not None:
        raise RuntimeError(
            f"mhc_ops.integrations.{engine}: expected kernels for hidden size {hidden}: {reason}"
        )


def _decide(hc_mult: int, hidden: int, dtype: torch.dtype, device: torch.device) -> str | None:
    if hc_mult != geometry.HC_MULT:
        return f"expected hc_mult {geometry.HC_MULT}, got {hc_mult}"
    if dtype != ACTIVATION:
        return f"expected streams of {ACTIVATION}, got {dtype}"
    try:
        return no_kernels(hidden, device)
    except Exception as error:  # whatever it is, the engine can do without the ops
        return f"{type(error).__name__}: {error}"


def _place(streams: Any) -> Place | None:
    """Where a call belongs; None for what are no streams, which the engine knows best to refuse."""
    try:
        shape = streams.shape
        # Of symbols in a trace, index makes numbers.
        return index(shape[-2]), index(shape[-1]), streams.dtype, streams.device
    except (AttributeError, IndexError, TypeError):
        return None


@torch.compiler.assume_constant_result
def _refusal(place: Place) -> str | None:
    """The reason why the ops do not serve a place; None where they do. A trace calls it too."""
    try:
        return _decided[place]
    except KeyError:
        pass
    reason = _decide(*place)
    if reason is not None:
        _tell(reason)
    _decided[place] = reason
    return reason


def falls_back(streams: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Make a function that calls an op call the engine's own one where the op does not serve.

    Args:
        streams: the parameter that is the residual streams.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        position = list(inspect.signature(function).parameters).index(streams)

        @functools.wraps(function)
        def served(*args: P.args, **kwargs: P.kwargs) -> T:
            stock = _rebind.stock(served)
            if stock is None:
                return function(*args, **kwargs)
            given: Any = args[position] if position < len(args) else kwargs.get(streams)
            place = _place(given)
            if place is None or _refusal(place) is not None:
                return stock(*args, **kwargs)
            try:
                return function(*args, **kwargs)
            except ValueError as error:
                reason = str(error)
            except jit.KernelUnavailable as error:
                reason = str(error)
                # Another call would try again for as long; outside of a capture it could succeed.
                if not torch.cuda.is_current_stream_capturing():
                    _decided[place] = reason
            _tell(reason)
            return stock(*args, **kwargs)

        return served

    return decorate

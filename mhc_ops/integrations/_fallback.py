"""Hand calls that the ops do not serve to the engine's own functions, and log the reason once.

The *place* of a call is its number of streams, hidden size, dtype and device. Whether the ops serve
a place is decided at the first call of the place, which also loads every kernel of the hidden size.
Engines run a model once before they capture it, and SGLang calls ``mhc_pre`` when it has loaded the
weights. Layouts, addresses and numbers are checked by the ops themselves before they launch
anything, so this module adds no second check to a call that the ops serve.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
import sys
from collections.abc import Callable
from operator import index
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from .. import geometry, jit, support
from .._arguments import ACTIVATION
from ..prewarm import prewarm
from . import _rebind

logger = logging.getLogger("mhc_ops")

P = ParamSpec("P")
T = TypeVar("T")

_NUMBERS = re.compile(r"\d+")

# A place is hc_mult, the hidden size, and dtype and device of the streams.
Place = tuple[int, int, torch.dtype, torch.device]


class NotServed(Exception):
    """Say that a call goes to the engine's own function by design, which is not logged."""


# This maps a place to the reason why the ops do not serve it, or to None where they do.
_decided: dict[Place, str | None] = {}
_told: set[str] = set()


def _tell(reason: str) -> None:
    """Log a reason once; reasons that differ in numbers only, such as a token count, are one."""
    sort = _NUMBERS.sub("#", reason)
    if sort not in _told:
        _told.add(sort)
        logger.warning("the engine's own mHC functions run: %s", reason)


def no_kernels(hidden: int, device: torch.device) -> str | None:
    """Look for the kernels of a hidden size, without compiling any.

    Args:
        hidden: hidden size.
        device: device on which the kernels would run; for a CUDA device CUDA is initialised.

    Returns:
        The reason why there are none. None where the kernels are available, and on a CPU, where
        the ops run the reference.
    """
    multiple = geometry.HIDDEN_MULTIPLE
    if hidden < 1 or hidden % multiple != 0:
        return f"expected a hidden size that is a multiple of {multiple}, got {hidden}"
    if device.type == "cpu":
        return None
    served, reason = support.is_supported(device)
    if served:
        served, reason = jit.obtainable(hidden, support.arch(support.cuda_device(device)))
    return None if served else reason


def require(engine: str, hidden: int) -> None:
    """Refuse an install that would serve nothing.

    Args:
        engine: name of the adapter, for the message.
        hidden: hidden size of the model that will run on the current CUDA device.

    Raises:
        RuntimeError: the ops do not serve the device, or the kernels are not available; the message
            gives the reason.
    """
    reason = no_kernels(hidden, torch.device("cuda"))
    if reason is not None:
        raise RuntimeError(
            f"mhc_ops.integrations.{engine}: expected kernels for hidden size {hidden}: {reason}"
        )


def load_kernels(hidden: int, device: torch.device) -> None:
    """Load every kernel of a hidden size; compile a kernel that is neither built ahead nor cached.

    Args:
        hidden: hidden size.
        device: device of the model; nothing is loaded for a CPU, nor during CUDA-graph capture.

    Raises:
        RuntimeError: a kernel is not available.
    """
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        prewarm([hidden], device=device, max_tokens=sys.maxsize)


def _decide(hc_mult: int, hidden: int, dtype: torch.dtype, device: torch.device) -> str | None:
    if hc_mult != geometry.HC_MULT:
        return f"expected hc_mult {geometry.HC_MULT}, got {hc_mult}"
    if dtype != ACTIVATION:
        return f"expected streams of {ACTIVATION}, got {dtype}"
    try:
        reason = no_kernels(hidden, device)
        if reason is None:
            load_kernels(hidden, device)
    except Exception as error:  # after any failure the engine can run its own functions
        return str(error) if isinstance(error, RuntimeError) else f"{type(error).__name__}: {error}"
    return reason


def _place(streams: Any, flat: Any = None) -> Place | None:
    """Say which place a call belongs to.

    Args:
        streams: the streams [..., n, H], or with ``flat`` any activation [..., H].
        flat: [..., n*H], the streams or their projection.

    Returns:
        The place. None where the argument is no tensor of streams, which the engine's own function
        is left to refuse.
    """
    try:
        shape = streams.shape
        # In a trace the sizes are symbols, which index turns into numbers.
        hidden = index(shape[-1])
        hc_mult = index(shape[-2] if flat is None else flat.shape[-1] // hidden)
        return hc_mult, hidden, streams.dtype, streams.device
    except (AttributeError, IndexError, TypeError, ZeroDivisionError):
        return None


@torch.compiler.assume_constant_result
def _refusal(place: Place) -> str | None:
    """Say why the ops do not serve a place; None where they do. A trace calls this, too."""
    try:
        return _decided[place]
    except KeyError:
        pass
    reason = _decide(*place)
    if reason is not None:
        _tell(reason)
    _decided[place] = reason
    return reason


def warm(hc_mult: int, hidden: int, device: torch.device) -> None:
    """Decide for a model before its first call, and load the kernels where the ops serve the model.

    Args:
        hc_mult: number of streams.
        hidden: hidden size.
        device: device of the model.
    """
    _refusal((hc_mult, hidden, ACTIVATION, device))


def bf16(weight: Tensor | None) -> Tensor | None:
    """Round a norm's weight to bf16 as both engines do before their kernels read it."""
    return None if weight is None else weight.to(ACTIVATION)


def falls_back(
    streams: str, *, flat: str | None = None
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Make a function that calls an op fall back to the engine's own where the op does not serve.

    A function that calls no op for some of its arguments raises :class:`NotServed` for these.

    Args:
        streams: name of the parameter that is the residual streams [..., n, H]; with ``flat`` name
            of a parameter that is an activation [..., H].
        flat: name of a parameter [..., n*H], which tells n where ``streams`` does not.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        names = list(inspect.signature(function).parameters)
        positions = [(names.index(name), name) for name in (streams, flat) if name]

        @functools.wraps(function)
        def served(*args: P.args, **kwargs: P.kwargs) -> T:
            stock = _rebind.stock(served)
            if stock is None:
                return function(*args, **kwargs)
            given: list[Any] = [
                args[position] if position < len(args) else kwargs.get(name)
                for position, name in positions
            ]
            place = _place(*given)
            if place is None or _refusal(place) is not None:
                return stock(*args, **kwargs)
            try:
                return function(*args, **kwargs)
            except NotServed:
                return stock(*args, **kwargs)
            except ValueError as error:
                reason = str(error)
            except jit.KernelUnavailable as error:
                reason = str(error)
                # The failure is remembered, because each further call would take as long to fail. A
                # failure during a capture is not remembered: the same call may succeed outside.
                if not torch.cuda.is_current_stream_capturing():
                    _decided[place] = reason
            _tell(reason)
            return stock(*args, **kwargs)

        return served

    return decorate

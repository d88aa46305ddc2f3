"""Hand calls that the ops do not serve to the engine's own functions, and log the reason once.

What is the same for all calls of a model, device and sizes, is decided at the first call, which
also loads every kernel of the hidden size: engines run a model once before they capture it, and
SGLang calls ``mhc_pre`` when it has loaded the weights. The rest (layouts, addresses, numbers) is
what the ops check themselves before they launch anything, so a call that they serve costs nothing
more.
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

Place = tuple[int, int, torch.dtype, torch.device]  # hc_mult, hidden, and of the streams


class NotServed(Exception):
    """Says that a call is the engine's by design, which is no news to its log."""


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
        The reason why there are none; None where they can be had, and on a CPU, where the ops are
        their own reference.
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


def load_kernels(hidden: int, device: torch.device) -> None:
    """Load every kernel of a hidden size, and compile those that are not built.

    Args:
        hidden: H.
        device: where the model runs; nothing is done for a CPU, nor while CUDA is captured.

    Raises:
        RuntimeError: a kernel cannot be had.
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
    except Exception as error:  # whatever it is, the engine can do without the ops
        return str(error) if isinstance(error, RuntimeError) else f"{type(error).__name__}: {error}"
    return reason


def _place(streams: Any, flat: Any = None) -> Place | None:
    """Say where a call belongs.

    Args:
        streams: the streams [..., n, H], or with ``flat`` any activation [..., H].
        flat: [..., n*H], streams or their projection.

    Returns:
        The place; None for what are no streams, which the engine knows best to refuse.
    """
    try:
        shape = streams.shape
        # Of symbols in a trace, index makes numbers.
        hidden = index(shape[-1])
        hc_mult = index(shape[-2] if flat is None else flat.shape[-1] // hidden)
        return hc_mult, hidden, streams.dtype, streams.device
    except (AttributeError, IndexError, TypeError, ZeroDivisionError):
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


def warm(hc_mult: int, hidden: int, device: torch.device) -> None:
    """Decide for a model before its first call, and load its kernels where the ops serve it.

    Args:
        hc_mult: n.
        hidden: H.
        device: where the model runs.
    """
    _refusal((hc_mult, hidden, ACTIVATION, device))


def bf16(weight: Tensor | None) -> Tensor | None:
    """Round a norm's weight to bf16 as both engines do before their kernels read it."""
    return None if weight is None else weight.to(ACTIVATION)


def falls_back(
    streams: str, *, flat: str | None = None
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Make a function that calls an op call the engine's own one where the op does not serve.

    A function that calls no op for some of its arguments raises :class:`NotServed` for these.

    Args:
        streams: the parameter that is the residual streams [..., n, H]; with ``flat`` one that is
            an activation [..., H].
        flat: a parameter [..., n*H], which tells n where the streams do not.
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
                # Another call would try again for as long; outside of a capture it could succeed.
                if not torch.cuda.is_current_stream_capturing():
                    _decided[place] = reason
            _tell(reason)
            return stock(*args, **kwargs)

        return served

    return decorate

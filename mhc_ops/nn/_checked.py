"""Check the arguments of modules when the modules are made, by the ranges of the ops."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Iterable
from typing import Any, NoReturn, cast

import torch

from .._arguments import ARGUMENTS, LARGEST, NumberSpec

_SIZE = NumberSpec(1, LARGEST)


def _fail(kind: type[Exception], module: str, argument: str, expected: str, got: Any) -> NoReturn:
    raise kind(f"mhc_ops.nn.{module}: expected {argument} {expected}, got {got!r}")


def _integer(module: str, argument: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        _fail(TypeError, module, argument, "to be an integer", value)


def size(module: str, argument: str, value: Any) -> int:
    """Return a size as an integer of at least 1.

    Args:
        module: name of the module's class.
        argument: name of the argument.
        value: what was given for it.

    Raises:
        TypeError: the value is no integer.
        ValueError: the value is below 1.
    """
    found = _integer(module, argument, value)
    if found < 1:
        _fail(ValueError, module, argument, "to be at least 1", value)
    return found


def number(module: str, argument: str, value: Any, like: str = "norm_eps") -> Any:
    """Return a number as the ops take it: an integer or a float in the range of an argument.

    Args:
        module: name of the module's class.
        argument: name of the argument.
        value: what was given for it.
        like: the ops' argument whose range holds; every epsilon has the same.

    Raises:
        TypeError: the value is no number, or no integer where one is needed.
        ValueError: the value is out of the range.
    """
    spec = cast(NumberSpec, ARGUMENTS[like])
    if spec.integer:
        found: float = _integer(module, argument, value)
    elif isinstance(value, numbers.Real) and not isinstance(value, bool):
        found = float(value)
    else:
        _fail(TypeError, module, argument, "to be a number", value)
    expected = spec.fault(found)
    if expected is not None:
        _fail(ValueError, module, argument, expected, value)
    return found


def dtype(module: str, argument: str, value: Any) -> torch.dtype:
    """Return a floating dtype of at least 16 bits.

    Args:
        module: name of the module's class.
        argument: name of the argument.
        value: what was given for it.

    Raises:
        TypeError: the value is no such dtype.
    """
    if isinstance(value, torch.dtype) and value.is_floating_point and value.itemsize >= 2:
        return value
    _fail(TypeError, module, argument, "to be a floating dtype of at least 16 bits", value)


def function(module: str, argument: str, value: Any) -> Any:
    """Return a sublayer or a projection, which is a function of [..., H].

    Args:
        module: name of the module's class.
        argument: name of the argument.
        value: what was given for it.

    Raises:
        TypeError: the value cannot be called.
    """
    if not callable(value):
        _fail(TypeError, module, argument, "to be callable, f(x) -> x", value)
    return value


def pairs(module: str, argument: str, value: Any) -> list[tuple[Any, Any]]:
    """Return pairs of functions, at least one.

    Args:
        module: name of the module's class.
        argument: name of the argument.
        value: what was given for it.

    Raises:
        TypeError: the value is no iterable of pairs of functions.
        ValueError: there is no pair.
    """
    if not isinstance(value, Iterable):
        _fail(TypeError, module, argument, "to be pairs (attention, mlp)", value)
    found = []
    for index, pair in enumerate(value):
        if not isinstance(pair, Iterable) or len(both := tuple(pair)) != 2:
            _fail(TypeError, module, f"{argument}[{index}]", "to be a pair (attention, mlp)", pair)
        for place, one in enumerate(both):
            function(module, f"{argument}[{index}][{place}]", one)
        found.append((both[0], both[1]))
    if not found:
        raise ValueError(f"mhc_ops.nn.{module}: expected at least one pair of {argument}, got none")
    return found

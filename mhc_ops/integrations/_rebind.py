"""Replace functions of an engine in place, and put them back, for sglang.py and vllm.py."""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch

from . import _imports

logger = logging.getLogger("mhc_ops")


class Replacement(NamedTuple):
    """Name a function or method of an engine, and the function that replaces it.

    Attributes:
        module: full name of the module that defines the engine's function.
        name: name of the engine's function in the module; a method is ``Class.method``.
        function: the function that replaces the engine's. It has the signature that the engine's
            is expected to have.
        late: whether only the engine imports the module, such as that of a model. The replacement
            is then made when the engine has imported the module. If the module is not as expected,
            this replacement alone is left out.
    """

    module: str
    name: str
    function: Callable[..., Any]
    late: bool = False


class _Found(NamedTuple):
    """Hold a function of an engine, where it is defined, and the function that replaces it."""

    owner: Any  # the owner is a module or a class
    attribute: str
    stock: Callable[..., Any]
    ours: Callable[..., Any]


# This maps a function of ours to the engine's own that it replaced. An entry stays after uninstall,
# because other code may still hold the function of ours.
_stock: dict[Callable[..., Any], Callable[..., Any]] = {}


def stock(ours: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return the engine's own function that one of ours replaced; None without an install."""
    return _stock.get(ours)


def _parameters(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    """List name, kind and default of every parameter; annotations do not matter to a caller."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def _text(function: Callable[..., Any]) -> str:
    parameters = inspect.signature(function).parameters.values()
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return str(inspect.Signature(bare))


def _find(engine: str, tested: str, wanted: Replacement) -> _Found:
    """Find the engine's function, and refuse one whose signature is not that of ours."""
    asked = f"mhc_ops.integrations.{engine}: expected {wanted.module}.{wanted.name}"
    hint = f"; tested with {engine} {tested}"
    try:
        owner: Any = importlib.import_module(wanted.module)
    except ImportError as error:
        raise RuntimeError(f"{asked}, got an import error: {error}{hint}") from error
    *outer, attribute = wanted.name.split(".")
    for name in outer:
        owner = getattr(owner, name, None)
    found = None if owner is None else vars(owner).get(attribute)
    if found is None:
        raise RuntimeError(f"{asked}, got a module without it{hint}")
    if not inspect.isfunction(found):
        raise RuntimeError(f"{asked} to be a function, got {type(found).__name__}{hint}")
    if _parameters(found) != _parameters(wanted.function):
        raise RuntimeError(f"{asked}{_text(wanted.function)}, got {_text(found)}{hint}")
    return _Found(owner, attribute, found, wanted.function)


def _bound(engine: str, function: Callable[..., Any]) -> Iterator[tuple[Any, str]]:
    """List where the engine's modules bind a function, because model code imports it by name."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == engine and isinstance(module, ModuleType):
            for attribute, value in list(vars(module).items()):
                if value is function:
                    yield module, attribute


def _places(engine: str, found: _Found) -> Iterator[tuple[Any, str]]:
    if isinstance(found.owner, ModuleType):
        yield from _bound(engine, found.stock)
    else:
        yield found.owner, found.attribute


def _replace(engine: str, found: Sequence[_Found]) -> None:
    """Bind our functions wherever the engine binds its own: all of them, or none if one fails."""
    done: list[tuple[Any, str, Callable[..., Any]]] = []
    try:
        for one in found:
            if one.stock is not one.ours:
                _stock[one.ours] = one.stock
                for owner, attribute in _places(engine, one):
                    done.append((owner, attribute, one.stock))
                    setattr(owner, attribute, one.ours)
    except BaseException:
        for owner, attribute, own in done:
            setattr(owner, attribute, own)
        raise


def _replace_late(engine: str, tested: str, wanted: Sequence[Replacement]) -> None:
    """Replace functions of a module that the engine has imported; log those that do not fit."""
    for one in wanted:
        try:
            _replace(engine, [_find(engine, tested, one)])
        except Exception as error:  # after any failure the engine can keep its own function
            logger.warning("%s keeps its own %s: %s", engine, one.name, error)


def install(engine: str, tested: str, replacements: Sequence[Replacement]) -> None:
    """Bind every replacement wherever the engine's modules bind the function that it replaces.

    Args:
        engine: name of the engine's top-level package.
        tested: version of the engine that has these signatures, for the messages.
        replacements: what to replace; a replacement that is in place already is left there.

    Raises:
        RuntimeError: the engine is not installed, a function that is not ``late`` is missing or has
            another signature, or torch is built for ROCm. Nothing is replaced then.
    """
    if torch.version.hip is not None:
        raise RuntimeError(
            f"mhc_ops.integrations.{engine}: expected a torch built for CUDA, "
            f"got ROCm {torch.version.hip}"
        )
    _replace(engine, [_find(engine, tested, wanted) for wanted in replacements if not wanted.late])
    late = [wanted for wanted in replacements if wanted.late]
    for module in dict.fromkeys(wanted.module for wanted in late):
        here = [wanted for wanted in late if wanted.module == module]
        _imports.after(module, functools.partial(_replace_late, engine, tested, here))


def uninstall(engine: str, replacements: Sequence[Replacement]) -> None:
    """Undo :func:`install`, also in modules that were imported after it.

    Args:
        engine: name of the engine's top-level package.
        replacements: the replacements to undo; one that is not in place is left alone.
    """
    for module, name, ours, late in replacements:
        if late:
            _imports.forget(module)
        if ours not in _stock:
            continue
        *outer, attribute = name.split(".")
        if not outer:
            for owner, bound in _bound(engine, ours):
                setattr(owner, bound, _stock[ours])
        elif module in sys.modules:
            owner = getattr(sys.modules[module], outer[0], None)
            if owner is not None and vars(owner).get(attribute) is ours:
                setattr(owner, attribute, _stock[ours])


def guarded(engine: str, install: Callable[[], None]) -> None:
    """Call an adapter's install from a plugin, which the engine may call without any guard.

    Every exception is logged instead of raised, except a request to end the process.

    Args:
        engine: name of the engine, for the log.
        install: function ``install`` of the engine's adapter.
    """
    try:
        install()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        logger.warning(
            "%s keeps its own mHC functions: %s: %s", engine, type(error).__name__, error
        )

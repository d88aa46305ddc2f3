"""Functions of an engine replaced in place, and put back; what sglang.py and vllm.py share."""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch

logger = logging.getLogger("mhc_ops")


class Replacement(NamedTuple):
    """A function of an engine, and what takes its place.

    Attributes:
        module: full name of the module that defines it.
        name: its name there.
        function: takes its place; has the signature that is expected of it.
    """

    module: str
    name: str
    function: Callable[..., Any]


# Ours to the engine's own; kept after uninstall for whoever still holds one of ours.
_stock: dict[Callable[..., Any], Callable[..., Any]] = {}


def stock(ours: Callable[..., Any]) -> Callable[..., Any] | None:
    """The engine's own function that one of ours was put in place of; None without an install."""
    return _stock.get(ours)


def _parameters(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    """Name, kind and default of every parameter; annotations do not matter to a caller."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def _text(function: Callable[..., Any]) -> str:
    parameters = inspect.signature(function).parameters.values()
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return str(inspect.Signature(bare))


def _find(engine: str, tested: str, wanted: Replacement) -> Callable[..., Any]:
    """The engine's function, once it is known to be called as ours is."""
    asked = f"mhc_ops.integrations.{engine}: expected {wanted.module}.{wanted.name}"
    hint = f"; tested with {engine} {tested}"
    try:
        module = importlib.import_module(wanted.module)
    except ImportError as error:
        raise RuntimeError(f"{asked}, got an import error: {error}{hint}") from error
    found = getattr(module, wanted.name, None)
    if found is None:
        raise RuntimeError(f"{asked}, got a module without it{hint}")
    if not inspect.isfunction(found):
        raise RuntimeError(f"{asked} to be a function, got {type(found).__name__}{hint}")
    if _parameters(found) != _parameters(wanted.function):
        raise RuntimeError(f"{asked}{_text(wanted.function)}, got {_text(found)}{hint}")
    return found


def _bound(engine: str, function: Callable[..., Any]) -> Iterator[tuple[ModuleType, str]]:
    """Where the engine's modules bind a function: model code imports them by name."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == engine and isinstance(module, ModuleType):
            for attribute, value in list(vars(module).items()):
                if value is function:
                    yield module, attribute


def install(engine: str, tested: str, replacements: Sequence[Replacement]) -> None:
    """Bind every replacement wherever the engine's modules bind the function that it replaces.

    Args:
        engine: name of its top-level package.
        tested: the version that the signatures are those of, for the messages.
        replacements: what to replace; one that is in place already is left there.

    Raises:
        RuntimeError: the engine is not installed, a function is missing or has another signature,
            or torch is built for ROCm. Nothing is replaced then.
    """
    if torch.version.hip is not None:
        raise RuntimeError(
            f"mhc_ops.integrations.{engine}: expected a torch built for CUDA, "
            f"got ROCm {torch.version.hip}"
        )
    found = [(_find(engine, tested, wanted), wanted.function) for wanted in replacements]
    done: list[tuple[ModuleType, str, Callable[..., Any]]] = []
    try:
        for stock, ours in found:
            if stock is not ours:
                _stock[ours] = stock
                for module, attribute in _bound(engine, stock):
                    done.append((module, attribute, stock))
                    setattr(module, attribute, ours)
    except BaseException:
        for module, attribute, stock in done:
            setattr(module, attribute, stock)
        raise


def uninstall(engine: str, replacements: Sequence[Replacement]) -> None:
    """Undo :func:`install`, also in modules that were imported after it.

    Args:
        engine: name of its top-level package.
        replacements: those that were installed; one that is not in place is left alone.
    """
    for _, _, ours in replacements:
        if ours in _stock:
            for module, attribute in _bound(engine, ours):
                setattr(module, attribute, _stock[ours])


def guarded(engine: str, install: Callable[[], None]) -> None:
    """Call an adapter's install from a plugin, which the engine may call without any guard.

    Whatever goes wrong is logged; only a request to end the process gets out.

    Args:
        engine: its name, for the log.
        install: of its adapter.
    """
    try:
        install()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        logger.warning(
            "%s keeps its own mHC functions: %s: %s", engine, type(error).__name__, error
        )

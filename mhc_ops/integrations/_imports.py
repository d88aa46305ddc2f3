"""Call a function once other code has imported a module, without importing the module now."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

_waiting: dict[str, Callable[[], None]] = {}


class _Finder(importlib.abc.MetaPathFinder):
    """Find a module as the other finders do, and make its loader call what waits for the module."""

    def __init__(self) -> None:
        self._busy = threading.local()

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in _waiting or getattr(self._busy, "with_name", None) == name:
            return None
        self._busy.with_name = name
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._busy.with_name = None
        loader: Any = None if spec is None else spec.loader
        if loader is None:
            return spec
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            then = _waiting.pop(name, None)
            if then is not None:
                then()

        loader.exec_module = exec_module  # a loader belongs to one module, so no other is affected
        return spec


_finder = _Finder()


def after(module: str, then: Callable[[], None]) -> None:
    """Call a function once a module is imported; call it now if the module is imported already.

    Args:
        module: full name of the module.
        then: the function, which must raise nothing. It replaces a function that already waits for
            the module.
    """
    if module in sys.modules:
        then()
        return
    _waiting[module] = then
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def forget(module: str) -> None:
    """Drop the function that waits for a module, if there is one.

    Args:
        module: full name of the module.
    """
    _waiting.pop(module, None)
    if not _waiting and _finder in sys.meta_path:
        sys.meta_path.remove(_finder)

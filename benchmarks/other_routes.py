"""Change the table of routes for a while, to run a kernel at sizes of other kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from mhc_ops import geometry, routes
from mhc_ops.native import host, plan


@contextmanager
def other_routes(**constants: Any) -> Iterator[None]:
    """Make the table of routes from these constants while the context lasts.

    Args:
        constants: constants of ``mhc_ops.routes`` or ``mhc_ops.geometry``, such as ``CLUSTERS=1``.
    """
    with ExitStack() as stack:
        for name, value in constants.items():
            module = routes if hasattr(routes, name) else geometry
            stack.enter_context(mock.patch.object(module, name, value))
        try:
            _forget()
            yield
        finally:
            _forget()


def _forget() -> None:
    plan.plan.cache_clear()
    host.forget()

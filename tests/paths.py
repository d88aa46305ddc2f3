"""Count which path the calls of a test run took: a plugin of pytest, with a line on a GPU.

The line comes at the end. The plugin counts in the processes that run tests, all of pytest-xdist,
not in processes that tests start.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

import mhc_ops
from mhc_ops import config, jit, store
from mhc_ops._arguments import recipe
from mhc_ops.native import host, serve
from mhc_ops.ops import _define

COUNTED = ("short", "long", "cpu", "ahead", "cached", "compiled")


class Paths:
    """Count how calls were served and where kernels came from, from :meth:`install` on.

    Attributes:
        counts: by what is in ``COUNTED``, of this process without the short way, and of others.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._sources: dict[Any, str] = {}  # The keys are those of kernels.
        self._undo: list[Callable[[], None]] = []
        self._short_before = host.calls()

    # ----------------------------------------------------------------------------------- counting

    def install(self) -> None:
        """Begin to count."""
        self._short_before = host.calls()
        self._wrap(serve, "_launch_all", self._launch_all)
        self._wrap(_define, "check", self._check)
        self._wrap(store, "load_kernel", self._load_kernel)
        self._wrap(jit, "_compile", self._compile)
        self._wrap(jit, "_load", self._load)

    def restore(self) -> None:
        """Count no more."""
        while self._undo:
            self._undo.pop()()

    def total(self) -> Counter[str]:
        """Sum all counts so far."""
        return self.counts + Counter(short=host.calls() - self._short_before)

    def _wrap(self, module: Any, name: str, counting: Callable[..., Any]) -> None:
        function = getattr(module, name)
        setattr(module, name, functools.wraps(function)(functools.partial(counting, function)))
        self._undo.append(lambda: setattr(module, name, function))

    def _launch_all(self, launch_all: Callable[..., None], *args: Any) -> None:
        launch_all(*args)
        self.counts["long"] += 1

    def _check(self, check: Callable[..., Any], op: str, values: Mapping[str, Any]) -> Any:
        sizes = check(op, values)
        streams = values[recipe(op).streams]
        # The fake implementation calls the check as well.
        if streams.device.type == "cpu" and not isinstance(streams, FakeTensor):
            self.counts["cpu"] += 1
        return sizes

    def _load_kernel(
        self, load_kernel: Callable[..., Any], folder: Any, key: Any, **how: Any
    ) -> Any:
        kernel = load_kernel(folder, key, **how)
        if kernel is not None:
            ahead = folder == config.kernels_folder()
            self._sources[key] = "ahead" if ahead else "cached"
        return kernel

    def _compile(self, compile: Callable[..., Any], key: Any, folder: Any) -> Any:
        kernel = compile(key, folder)
        self._sources[key] = "compiled"
        return kernel

    def _load(self, load: Callable[..., Any], key: Any, device: torch.device) -> Any:
        new = jit.loaded_already(key, device) is None
        kernel = load(key, device)
        if new:
            self.counts[self._sources.get(key, "cached")] += 1
        return kernel

    # ------------------------------------------------------------------------------- pytest's hooks

    def pytest_sessionfinish(self, session: Any) -> None:
        # A worker of pytest-xdist sends the counts to the controller.
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["paths"] = dict(self.total())

    def pytest_testnodedown(self, node: Any) -> None:
        self.counts.update(getattr(node, "workeroutput", {}).get("paths", {}))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if mhc_ops.is_supported("cuda")[0]:
            terminalreporter.write_line(line(self.total()))


def line(counts: Mapping[str, int]) -> str:
    """Put counts into words."""
    short, long, cpu, ahead, cached, compiled = (f"{counts.get(name, 0):,}" for name in COUNTED)
    return (
        f"mhc ops: {short} calls took the short way, {long} the long way, {cpu} the CPU reference; "
        f"kernels loaded: {ahead} built ahead, {cached} from the cache, {compiled} compiled by JIT"
    )

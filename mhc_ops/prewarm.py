"""Compile and load every kernel that a hidden size can reach, before serving or graph capture."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from . import geometry, jit, nn, routes, support
from .native import host
from .native.plan import plans

if TYPE_CHECKING:
    from rich.progress import Progress

DEFAULT_HIDDEN = (4096, 7168)  # V4-Flash and V4-Pro
DEFAULT_MAX_TOKENS = 8192


class PrewarmReport(NamedTuple):
    """Report what :func:`prewarm` did.

    Attributes:
        device: the device on which the kernels are loaded now.
        kernels: the kernels. Each was built ahead, read from the cache or compiled, and is loaded.
        seconds: how long the prewarm took.
    """

    device: torch.device
    kernels: tuple[routes.Key, ...]
    seconds: float


def _load(hidden: int, max_tokens: int, device: torch.device) -> None:
    """Load every kernel on the device, and tell the short way about the loaded kernels."""
    arch, sm_count = support.arch(device), support.sm_count(device)
    for key in routes.keys(hidden, arch, max_tokens):
        jit.load(key, device)
    host.load()
    for of in plans(hidden, arch, sm_count):
        host.remember(of, device)


def check_sizes(caller: str, hidden: Sequence[int], max_tokens: int) -> None:
    """Refuse sizes that the kernels cannot serve, in the caller's name."""
    if not hidden:
        raise ValueError(f"{caller}: expected at least one hidden size, got none")
    for size in hidden:
        if size < 1 or size % geometry.HIDDEN_MULTIPLE:
            raise ValueError(
                f"{caller}: expected hidden sizes that are multiples of "
                f"{geometry.HIDDEN_MULTIPLE}, got {size}"
            )
    if max_tokens < 1:
        raise ValueError(f"{caller}: expected max_tokens of at least 1, got {max_tokens}")


class _NoBar(AbstractContextManager["_NoBar"]):
    """Stand in for a progress bar where none is shown."""

    def __exit__(self, *raised: object) -> None:
        """Close nothing."""

    def add_task(self, description: str, *, total: int) -> int:
        """Show nothing of a task."""
        return 0

    def advance(self, task: int) -> None:
        """Show nothing of the progress of a task."""

    def update(self, task: int, *, completed: int) -> None:
        """Show nothing of how far a task is."""


def progress_bar(shown: bool) -> Progress | _NoBar:
    """Make a progress bar on standard error; without rich, make one that shows nothing."""
    if not shown or importlib.util.find_spec("rich") is None:
        return _NoBar()
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


def side_by_side(
    bar: Progress | _NoBar,
    text: str,
    work: Callable[[routes.Key], object],
    keys: Iterable[routes.Key],
) -> None:
    """Do a piece of work for every key, in as many threads as there are processors."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        running = [pool.submit(work, key) for key in keys]
        task: Any = bar.add_task(text, total=len(running))
        try:
            for done in as_completed(running):
                done.result()
                bar.advance(task)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # after a failure no other work is started
            raise


def _sizes(of: Any) -> list[tuple[int, int]]:
    """List each (hidden size, hc_mult) of a model or a config once.

    The modules of ``mhc_ops.nn`` in a model tell both. For a model without them, as transformers
    makes it, the model's config tells both.
    """
    if isinstance(of, torch.nn.Module):
        found = {
            (module.fn.shape[1] // module.hc_mult, module.hc_mult)
            for module in of.modules()
            if isinstance(module, (nn.HyperConnection, nn.HyperHead))
        }
        if found:
            return sorted(found)
    config = getattr(of, "config", of)
    try:
        return [(config.hidden_size, config.hc_mult)]
    except AttributeError as error:
        raise TypeError(
            "mhc_ops.prewarm: expected hidden sizes, a model with hyper-connections, or a model or "
            f"config with hidden_size and hc_mult, got {type(of).__name__}: {error}"
        ) from error


def _hidden_sizes(of: Any) -> list[int]:
    sizes = _sizes(of)
    for _, hc_mult in sizes:
        if hc_mult != geometry.HC_MULT:
            raise ValueError(f"mhc_ops.prewarm: expected hc_mult {geometry.HC_MULT}, got {hc_mult}")
    return [size for size, _ in sizes]


def _device(of: Any) -> torch.device | None:
    """Return the CUDA device of a model's parameters; None where there is none."""
    parameters = of.parameters() if isinstance(of, torch.nn.Module) else ()
    return next((p.device for p in parameters if p.device.type == "cuda"), None)


def prewarm(
    hidden: Sequence[int] | torch.nn.Module | Any,
    *,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    device: torch.device | str | int | None = None,
    progress: bool = False,
) -> PrewarmReport:
    """Compile and load all kernels that calls with these sizes, or of this model, can reach.

    After a prewarm no call with one of the hidden sizes and up to ``max_tokens`` tokens compiles or
    loads anything, so such a call may run inside CUDA-graph capture. Kernels are compiled side by
    side; kernels that were built ahead or are cached are read.

    Args:
        hidden: hidden sizes, multiples of 256; or a model with hyper-connections; or a model of
            transformers, or any config, with ``hidden_size`` and ``hc_mult``.
        max_tokens: the largest token count of a call.
        device: a CUDA device, its name or index. None means the model's device, and without a
            model the current device.
        progress: whether to show a progress bar on standard error.

    Returns:
        A report of the device, the kernels and the seconds.

    Raises:
        ValueError: the kernels cannot serve a hidden size, ``hc_mult`` or ``max_tokens``.
        TypeError: the first argument tells no hidden sizes.
        RuntimeError: the kernels cannot serve the device; the message gives the reason.

    Example:
        >>> import mhc_ops
        >>> if mhc_ops.is_supported()[0]:
        ...     report = mhc_ops.prewarm(hidden=[256], max_tokens=8)
    """
    if not isinstance(hidden, Sequence):
        device = _device(hidden) if device is None else device
        hidden = _hidden_sizes(hidden)
    check_sizes("mhc_ops.prewarm", hidden, max_tokens)
    supported, reason = support.is_supported(device)
    if not supported:
        raise RuntimeError(f"mhc_ops.prewarm: expected a GPU that the ops support: {reason}")
    target = support.cuda_device(device)

    start = time.perf_counter()
    arch = support.arch(target)
    keys = [key for size in hidden for key in routes.keys(size, arch, max_tokens)]
    with progress_bar(progress) as bar:
        side_by_side(bar, f"compiling for {arch}", jit.compile_key, keys)
        loading: Any = bar.add_task(f"loading on {target}", total=len(hidden))
        for size in hidden:
            _load(size, max_tokens, target)
            bar.advance(loading)
    return PrewarmReport(target, tuple(keys), time.perf_counter() - start)


def main(argv: Sequence[str]) -> int:
    """Run ``python -m mhc_ops prewarm``, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mhc_ops prewarm", description=__doc__)
    parser.add_argument("--hidden", type=int, nargs="+", default=list(DEFAULT_HIDDEN))
    parser.add_argument("--max-tokens", type=int, default=DEFAULT_MAX_TOKENS)
    parser.add_argument("--device", default=None)
    arguments = parser.parse_args(argv)
    try:
        report = prewarm(
            arguments.hidden,
            max_tokens=arguments.max_tokens,
            device=arguments.device,
            progress=True,
        )
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{len(report.kernels)} kernels ready on {report.device} in {report.seconds:.1f} s")
    return 0

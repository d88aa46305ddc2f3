"""Make plans: the recipe of an op and its rows of the table, for one hidden size on one device.

The short way and the long way of a CUDA call follow the same plan. A plan says what each argument
must be, what is allocated, and where the value of every parameter of every launch comes from. A
:class:`Range` of a plan is a row of the table of routes, a :class:`Step` is a launch of the row.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch

from .. import formula, geometry, routes
from .._arguments import ACTIVATION, MIX, Recipe, Sizes, recipe
from ..formula import Formula
from ..routes import Key


class Memory(NamedTuple):
    """Describe memory that one call needs between its launches.

    Attributes:
        dtype: dtype of the memory.
        shape: sizes of the memory, as formulas of the token count.
    """

    dtype: torch.dtype
    shape: tuple[Formula, ...]


class Step(NamedTuple):
    """Describe one launch of a plan.

    Attributes:
        key: the kernel.
        scalars: parameter to formula of the token count; ``tokens`` is one of the parameters.
        renamed: parameter to the op's name for the value, where the two differ.
    """

    key: Key
    scalars: Mapping[str, Formula]
    renamed: Mapping[str, str]

    def source(self, parameter: str) -> str:
        """Return the op's name for a parameter of the kernel."""
        return self.renamed.get(parameter, parameter)


class Range(NamedTuple):
    """Hold the launches that serve a range of token counts.

    Attributes:
        max_tokens: the largest token count of the range; None for a range without an end.
        memory: name to description of the memory that is allocated for the launches.
        steps: the launches, in the order in which they run.
    """

    max_tokens: int | None
    memory: Mapping[str, Memory]
    steps: tuple[Step, ...]


class Plan(NamedTuple):
    """Say how calls of an op are served.

    Attributes:
        recipe: the arguments and outputs of the op.
        sizes: the sizes of a token.
        norm: whether the RMSNorm follows.
        ranges: the ranges, by rising token count.
    """

    recipe: Recipe
    sizes: Sizes
    norm: bool
    ranges: tuple[Range, ...]

    def range(self, tokens: int) -> Range:
        """Return the range that serves a call with at least one token."""
        return next(r for r in self.ranges if r.max_tokens is None or tokens <= r.max_tokens)


def _memory(of: Recipe, steps: tuple[Step, ...], hidden: int) -> dict[str, Memory]:
    """Return the memory that the launches of a row pass to each other and that is no output."""
    tokens, n = formula.name("tokens"), formula.constant(geometry.HC_MULT)
    width, columns = formula.constant(geometry.PARTIAL_WIDTH), formula.constant(hidden)
    needed = {}
    for step in steps:
        if "splits" in step.scalars:
            shape = (step.scalars["splits"], tokens, width)
            needed["partials"] = Memory(MIX, shape)
        if "residual_out" in step.renamed.values() and "residual_out" not in of.outputs:
            needed["residual_out"] = Memory(ACTIVATION, (tokens, n, columns))
    return needed


@functools.lru_cache(maxsize=1024)
def plan(op: str, hidden: int, arch: str, sm_count: int | None, norm: bool) -> Plan:
    """Return the plan of an op.

    Args:
        op: name of the op.
        hidden: hidden size.
        arch: architecture, such as ``sm_90a``.
        sm_count: multiprocessors of the device. With None the formulas keep the name
            ``multiprocessors``, for a plan that is written to a file ahead of time.
        norm: whether the RMSNorm follows.
    """
    of, n = recipe(op), geometry.HC_MULT
    known = {} if sm_count is None else {"multiprocessors": sm_count}
    ranges = []
    for row in routes.routes(op, hidden, arch):
        steps = tuple(
            Step(
                launch.key(hidden, arch, norm),
                {
                    "tokens": formula.name("tokens"),
                    **{name: formula.given(f, known) for name, f in launch.scalars.items()},
                },
                launch.renamed,
            )
            for launch in row.launches
        )
        ranges.append(Range(row.max_tokens, _memory(of, steps, hidden), steps))
    return Plan(of, Sizes((), n, hidden, of.rows(n)), norm, tuple(ranges))


def plans(hidden: int, arch: str, sm_count: int | None) -> list[Plan]:
    """List the plans of every op, with the RMSNorm and without it where the op has one.

    Args:
        hidden, arch, sm_count: as of :func:`plan`.
    """
    return [
        plan(op, hidden, arch, sm_count, norm)
        for op in routes.ops()
        for norm in ((False, True) if "norm_weight" in recipe(op).arguments else (False,))
    ]

"""Plans: the recipe of an op and its rows of the table, for one hidden size on one device.

A plan is what both ways of a CUDA call follow. It says what each argument must be, what is
allocated, and for every parameter of every launch where its value comes from.
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
    """Memory that one call needs between its launches.

    Attributes:
        dtype: what it holds.
        shape: its sizes, as formulas of the token count.
    """

    dtype: torch.dtype
    shape: tuple[Formula, ...]


class Step(NamedTuple):
    """One launch.

    Attributes:
        key: the kernel.
        scalars: parameter to formula of the token count, ``tokens`` among them.
        renamed: parameter to the op's name for it, where they differ.
    """

    key: Key
    scalars: Mapping[str, Formula]
    renamed: Mapping[str, str]

    def source(self, parameter: str) -> str:
        """The op's name for a parameter of the kernel."""
        return self.renamed.get(parameter, parameter)


class Range(NamedTuple):
    """The launches that serve a range of token counts.

    Attributes:
        max_tokens: the largest token count that they serve; None for any.
        memory: what is allocated for them.
        steps: the launches, in order.
    """

    max_tokens: int | None
    memory: Mapping[str, Memory]
    steps: tuple[Step, ...]


class Plan(NamedTuple):
    """How calls of an op are served.

    Attributes:
        recipe: what its arguments and outputs are.
        sizes: those of a token.
        norm: whether the RMSNorm follows.
        ranges: by rising token count.
    """

    recipe: Recipe
    sizes: Sizes
    norm: bool
    ranges: tuple[Range, ...]

    def range(self, tokens: int) -> Range:
        """The launches for at least one token."""
        return next(r for r in self.ranges if r.max_tokens is None or tokens <= r.max_tokens)


def _memory(of: Recipe, steps: tuple[Step, ...], hidden: int) -> dict[str, Memory]:
    """What the launches of a row hand on to each other, and is no output."""
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
    """The plan of an op.

    Args:
        op: its name.
        hidden: H.
        arch: such as ``sm_90a``.
        sm_count: multiprocessors of the device; None leaves them open, for a plan written ahead.
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

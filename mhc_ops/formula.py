"""Make and evaluate integer formulas of named sizes: ``ceildiv(tokens, group_tokens) * 16``.

The table of routes states the scalars of a launch as formulas, and the manifest of a kernel its
grid. Python evaluates a formula with :func:`evaluate`, the short way by its :func:`code`. Every
size is at least 0 and every divisor above 0, so Python and C++ round a quotient alike.
"""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

Value: TypeAlias = "Formula | int"

# native/plan.h evaluates these steps. The position of a step is its value in the enumeration Step
# there.
STEPS = (
    *("constant", "tokens", "+", "-", "*", "//", "%", "min", "max", "at_most", "select"),
    "multiprocessors",
)
_OPEN = ("tokens", "multiprocessors")  # a call gives the first of these sizes, a device the second

_FUNCTIONS: dict[str, Callable[..., int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
    "min": min,
    "max": max,
    "at_most": lambda a, b: int(a <= b),
    "select": lambda condition, a, b: a if condition else b,
}
_CALLED = {name: function for name, function in _FUNCTIONS.items() if name.isidentifier()}
_INFIX = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.FloorDiv: "//", ast.Mod: "%"}


@dataclass(frozen=True)
class Formula:
    """Represent a number, a name, or a function of formulas.

    Attributes:
        function: a key of the table of functions; ``constant`` or ``name`` for a leaf.
        parts: the arguments of the function.
        leaf: the number or the name.
    """

    function: str
    parts: tuple[Formula, ...] = ()
    leaf: int | str = 0

    def __add__(self, other: Value) -> Formula:
        return apply("+", self, other)

    def __sub__(self, other: Value) -> Formula:
        return apply("-", self, other)

    def __mul__(self, other: Value) -> Formula:
        return apply("*", self, other)

    def __rmul__(self, other: Value) -> Formula:
        return apply("*", other, self)

    def __floordiv__(self, other: Value) -> Formula:
        return apply("//", self, other)

    def __rfloordiv__(self, other: Value) -> Formula:
        return apply("//", other, self)

    def __mod__(self, other: Value) -> Formula:
        return apply("%", self, other)

    @functools.cached_property
    def function_of_names(self) -> Callable[[Mapping[str, int]], int]:
        """Compile the formula to a function of the sizes of its names."""
        return eval(f"lambda names: {self._python()}", dict(_CALLED))

    def _python(self) -> str:
        if self.function == "name":
            return f"names[{self.leaf!r}]"
        if not self.parts:
            return repr(self.leaf)
        parts = [part._python() for part in self.parts]
        if self.function in _INFIX.values():
            return f"({parts[0]} {self.function} {parts[1]})"
        return f"{self.function}({', '.join(parts)})"

    def __str__(self) -> str:
        if not self.parts:
            return str(self.leaf)
        if self.function in _INFIX.values():
            return f"({self.parts[0]} {self.function} {self.parts[1]})"
        return f"{self.function}({', '.join(map(str, self.parts))})"


def constant(number: Value) -> Formula:
    """Return the formula of a number; a formula is returned as it is."""
    return number if isinstance(number, Formula) else Formula("constant", leaf=number)


def name(text: str) -> Formula:
    """Return the formula whose value is the size of this name."""
    return Formula("name", leaf=text)


def apply(function: str, *parts: Value) -> Formula:
    """Apply a function to formulas and numbers; where all are numbers, compute the value."""
    formulas = tuple(map(constant, parts))
    if all(part.function == "constant" for part in formulas):
        return constant(_FUNCTIONS[function](*(part.leaf for part in formulas)))
    return Formula(function, formulas)


def ceildiv(a: Value, b: Value) -> Formula:
    """Return the formula of a / b, rounded up."""
    return (constant(a) + b - 1) // b


def minimum(a: Value, b: Value) -> Formula:
    """Return the formula of the smaller of two values."""
    return apply("min", a, b)


def maximum(a: Value, b: Value) -> Formula:
    """Return the formula of the larger of two values."""
    return apply("max", a, b)


def at_most(a: Value, b: Value) -> Formula:
    """Return the formula of 1 where a <= b, else 0."""
    return apply("at_most", a, b)


def select(condition: Value, a: Value, b: Value) -> Formula:
    """Return the formula of a where the condition is not 0, else of b."""
    return apply("select", condition, a, b)


def given(formula: Formula, values: Mapping[str, Value]) -> Formula:
    """Replace some of the names of a formula.

    Args:
        formula: the formula.
        values: name to the number or formula that replaces the name.
    """
    if formula.function == "name":
        return constant(values.get(str(formula.leaf), formula))
    if not formula.parts:
        return formula
    return apply(formula.function, *(given(part, values) for part in formula.parts))


def evaluate(formula: Formula, values: Mapping[str, int]) -> int:
    """Compute the value of a formula.

    Args:
        formula: the formula.
        values: the size of every name in the formula.

    Raises:
        ValueError: the formula has a name that ``values`` lacks.
    """
    try:
        return formula.function_of_names(values)
    except KeyError:
        raise ValueError(
            f"mhc_ops.formula.evaluate: expected the size of every name in {formula}, "
            f"got {dict(values)}"
        ) from None


def code(formula: Formula) -> list[int]:
    """Translate a formula to steps of the stack machine in native/plan.h.

    Args:
        formula: the formula, of ``tokens`` and ``multiprocessors``.

    Returns:
        The number of each step. The value of a constant follows the number of its step.

    Raises:
        ValueError: the formula has a name other than these two.
    """
    if formula.function == "constant":
        return [STEPS.index("constant"), int(formula.leaf)]
    if formula.function == "name":
        if formula.leaf not in _OPEN:
            raise ValueError(
                "mhc_ops.formula.code: expected a formula of tokens and multiprocessors alone, "
                f"got {formula}"
            )
        return [STEPS.index(str(formula.leaf))]
    steps = [step for part in formula.parts for step in code(part)]
    return [*steps, STEPS.index(formula.function)]


def depth(formula: Formula) -> int:
    """Count the numbers that the stack machine holds at once."""
    return max([1, *(i + depth(part) for i, part in enumerate(formula.parts))])


def parse(text: str) -> Formula:
    """Parse the text of a formula, which ``str`` gives.

    Args:
        text: integers, names, ``+ - * // %`` and min, max, at_most and select.

    Raises:
        ValueError: the text is no such formula.
    """
    try:
        return _from_tree(ast.parse(text, mode="eval").body)
    except (
        *(SyntaxError, TypeError, KeyError, ZeroDivisionError),
        *(RecursionError, MemoryError),  # The text is nested too deeply.
    ) as error:
        raise ValueError(f"mhc_ops.formula.parse: expected a formula, got {text!r}") from error


def _from_tree(node: ast.expr) -> Formula:
    match node:
        case ast.Constant(value=int(number)) if not isinstance(number, bool):
            return constant(number)
        case ast.Name(id=text):
            return name(text)
        case ast.BinOp(left=left, op=infix, right=right):
            return apply(_INFIX[type(infix)], _from_tree(left), _from_tree(right))
        case ast.Call(func=ast.Name(id=function), args=parts, keywords=[]):
            if function not in _FUNCTIONS or len(parts) != (3 if function == "select" else 2):
                raise KeyError(function)
            return apply(function, *map(_from_tree, parts))
    raise KeyError(type(node).__name__)

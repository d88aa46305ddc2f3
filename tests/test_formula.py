"""Show that a formula's text and code stand for the number that the formula stands for."""

import operator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhc_ops import formula, routes
from mhc_ops.formula import STEPS, apply, code, constant, evaluate, name, parse

NAMES = ("tokens", "group_tokens", "splits")
NUMBERS = st.integers(0, 1 << 20)
SIZES = st.fixed_dictionaries({size: NUMBERS for size in NAMES})
MOST_ON_THE_STACK = 32  # native/plan.h has room for so many.

OPERATORS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
    "min": min,
    "max": max,
    "at_most": lambda a, b: int(a <= b),
}


def grown(leaves):
    """Grow formulas in which nothing is below 0 and no divisor is 0, whatever the sizes."""

    def combine(parts):
        pairs = st.tuples(parts, parts)
        return st.one_of(
            *(
                pairs.map(lambda pair, function=function: apply(function, *pair))
                for function in ("+", "*", "min", "max", "at_most")
            ),
            pairs.map(lambda pair: formula.maximum(*pair) - pair[1]),
            pairs.map(lambda pair: pair[0] // (pair[1] + 1)),
            pairs.map(lambda pair: pair[0] % (pair[1] + 1)),
            pairs.map(lambda pair: formula.ceildiv(pair[0], pair[1] + 1)),
            st.tuples(parts, parts, parts).map(lambda three: formula.select(*three)),
        )

    return st.recursive(leaves, combine, max_leaves=12)


FORMULAS = grown(st.one_of(NUMBERS.map(constant), st.sampled_from(NAMES).map(name)))
OF_TOKENS = grown(st.one_of(NUMBERS.map(constant), st.just(name("tokens"))))


def run(steps, tokens, multiprocessors=None):
    """Run a code on a stack machine like that of native/plan.h; return the result and the depth."""
    stack, words, deepest = [], iter(steps), 0
    for word in words:
        step = STEPS[word]
        if step == "constant":
            stack.append(next(words))
        elif step == "tokens":
            stack.append(tokens)
        elif step == "multiprocessors":
            stack.append(multiprocessors)
        elif step == "select":
            b, a, condition = stack.pop(), stack.pop(), stack.pop()
            stack.append(a if condition else b)
        else:
            b, a = stack.pop(), stack.pop()
            stack.append(OPERATORS[step](a, b))
        deepest = max(deepest, len(stack))
    (result,) = stack
    return result, deepest


@given(FORMULAS, SIZES)
def test_the_text_of_a_formula_is_the_formula(value, sizes):
    again = parse(str(value))
    assert again == value
    assert evaluate(again, sizes) == evaluate(value, sizes)


@given(FORMULAS, SIZES)
def test_python_makes_the_same_number_of_the_text(value, sizes):
    functions = {
        "min": min,
        "max": max,
        "at_most": OPERATORS["at_most"],
        "select": lambda condition, a, b: a if condition else b,
    }
    assert evaluate(value, sizes) == eval(str(value), functions | sizes)


@given(OF_TOKENS, NUMBERS)
def test_the_code_of_a_formula_is_the_formula(value, tokens):
    number, deepest = run(code(value), tokens)
    assert number == evaluate(value, {"tokens": tokens})
    assert deepest == formula.depth(value)


@given(FORMULAS, SIZES, st.sets(st.sampled_from(NAMES)))
def test_names_are_replaced_in_turn_or_at_once(value, sizes, first):
    some = formula.given(value, {size: sizes[size] for size in first})
    assert evaluate(some, sizes) == evaluate(value, sizes)
    # A formula takes the place of a name.
    swapped = formula.given(value, {"splits": name("tokens") + 1})
    assert evaluate(swapped, sizes) == evaluate(value, sizes | {"splits": sizes["tokens"] + 1})


def test_every_operator():
    a, sizes = name("a"), {"a": 7}
    values = [a + 1, a - 1, a * 2, 2 * a, a // 2, 20 // a, a % 4]
    assert [evaluate(value, sizes) for value in values] == [8, 6, 14, 14, 3, 2, 3]
    assert evaluate(formula.ceildiv(a, 4), sizes) == 2
    assert evaluate(formula.ceildiv(15, a), sizes) == 3
    assert evaluate(formula.minimum(a, 3), sizes) == 3
    assert evaluate(formula.maximum(a, 3), sizes) == 7
    assert [evaluate(formula.at_most(a, n), sizes) for n in (6, 7, 8)] == [0, 1, 1]
    assert [evaluate(formula.select(n, a, 9), sizes) for n in (0, 1, 2)] == [9, 7, 7]


def test_numbers_alone_become_a_number():
    assert formula.ceildiv(7, 2) == constant(4)
    assert formula.select(formula.at_most(3, 2), 5, 6) == constant(6)
    assert constant(name("tokens")) == name("tokens")
    assert evaluate(constant(5), {}) == 5


def test_text():
    clusters = formula.minimum(7, formula.ceildiv(name("tokens"), 16))
    assert str(clusters) == "min(7, (((tokens + 16) - 1) // 16))"
    assert parse("min(7, (tokens + 16 - 1) // 16)") == clusters
    assert parse("select(at_most(a, 2), a * 3 % 4, b)") == formula.select(
        formula.at_most(name("a"), 2), name("a") * 3 % 4, name("b")
    )


@pytest.mark.parametrize(
    "text",
    [
        "", "a +", "a b", "a / 2", "a ** 2", "-a", "not a", "1.5", "'a'", "True", "None", "a.b",
        "a[0]", "(a, b)", "a < b", "a if b else c", "lambda: 1", "f(a)", "abs(a)", "a(b)",
        "min(a, b=2)", "min(*a)", "min()", "min(a)", "min(a, b, c)", "select(a, b)",
        "constant(a)", "constant(3)", "tokens(a, b)", "1 // 0", "a + 1 % 0",
    ],
)  # fmt: skip
def test_what_is_no_formula(text):
    with pytest.raises(ValueError, match="expected a formula, got") as caught:
        parse(text)
    assert repr(text) in str(caught.value)


def test_what_has_no_number():
    value = name("tokens") + name("splits")
    with pytest.raises(ValueError, match=r"the size of every name in \(tokens \+ splits\), got"):
        evaluate(value, {"tokens": 3})
    with pytest.raises(ValueError, match="the size of every name"):
        evaluate(name("tokens"), {})


def test_what_has_no_code():
    with pytest.raises(ValueError, match=r"of tokens and multiprocessors alone, got .*splits"):
        code(name("tokens") + name("splits"))


@pytest.mark.parametrize("arch", ["sm_90a", "sm_80"])
@pytest.mark.parametrize("hidden", [256, 4096, 5120, 7168, 8448])
def test_formulas_of_the_table(hidden, arch):
    """Check text, code and room on the stack of every formula of the table."""
    for op in routes.ops():
        for launch in (launch for row in routes.routes(op, hidden, arch) for launch in row[1]):
            for value in launch.scalars.values():
                assert parse(str(value)) == value
                known = formula.given(value, {"multiprocessors": 132})
                assert formula.depth(known) <= MOST_ON_THE_STACK
                for tokens in (1, 7, 48, 49, 129, 1000, 32768):
                    number, _ = run(code(known), tokens)
                    assert number == evaluate(value, {"tokens": tokens, "multiprocessors": 132})
                    # Plans built ahead have this code, which asks for the multiprocessors.
                    assert run(code(value), tokens, 132)[0] == number

"""The docstrings: their examples run, and the API pages are made from them."""

import doctest
import html
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mhc_ops
from helpers import OPS

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
DOCUMENTED = re.search(r"^DOCUMENTED := (.*)$", MAKEFILE, re.MULTILINE)[1].split()

# csrc_tilelang is a language of its own; an adapter needs the package that it adapts
MODULES = [
    "mhc_ops",
    *(
        module.name
        for module in pkgutil.walk_packages(mhc_ops.__path__, "mhc_ops.")
        if not re.search(r"csrc_tilelang|integrations\.|__main__", module.name)
    ),
]
FUNCTIONS = [*OPS, "is_supported", "prewarm"]


def examples(name):
    found = doctest.DocTestFinder().find(importlib.import_module(name))
    return [test for test in found if test.examples]


@pytest.mark.parametrize("name", [name for name in MODULES if examples(name)])
def test_examples(name):
    runner = doctest.DocTestRunner(verbose=False)
    said = []
    for test in examples(name):
        runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)


def test_every_public_function_has_an_example():
    source = "".join(
        example.source for name in MODULES for test in examples(name) for example in test.examples
    )
    assert set(FUNCTIONS) <= set(mhc_ops.__all__)
    assert [name for name in FUNCTIONS if f"mhc_ops.{name}(" not in source] == []


@pytest.mark.slow
def test_pages(tmp_path):
    pytest.importorskip("pdoc")
    command = re.search(r"^\t\$\(BIN\)/pdoc (.*)$", MAKEFILE, re.MULTILINE)[1]
    options = command.replace("build/docs", str(tmp_path)).replace("'", "").split()
    options[options.index("$(DOCUMENTED)") : options.index("$(DOCUMENTED)") + 1] = DOCUMENTED
    done = subprocess.run(
        [sys.executable, "-m", "pdoc", *options], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    # of NamedTuple's own __init__, whose annotations are texts that no module resolves
    warnings = [line for line in done.stderr.splitlines() if "Warn" in line]
    assert [line for line in warnings if ".__init__. Import of" not in line] == []
    for name in DOCUMENTED:
        module = importlib.import_module(name)
        page = html.unescape((tmp_path / f"{name.replace('.', '/')}.html").read_text())
        summary = re.sub(r"[`\n]", " ", module.__doc__.split(".")[0])
        assert " ".join(summary.split()[:6]) in " ".join(re.sub(r"<[^>]+>", " ", page).split())
        for public in getattr(module, "__all__", ()):
            assert f'id="{public}"' in page, f"{name}.{public}"
    # the formula of post, for the browser to draw
    assert r"$$r'_j = \mathrm{bf16}\Big(" in html.unescape((tmp_path / "mhc_ops.html").read_text())


@pytest.mark.parametrize("op", OPS)
def test_formulas_of_several_lines_are_aligned(op):
    formula = getattr(mhc_ops, op).__doc__.split(".. math::\n")[1].split("\n\n")[0]
    assert ("&=" in formula) == (r"\begin{aligned}" in formula)

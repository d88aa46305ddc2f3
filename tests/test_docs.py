"""Run the examples of the docstrings, and check the HTML built from docstrings and pages."""

import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import mhc_ops
from helpers import OPS
from mhc_ops import nn, reference

ROOT = Path(__file__).parents[1]
API = ROOT / "docs" / "api"

# csrc_tilelang is a language of its own; an adapter needs the package that it adapts.
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


# --------------------------------------------------------------------------------------- formulas

FORMULAS = [
    *(getattr(mhc_ops, op) for op in OPS),
    *(f for f in vars(reference).values() if inspect.isfunction(f) and f.__name__[0] != "_"),
    nn.HyperConnection,
    nn.HyperHead,
    nn.FoldedRMSNorm,
    nn.NextNLayer,
    nn.StreamState.materialise,
    nn.expand,
]
FORMULAS = [f for f in FORMULAS if f.__module__.startswith("mhc_ops")]


@pytest.mark.parametrize("of", FORMULAS, ids=lambda of: f"{of.__module__}.{of.__qualname__}")
def test_the_formula_comes_first_and_is_text(of):
    """Put the formula into a literal block behind the summary, which ``help()`` shows as it is."""
    summary, formula, *_ = inspect.getdoc(of).split("\n\n")
    assert summary.endswith("::")
    lines = formula.splitlines()
    assert "=" in lines[0]
    assert all(line.startswith("    ") for line in lines)
    assert max(map(len, lines)) <= 96


def test_no_formula_needs_to_be_drawn():
    for path in (ROOT / "mhc_ops").rglob("*.py"):
        assert not re.search(r"\.\. math|\\mathrm|\\sum", path.read_text()), path


# -------------------------------------------------------------------------------------- API pages


def listed(page):
    return set(re.findall(r"^\.\. auto(?:class|function):: \S+\.(\w+)$", page, re.MULTILINE))


PAGES = [path for path in sorted(API.glob("*.md")) if path.name != "index.md"]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_an_api_page_lists_what_is_public(path):
    page = path.read_text()
    name = re.search(r"automodule:: (\S+)", page)[1]
    module = importlib.import_module(name)
    exported = [
        public
        for public in getattr(module, "__all__", ())
        if callable(getattr(module, public))  # Constants are told where used.
    ]
    public = exported or [
        attribute
        for attribute, value in vars(module).items()
        if attribute[0] != "_"
        and getattr(value, "__module__", "").partition("mhc_ops")[0] == ""
        and getattr(value, "__module__", None) == name
        and (inspect.isclass(value) or inspect.isfunction(value))
    ]
    assert listed(page) == set(public)


# ------------------------------------------------------------------------------------------- HTML


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    """Build the pages as ``make docs`` does, which must have nothing to say."""
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package, reason=f"{package} builds the pages: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("html")
    makefile = (ROOT / "Makefile").read_text()
    command = re.search(r"^\t\$\(BIN\)/python (-m sphinx .*)$", makefile, re.MULTILINE)[1]
    assert "-W" in command.split()
    done = subprocess.run(
        [sys.executable, *command.replace("build/docs", str(folder)).split()],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return folder


class Fetched(HTMLParser):
    """Collect what a browser fetches to show a page, and the ids that links can name."""

    def __init__(self, path):
        super().__init__()
        self.urls, self.ids = [], set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids.add(given.get("id"))
        if tag in ("script", "img", "iframe", "source"):
            self.urls.append(given.get("src"))
        elif tag == "link" and given.get("rel") in ("stylesheet", "preload", "icon"):
            self.urls.append(given.get("href"))


@pytest.mark.slow
def test_the_pages_fetch_nothing(html):
    """Fetch nothing, so that the pages look the same without a network."""
    pages = list(html.rglob("*.html"))
    assert len(pages) > len(list((ROOT / "docs").rglob("*.md")))
    for path in pages:
        for url in Fetched(path).urls:
            if url is not None:
                local = path.parent / url.partition("?")[0]
                assert not re.match(r"(https?:)?//", url), f"{path.name}: {url}"
                assert local.resolve().is_file(), f"{path.name}: {url}"
    for path in html.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", path.read_text()), path
    assert not [path for path in pages if "mathjax" in path.read_text().lower()]


@pytest.mark.slow
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_everything_public_is_in_the_html(html, path):
    page = path.read_text()
    module = re.search(r"automodule:: (\S+)", page)[1]
    ids = Fetched(html / "api" / f"{path.stem}.html").ids
    for name in listed(page):
        assert f"{module}.{name}" in ids


@pytest.mark.slow
def test_the_formula_is_readable_in_the_html(html):
    text = re.sub(r"<[^>]+>", "", (html / "api" / "mhc_ops.html").read_text())
    assert "residual_out[j] = bf16(post_layer_mix[j] * x + sum_i comb_res_mix[i, j]" in text

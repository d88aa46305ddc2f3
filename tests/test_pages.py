"""Test that the pages are true: code runs, commands and links exist, tables are right."""

import argparse
import functools
import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from test_examples import PACKAGE

import figures
import mhc_ops
import pages
from helpers import OPS, overload
from mhc_ops import bench, config
from mhc_ops.__main__ import COMMANDS
from mhc_ops._arguments import ARGUMENTS, LARGEST, NumberSpec
from records import read_baseline

ROOT = pages.ROOT
DOCS = ROOT / "docs"
MAKEFILE = (ROOT / "Makefile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Sites that the pages link to; the project has no address of its own.
SITES = (
    "arxiv.org",
    "docs.pytest.org",
    "github.com",
    "huggingface.co",
    "keepachangelog.com",
    "semver.org",
)

each_page = pytest.mark.parametrize("page", pages.PAGES, ids=pages.name)


def with_blocks(choose):
    chosen = [page for page in pages.PAGES if any(map(choose, pages.blocks(page)))]
    return pytest.mark.parametrize("page", chosen, ids=pages.name)


# ------------------------------------------------------------------------------------------- code


def run_page(page, *met):
    """Run the Python of a page in order, in one namespace; compile what needs more than is met."""
    namespace = {}
    for block in pages.blocks(page):
        if block.language != "python" or block.torchrun:
            continue
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
        if block.needs in ("", *met):
            exec(code, namespace)
    return namespace


@pytest.fixture
def _as_before(monkeypatch, fresh_dynamo):
    """End the switches that a page sets, and what it compiles, with the test."""
    for name in config.DEFAULTS:
        monkeypatch.setenv(name, str(int(config.DEFAULTS[name])))


@with_blocks(lambda block: block.language == "python")
@pytest.mark.usefixtures("_as_before")
def test_code(page):
    run_page(page)


@pytest.mark.gpu
@with_blocks(lambda block: block.needs == "a GPU" and block.language == "python")
@pytest.mark.usefixtures("_as_before")
def test_code_on_a_gpu(page):
    run_page(page, "a GPU")


@pytest.mark.usefixtures("_as_before")
def test_the_code_of_the_readme_does_what_it_says():
    namespace = run_page(ROOT / "README.md")
    x, streams, post_mix, comb_mix, hc = (
        namespace[name] for name in ("x", "streams", "post_mix", "comb_mix", "hc")
    )
    want = mhc_ops.fused_post_pre(x, streams, post_mix, comb_mix, *hc)
    assert want.layer_input.shape == (8, 4096)
    for name, value in want._asdict().items():
        assert torch.equal(getattr(namespace["out"], name), value), name
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert namespace["hidden"].shape == (8, 256)


TORCHRUN = [
    pytest.param(block.text, id=f"{pages.name(page)}-{block.line}")
    for page in pages.PAGES
    for block in pages.blocks(page)
    if block.torchrun
]


@pytest.mark.slow
@pytest.mark.parametrize("text", TORCHRUN)
def test_code_under_torchrun(text, tmp_path):
    script = tmp_path / "block.py"
    script.write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(script)],
        env=os.environ | {"PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_needs_are_those_that_are_known():
    known = {"", "a GPU", "a checkpoint", "SGLang", "vLLM", "the engines"}
    assert {block.needs for page in pages.PAGES for block in pages.blocks(page)} <= known
    assert len(TORCHRUN) == 2


# --------------------------------------------------------------------------------------- commands


class Parsed(Exception):
    """Tell that a command line was understood; the command itself is not run."""


@functools.cache
def pip_options(command):
    said = subprocess.run(
        [sys.executable, "-m", "pip", command, "--help"], capture_output=True, text=True, check=True
    )
    return set(re.findall(r"(?<!\S)--[\w-]+", said.stdout))


def check_pip(words):
    command, *arguments = words
    for word in arguments:
        if word.startswith("--"):
            assert word in pip_options(command)
        elif extras := re.fullmatch(r"\.\[([\w,]+)\]", word):
            assert set(extras[1].split(",")) <= EXTRAS.keys()
        else:
            assert word in (".", "dist/mhc_ops-*.whl", f"mhc-ops=={mhc_ops.__version__}")
    assert command in ("install", "wheel", "check")


def check_python(words, monkeypatch):
    """Let a command of the package, or a script, parse its arguments."""
    if words[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words[2:] if word.startswith("tests"))
        return
    if words[:2] == ["-m", "mhc_ops"]:
        assert words[2] in COMMANDS
        module, arguments = f"mhc_ops.{COMMANDS[words[2]][0]}", words[3:]
    else:
        script, *arguments = words
        assert (ROOT / script).is_file(), script
        if not script.startswith("benchmarks/"):
            return
        module = Path(script).stem
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser, given=None, namespace=None):
        parse(parser, given, namespace)
        raise Parsed

    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        patched.setattr(sys, "argv", [module, *arguments])
        main = importlib.import_module(module).main
        with pytest.raises(Parsed):
            main(arguments) if module.startswith("mhc_ops") else main()


def check_command(words, monkeypatch):
    program, *arguments = words
    program = program.removeprefix(".venv/bin/")
    if program == "make":
        targets = re.search(r"^\.PHONY: (.+)$", MAKEFILE, re.MULTILINE)[1].split()
        assert {word for word in arguments if "=" not in word} <= set(targets)
    elif program == "pip":
        check_pip(arguments)
    elif program == "python":
        check_python(arguments, monkeypatch)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        script = get_args_parser().parse_args(arguments).training_script
        assert (ROOT / script).is_file()
    else:
        assert any(text.startswith(program) for text in EXTRAS["test"]), f"what is {program}?"


@with_blocks(lambda block: block.language == "bash")
def test_commands(page, monkeypatch):
    for block in pages.blocks(page):
        if block.language == "bash":
            for words in pages.commands(block.text):
                check_command(words, monkeypatch)


@pytest.mark.parametrize(
    "command",
    ["make dmo", "python -m mhc_ops bench --tokns 3", "pip install '.[dcs]'", "pip lst", "sudo rm",
     "python benchmarks/none.py", "python -m mhc_ops demos"],
)  # fmt: skip
def test_commands_that_do_not_exist_are_found(command, monkeypatch):
    (words,) = pages.commands(command)
    with pytest.raises((AssertionError, SystemExit, subprocess.CalledProcessError)):
        check_command(words, monkeypatch)


# ------------------------------------------------------------------------------- links and files


@each_page
def test_links(page):
    for link in pages.links(page):
        if link.startswith("http"):
            assert link.startswith(tuple(f"https://{site}" for site in SITES)), link
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in pages.anchors(target), link


@each_page
def test_files_that_are_named_exist(page):
    named = set(re.findall(r"`([\w.-]+/[\w./-]+\.(?:py|c|cpp|jsonl?|md|svg))`", pages.prose(page)))
    for name in named:
        assert (ROOT / name).exists(), name


# ---------------------------------------------------------------------------------------- figures


@each_page
def test_tables_are_those_of_the_records(page):
    text = page.read_text()
    assert figures.renewed(text) == text, "write them anew: python tests/figures.py " + str(page)


def test_every_table_of_figures_is_shown():
    shown = re.findall("<!-- table: (\\w+) -->", "".join(page.read_text() for page in pages.PAGES))
    assert sorted(shown) == sorted(figures.TABLES)


def test_the_range_of_the_readme_is_that_of_the_table():
    factors = [float(row[-1]) for row in pages.rows(figures.boundary())[1:]]
    said = f"At the {len(factors)} sizes that were measured it is {min(factors):.2f} to "
    assert f"{said}{max(factors):.2f} times faster" in (ROOT / "README.md").read_text()


def test_every_default_row_of_the_bench_has_a_baseline():
    """Show a baseline for every row of the bench by the command of the page on performance."""
    path = re.search(r"--baseline (\S+)", pages.section(DOCS / "performance.md", "Repeat it"))[1]
    baseline = read_baseline(ROOT / path)
    for tokens in bench.DEFAULT_TOKENS:
        for hidden in bench.DEFAULT_HIDDEN:
            assert (tokens, hidden, "fused") in baseline


def test_the_number_of_malformed_calls():
    from test_malformed import EXAMPLES

    assert f"{EXAMPLES * len(OPS):,} malformed calls" in (ROOT / "README.md").read_text()


# ------------------------------------------------------------------------------- what the code has


def test_schemas():
    shown = " ".join(pages.section(DOCS / "ops.md", "Schemas").split())
    for op in OPS:
        assert str(overload(op)._schema) in shown


def test_arguments():
    table = pages.section(DOCS / "ops.md", "Arguments")
    named = set(re.findall(r"`(\w+)`", " ".join(row[0] for row in pages.rows(table)[1:])))
    assert named == ARGUMENTS.keys()


def test_ranges():
    table = pages.rows(pages.section(DOCS / "numbers.md", "Ranges"))[1:]
    said = {name: row[1] for row in table for name in re.findall(r"`(\w+)`", row[0])}
    for name, spec in ARGUMENTS.items():
        if name == "norm_eps":
            continue  # The page says this twice.
        if isinstance(spec, NumberSpec):
            bounds = {
                (0, LARGEST): "a number of fp32, at least 0",
                (-LARGEST, LARGEST): "a number of fp32",
            }.get((spec.least, spec.most), f"{spec.least} to {spec.most}")
            assert said[name] == bounds, name


def test_switches():
    def found(page, title):
        table = pages.section(DOCS / page, title)
        return re.findall(r"\| `(MHC_OPS_\w+)` \| `([01])` \|", table)

    defaults = [(name, str(int(value))) for name, value in config.DEFAULTS.items()]
    assert found("deployment.md", "Environment variables") == defaults
    assert found("models.md", "wire and the switches") == defaults[: len(config.WIRING)]


def test_every_environment_variable_is_in_the_table():
    sources = [*(ROOT / "mhc_ops").rglob("*.py"), ROOT / "setup.py"]
    read = {
        name
        for path in sources
        for name in re.findall(r'environ(?:\.get)?[(\[]"(\w+)"', path.read_text())
    }
    table = pages.section(DOCS / "deployment.md", "Environment variables")
    assert "MHC_OPS_AOT_ARCHS" in read
    assert read - {"PATH"} <= set(re.findall(r"`(\w+)`", table))


def test_commands_of_the_package():
    said = re.findall(
        r"python -m mhc_ops (\w+)", pages.section(DOCS / "deployment.md", "Command line")
    )
    assert said == list(COMMANDS)


def test_compatibility():
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    table = pages.rows(pages.section(DOCS / "deployment.md", "Install"))
    for package in ("torch", "tilelang", "transformers"):
        (row,) = (row for row in table if row[0].lower().startswith(package))
        assert row[-1] == pins[package]


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_every_function_that_an_adapter_replaces_is_in_its_table(engine):
    adapter = importlib.import_module(f"mhc_ops.integrations.{engine}")
    text = pages.section(DOCS / "engines.md", "What runs on the ops, and what stays the engine's")
    start = text.index("SGLang 0.5.23:" if engine == "sglang" else "vLLM 0.33.0,")
    end = text.index("vLLM 0.33.0,") if engine == "sglang" else len(text)
    named = set(re.findall(r"`([\w.]+)`", text[start:end]))
    for replacement in adapter.REPLACEMENTS:
        # This one loads kernels alone.
        if not replacement.name.endswith("finalize_mhc_broadcast_weights"):
            assert any(name.endswith(replacement.name) for name in named), replacement.name
    assert f"{'SGLang' if engine == 'sglang' else 'vLLM'} {adapter.TESTED}" in text


def test_the_readme_is_read_in_five_minutes():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_changelog_has_this_version():
    assert f"## {mhc_ops.__version__} " in (ROOT / "CHANGELOG.md").read_text()
    assert f"mhc-ops-{mhc_ops.__version__}" in (ROOT / "README.md").read_text()


def test_version_is_written_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "mhc_ops.__version__"

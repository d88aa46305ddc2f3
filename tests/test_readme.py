"""The README says what is: its examples run; schemas, switches and versions are the real ones."""

import re
import tomllib
from pathlib import Path

import pytest
import torch

import mhc_ops
from helpers import OPS, overload
from mhc_ops import bench, config
from mhc_ops.__main__ import COMMANDS
from records import read_baseline

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def section(title):
    return README.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def code(title):
    return re.search(r"```python\n(.*?)```", section(title), re.DOTALL)[1]


def eager(namespace):
    """The boundary of the ten lines again, on what the arguments hold now."""
    x, streams, post_mix, comb_mix, hc = (
        namespace[name] for name in ("x", "streams", "post_mix", "comb_mix", "hc")
    )
    return mhc_ops.fused_post_pre(x, streams, post_mix, comb_mix, *hc)


def assert_out_is(namespace, want):
    assert namespace["out"].layer_input.shape == (8, 4096)
    for name, value in want._asdict().items():
        assert torch.equal(getattr(namespace["out"], name), value), name


def test_ten_lines_and_compile(fresh_dynamo):
    namespace = {}
    exec(code("Ten lines"), namespace)
    assert_out_is(namespace, eager(namespace))
    exec(code("torch.compile"), namespace)
    assert_out_is(namespace, eager(namespace))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.gpu
def test_cuda_graph():
    namespace = {}
    exec(code("Ten lines"), namespace)
    namespace["new_x"] = torch.randn_like(namespace["x"])
    exec(code("CUDA graphs"), namespace)
    assert_out_is(namespace, eager(namespace))


def test_schemas():
    shown = " ".join(section("The ops").split())
    for op in OPS:
        assert str(overload(op)._schema).replace("mhc::", "", 1) in shown.replace("mhc::", "")


def test_switches():
    rows = re.findall(r"\| `(MHC_OPS_\w+)` \| `([01])` \|", README)
    assert rows == [(name, str(int(value))) for name, value in config.DEFAULTS.items()]


def test_commands():
    assert re.findall(r"python -m mhc_ops (\w+) +#", section("Command line")) == list(COMMANDS)


def test_compatibility():
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    table = section("Compatibility")
    for package in ("torch", "tilelang", "transformers"):
        (row,) = (line for line in table.splitlines() if line.lower().startswith(f"| {package}"))
        assert row.rstrip("| ").endswith(f"| {pins[package]}")


def test_files_that_are_named_exist():
    documents = README + (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"[\w./-]+/[\w./-]+\.(?:py|json|md)\b", documents))
    named |= set(re.findall(r"\]\((?!http)([^)]+)\)", documents))
    assert "benchmarks/baselines/h200_sglang_0.5.23.json" in named
    for name in named:
        assert (ROOT / name).exists(), name


def test_changelog_has_this_version():
    assert f"## {mhc_ops.__version__} " in (ROOT / "CHANGELOG.md").read_text()


def test_every_default_row_of_the_bench_has_a_baseline():
    """The command of the section on performance shows a baseline for every row of its defaults."""
    path = re.search(r"--baseline (\S+)", section("Performance"))[1]
    baseline = read_baseline(ROOT / path)
    for tokens in bench.DEFAULT_TOKENS:
        for hidden in bench.DEFAULT_HIDDEN:
            assert (tokens, hidden, "fused") in baseline


def test_version_is_written_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "mhc_ops.__version__"

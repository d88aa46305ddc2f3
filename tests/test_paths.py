"""Test the line at the end of a run on a GPU: what it counts, and the sum of workers' counts."""

import functools
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fake_driver import ARCH, compiled
from helpers import OPS, call, folder_of_kernels
from mhc_ops import compiler, jit, store
from mhc_ops._arguments import recipe
from mhc_ops.native import host, launcher, serve
from mhc_ops.routes import Key
from mhc_ops.testing import make_inputs
from paths import Paths, line

TESTS = Path(__file__).parent
KEY = Key("post", ARCH, 256)


@pytest.fixture
def paths():
    counting = Paths()
    counting.install()
    yield counting
    counting.restore()


@pytest.mark.parametrize("op", OPS)
def test_ways_of_a_call(driver, paths, op):
    """Count calls on tensors that the stand-in for the driver serves as if they were on a GPU."""
    if not host.load():
        pytest.skip("needs a C++ compiler")
    inputs = make_inputs(op, 3, 256, norm=op != "post")
    call(op, inputs)
    assert paths.total() == {"cpu": 1}  # There is no plan yet.
    serve.serve(op, recipe(op).bind((), inputs))
    assert paths.total() == {"cpu": 1, "long": 1}
    for _ in range(2):
        call(op, inputs)
    assert paths.total() == {"cpu": 1, "long": 1, "short": 2}


def test_what_is_no_call(paths):
    """Count no call that is refused, of fake tensors, or of no memory."""
    inputs = make_inputs("post", 3, 256)
    with pytest.raises(ValueError, match="expected x"):
        call("post", inputs | {"x": inputs["x"].float()})
    with FakeTensorMode() as mode:
        call("post", {name: mode.from_tensor(t) for name, t in inputs.items()})
    call("post", {name: t.to("meta") for name, t in inputs.items()})
    assert not paths.total()


def test_where_kernels_come_from(paths, tmp_path, monkeypatch):
    monkeypatch.setenv("MHC_OPS_KERNELS", str(folder_of_kernels(tmp_path / "ahead")))
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "compile_kernel", compiled)
    monkeypatch.setattr(launcher, "load", lambda *args: object())
    device = torch.device("cuda", 0)

    def load(key=KEY):
        monkeypatch.setattr(jit, "_loaded", {})
        monkeypatch.setattr(jit, "_compiled", {})
        jit.load(key, device)
        jit.load(key, device)  # The kernel is loaded already.

    load()
    assert paths.counts == Counter(compiled=1)
    load()
    assert paths.counts == Counter(compiled=1, cached=1)
    store.save_kernel(tmp_path / "ahead", KEY, compiled(KEY))
    load()
    assert paths.counts == Counter(compiled=1, cached=1, ahead=1)


def test_restored():
    before = [serve._launch_all, store.load_kernel, jit._compile, jit._load]
    counting = Paths()
    counting.install()
    assert isinstance(jit._load, functools.partial)
    counting.restore()
    assert [serve._launch_all, store.load_kernel, jit._compile, jit._load] == before


RUN = """
import sys
sys.path.insert(0, {tests!r})
import mhc_ops
from paths import Paths

mhc_ops.is_supported = lambda device: ({gpu}, "")

def pytest_configure(config):
    counting = Paths()
    counting.install()
    config.pluginmanager.register(counting)
"""
CALLS = """
import mhc_ops, pytest
from mhc_ops.testing import make_inputs

@pytest.mark.parametrize("i", range(6))
def test_call(i):
    for _ in range(i):
        mhc_ops.post(**make_inputs("post", 1, 8))
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 2])
def test_the_line(pytester, monkeypatch, processes):
    monkeypatch.setenv("PYTHONPATH", str(TESTS.parent))
    pytester.makeconftest(RUN.format(tests=str(TESTS), gpu=True))
    pytester.makepyfile(CALLS)
    result = pytester.runpytest_subprocess("-p", "xdist", f"-n{processes}")
    result.assert_outcomes(passed=6)
    (said,) = (text for text in result.outlines if text.startswith("mhc ops: "))
    assert said == line({"cpu": 15})
    assert "0 calls took the short way, 0 the long way, 15 the CPU reference" in said


def test_no_line_without_a_gpu(pytester, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS.parent))
    pytester.makeconftest(RUN.format(tests=str(TESTS), gpu=False))
    pytester.makepyfile(CALLS)
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(passed=6)
    assert not [text for text in result.outlines if text.startswith("mhc ops: ")]

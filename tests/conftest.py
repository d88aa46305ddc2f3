"""Define the ``gpu`` marker, the fixtures that several files share, and one seed for each test."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import pytest

# Threads of OpenMP that wait in a loop take the cores from the other processes of a test run, nine
# tenths of some tests' time. torch reads the variable when torch is imported, here and in the
# processes that tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import torch

import mhc_ops
from emulated import lower_key
from fake_driver import FakeDriver, install, restore
from kept import Kept
from mhc_ops.compiler import Lowered
from mhc_ops.native import host
from mhc_ops.routes import Key
from paths import Paths

pytest_plugins = ["pytester"]

# The GPU tests use these sizes, whose kernels are compiled side by side before the first of many
# tests, not one by one in the tests.
HIDDEN_SIZES = (256, 512, 768, 2816, 4096, 5120, 7168)
MANY = 100

SLOW_SECONDS = 5


# A slow machine is no failure.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device that the TileLang kernels serve")
    config.addinivalue_line("markers", f"slow: takes more than {SLOW_SECONDS} s; not of make check")
    paths = Paths()
    paths.install()
    config.pluginmanager.register(paths)


def slow_first(items: list[pytest.Item]) -> list[pytest.Item]:
    """Order tests so that each of pytest-xdist's processes begins with its share of the slow ones.

    Each process starts with as many tests in a row, so no process is left with a slow test at the
    end of the run, when the others have nothing to do.
    """
    slow = [item for item in items if item.get_closest_marker("slow")]
    quick = [item for item in items if not item.get_closest_marker("slow")]
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    files = list(dict.fromkeys(item.path for item in slow))
    ordered: list[pytest.Item] = []
    for process in range(count):
        # Tests of one file stay together, because they share what the file sets up.
        share = [item for item in slow if files.index(item.path) % count == process]
        fill = max(0, len(items) // count - len(share))
        ordered += share + quick[:fill]
        quick = quick[fill:]
    return ordered + quick


@pytest.hookimpl(tryfirst=True)  # The hook comes before -m chooses.
def pytest_collection_modifyitems(items):
    for item in items:
        if "kept" in item.fixturenames:  # The test lowers and compiles kernels.
            item.add_marker(pytest.mark.slow)
    items[:] = slow_first(items)
    supported, reason = mhc_ops.is_supported("cuda")
    if supported:
        return
    skip = pytest.mark.skip(reason=f"needs a supported GPU: {reason}")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter):
    """Name the tests that took long and are not marked ``slow``, so that the marker stays true."""
    for report in terminalreporter.getreports("passed"):
        if report.when != "call" or isinstance(report, pytest.SubtestReport):
            continue
        if report.duration > SLOW_SECONDS and not {"slow", "gpu"} & report.keywords.keys():
            terminalreporter.write_line(
                f"not marked slow, took {report.duration:.1f} s: {report.nodeid}"
            )


@pytest.fixture(scope="session", autouse=True)
def _kernels(request):
    # Every test has the short way in front, as after the first kernel of one launch on a GPU.
    host.load()
    gpu_tests = [item for item in request.session.items if item.get_closest_marker("gpu")]
    if len(gpu_tests) > MANY and mhc_ops.is_supported("cuda")[0]:
        mhc_ops.prewarm(hidden=HIDDEN_SIZES, device="cuda")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Give every device that the ops run on, by name."""
    return request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def fresh_dynamo():
    """Drop the compiled code of other tests before the test, and the test's own code after it."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def _driver(tmp_path_factory) -> FakeDriver:
    return FakeDriver(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def driver(_driver, monkeypatch):
    """Serve CPU tensors with a CUDA driver without a GPU while the test lasts."""
    _driver.reset()
    install(monkeypatch, _driver)
    yield _driver
    monkeypatch.undo()
    restore()


@pytest.fixture(scope="session")
def kept(pytestconfig, tmp_path_factory) -> Kept:
    """Keep what is lowered and compiled, in pytest's cache folder where there is one."""
    try:
        folder = pytestconfig.cache.mkdir("built")
    except (AttributeError, OSError):  # pytest's plugin is missing, or the checkout is read-only.
        folder = tmp_path_factory.mktemp("built")
    found = Kept(folder)
    found.drop_unused()
    return found


@pytest.fixture(scope="session")
def lowered(kept) -> Callable[[Key], Lowered]:
    """Lower the kernel of a key, each kernel once."""
    return functools.cache(lambda key: lower_key(key, kept))

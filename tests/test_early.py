"""Count reads for early reading, in the table of either way and in calls of both ways."""

import gc
import threading

import pytest
import torch

from fake_driver import CPU
from helpers import call
from mhc_ops import jit
from mhc_ops._arguments import recipe
from mhc_ops.native import early, host
from mhc_ops.native.serve import serve
from mhc_ops.testing import make_inputs

HIDDEN = 256
# The kernels of these ops take ``early`` at any token count.
READERS = ("pre", "fused_post_pre")


@pytest.fixture(params=["python", "native"])
def table(request):
    """Give a table of what was read."""
    if request.param == "python":
        return early.Table()
    if not host.load():
        pytest.skip("there is no native library here")
    return host.early_reads()


def read(table, fn, capture=0):
    """Read a projection as a call does; return whether the call may do so early."""
    allowed, news = table.look(fn, lambda: capture)
    if news is not None:
        table.add(news)
    return allowed


def projection():
    return torch.randn(24, 8)


def test_the_second_read_is_early(table):
    fn, other = projection(), projection()
    assert [read(table, fn), read(table, fn), read(table, fn)] == [False, True, True]
    assert not read(table, other)


def test_a_read_counts_once_it_was_made(table):
    """Add nothing for a call that looks and is refused afterwards: looking is not reading."""
    fn = projection()
    for _ in range(3):
        assert table.look(fn, lambda: 0)[0] is False
    assert read(table, fn) is False
    assert read(table, fn) is True


def test_a_written_projection_is_read_late(table):
    fn = projection()
    for write in (lambda: fn.mul_(2), lambda: fn.detach().mul_(2), lambda: fn[3].zero_()):
        read(table, fn)
        assert read(table, fn)
        write()
        assert not read(table, fn)
    assert read(table, fn)


def test_a_write_between_look_and_launch_counts(table):
    fn = projection()
    _, news = table.look(fn, lambda: 0)
    fn.mul_(2)
    table.add(news)
    assert not read(table, fn)


def test_a_replaced_projection_is_read_late(table):
    """Read late after ``.data`` was assigned: tensor and version stay, the memory is another."""
    fn = projection()
    read(table, fn)
    version = fn._version
    fn.data = fn.clone()
    assert fn._version == version
    assert [read(table, fn), read(table, fn)] == [False, True]


def test_a_view_is_another_tensor(table):
    fn = projection()
    assert not any(read(table, fn.detach()) for _ in range(3))


def test_a_projection_of_inference_mode_is_read_late(table):
    with torch.inference_mode():
        fn = projection()
        assert not any(read(table, fn) for _ in range(3))


def test_a_read_in_a_capture_counts_in_that_capture_alone(table):
    """Read late after a capture, in which nothing runs: what wrote the projection may still run."""
    fn = projection()
    assert [read(table, fn, 5), read(table, fn, 5)] == [False, True]
    assert [read(table, fn, 6), read(table, fn, 6)] == [False, True]
    assert [read(table, fn), read(table, fn), read(table, fn, 7)] == [False, True, True]


def test_the_capture_is_asked_for_only_where_it_matters(table):
    fn = projection()
    if isinstance(table, early.Table):
        read(table, fn)
        assert table.look(fn, lambda: pytest.fail("asked")) == (True, None)


def test_the_table_forgets_the_dead(table):
    before = len(table)
    kept = [torch.empty(1) for _ in range(100)]
    for fn in kept:
        read(table, fn)
    for _ in range(5000):
        read(table, torch.empty(1))
    gc.collect()
    assert len(table) < 2000 + 2 * before
    assert all(read(table, fn) for fn in kept)


def test_a_tracked_tensor_gives_its_memory_back(table):
    fn = torch.empty(1)
    storage = fn.untyped_storage()
    count = torch._C._storage_Use_Count(storage._cdata)
    read(table, fn)
    del fn
    assert torch._C._storage_Use_Count(storage._cdata) == count - 1


def test_many_threads(table):
    shared = projection()
    wrong = []

    def work():
        try:
            for _ in range(300):
                fn = projection()
                assert [read(table, fn), read(table, fn)] == [False, True]
                read(table, shared)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert read(table, shared)


# -------------------------------------------------------------------------------------- in calls


def long_way(op, inputs):
    serve(op, recipe(op).bind((), inputs))


def short_way(op, inputs):
    before = host.calls()
    call(op, inputs)
    assert host.calls() - before == 1


@pytest.fixture
def ways(driver):
    """Give the short and the long way of a call, with the kernels of both ops loaded."""
    driver.run = lambda launch: None
    if not host.load():
        pytest.skip("there is no native library here")
    for op in READERS:
        of = driver.plan(op, HIDDEN, False)
        jit.loaded(of.range(3).steps[0].key, CPU)
        host.remember(of, CPU)
    return {"long": long_way, "short": short_way}


def given(driver):
    """Return what the kernels were told since the last time."""
    told = [launch.arguments["early"] for launch in driver.launches]
    driver.launches.clear()
    return told


def inputs_of(op):
    return make_inputs(op, 3, HIDDEN)


@pytest.mark.parametrize("way", ["long", "short"])
@pytest.mark.parametrize("op", READERS)
def test_calls(driver, ways, op, way):
    inputs = inputs_of(op)
    for _ in range(3):
        ways[way](op, inputs)
    inputs["fn"].mul_(2)
    for _ in range(2):
        ways[way](op, inputs)
    ways[way](op, inputs | {"fn": inputs["fn"].clone()})
    assert given(driver) == [0, 1, 1, 0, 1, 0]


def test_both_ways_and_both_ops_share_one_table(driver, ways):
    boundary = inputs_of("fused_post_pre")
    alone = {name: v for name, v in boundary.items() if name in inputs_of("pre")}
    ways["long"]("pre", alone)
    ways["short"]("fused_post_pre", boundary)
    ways["short"]("pre", alone)
    ways["long"]("fused_post_pre", boundary)
    assert given(driver) == [0, 1, 1, 1]


@pytest.mark.parametrize("way", ["long", "short"])
def test_pre_alone_reads_early(driver, ways, way):
    """Read early in ``pre`` without any fused op, as the default wiring calls ``pre``."""
    inputs = inputs_of("pre")
    for _ in range(2):
        ways[way]("pre", inputs)
    assert given(driver) == [0, 1]


@pytest.mark.parametrize("way", ["long", "short"])
def test_a_refused_launch_is_no_read(driver, ways, way):
    inputs = inputs_of("pre")
    driver.run = lambda launch: 1
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE"):
        ways[way]("pre", inputs)
    driver.run = lambda launch: None
    for _ in range(2):
        ways[way]("pre", inputs)
    assert given(driver) == [0, 0, 1]


def test_a_refused_kernel_is_no_read(driver, monkeypatch):
    """Count no read where a capture's guard or a failed compile comes before any launch."""

    def refuse(key, device):
        raise RuntimeError("not loaded, and the stream is being captured")

    driver.run = lambda launch: None
    inputs = inputs_of("pre")
    with monkeypatch.context() as patch:
        patch.setattr(jit, "loaded", refuse)
        with pytest.raises(RuntimeError, match="being captured"):
            long_way("pre", inputs)
    for _ in range(2):
        long_way("pre", inputs)
    assert given(driver) == [0, 1]


@pytest.mark.parametrize("way", ["long", "short"])
def test_calls_of_a_capture(driver, ways, way):
    inputs = inputs_of("pre")
    for number in (3, 3, 4, 0, 0, 5):
        driver.library.fake_capture(number)
        ways[way]("pre", inputs)
    assert given(driver) == [0, 1, 0, 0, 1, 1]


def test_without_the_native_library(driver, monkeypatch):
    """Serve every call by the long way through the launcher, also with early reading."""
    driver.run = lambda launch: None
    monkeypatch.setattr(host, "_reads", early.Table())
    monkeypatch.setattr(host, "_library", None)
    monkeypatch.setattr(host, "load", lambda: False)
    inputs = inputs_of("pre")
    for _ in range(3):
        long_way("pre", inputs)
    assert given(driver) == [0, 1, 1]

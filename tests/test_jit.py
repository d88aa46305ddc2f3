"""jit: one compile a key however many threads ask; no compile inside a graph capture."""

import logging
import sys
import threading
import types

import pytest
import torch

from mhc_ops import dispatch, jit

KEY = dispatch.Key("post", "sm_90a", 256)


@pytest.fixture
def empty(monkeypatch):
    """A jit that has compiled nothing."""
    monkeypatch.setattr(jit, "_compiled", {})
    monkeypatch.setattr(jit, "_ready", {})
    monkeypatch.setattr(jit, "_locks", {})


@pytest.fixture
def compiler(monkeypatch, empty):
    """A stand-in for TileLang's compiler that counts its calls."""
    calls = []
    gate = threading.Event()

    def compile(program, target, pass_configs):
        calls.append(target["arch"])
        gate.wait(5)
        module = types.SimpleNamespace(main=lambda *args: calls.append(args))
        return types.SimpleNamespace(
            adapter=types.SimpleNamespace(get_exportable_executable=lambda: module)
        )

    fake = types.SimpleNamespace(compile=compile)
    monkeypatch.setitem(sys.modules, "tilelang", fake)
    monkeypatch.setattr(jit, "program", lambda key: key)
    monkeypatch.setattr(jit, "pass_configs", dict)
    return types.SimpleNamespace(calls=calls, gate=gate)


def test_many_threads_one_compile(compiler):
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(jit.compile_key(KEY))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    compiler.gate.set()
    for thread in threads:
        thread.join()
    assert compiler.calls == ["sm_90a"]
    assert len(results) == 8
    assert len(set(map(id, results))) == 1


def test_other_keys_compile_side_by_side(compiler):
    other = KEY._replace(hidden=512)
    threads = [threading.Thread(target=jit.compile_key, args=(key,)) for key in (KEY, other)]
    for thread in threads:
        thread.start()
    deadline = threading.Event()
    for _ in range(100):
        if len(compiler.calls) == 2:
            break
        deadline.wait(0.05)
    assert len(compiler.calls) == 2, "the second key waited for the first"
    compiler.gate.set()
    for thread in threads:
        thread.join()


def test_a_compile_is_logged_with_its_time(compiler, caplog):
    compiler.gate.set()
    with caplog.at_level(logging.INFO, logger="mhc_ops"):
        jit.compile_key(KEY)
        jit.compile_key(KEY)
    start, end = (record.getMessage() for record in caplog.records)
    assert start.startswith("compiling Key(kernel='post', arch='sm_90a', hidden=256")
    assert end.startswith("compiled Key(kernel='post'")
    assert end.endswith(" s")


def test_tilelang_is_quiet_about_our_kernels_alone(compiler, caplog):
    tilelang_logger = logging.getLogger("tilelang.jit.kernel")
    compiler.gate.set()
    compile = sys.modules["tilelang"].compile

    def noisy(program, target, pass_configs):
        tilelang_logger.info("of ours")
        tilelang_logger.warning("a warning")
        other = threading.Thread(target=tilelang_logger.info, args=("of another thread",))
        other.start()
        other.join()
        return compile(program, target, pass_configs)

    sys.modules["tilelang"].compile = noisy
    with caplog.at_level(logging.INFO, logger="tilelang.jit.kernel"):
        jit.compile_key(KEY)
        tilelang_logger.info("afterwards")
    assert [record.getMessage() for record in caplog.records if record.name != "mhc_ops"] == [
        "a warning",
        "of another thread",
        "afterwards",
    ]


def test_a_failed_compile_is_tried_again(compiler, monkeypatch):
    compiler.gate.set()
    with monkeypatch.context() as patch:
        patch.setattr(jit, "program", lambda key: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            jit.compile_key(KEY)
    jit.compile_key(KEY)
    assert compiler.calls == ["sm_90a"]


def test_a_kernel_that_is_not_loaded_is_refused_in_a_capture(empty, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError) as refusal:
        jit.launch(KEY, torch.device("cuda", 0))
    assert str(refusal.value) == (
        "mhc: kernel post for hidden size 256 is not loaded on cuda:0 and cannot be during "
        "CUDA-graph capture; before the capture call "
        "mhc_ops.prewarm(hidden=[256], device='cuda:0')"
    )


@pytest.mark.parametrize(
    ("arch", "pdl"), [("sm_80", False), ("sm_89", False), ("sm_90a", True), ("sm_120a", True)]
)
def test_programmatic_dependent_launch_from_hopper_on(arch, pdl):
    source = jit.program(dispatch.post_key(256, arch)).script()
    assert ("pdl_sync" in source) is pdl

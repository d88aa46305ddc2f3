"""jit: where a kernel comes from; one compile a key however many ask; what a failure says."""

import logging
import os
import re
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch

import mhc_ops
from mhc_ops import dispatch, jit, store

ROOT = Path(mhc_ops.__file__).parents[1]
KEY = dispatch.Key("post", "sm_90a", 256)


@pytest.fixture
def empty(monkeypatch, tmp_path):
    """A jit that has compiled nothing, with an empty cache."""
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("MHC_OPS_KERNELS", "MHC_OPS_DISABLE_JIT", "MHC_OPS_TRUST_CACHE"):
        monkeypatch.delenv(name, raising=False)
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
            adapter=types.SimpleNamespace(get_exportable_executable=lambda: module),
            export_library=lambda path: Path(path).write_bytes(b"library"),
        )

    fake = types.SimpleNamespace(compile=compile)
    monkeypatch.setitem(sys.modules, "tilelang", fake)
    nvcc = types.SimpleNamespace(get_nvcc_compiler=lambda: "/no/such/nvcc")
    monkeypatch.setitem(sys.modules, "tilelang.contrib.nvcc", nvcc)
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


# ---------------------------------------------------------------------------- where it comes from


@pytest.fixture
def folders(monkeypatch, compiler, tmp_path):
    """Stands for ``store.load_kernel``: folder to the function that it gives; asked folders."""
    compiler.gate.set()
    monkeypatch.setenv("MHC_OPS_KERNELS", str(tmp_path / "ahead"))
    held = types.SimpleNamespace(functions={}, asked=[])
    names = {tmp_path / "ahead": "ahead", store.cached_folder(): "cache"}

    def load_kernel(folder, key):
        held.asked.append(names[folder])
        return held.functions.get(names[folder])

    monkeypatch.setattr(store, "load_kernel", load_kernel)
    return held


def test_built_ahead_comes_first(folders, compiler):
    folders.functions = {"ahead": print, "cache": repr}
    assert jit.compile_key(KEY) is print
    assert (folders.asked, compiler.calls) == (["ahead"], [])


def test_then_the_cache(folders, compiler):
    folders.functions = {"cache": repr}
    assert jit.compile_key(KEY) is repr
    assert (folders.asked, compiler.calls) == (["ahead", "cache"], [])


def test_then_the_compiler(folders, compiler):
    jit.compile_key(KEY)
    assert (folders.asked, compiler.calls) == (["ahead", "cache", "cache"], ["sm_90a"])


def test_a_kernel_built_ahead_needs_no_cache(folders, monkeypatch, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    folders.functions = {"ahead": print}
    assert jit.compile_key(KEY) is print


def test_a_cache_that_others_can_write_is_refused(compiler, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(RuntimeError, match=r"cache can be written by others \(mode 0777\)"):
        jit.compile_key(KEY)
    assert not compiler.calls


def test_disabled(compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("MHC_OPS_DISABLE_JIT", "1")
    monkeypatch.setenv("MHC_OPS_KERNELS", "/kernels")
    with pytest.raises(RuntimeError) as error:
        jit.compile_key(KEY)
    assert str(error.value) == (
        "mhc: kernel post for hidden size 256 on sm_90a is neither built ahead, in /kernels, nor "
        f"cached, in {store.cached_folder()}, and MHC_OPS_DISABLE_JIT is set; build it: "
        "python -m mhc_ops build --arch sm_90a --hidden 256 -o DIR, then MHC_OPS_KERNELS=DIR"
    )
    assert not compiler.calls
    assert not (tmp_path / "cache").exists()


def test_what_was_compiled_is_kept(compiler):
    compiler.gate.set()
    jit.compile_key(KEY)
    kept = store.find(store.cached_folder(), store.file_name(KEY), store._versions())
    assert kept.read_bytes() == b"library"


AT_ONCE = """
import logging
logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s")
from mhc_ops import dispatch, jit
print(jit.compile_key(dispatch.post_key(256, "sm_90a")))
"""


def test_many_processes_one_compile(tmp_path):
    environment = {"TILELANG_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", AT_ONCE],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    logs = []
    for process in running:
        out, log = process.communicate(timeout=200)
        assert process.returncode == 0, log
        assert "Function" in out
        logs.append([line for line in log.splitlines() if line.startswith("mhc_ops ")])
    compiled = [log for log in logs if any("mhc_ops compiled" in line for line in log)]
    assert len(compiled) == 1, logs


# ------------------------------------------------------------------------------ what a failure says


def failure(compiler, error):
    """The message of a compile that fails with this error."""

    def compile(program, target, pass_configs):
        raise error

    sys.modules["tilelang"].compile = compile
    with pytest.raises(RuntimeError) as refusal:
        jit.compile_key(KEY)
    first, second = str(refusal.value).split("\n")
    kind = type(error).__name__
    assert (
        first
        == f"mhc: kernel post for hidden size 256 on sm_90a cannot be compiled: {kind}: {error}"
    )
    command = "python -m mhc_ops build --arch sm_90a --hidden 256 -o DIR, then MHC_OPS_KERNELS=DIR"
    advice, last = second.split("; or ")
    assert last == f"build it on another machine: {command}"
    return advice


def test_without_nvcc(compiler):
    advice = failure(compiler, RuntimeError("no CUDA"))
    assert advice == "there is no nvcc: install the CUDA toolkit and let CUDA_HOME name it"


def test_a_full_disk(compiler, monkeypatch):
    monkeypatch.setenv("TILELANG_CACHE_DIR", "/full")
    wrapped = RuntimeError("compilation failed")
    wrapped.__cause__ = OSError(28, "No space left on device")
    assert failure(compiler, wrapped) == (
        "make room in /full and in the folder for temporary files, or let TILELANG_CACHE_DIR and "
        "TMPDIR name others"
    )


def test_a_cache_that_cannot_be_written(compiler):
    advice = failure(compiler, OSError(30, "Read-only file system", "/cache"))
    assert advice == "let TILELANG_CACHE_DIR name a folder that this process can write"


def test_a_kernel_that_nvcc_refuses(compiler, monkeypatch):
    nvcc = types.SimpleNamespace(get_nvcc_compiler=lambda: sys.executable)
    monkeypatch.setitem(sys.modules, "tilelang.contrib.nvcc", nvcc)
    advice = failure(compiler, RuntimeError("error in line 1"))
    assert advice == f"nvcc is {sys.executable}; TILELANG_VERBOSE=1 shows what it says"


def test_a_kernel_that_cannot_be_kept_still_runs(compiler, monkeypatch, caplog):
    compiler.gate.set()
    full = OSError(28, "No space left on device")

    def save(*arguments):
        raise full

    monkeypatch.setattr(store, "save", save)
    with caplog.at_level(logging.WARNING, logger="mhc_ops"):
        jit.compile_key(KEY)
    assert [record.getMessage() for record in caplog.records] == [
        f"kernel post for hidden size 256 on sm_90a cannot be kept for other processes: {full}"
    ]


READ_ONLY = """
import logging
logging.basicConfig(level=logging.WARNING, format="%(name)s %(message)s")
from mhc_ops import dispatch, jit
try:
    jit.compile_key(dispatch.post_key(256, "sm_90a"))
except RuntimeError as error:
    print(error)
"""


def test_tilelang_where_the_cache_cannot_be_made(tmp_path):
    """The errors above are those that TileLang raises."""
    (tmp_path / "file").touch()
    environment = {"TILELANG_CACHE_DIR": str(tmp_path / "file"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", READ_ONLY],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert re.search("cannot be compiled: .*\nlet TILELANG_CACHE_DIR name a folder", done.stdout)


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

"""Test jit: where a kernel comes from, one compile a key for any number of threads, failures."""

import importlib.metadata
import logging
import os
import re
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch

import mhc_ops
from helpers import HANG, folder_of_kernels
from mhc_ops import compiler, disk, formula, jit, routes, store
from mhc_ops.native import launcher

ROOT = Path(mhc_ops.__file__).parents[1]
KEY = routes.Key("post", "sm_90a", 256)


def compiled(key):
    """Return what stands for a compiled kernel."""
    return compiler.Compiled(
        cubin=b"machine code",
        symbol=key.kernel,
        parameters=(("x", "pointer"), ("tokens", "int64")),
        grid=(formula.name("tokens"), formula.constant(1)),
        block=128,
        cluster=1,
        shared=0,
        pdl=True,
        compiled_with={"tilelang": "0.1.15", "nvcc": "13.0"},
    )


@pytest.fixture
def empty(monkeypatch, tmp_path):
    """Let jit have compiled nothing, with an empty cache."""
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("MHC_OPS_KERNELS", "MHC_OPS_DISABLE_JIT", "MHC_OPS_TRUST_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jit, "_compiled", {})
    monkeypatch.setattr(jit, "_loaded", {})
    monkeypatch.setattr(jit, "_locks", {})


@pytest.fixture
def compile_calls(monkeypatch, empty):
    """Replace the compiler by a function that counts its calls and waits for a gate."""
    calls = []
    gate = threading.Event()

    def compile_kernel(key):
        calls.append(key)
        gate.wait(HANG)
        return compiled(key)

    monkeypatch.setattr(compiler, "compile_kernel", compile_kernel)
    return types.SimpleNamespace(calls=calls, gate=gate)


def test_many_threads_one_compile(compile_calls):
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(jit.compile_key(KEY))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    compile_calls.gate.set()
    for thread in threads:
        thread.join()
    assert compile_calls.calls == [KEY]
    assert len(results) == 8
    assert len(set(map(id, results))) == 1


def test_other_keys_compile_side_by_side(compile_calls):
    other = KEY._replace(hidden=512)
    threads = [threading.Thread(target=jit.compile_key, args=(key,)) for key in (KEY, other)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + HANG
    while len(compile_calls.calls) < 2:
        assert time.monotonic() < deadline, "the second key waited for the first"
        time.sleep(0.01)
    compile_calls.gate.set()
    for thread in threads:
        thread.join()


def test_a_compile_is_logged_with_its_time(compile_calls, caplog):
    compile_calls.gate.set()
    with caplog.at_level(logging.INFO, logger="mhc_ops"):
        jit.compile_key(KEY)
        jit.compile_key(KEY)
    start, end = (record.getMessage() for record in caplog.records)
    assert start.startswith("compiling Key(kernel='post', arch='sm_90a', hidden=256")
    assert end.startswith("compiled Key(kernel='post'")
    assert end.endswith(" s")


def test_a_failed_compile_is_tried_again(compile_calls, monkeypatch):
    compile_calls.gate.set()
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "compile_kernel", lambda key: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            jit.compile_key(KEY)
    jit.compile_key(KEY)
    assert compile_calls.calls == [KEY]


def test_many_threads_load_once(compile_calls, monkeypatch):
    """Load once on each device; a kernel that was refused is tried again."""
    loads = []

    def load(name, kernel, device_index):
        loads.append(device_index)
        if len(loads) == 1:
            raise RuntimeError("no driver")
        return launcher.Kernel(100 + device_index, kernel)

    monkeypatch.setattr(launcher, "load", load)
    compile_calls.gate.set()
    with pytest.raises(RuntimeError, match="no driver"):
        jit.load(KEY, torch.device("cuda", 0))
    assert jit.loaded_already(KEY, torch.device("cuda", 0)) is None
    results = []
    threads = [
        threading.Thread(
            target=lambda i=i: results.append(jit.load(KEY, torch.device("cuda", i % 2)).handle)
        )
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(loads[1:]) == [0, 1]
    assert sorted(results) == [100] * 4 + [101] * 4
    assert compile_calls.calls == [KEY]


# ------------------------------------------------------------------------ where a kernel comes from


@pytest.fixture
def folders(monkeypatch, compile_calls, tmp_path):
    """Replace ``store.load_kernel``: hold the kernel of each folder, and the asked folders."""
    compile_calls.gate.set()
    monkeypatch.setenv("MHC_OPS_KERNELS", str(folder_of_kernels(tmp_path / "ahead")))
    held = types.SimpleNamespace(kernels={}, asked=[])
    names = {tmp_path / "ahead": "ahead", store.cached_folder(): "cache"}

    def load_kernel(folder, key):
        held.asked.append(names[folder])
        return held.kernels.get(names[folder])

    monkeypatch.setattr(store, "load_kernel", load_kernel)
    return held


ONE, OTHER = (compiled(KEY)._replace(cubin=text) for text in (b"one", b"other"))


def test_built_ahead_comes_first(folders, compile_calls):
    folders.kernels = {"ahead": ONE, "cache": OTHER}
    assert jit.compile_key(KEY) is ONE
    assert (folders.asked, compile_calls.calls) == (["ahead"], [])


def test_then_the_cache(folders, compile_calls):
    folders.kernels = {"cache": OTHER}
    assert jit.compile_key(KEY) is OTHER
    assert (folders.asked, compile_calls.calls) == (["ahead", "cache"], [])


def test_then_the_compiler(folders, compile_calls):
    jit.compile_key(KEY)
    assert (folders.asked, compile_calls.calls) == (["ahead", "cache", "cache"], [KEY])


def test_a_kernel_built_ahead_needs_no_cache(folders, monkeypatch, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    folders.kernels = {"ahead": ONE}
    assert jit.compile_key(KEY) is ONE


def test_a_cache_that_others_can_write_is_refused(compile_calls, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(RuntimeError, match=r"cache can be written by others \(mode 0777\)"):
        jit.compile_key(KEY)
    assert not compile_calls.calls


def test_disabled(compile_calls, monkeypatch, tmp_path):
    monkeypatch.setenv("MHC_OPS_DISABLE_JIT", "1")
    ahead = folder_of_kernels(tmp_path / "ahead")
    monkeypatch.setenv("MHC_OPS_KERNELS", str(ahead))
    with pytest.raises(RuntimeError) as error:
        jit.compile_key(KEY)
    assert str(error.value) == (
        f"mhc: kernel post for hidden size 256 on sm_90a is neither built ahead, in {ahead}, nor "
        f"cached, in {store.cached_folder()}, and MHC_OPS_DISABLE_JIT is set; build it: "
        "python -m mhc_ops build --arch sm_90a --hidden 256 -o DIR, then MHC_OPS_KERNELS=DIR"
    )
    assert not compile_calls.calls
    assert not (tmp_path / "cache").exists()


def test_kernels_that_are_named_and_not_there(compile_calls, monkeypatch, tmp_path):
    """Compile nothing where the user has said where the kernels are, and they are not there."""
    compile_calls.gate.set()
    monkeypatch.setenv("MHC_OPS_KERNELS", str(tmp_path / "ahead"))
    with pytest.raises(ValueError, match=r"^MHC_OPS_KERNELS: expected a folder of kernels "):
        jit.compile_key(KEY)
    served, reason = jit.obtainable(256, "sm_90a")
    assert (served, reason[:16]) == (False, "MHC_OPS_KERNELS:")
    assert not compile_calls.calls


def test_what_was_compiled_is_kept(compile_calls):
    compile_calls.gate.set()
    assert jit.compile_key(KEY) == store.load_kernel(store.cached_folder(), KEY) == compiled(KEY)


AT_ONCE = """
import logging
logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s")
from mhc_ops import jit, routes
print(len(jit.compile_key(routes.Key("post", "sm_90a", 256)).cubin))
"""


@pytest.mark.slow
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
        out, log = process.communicate(timeout=HANG)
        assert process.returncode == 0, log
        assert int(out) > 1000
        logs.append([line for line in log.splitlines() if line.startswith("mhc_ops ")])
    compiled = [log for log in logs if any("mhc_ops compiled" in line for line in log)]
    assert len(compiled) == 1, logs


# ------------------------------------------------------------------------------ what a failure says


COMMAND = "python -m mhc_ops build --arch sm_90a --hidden 256 -o DIR, then MHC_OPS_KERNELS=DIR"
WHAT = "mhc: kernel post for hidden size 256 on sm_90a cannot be compiled: "


@pytest.fixture
def failing(monkeypatch, empty):
    """Have TileLang's compiler fail, and return what the user is advised to do."""
    nvcc = types.SimpleNamespace(get_nvcc_compiler=lambda: "/no/such/nvcc")
    monkeypatch.setitem(sys.modules, "tilelang", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "tilelang.contrib.nvcc", nvcc)

    def fail(error):
        def compile_one(key):
            raise error

        monkeypatch.setattr(compiler, "_compile", compile_one)
        with pytest.raises(RuntimeError) as refusal:
            jit.compile_key(KEY)
        first, second = str(refusal.value).split("\n")
        assert first == f"{WHAT}{type(error).__name__}: {error}"
        advice, last = second.split("; or ")
        assert last == f"build it on another machine: {COMMAND}"
        return advice

    return fail


def test_without_nvcc(failing):
    advice = failing(RuntimeError("no CUDA"))
    assert advice == "there is no nvcc: install the CUDA toolkit and let CUDA_HOME name it"


def test_a_full_disk(failing, monkeypatch):
    monkeypatch.setattr(disk, "advice", lambda error: f"make room ({error.__cause__})")
    wrapped = RuntimeError("compilation failed")
    wrapped.__cause__ = OSError(28, "No space left on device")
    assert failing(wrapped) == "make room ([Errno 28] No space left on device)"


def test_nvcc_without_words_for_a_full_disk(failing, monkeypatch):
    nvcc = types.SimpleNamespace(get_nvcc_compiler=lambda: sys.executable)
    monkeypatch.setitem(sys.modules, "tilelang.contrib.nvcc", nvcc)
    monkeypatch.setattr(disk, "_free", lambda folder: 1 << 20)
    advice = failing(RuntimeError("nvcc fatal   : Failed to preprocess host compiler properties."))
    assert advice.startswith("make room in ")


def test_a_failure_shows_no_cuda_source(failing, monkeypatch):
    """Leave out the source, also in the error that led to the refusal, which tracebacks show."""
    said = "a.cu(3): error: no such thing"
    error = RuntimeError("extern source;\n" * 80 + f"\nCompilation error:\n{said}\n")

    def compile_one(key):
        raise error

    monkeypatch.setattr(compiler, "_compile", compile_one)
    with pytest.raises(RuntimeError) as refusal:
        jit.compile_key(KEY)
    assert str(refusal.value).splitlines()[0] == f"{WHAT}RuntimeError: {said}"
    assert str(refusal.value.__cause__) == said


def test_a_cache_that_cannot_be_written(failing):
    advice = failing(OSError(30, "Read-only file system", "/cache"))
    assert advice == "let TILELANG_CACHE_DIR name a folder that this process can write"


def test_a_kernel_that_nvcc_refuses(failing, monkeypatch):
    nvcc = types.SimpleNamespace(get_nvcc_compiler=lambda: sys.executable)
    monkeypatch.setitem(sys.modules, "tilelang.contrib.nvcc", nvcc)
    advice = failing(RuntimeError("error in line 1"))
    assert advice == f"nvcc is {sys.executable}; TILELANG_VERBOSE=1 shows what it says"


@pytest.mark.parametrize("installed", [None, "0.1.12"])
def test_without_the_tilelang_that_the_kernels_are_written_for(empty, monkeypatch, installed):
    """Raise one clear error, before anything of another TileLang is imported."""

    def version(package):
        assert package == "tilelang"
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setitem(sys.modules, "tilelang", None)
    with pytest.raises(RuntimeError) as refusal:
        jit.compile_key(KEY)
    first, second = str(refusal.value).split("\n")
    assert first == WHAT + (
        "TileLang is not installed"
        if installed is None
        else "it is written for TileLang 0.1.15, and 0.1.12 is installed"
    )
    assert second.startswith("install it (pip install tilelang==0.1.15)")
    assert second.endswith(f"; or build it on another machine: {COMMAND}")


def test_a_kernel_that_cannot_be_kept_still_runs(compile_calls, monkeypatch, caplog):
    compile_calls.gate.set()
    full = OSError(28, "No space left on device")

    def save(*arguments):
        raise full

    monkeypatch.setattr(store, "save", save)
    with caplog.at_level(logging.WARNING, logger="mhc_ops"):
        jit.compile_key(KEY)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(
        f"kernel post for hidden size 256 on sm_90a cannot be kept for other processes: {full}; "
        "make room in "
    )


READ_ONLY = """
import logging
logging.basicConfig(level=logging.WARNING, format="%(name)s %(message)s")
from mhc_ops import jit, routes
try:
    jit.compile_key(routes.Key("post", "sm_90a", 256))
except RuntimeError as error:
    print(error)
"""


@pytest.mark.slow
def test_tilelang_where_the_cache_cannot_be_made(tmp_path):
    """Show that TileLang raises the errors that the tests above pretend."""
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
        jit.loaded(KEY, torch.device("cuda", 0))
    assert str(refusal.value) == (
        "mhc: kernel post for hidden size 256 is not loaded on cuda:0 and cannot be during "
        "CUDA-graph capture; before the capture call "
        "mhc_ops.prewarm(hidden=[256], device='cuda:0')"
    )


@pytest.mark.parametrize(
    ("arch", "pdl"), [("sm_80", False), ("sm_89", False), ("sm_90a", True), ("sm_120a", True)]
)
def test_programmatic_dependent_launch_from_hopper_on(arch, pdl):
    source = compiler.program(routes.Key("post", arch, 256)).script()
    assert ("pdl_sync" in source) is pdl

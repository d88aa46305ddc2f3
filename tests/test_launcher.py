"""Test the launcher: what it asks the driver for, what a failure says, threads and contexts."""

import ctypes
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import mhc_ops
from emulated import HIDDEN
from fake_driver import ARCH, CLUSTERED, SIGNATURES, build_driver, compiled, signature
from mhc_ops import formula, routes, store
from mhc_ops.native import launcher, library

ROOT = Path(mhc_ops.__file__).parents[1]
KEY = routes.Key("fused_post_pre", ARCH, 256, (("norm", 0),))
POST = routes.Key("post", ARCH, 256)


def values_of(key, tokens=3):
    """Return some memory and some numbers for a kernel."""
    hidden = key.hidden
    numbers = {"tokens": tokens, "early": 1, "sinkhorn_repeat": 20, "group_tokens": 1}
    return {
        name: torch.zeros(96 * tokens * hidden)
        if kind == "pointer"
        else numbers.get(name, 0.5 if kind == "float32" else 7)
        for name, kind in signature(key)
    }


def test_a_launch(driver):
    driver.run = lambda launch: None
    kernel = driver.load(KEY)
    given = values_of(KEY)
    launcher.launch("fused_post_pre", kernel, (48, 1), given, 123)
    (launch,) = driver.launches
    assert launch[:8] == (KEY, 0, (48, 1), 256, 16, 1000, 1, 123)
    for name, value in launch.arguments.items():
        if isinstance(value, torch.Tensor):
            assert value.data_ptr() == given[name].data_ptr(), name
        else:
            assert (type(value), value) == (type(given[name]), given[name]), name


def test_a_launch_without_clusters(driver):
    driver.run = lambda launch: None
    launcher.launch("post", driver.load(POST), (3, 2), values_of(POST), 0)
    (launch,) = driver.launches
    assert launch[:8] == (POST, 0, (3, 2), 256, 1, 0, 1, None)


def test_a_thread_without_a_context(driver):
    """Launch on a thread that has used no device: its context is the kernel's during the launch."""
    driver.run = lambda launch: None
    kernels = [driver.load(KEY, device) for device in (0, 1)]
    depths = []

    def work():
        for kernel in kernels:
            launcher.launch("fused_post_pre", kernel, (16, 1), values_of(KEY), 0)
            depths.append(driver.library.fake_depth())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [launch.device for launch in driver.launches] == [0, 1]
    assert depths == [0, 0]


def test_the_capture_of_a_stream(driver):
    kernel = driver.load(KEY)
    assert launcher.capture(kernel, 0) == 0
    driver.library.fake_capture(2**40)
    assert launcher.capture(kernel, 0) == 2**40


WHAT = "kernel post for hidden size 256 on sm_90a"


def test_a_kernel_that_the_driver_refuses(driver):
    loads = driver.library.fake_loads() - driver.library.fake_unloads()
    refused = compiled(POST)._replace(cubin=b"!")
    with pytest.raises(RuntimeError) as error:
        launcher.load(WHAT, refused, 0)
    assert str(error.value) == (
        f"mhc: {WHAT} cannot be loaded on cuda:0 (1 bytes of machine code, block 256, clusters of "
        "1, 0 bytes of shared memory): CUDA_ERROR_INVALID_IMAGE: in words"
    )
    with pytest.raises(RuntimeError, match="error 500 of the CUDA driver"):
        launcher.load(WHAT, compiled(POST)._replace(symbol="another"), 0)
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE"):
        launcher.load(WHAT, compiled(POST)._replace(shared=300_000), 0)
    with pytest.raises(RuntimeError, match="CUDA_ERROR_NO_DEVICE"):
        launcher.load(WHAT, compiled(POST), 7)
    # What was loaded before the refusal is unloaded, and no context stays behind.
    assert driver.library.fake_loads() - driver.library.fake_unloads() == loads
    assert driver.library.fake_depth() == 0


def test_a_launch_that_the_driver_refuses(driver):
    kernel = driver.load(KEY)
    with pytest.raises(RuntimeError) as error:
        launcher.launch("fused_post_pre", kernel, (17, 2), values_of(KEY), 0)
    assert str(error.value) == (
        "mhc::fused_post_pre: kernel fused_post_pre for hidden size 256 on sm_90a cannot be "
        "launched (grid 17 x 2, block 256, clusters of 16, 1000 bytes of shared memory, "
        "programmatic launch on): CUDA_ERROR_INVALID_VALUE: in words"
    )


def test_long_names_are_cut_not_overrun(driver):
    kernel = launcher.load("k" * 5000, compiled(POST), 0)
    driver.run = lambda launch: 1
    driver.keys[compiled(POST).symbol] = POST
    with pytest.raises(RuntimeError, match=r"^mhc::post: k{1000,1023}$"):
        launcher.launch("post", kernel, (1, 1), values_of(POST), 0)


def own_launcher(folder):
    """Return a launcher that has opened no driver."""
    copy = folder / "own.so"
    shutil.copy(launcher.get()._name, copy)
    return launcher.declare(ctypes.CDLL(str(copy)))


def test_without_a_driver(monkeypatch, tmp_path):
    monkeypatch.setattr(launcher, "_library", own_launcher(tmp_path))
    monkeypatch.setattr(launcher, "DRIVER", str(tmp_path / "none.so"))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"there is no CUDA driver \(libcuda\.so\.1\)"):
            launcher.load(WHAT, compiled(POST), 0)
    # A failure is not remembered, because the driver may be there later.
    monkeypatch.setattr(launcher, "DRIVER", str(build_driver(tmp_path)))
    launcher.load(WHAT, compiled(POST), 0)


def test_an_old_driver(monkeypatch, tmp_path):
    (tmp_path / "old.c").write_text("int cuInit(unsigned flags) { return (int)flags; }")
    old = str(tmp_path / "old.so")
    subprocess.run(["cc", "-shared", "-fPIC", str(tmp_path / "old.c"), "-o", old], check=True)
    monkeypatch.setattr(launcher, "_library", own_launcher(tmp_path))
    monkeypatch.setattr(launcher, "DRIVER", old)
    with pytest.raises(RuntimeError, match="the CUDA driver is older than CUDA 12"):
        launcher.load(WHAT, compiled(POST), 0)


THREADS = """
#include "launcher.c"
#include <stdio.h>
enum { THREADS = 12, LAUNCHES = 200 };
int fake_loads(void);
static const char* path;
static int failures;
static void* work(void* number) {
  mhc_kernel* kernel = NULL;
  void* arguments[1] = {NULL};
  char text[100];
  const int device = (int)(intptr_t)number % 2;
  int bad = mhc_open(path) != 0;
  bad |= mhc_load(device, "kernel", "kernel", "a kernel", 64, 16, 1000, 1, &kernel) != 0;
  for (int i = 0; i < LAUNCHES && !bad; ++i) {
    bad |= mhc_launch(kernel, 16, 1, NULL, arguments) != 0;
    bad |= mhc_launch(kernel, 15, 1, NULL, arguments) == 0;
    bad |= mhc_capture(kernel, NULL) != 0;
    mhc_explain(1, text, sizeof text);
  }
  __atomic_add_fetch(&failures, bad, __ATOMIC_SEQ_CST);
  return NULL;
}
int main(int count, char** arguments) {
  (void)count;
  pthread_t threads[THREADS];
  path = arguments[1];
  for (intptr_t i = 0; i < THREADS; ++i) pthread_create(&threads[i], NULL, work, (void*)i);
  for (int i = 0; i < THREADS; ++i) pthread_join(threads[i], NULL);
  printf("%d failures\\n", failures);
  return failures != 0;
}
"""


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_first_calls_of_many_threads_under_a_sanitizer(tmp_path, sanitizer):
    """Open the driver, load and launch from all threads at once; the sanitizer finds nothing."""
    (tmp_path / "threads.c").write_text(THREADS)
    flags = [f"-fsanitize={sanitizer}", "-g", "-O1"]
    driver, program = tmp_path / "driver.so", tmp_path / "threads"
    source = str(ROOT / "tests" / "fake_cuda.c")
    subprocess.run(["cc", *flags, "-shared", "-fPIC", source, "-o", str(driver)], check=True)
    threads = ["-pthread", f"-I{launcher.SOURCE.parent}", str(tmp_path / "threads.c")]
    subprocess.run(["cc", *flags, *threads, "-o", str(program), "-ldl"], check=True)
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
    command = [str(program), str(driver)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "unexpected memory mapping" in done.stderr:
        # g++ 12's ThreadSanitizer wants less address-space randomisation than newer kernels use.
        command = ["setarch", "-R", *command]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "0 failures\n"), done.stderr


def test_it_compiles_without_a_warning(tmp_path):
    strict = ["-Wall", "-Wextra", "-Werror", "-Wshadow", "-Wstrict-prototypes"]
    command = [*launcher.command(), *strict, "-o", str(tmp_path / "launcher.so")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_it_needs_nothing_but_the_c_library():
    """Need no torch, Python or CUDA: look at the linked libraries and the symbols asked for."""
    path = launcher.get()._name
    said = subprocess.run(
        ["readelf", "-d", path], capture_output=True, text=True, check=True
    ).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", said)
    assert set(needed) <= {"libc.so.6", "libdl.so.2", "libpthread.so.0"}


def cuda_home():
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    return next((h for h in homes if h and (Path(h) / "include/cuda.h").exists()), None)


@pytest.mark.skipif(cuda_home() is None, reason="needs the header of the CUDA driver")
def test_what_it_declares_is_what_the_driver_declares(tmp_path):
    """Compare names, numbers and layouts with CUDA's own header."""
    text = launcher.SOURCE.read_text()
    enumerators = re.findall(r"^  (CU_\w+) = (\d+),", text, re.MULTILINE)
    assert len(enumerators) == 8
    theirs_and_ours = {
        "gridDimX": "grid_x",
        "blockDimX": "block_x",
        "sharedMemBytes": "shared_bytes",
        "hStream": "stream",
        "attrs": "attributes",
        "numAttrs": "attribute_count",
    }
    declared = text[text.index("typedef union {") : text.index("_Static_assert")]
    lines = [
        "#include <stddef.h>",
        "#include <cuda.h>",
        re.sub(r"\bCUlaunch(\w+)\b", r"Our\1", declared).replace("CULaunch", "Our"),
        *(f'_Static_assert({name} == {value}, "{name}");' for name, value in enumerators),
        *(
            f"_Static_assert(offsetof(CUlaunchConfig, {theirs}) == offsetof(OurConfig, {ours}), "
            f'"{ours}");'
            for theirs, ours in theirs_and_ours.items()
        ),
    ]
    (tmp_path / "layout.c").write_text("\n".join(lines))
    done = subprocess.run(
        ["cc", "-std=c11", f"-I{cuda_home()}/include", "-fsyntax-only", str(tmp_path / "layout.c")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------- the build


@pytest.fixture
def unbuilt(monkeypatch, tmp_path):
    """Let nobody have asked for the launcher, with an empty cache."""
    monkeypatch.setattr(launcher, "_library", None)
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("MHC_OPS_KERNELS", raising=False)
    return tmp_path / "cache" / "mhc_ops"


def test_it_is_built_once_and_kept(unbuilt, caplog, monkeypatch):
    with caplog.at_level(logging.INFO, logger="mhc_ops"):
        first = launcher.get()
        assert launcher.get() is first
        monkeypatch.setattr(launcher, "_library", None)
        launcher.get()
    said = [record.getMessage() for record in caplog.records]
    assert [line.split(" in ")[0] for line in said] == ["building launcher", "built launcher"]
    (folder,) = unbuilt.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [
        "launcher.json",
        "launcher.lock",
        "launcher.so",
    ]


@pytest.mark.parametrize("compiler", ["false", "/no/such/compiler"])
def test_without_a_compiler(unbuilt, monkeypatch, compiler):
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(RuntimeError) as error:
        launcher.get()
    first, advice = str(error.value).split("\n")
    assert first.startswith("mhc: the launcher of kernels cannot be built: ")
    assert advice == (
        "install a C compiler, or let CC name one; or build it on another machine: python -m "
        "mhc_ops build --arch ARCH -o DIR, then MHC_OPS_KERNELS=DIR"
    )


def test_one_that_was_built_ahead(unbuilt, monkeypatch, tmp_path):
    launcher.build(tmp_path / "ahead")
    monkeypatch.setenv("MHC_OPS_KERNELS", str(tmp_path / "ahead"))
    monkeypatch.setenv("CC", "/no/such/compiler")
    assert launcher.get()._name == str(tmp_path / "ahead" / "launcher.so")
    assert not unbuilt.exists()


def test_it_depends_on_no_version_of_anything():
    assert set(launcher.built_with()) == {"machine", "flags", "source"}


def test_a_broken_one_is_built_anew(unbuilt):
    launcher.get()
    (folder,) = unbuilt.iterdir()
    (folder / "launcher.so").unlink()  # The loaded library stays whole.
    (folder / "launcher.so").write_bytes(b"no ELF")
    path = library.obtain(launcher.NAME, launcher.built_with(), launcher.command())
    assert store.find(folder, launcher.NAME, store.LIBRARY, launcher.built_with()) is not None
    assert path == folder / "launcher.so"


# -------------------------------------------------------------------- whether stand-ins are true


@pytest.mark.parametrize("kernel", SIGNATURES)
def test_the_stand_ins_have_the_signatures_of_the_kernels(kernel, lowered):
    """Compare names, kinds and order of all parameters, and clusters, with TileLang's source."""
    options = {
        "projection": (("rows", 24), ("token_tiles", 1), ("ctas_per_sm", 5)),
        "post": (),
        "expand": (),
        "post_projection": (),
        "post_head": (("norm", 1), ("streams", 1), ("loop", 1)),
    }.get(kernel, (("norm", 1),))
    key = routes.Key(kernel, ARCH, HIDDEN, options)
    real = lowered(key)  # The emulation runs this size, too.
    assert real.parameters == signature(key)
    assert (real.cluster == 16) == kernel.startswith(CLUSTERED)
    names = {name for name, kind in real.parameters if kind != "pointer"}
    for extent in real.grid:
        formula.evaluate(extent, dict.fromkeys(names, 1))  # These names suffice.


def test_the_package_launches_nothing_else():
    """Load launcher and short way without TileLang's run time."""
    code = (
        "import sys, mhc_ops\n"
        "from mhc_ops.native import host, launcher\n"
        "launcher.get(), host.load()\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('tilelang', 'tvm', 'tvm_ffi')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "[]\n", done.stderr

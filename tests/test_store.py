"""Test store: what is taken from a folder of kernels, what is left alone and why, the lock."""

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import mhc_ops
from fake_driver import build_driver
from mhc_ops import compiler, jit, routes, store, support
from mhc_ops.native import host, launcher, torches

ROOT = Path(mhc_ops.__file__).parents[1]
KEY = routes.Key("post", "sm_90a", 256)
NAME = "post-sm_90a-256"
FACTS = {"machine": "x86_64", "sources": "abc"}
# These limit the processor where there is no GPU; no busy machine reaches them.
IMPORT_SECONDS = 0.25  # The import of mhc_ops takes less beyond torch's own.
FIRST_CALL_SECONDS = 0.3  # The import of mhc_ops and a first call take less.


@pytest.fixture(autouse=True)
def _unwarned(monkeypatch):
    monkeypatch.setattr(store, "_warned", set())


@pytest.fixture
def reasons(caplog):
    """Return the warnings so far."""
    caplog.set_level(logging.WARNING, logger="mhc_ops")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.fixture
def folder(tmp_path):
    """Return a folder with one library."""
    store.save(tmp_path, NAME, store.LIBRARY, FACTS, b"library" * 100)
    return tmp_path


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """Return a folder with the launcher and a really compiled post kernel of hidden size 256."""
    folder = tmp_path_factory.mktemp("kernels")
    store.save_kernel(folder, KEY, compiler.compile_kernel(KEY))
    launcher.build(folder)
    return folder


def test_names_of_files_are_those_of_keys():
    names = [
        store.file_name(key)
        for hidden in (256, 4096)
        for arch in ("sm_80", "sm_90a")
        for key in routes.keys(hidden, arch, 8192)
    ]
    assert len(set(names)) == len(names)
    key = routes.Key("finish", "sm_90a", 4096, (("norm", True),))
    assert store.file_name(key) == "finish-sm_90a-4096-norm1"


def test_a_library_is_found(folder, reasons):
    found = store.find(folder, NAME, store.LIBRARY, FACTS)
    assert (found.path, found.content) == (folder / f"{NAME}.so", b"library" * 100)
    assert found.facts.items() >= FACTS.items()
    assert sorted(path.name for path in folder.iterdir()) == [f"{NAME}.json", f"{NAME}.so"]
    assert not reasons()


def test_nothing_is_found_where_there_is_nothing(folder, reasons):
    assert store.find(folder, "post-sm_90a-512", store.LIBRARY, FACTS) is None
    assert store.find(folder / "nowhere", NAME, store.LIBRARY, FACTS) is None
    assert not reasons()


def change(field, value):
    def apply(folder):
        path = folder / f"{NAME}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))

    return apply


def flip_a_bit(folder):
    path = folder / f"{NAME}.so"
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)


DEEP = 100_000  # Python refuses to read JSON that is nested less deeply already.
CHANGED = f"it is truncated or changed, its SHA-256 is not that in {NAME}.json"
MISMATCHES = {
    "other machine": (
        change("machine", "aarch64"), f"{NAME}.so", "built with machine aarch64, expected x86_64"
    ),
    "other sources": (
        change("sources", "def"), f"{NAME}.so", "built with sources def, expected abc",
    ),
    "truncated": (lambda f: os.truncate(f / f"{NAME}.so", 50), f"{NAME}.so", CHANGED),
    "empty": (lambda f: os.truncate(f / f"{NAME}.so", 0), f"{NAME}.so", CHANGED),
    "corrupted": (flip_a_bit, f"{NAME}.so", CHANGED),
    "of another kernel": (
        change("name", "post-sm_90a-512"), f"{NAME}.json", f"it is not that of {NAME}.so"
    ),
    "no object": (
        lambda f: (f / f"{NAME}.json").write_text("[]"), f"{NAME}.json",
        f"it is not that of {NAME}.so",
    ),
    "no manifest": (
        lambda f: (f / f"{NAME}.json").unlink(), f"{NAME}.so",
        f"there is no {NAME}.json beside it",
    ),
    "truncated manifest": (
        lambda f: os.truncate(f / f"{NAME}.json", 20), f"{NAME}.json", "it cannot be read: "
    ),
    "nested manifest": (
        lambda f: (f / f"{NAME}.json").write_text("[" * DEEP + "]" * DEEP), f"{NAME}.json",
        "it cannot be read: ",
    ),
    "no library": (lambda f: (f / f"{NAME}.so").unlink(), f"{NAME}.so", "it cannot be read: "),
}  # fmt: skip


@pytest.mark.parametrize("name", MISMATCHES)
def test_what_does_not_match_is_left_alone(folder, reasons, name):
    spoil, file, reason = MISMATCHES[name]
    spoil(folder)
    for _ in range(2):
        assert store.find(folder, NAME, store.LIBRARY, FACTS) is None
    (message,) = reasons()
    assert message.startswith(f"{folder / file} is not used: {reason}")


def test_one_warning_for_a_folder_of_another_version(folder, reasons):
    store.save(folder, "another", store.LIBRARY, FACTS, b"another")
    for name in (NAME, "another"):
        assert store.find(folder, name, store.LIBRARY, FACTS | {"sources": "other"}) is None
    assert len(reasons()) == 1


def test_a_file_that_cannot_be_written_leaves_nothing(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def write(path, text):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write)  # The manifest is written after the library.
    with pytest.raises(OSError, match="No space left"):
        store.save(folder, NAME, store.LIBRARY, FACTS, b"half")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_kernel_is_what_was_compiled(kernels, reasons):
    kernel = store.load_kernel(kernels, KEY)
    assert kernel == compiler.compile_kernel(KEY)
    assert kernel.cubin.startswith(b"\x7fELF")
    assert (kernel.symbol, kernel.block, kernel.cluster) == ("mhc_post_kernel", 128, 1)
    assert kernel.parameters[-2:] == (("x", "pointer"), ("tokens", "int32"))
    assert kernel.compiled_with["tilelang"] == compiler.TILELANG
    assert not reasons()


def test_compilers_are_a_record_that_decides_nothing(kernels, reasons, tmp_path):
    """Take a kernel of these sources, whatever has compiled it."""
    facts = json.loads((kernels / f"{NAME}.json").read_text())
    facts["compiled_with"] = {"tilelang": "0.0.1", "nvcc": "1.0"}
    (tmp_path / f"{NAME}.json").write_text(json.dumps(facts))
    (tmp_path / f"{NAME}.cubin").write_bytes((kernels / f"{NAME}.cubin").read_bytes())
    assert store.load_kernel(tmp_path, KEY).compiled_with == facts["compiled_with"]
    assert not reasons()


def test_a_kernel_of_other_sources_is_left_alone(kernels, reasons, monkeypatch):
    got = store.kernels_built_with()["sources"]
    monkeypatch.setattr(store, "kernels_built_with", lambda: {"sources": "else"})
    assert store.load_kernel(kernels, KEY) is None
    (message,) = reasons()
    assert message.endswith(f"{NAME}.cubin is not used: built with sources {got}, expected else")


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("grid", ["tokens", "__import__('os')"]),
        ("grid", ["tokens"]),
        ("grid", ["tokens", "-" * DEEP + "1"]),
        ("grid", ["tokens", "(" * DEEP + "1" + ")" * DEEP]),
        ("grid", ["tokens", "1" + "+1" * DEEP]),
        ("parameters", ["x"]),
        ("block", "many"),
        ("symbol", None),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_manifest_that_is_not_one_of_a_kernel(kernels, reasons, tmp_path, fact, value):
    facts = json.loads((kernels / f"{NAME}.json").read_text())
    if value is None:
        del facts[fact]
    else:
        facts[fact] = value
    (tmp_path / f"{NAME}.json").write_text(json.dumps(facts))
    (tmp_path / f"{NAME}.cubin").write_bytes((kernels / f"{NAME}.cubin").read_bytes())
    assert store.load_kernel(tmp_path, KEY) is None
    (message,) = reasons()
    assert f"{NAME}.cubin is not used: its manifest is not one of a kernel: " in message


def test_every_source_of_a_kernel_counts(monkeypatch, tmp_path, subtests):
    sources = compiler.sources()
    folder = ROOT / "csrc_tilelang"
    files = {path for kind in ("*.py", "*.cuh") for path in folder.rglob(kind)}
    assert {"post.py", "device.cuh", "steps/post.py"} <= {
        path.relative_to(folder).as_posix() for path in files
    }
    assert sources.keys() == {"geometry.py", "compiler.py"} | {
        path.relative_to(ROOT).as_posix() for path in files
    }
    before = store.kernels_built_with.__wrapped__()
    changed = tmp_path / "changed"
    for name, path in sources.items():
        changed.write_text(path.read_text() + "\n")
        with subtests.test(name), monkeypatch.context() as patch:
            patch.setattr(compiler, "sources", lambda n=name: sources | {n: changed})
            assert store.kernels_built_with.__wrapped__() != before


FIRST_CALL = """
import sys, time
import torch
start = time.process_time()
import mhc_ops
imported = time.process_time()
from mhc_ops import jit, routes
from mhc_ops.native import launcher
kernel = jit.compile_key(routes.Key("post", "sm_90a", 256))
launcher.DRIVER = sys.argv[1]
handle = launcher.load("post", kernel._replace(cubin=b"mhc_post_kernel"), 0)
values = {name: 0 if kind == "pointer" else 2 for name, kind in kernel.parameters}
launcher.launch("post", handle, (2, 1), values, 0)
launched = time.process_time()
taken = {"tilelang", "tvm", "tvm_ffi"} & sys.modules.keys()
assert not taken, f"{taken} were imported"
print(imported - start, launched - start)
"""


def first_call(driver, **environment):
    done = subprocess.run(
        [sys.executable, "-c", FIRST_CALL, str(driver)],
        # No compiler is found, and every symbol is resolved as soon as a library is loaded.
        env={"PATH": "/nowhere", "HOME": "/nowhere", "LD_BIND_NOW": "1", "PYTHONPATH": str(ROOT)}
        | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return tuple(map(float, done.stdout.split()))


@pytest.mark.slow
def test_the_first_call_of_a_kernel_built_ahead(kernels, tmp_path):
    """Make the first call quickly, with no TileLang, tvm-ffi, compiler or cache.

    A stand-in for the driver takes the launch; the next test launches on a GPU.
    """
    environment = {"MHC_OPS_KERNELS": str(kernels), "MHC_OPS_DISABLE_JIT": "1"}
    driver = build_driver(tmp_path)
    times = [first_call(driver, **environment) for _ in range(3)]
    imported, called = map(min, zip(*times, strict=True))
    assert imported < IMPORT_SECONDS
    assert called < FIRST_CALL_SECONDS


FIRST_CALL_ON_A_GPU = """
import sys, time
import torch
x = torch.ones(2, 256, device="cuda", dtype=torch.bfloat16)
n = torch.ones(2, 4, 256, device="cuda", dtype=torch.bfloat16)
post, comb = torch.ones(2, 4, 1, device="cuda"), torch.ones(2, 4, 4, device="cuda")
torch.cuda.synchronize()
start = time.perf_counter()
import mhc_ops
out = mhc_ops.post(x, n, post, comb)
torch.cuda.synchronize()
print(time.perf_counter() - start)
taken = {"tilelang", "tvm", "tvm_ffi"} & sys.modules.keys()
assert not taken, f"{taken} were imported"
assert (out == 5).all()
"""


@pytest.mark.gpu
def test_the_first_call_on_a_gpu(tmp_path):
    key = routes.Key("post", support.arch(torch.device("cuda", 0)), 256)
    store.save_kernel(tmp_path, key, jit.compile_key(key))
    launcher.build(tmp_path)
    host.build(tmp_path, torches.here())
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {"PATH": "/nowhere", "PYTHONPATH": path, "MHC_OPS_DISABLE_JIT": "1"}
    environment |= {"MHC_OPS_KERNELS": str(tmp_path), "TILELANG_CACHE_DIR": str(tmp_path / "none")}
    kept = {name: value for name, value in os.environ.items() if name.startswith(("LD_", "CUDA"))}
    times = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", FIRST_CALL_ON_A_GPU],
            env=kept | environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        times.append(float(done.stdout))
    assert min(times) < FIRST_CALL_SECONDS


# ---------------------------------------------------------------------------------------- the lock

HOLD = """
import sys, time
from pathlib import Path
from mhc_ops import store
with store.lock(Path(sys.argv[1]), "kernel"):
    print("held", flush=True)
    time.sleep(3600)
"""


@pytest.fixture
def holder(tmp_path):
    """Yield a process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_lock_is_free_when_its_holder_dies(holder, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="mhc_ops")
    holder.kill()
    holder.wait()
    start = time.monotonic()
    with store.lock(tmp_path, "kernel"):
        assert time.monotonic() - start < 60  # This is far below LOCK_SECONDS.
    assert not caplog.records


def test_a_lock_is_not_waited_for_for_ever(holder, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="mhc_ops")
    monkeypatch.setattr(store, "LOCK_SECONDS", 0.3)
    start = time.monotonic()
    with store.lock(tmp_path, "kernel"):
        assert 0.3 <= time.monotonic() - start < 60
    assert [record.getMessage() for record in caplog.records] == [
        "another process is compiling kernel, waiting for it",
        "another process has been compiling kernel for 0 s, no longer waiting for it",
    ]


def test_work_goes_on_where_there_can_be_no_lock(tmp_path):
    (tmp_path / "file").touch()
    with store.lock(tmp_path / "file", "kernel"):
        done = True
    assert done

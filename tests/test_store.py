"""store: what is taken from a folder of kernels, what is left alone and why, and the lock."""

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
from mhc_ops import dispatch, jit, store, support
from mhc_ops.testing import make_inputs

ROOT = Path(mhc_ops.__file__).parents[1]
KEY = dispatch.post_key(256, "sm_90a")
NAME = "post-sm_90a-256"
FACTS = {"tilelang": "0.1.15", "kernel_sources": "abc"}
IMPORT_SECONDS = 0.1  # of mhc_ops beyond torch's own; 0.01 to 0.02 when it was measured
FIRST_CALL_SECONDS = 0.3  # from the import of mhc_ops to the end of the first call


@pytest.fixture(autouse=True)
def _unwarned(monkeypatch):
    monkeypatch.setattr(store, "_warned", set())


@pytest.fixture
def reasons(caplog):
    """What was warned of so far."""
    caplog.set_level(logging.WARNING, logger="mhc_ops")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.fixture
def folder(tmp_path):
    """A folder with one library."""
    store.save(tmp_path, NAME, FACTS, lambda path: path.write_bytes(b"library" * 100))
    return tmp_path


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """A folder with the post kernel of hidden size 256, really compiled."""
    folder = tmp_path_factory.mktemp("kernels")
    store.save_kernel(folder, KEY, jit.compile_kernel(KEY))
    return folder


def test_names_of_files_are_those_of_keys():
    names = [
        store.file_name(key)
        for hidden in (256, 4096)
        for arch in ("sm_80", "sm_90a")
        for key in dispatch.keys(hidden, arch, 8192)
    ]
    assert len(set(names)) == len(names)
    assert store.file_name(dispatch.finish_key(4096, "sm_90a", True)) == "finish-sm_90a-4096-norm1"


def test_a_library_is_found(folder, reasons):
    assert store.find(folder, NAME, FACTS) == folder / f"{NAME}.so"
    assert sorted(path.name for path in folder.iterdir()) == [f"{NAME}.json", f"{NAME}.so"]
    assert not reasons()


def test_nothing_is_found_where_there_is_nothing(folder, reasons):
    assert store.find(folder, "post-sm_90a-512", FACTS) is None
    assert store.find(folder / "nowhere", NAME, FACTS) is None
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


CHANGED = f"it is truncated or changed, its SHA-256 is not that in {NAME}.json"
MISMATCHES = {
    "other tilelang": (
        change("tilelang", "0.1.14"), f"{NAME}.so", "built with tilelang 0.1.14, expected 0.1.15"
    ),
    "other sources": (
        change("kernel_sources", "def"), f"{NAME}.so",
        "built with kernel_sources def, expected abc",
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
    "no library": (lambda f: (f / f"{NAME}.so").unlink(), f"{NAME}.so", "it cannot be read: "),
}  # fmt: skip


@pytest.mark.parametrize("name", MISMATCHES)
def test_what_does_not_match_is_left_alone(folder, reasons, name):
    spoil, file, reason = MISMATCHES[name]
    spoil(folder)
    for _ in range(2):
        assert store.find(folder, NAME, FACTS) is None
    (message,) = reasons()
    assert message.startswith(f"{folder / file} is not used: {reason}")


def test_one_warning_for_a_folder_of_another_version(folder, reasons):
    store.save(folder, "another", FACTS, lambda path: path.write_bytes(b"another"))
    for name in (NAME, "another"):
        assert store.find(folder, name, FACTS | {"tilelang": "0.2.0"}) is None
    assert len(reasons()) == 1


def test_a_library_that_cannot_be_written_leaves_nothing(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def export(path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        store.save(folder, NAME, FACTS, export)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_kernel_is_loaded(kernels, reasons):
    """Its host code runs: it refuses tensors of the CPU."""
    run = store.load_kernel(kernels, KEY)
    inputs = make_inputs("post", 2, 256)
    inputs["post_layer_mix"] = inputs["post_layer_mix"].squeeze(-1)
    with pytest.raises(RuntimeError, match="device_type mismatch, expected cuda"):
        run(*inputs.values(), torch.empty_like(inputs["residual"]))
    assert not reasons()


@pytest.mark.parametrize("fact", ["tilelang", "tvm_ffi", "machine", "kernel_sources"])
def test_a_kernel_of_another_installation_is_left_alone(kernels, reasons, monkeypatch, fact):
    versions = store._versions()
    got = versions[fact]
    monkeypatch.setattr(store, "_versions", lambda: versions | {fact: "else"})
    assert store.load_kernel(kernels, KEY) is None
    (message,) = reasons()
    assert message.endswith(f"{NAME}.so is not used: built with {fact} {got}, expected else")


def test_a_library_that_is_no_kernel(tmp_path, reasons):
    store.save(tmp_path, NAME, store._versions(), lambda path: path.write_bytes(b"no ELF"))
    assert store.load_kernel(tmp_path, KEY) is None
    (message,) = reasons()
    assert message.startswith(f"{tmp_path / NAME}.so is not used: it cannot be loaded: ")


def test_every_source_of_a_kernel_counts(monkeypatch, tmp_path):
    sources = store.kernel_sources()
    names = {path.name for path in sources}
    assert {path.name for path in (ROOT / "csrc_tilelang").glob("*.py")} <= names
    assert {"dispatch.py", "jit.py"} <= names
    copy = tmp_path / sources[-1].name
    copy.write_text(sources[-1].read_text() + "\n")
    monkeypatch.setattr(store, "kernel_sources", lambda: [*sources[:-1], copy])
    assert store._versions.__wrapped__() != store._versions()


FIRST_CALL = """
import sys, time
import torch
start = time.perf_counter()
import mhc_ops
imported = time.perf_counter()
from mhc_ops import dispatch, jit
run = jit.compile_key(dispatch.post_key(256, "sm_90a"))
loaded = time.perf_counter()
assert not {"tilelang", "tvm"} & sys.modules.keys(), "TileLang's Python was imported"
n = torch.empty(2, 4, 256, dtype=torch.bfloat16)
try:
    run(n[:, 0].contiguous(), n, torch.empty(2, 4), torch.empty(2, 4, 4), n)
except RuntimeError as error:
    assert "expected cuda" in str(error), error
else:
    raise SystemExit("a kernel for CUDA ran on the CPU")
print(imported - start, loaded - start)
"""


def first_call(**environment):
    done = subprocess.run(
        [sys.executable, "-c", FIRST_CALL],
        # no compiler is found, and every symbol is resolved as soon as a library is loaded
        env={"PATH": "/nowhere", "HOME": "/nowhere", "LD_BIND_NOW": "1", "PYTHONPATH": str(ROOT)}
        | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return tuple(map(float, done.stdout.split()))


def test_the_first_call_of_a_kernel_built_ahead(kernels):
    """No TileLang, no compiler, no cache; and quick: 0.04 s until the kernel is there.

    The launch itself is the GPU test's. Here the kernel refuses its arguments, which shows that it
    runs, and takes 0.8 s, since tvm-ffi's first error imports a good deal.
    """
    times = [first_call(MHC_OPS_KERNELS=str(kernels), MHC_OPS_DISABLE_JIT="1") for _ in range(3)]
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
assert not {"tilelang", "tvm"} & sys.modules.keys(), "TileLang's Python was imported"
assert (out == 5).all()
"""


@pytest.mark.gpu
def test_the_first_call_on_a_gpu(tmp_path):
    key = dispatch.post_key(256, support.arch(torch.device("cuda", 0)))
    store.save_kernel(tmp_path, key, jit.compile_kernel(key))
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
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock."""
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
        assert time.monotonic() - start < 5
    assert not caplog.records


def test_a_lock_is_not_waited_for_for_ever(holder, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="mhc_ops")
    monkeypatch.setattr(store, "LOCK_SECONDS", 0.3)
    start = time.monotonic()
    with store.lock(tmp_path, "kernel"):
        assert 0.3 <= time.monotonic() - start < 5
    assert [record.getMessage() for record in caplog.records] == [
        "another process is compiling kernel, waiting for it",
        "another process has been compiling kernel for 0 s, no longer waiting for it",
    ]


def test_work_goes_on_where_there_can_be_no_lock(tmp_path):
    (tmp_path / "file").touch()
    with store.lock(tmp_path / "file", "kernel"):
        done = True
    assert done

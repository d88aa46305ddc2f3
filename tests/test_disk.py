"""Say where to make room: what stands for a full disk, and what a really full one says."""

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import fake_driver
import mhc_ops
from mhc_ops import __main__, compiler, disk
from mhc_ops.native import host, launcher, library

ROOT = Path(mhc_ops.__file__).parents[1]
FULL = OSError(errno.ENOSPC, "No space left on device")
GCC = "/tmp/cc1.s: fatal error: error writing to /tmp/cc1.s: No space left on device"


@pytest.fixture
def free(monkeypatch, tmp_path):
    """Set the free bytes of the folder for temporary files and of the cache, both of this test."""
    folders = {name: tmp_path / name for name in ("tmp", "cache", "out")}
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(folders["tmp"]))
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(folders["cache"]))
    left = dict.fromkeys(folders, 1 << 40)
    monkeypatch.setattr(disk, "_free", lambda folder: left[folder.name])
    return left


def caused(error):
    outer = RuntimeError("it failed")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (FULL, True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (caused(FULL), True),
        (RuntimeError(f"nvcc says: {GCC}"), True),
        (subprocess.CalledProcessError(1, "g++", stderr=GCC), True),
        (FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"), True),
        (OSError(errno.EROFS, "Read-only file system"), False),
        (RuntimeError("a.cu(3): error: no such thing"), False),
    ],
)
def test_what_a_full_disk_says(free, error, full):
    assert disk.is_full(error) is full
    assert (disk.advice(error) is not None) is full


def test_the_folders_that_are_full_are_named(free, tmp_path):
    free["tmp"] = 1 << 20
    assert disk.advice(FULL) == (
        f"make room in {tmp_path}/tmp (1.0 MiB free), or let TMPDIR name another folder"
    )
    free["cache"] = 0
    assert disk.advice(FULL) == (
        f"make room in {tmp_path}/tmp (1.0 MiB free) and in {tmp_path}/cache (0.0 MiB free), or "
        "let TMPDIR and TILELANG_CACHE_DIR name other folders"
    )
    free["tmp"] = 1 << 40
    assert disk.advice(FULL, tmp_path / "out").startswith(f"make room in {tmp_path}/tmp (")
    free["out"] = 0
    assert disk.advice(FULL, tmp_path / "out") == (
        f"make room in {tmp_path}/out (0.0 MiB free), or let -o name another folder"
    )


def test_a_suspicion_needs_a_full_disk(free):
    error = RuntimeError("nvcc fatal   : Failed to preprocess host compiler properties.")
    assert disk.advice(error) is None
    assert disk.advice(error, suspected=True) is None
    free["tmp"] = 0
    assert disk.advice(error) is None
    assert disk.advice(error, suspected=True) is not None


def test_a_build_says_where(free, monkeypatch, capsys, tmp_path):
    free["out"] = 0
    monkeypatch.setattr(compiler, "compile_kernel", fake_driver.compiled)
    monkeypatch.setattr(library, "compile", lambda name, command: name.encode())

    def write(path, data):
        raise FULL

    monkeypatch.setattr(Path, "write_bytes", write)
    assert __main__.main(["build", "--arch", "sm_80", "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"mhc_ops.build: {FULL}; make room in {tmp_path}/out (0.0 MiB free), or let -o name "
        "another folder"
    )


def test_native_libraries_say_where(free, monkeypatch, tmp_path, caplog):
    """Advise no compiler where the compiler has run out of room."""

    def compile_library(name, command):
        raise subprocess.CalledProcessError(1, "cc", stderr=GCC)

    monkeypatch.delenv("MHC_OPS_KERNELS", raising=False)
    monkeypatch.setattr(library, "compile", compile_library)
    monkeypatch.setattr(launcher, "_library", None)
    with pytest.raises(RuntimeError) as error:
        launcher.get()
    assert f"{GCC}\nmake room in {tmp_path}" in str(error.value)
    assert "C compiler" not in str(error.value)

    monkeypatch.setattr(host, "_tried", False)
    monkeypatch.setattr(host, "_library", None)
    monkeypatch.setattr(launcher, "get", object)
    assert not host.load()
    assert f"{GCC}; make room in {tmp_path}" in caplog.text


@pytest.fixture
def tiny(tmp_path):
    """Mount a file system of the given size, which only root can."""
    folder = tmp_path / "tiny"
    folder.mkdir()

    def mount(size):
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", str(folder)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            pytest.skip(f"no file system can be mounted: {done.stderr.strip()}")
        return folder

    if os.geteuid():
        pytest.skip("only root mounts a file system")
    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True)


COMPILE = """
from mhc_ops import jit, routes
jit.compile_key(routes.Key("post", "sm_90a", 256))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "size"), [("TMPDIR", "16k"), ("TMPDIR", "2m"), ("TILELANG_CACHE_DIR", "16k")]
)
def test_a_disk_that_is_full(tiny, tmp_path, variable, size):
    """Fill the disk in earnest; nvcc's words differ by how much room is left."""
    folder = tiny(size)
    (folder / "other").write_bytes(b"x" * 8192)
    environment = {"TMPDIR": str(tmp_path), "TILELANG_CACHE_DIR": str(tmp_path / "cache")}
    environment |= {"PYTHONPATH": str(ROOT), variable: str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert f"make room in {folder} (" in done.stderr
    assert f"let {variable} name another folder" in done.stderr
    assert "#include" not in done.stderr
    assert "nvcc is /" not in done.stderr

"""build: what it refuses, and what it puts where; the wheel is ``test_packaging.py``'s."""

import subprocess

import pytest

import fake_driver
from mhc_ops import __main__, build, compiler, routes, store
from mhc_ops.native import host, launcher


@pytest.fixture
def compiled(monkeypatch):
    """Keys that were compiled, by a stand-in for the compiler, and native libraries built."""
    compiled = []

    def compile_kernel(key):
        compiled.append(key)
        return fake_driver.compiled(key)

    monkeypatch.setattr(compiler, "compile_kernel", compile_kernel)
    for native in (launcher, host):
        monkeypatch.setattr(native, "build", lambda folder, n=native: compiled.append(n.NAME))
    return compiled


ARCH = (
    "mhc_ops.build: expected architectures such as sm_80, sm_90a or sm_120a, from sm_80 on and "
    "with an a from sm_90a on, got "
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arch", ","], "mhc_ops.build: expected at least one architecture, got none"),
        (["--arch", "sm_80,hopper"], f"{ARCH}hopper"),
        (["--arch", "sm_75"], f"{ARCH}sm_75"),
        (["--arch", "sm_90"], f"{ARCH}sm_90"),
        (["--arch", "sm_80a"], f"{ARCH}sm_80a"),
        (
            ["--arch", "sm_80", "--hidden", "256,100"],
            "mhc_ops.build: expected hidden sizes that are multiples of 256, got 100",
        ),
        (
            ["--arch", "sm_80", "--max-tokens", "0"],
            "mhc_ops.build: expected max_tokens of at least 1, got 0",
        ),
    ],
)
def test_refusals(compiled, capsys, tmp_path, options, message):
    assert __main__.main(["build", *options, "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"{message}\n"
    assert not compiled
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90a", "sm_100a", "sm_103a", "sm_120a"])
def test_architectures(arch):
    build._check_arch(arch)


def test_every_kernel_is_built(compiled, capsys, tmp_path):
    archs, sizes = ("sm_80", "sm_90a"), (4096, 5120)
    options = ["--arch", "sm_80, sm_90a", "--hidden", "4096,5120,4096", "--max-tokens", "64"]
    assert __main__.main(["build", *options, "-o", str(tmp_path)]) == 0
    want = {key for arch in archs for size in sizes for key in routes.keys(size, arch, 64)}
    assert compiled[-2:] == ["launcher", "host"]
    assert sorted(compiled[:-2]) == sorted(want)
    for key in want:
        assert store.load_kernel(tmp_path, key) == fake_driver.compiled(key)
    said = capsys.readouterr()
    assert said.out.startswith(f"{len(want)} kernels in {tmp_path} in ")
    assert "compiling for sm_80, sm_90a" in said.err


def test_the_first_failure_ends_it(compiled, monkeypatch, capsys, tmp_path):
    tried = []

    def fail(key):
        tried.append(key)
        raise RuntimeError("no nvcc")

    monkeypatch.setattr(compiler, "compile_kernel", fail)
    archs = "sm_80,sm_86,sm_89,sm_90a,sm_100a"
    assert __main__.main(["build", "--arch", archs, "-o", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith("no nvcc\n")
    every = [k for arch in archs.split(",") for h in (4096, 5120, 7168) for k in
             routes.keys(h, arch, 8192)]  # fmt: skip
    assert len(tried) < len(every)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("native", [launcher, host], ids=lambda native: native.NAME)
def test_a_native_library_that_cannot_be_built(compiled, monkeypatch, capsys, tmp_path, native):
    def fail(folder):
        raise subprocess.CalledProcessError(1, "g++", stderr="error: no such header\n")

    monkeypatch.setattr(native, "build", fail)
    assert __main__.main(["build", "--arch", "sm_90a", "-o", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith(
        f"mhc_ops.build: the native library {native.NAME} cannot be built: error: no such header\n"
    )


def test_a_folder_that_cannot_be_made(compiled, capsys, tmp_path):
    (tmp_path / "file").touch()
    assert __main__.main(["build", "--arch", "sm_80", "-o", str(tmp_path / "file" / "out")]) == 2
    assert "Not a directory" in capsys.readouterr().err
    assert not compiled

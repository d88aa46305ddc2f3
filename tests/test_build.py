"""Test what ``build`` refuses, and what it puts where; ``test_packaging.py`` tests the wheel."""

import shutil
import subprocess
import zipfile

import pytest

import fake_driver
from mhc_ops import __main__, build, compiler, routes, store
from mhc_ops.native import host, library, torches


@pytest.fixture
def compiled(monkeypatch):
    """List keys and names of native libraries that stand-ins for the compilers have compiled."""
    compiled = []

    def compile_kernel(key):
        compiled.append(key)
        return fake_driver.compiled(key)

    def compile_library(name, command):
        compiled.append(name)
        return name.encode()

    monkeypatch.setattr(compiler, "compile_kernel", compile_kernel)
    monkeypatch.setattr(library, "compile", compile_library)
    return compiled


LIBRARIES = ["launcher", host.name(torches.here())]


def write_torch(folder, version, commit="abc", lacks=""):
    """Write what a build looks at of a package folder of torch."""
    for name in {torches.HEADERS, *torches.LIBRARIES, torches.VERSION} - {lacks}:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name} of {version}")
    if lacks != torches.VERSION:
        (folder / torches.VERSION).write_text(
            "from typing import Optional\n\n"
            f"__version__ = '{version}'\ncuda: Optional[str] = None\ngit_version = '{commit}'\n"
        )
    return folder


ARCH = (
    "mhc_ops.build: expected architectures such as sm_80, sm_90a or sm_120a, from sm_80 on and "
    "with an a from sm_90a on, got "
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "mhc_ops.build: expected an architecture or a torch to build for, got none"),
        (
            ["--arch", ","],
            "mhc_ops.build: expected an architecture or a torch to build for, got none",
        ),
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
    assert compiled[:2] == LIBRARIES
    assert sorted(compiled[2:]) == sorted(want)
    for key in want:
        assert store.load_kernel(tmp_path, key) == fake_driver.compiled(key)
    said = capsys.readouterr()
    assert said.out.startswith(
        f"{len(want)} kernels, {len(want)} of them new, and {', '.join(LIBRARIES)} in {tmp_path} "
    )
    assert "compiling for sm_80, sm_90a" in said.err


def test_what_is_there_is_kept(compiled, capsys, tmp_path, monkeypatch):
    """Compile what is missing, changed, or of other sources in a second build, and nothing else."""
    arguments = ["build", "--arch", "sm_80", "--hidden", "256", "-o", str(tmp_path)]
    assert __main__.main(arguments) == 0
    every = set(compiled[2:])
    compiled.clear()
    assert __main__.main(arguments) == 0
    assert not compiled
    gone, broken = sorted(every)[:2]
    (tmp_path / f"{store.file_name(gone)}.cubin").unlink()
    (tmp_path / f"{store.file_name(broken)}.cubin").write_bytes(b"broken")
    assert __main__.main([*arguments[:-2], "--arch", "sm_80,sm_86", "-o", str(tmp_path)]) == 0
    assert set(compiled) == {gone, broken, *routes.keys(256, "sm_86", 8192)}
    compiled.clear()
    monkeypatch.setattr(store, "kernels_built_with", lambda: {"sources": "others"})
    monkeypatch.setattr(host, "FLAGS", ("-O3",))
    assert __main__.main(arguments) == 0
    assert compiled[0] == LIBRARIES[1]
    assert set(compiled[1:]) == every


@pytest.mark.parametrize("as_wheels", [False, True], ids=["folders", "wheels"])
def test_native_libraries_for_other_torches(compiled, monkeypatch, capsys, tmp_path, as_wheels):
    """Build each against its torch's own files, import no torch, and compile no kernel."""
    seen = {}

    def compile_library(name, command):
        compiled.append(name)
        if name != "launcher":
            (home,) = (part[2:] for part in command if part.startswith("-I"))
            (libraries,) = (part[2:] for part in command if part.startswith("-L"))
            with open(f"{home}/torch/library.h") as header, open(f"{libraries}/libc10.so") as c10:
                seen[name] = header.read(), c10.read()
        return name.encode()

    monkeypatch.setattr(library, "compile", compile_library)
    versions = {"2.98.0+cu130": "2.98", "2.99.3": "2.99", "2.100.0a0+git12": "2.100.0a0+git12"}
    paths = []
    for version in versions:
        home = write_torch(tmp_path / version / "torch", version)
        if as_wheels:
            (home / "_tensor.py").touch()
            wheel = tmp_path / f"{version}.whl"
            with zipfile.ZipFile(wheel, "w") as archive:
                for file in (path for path in home.rglob("*") if path.is_file()):
                    archive.write(file, file.relative_to(home.parent))
            shutil.rmtree(home)
        paths.append(str(wheel if as_wheels else home))
    out = tmp_path / "out"
    arguments = ["--torch", f"{paths[0]}, {paths[1]}", "--torch", paths[2], "-o", str(out)]
    assert __main__.main(["build", *arguments]) == 0
    names = [f"host-torch{series}" for series in versions.values()]
    assert compiled == ["launcher", *names]
    assert capsys.readouterr().out.startswith(
        f"0 kernels, 0 of them new, and {', '.join(compiled)} in {out} in "
    )
    for version, name in zip(versions, names, strict=True):
        assert seen[name] == (f"{torches.HEADERS} of {version}", f"lib/libc10.so of {version}")
        of = torches.Torch(tmp_path, version, "abc")
        assert store.find(out, name, store.LIBRARY, host.built_with(of)) is not None
    assert len(list(out.glob("host-*.so"))) == 3


@pytest.mark.parametrize(
    ("version", "serves"),
    [
        ("2.14.1+cu130", {"2.14.0", "2.14.1", "2.14.1+cpu", "2.14.1+cu130"}),
        ("2.14.0", {"2.14.0", "2.14.1", "2.14.1+cpu", "2.14.1+cu130"}),
        ("2.13.0+cpu", {"2.13.0"}),
        ("2.14.0a0+git1", {"2.14.0a0+git1"}),
        ("2.14.0.dev20260101+cu130", {"2.14.0.dev20260101+cu130"}),
        ("2.14.1+git1", {"2.14.1+git1"}),
    ],
)
def test_a_library_serves_a_release_series_or_one_build(compiled, tmp_path, version, serves):
    others = {"2.13.0", "2.14.0", "2.14.1", "2.14.1+cpu", "2.14.1+cu130", "2.14.0a0+git1",
              "2.14.0.dev20260101+cu130", "2.14.0rc1", "2.14.1+git1", "2.15.0"}  # fmt: skip

    def of(version, commit):
        return torches.Torch(tmp_path, version, commit)

    host.build(tmp_path, of(version, "abc"))

    def found(torch):
        return store.find(tmp_path, host.name(torch), store.LIBRARY, host.built_with(torch))

    assert {v for v in others if found(of(v, "abc"))} == serves
    another_commit = {v for v in others if found(of(v, "def"))}
    assert another_commit == (serves if torches.RELEASE.fullmatch(version) else set())


@pytest.mark.parametrize("lacks", [torches.HEADERS, *torches.LIBRARIES, torches.VERSION])
def test_a_folder_that_is_no_torch(compiled, capsys, tmp_path, lacks):
    home = write_torch(tmp_path / "torch", "2.99.0", lacks=lacks)
    assert __main__.main(["build", "--torch", str(home), "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        "mhc_ops.build: expected a package folder of torch or a wheel of it, got "
        f"{home}, which has no {lacks}\n"
    )
    assert compiled == ["launcher"]


@pytest.mark.parametrize("text", ["__version__ = '2.99.0'", "__version__ =", "x: int"])
def test_a_torch_without_a_version(compiled, capsys, tmp_path, text):
    home = write_torch(tmp_path / "torch", "2.99.0")
    (home / torches.VERSION).write_text(text)
    assert __main__.main(["build", "--torch", str(home), "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(
        f"mhc_ops.build: expected __version__ and git_version in version.py of {home}, got "
    )


def test_a_file_that_is_no_wheel(compiled, capsys, tmp_path):
    (tmp_path / "torch.whl").write_text("no zip")
    path = str(tmp_path / "torch.whl")
    assert __main__.main(["build", "--torch", path, "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        f"mhc_ops.build: expected a wheel of torch, got {path}: File is not a zip file\n"
    )


def test_two_torches_of_one_series(compiled, capsys, tmp_path):
    homes = [str(write_torch(tmp_path / v, v)) for v in ("2.99.0", "2.99.1+cpu")]
    assert __main__.main(["build", "--torch", ",".join(homes), "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        "mhc_ops.build: expected one torch of each release series, got 2.99.0 and 2.99.1+cpu\n"
    )


def test_the_torch_of_this_environment_has_the_files(monkeypatch):
    """Read torch's version from its files as torch itself tells it."""
    with torches.opened(torches.here().home) as of:
        assert of == torches.here()


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
    assert not list(tmp_path.glob("*.cubin"))


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_native_library_that_cannot_be_built(compiled, monkeypatch, capsys, tmp_path, name):
    def fail(built, command):
        if built == name:
            raise subprocess.CalledProcessError(1, "g++", stderr="error: no such header\n")
        return b""

    monkeypatch.setattr(library, "compile", fail)
    assert __main__.main(["build", "--arch", "sm_90a", "-o", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"mhc_ops.build: the native library {name} cannot be built: error: no such header\n"
    )
    assert not [key for key in compiled if isinstance(key, routes.Key)]


def test_a_folder_that_cannot_be_made(compiled, capsys, tmp_path):
    (tmp_path / "file").touch()
    assert __main__.main(["build", "--arch", "sm_80", "-o", str(tmp_path / "file" / "out")]) == 2
    assert "Not a directory" in capsys.readouterr().err
    assert not compiled

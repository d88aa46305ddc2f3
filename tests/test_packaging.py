"""Test the wheel: what is in it, and that it runs where the checkout is not."""

import ast
import importlib.metadata
import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import rich
import torch

import mhc_ops
from mhc_ops import routes, store
from mhc_ops.native import host, torches

ROOT = Path(__file__).parents[1]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
# A build reads these; benchmarks, examples and tests go into the sdist alone.
SOURCES = ("mhc_ops", "csrc_tilelang", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md",
           "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "constraints.txt", "tests",
           "benchmarks", "docs", "examples")  # fmt: skip
IGNORED = shutil.ignore_patterns("__pycache__", "*.bak")

pytestmark = pytest.mark.slow  # Wheels are built and installed.

RUN_EVERY_OP = """
import sys
import mhc_ops

taken = {"tilelang", "tvm", "tvm_ffi"} & sys.modules.keys()
assert not taken, f"importing mhc_ops imported {taken}"

import torch
from mhc_ops.testing import OUTPUTS, as_outputs, assert_matches_oracle, make_inputs

for op in OUTPUTS:
    for tokens in (0, 3):
        inputs = make_inputs(op, tokens, 256, norm=op != "post")
        outputs = getattr(mhc_ops, op)(**inputs)
        assert_matches_oracle(op, inputs, outputs)
        assert {out.shape[0] for out in as_outputs(op, outputs).values()} == {tokens}
print(mhc_ops.__file__)
"""


def python(executable, *arguments, cwd, **environment):
    """Run an interpreter that sees nothing of the checkout."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= environment
    done = subprocess.run(
        [str(executable), *arguments], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def pip_wheel(source, target, **environment):
    """Build a wheel without asking any index."""
    python(
        sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps",
        "--no-index", "--wheel-dir", str(target), str(source), cwd=target, **environment,
    )  # fmt: skip
    (wheel,) = target.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return a copy of the sources: building leaves folders behind, and other tests may run."""
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=IGNORED)
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    return pip_wheel(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """Return (interpreter, site-packages) of a new environment with the wheel, and our torch."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, symlinks=True)
    interpreter = home / "bin" / "python"
    python(
        sys.executable, "-m", "pip", "--python", str(interpreter), "install", "--quiet",
        "--no-deps", "--no-index", str(wheel), cwd=home,
    )  # fmt: skip
    (site,) = home.glob("lib/python*/site-packages")
    # The borrowed packages come after the environment's own, and without their .pth files, so an
    # editable install of the checkout stays out.
    borrowed = {str(Path(module.__file__).parents[1]) for module in (torch, rich)}
    (site / "borrowed.pth").write_text("\n".join(sorted(borrowed)) + "\n")
    return interpreter, site


def test_wheel_holds_every_source_file(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    want = {"mhc_ops/py.typed"}
    for suffix in ("cpp", "h", "c"):
        for path in (ROOT / "mhc_ops" / "native").glob(f"*.{suffix}"):
            want.add(f"mhc_ops/native/{path.name}")
    assert {"mhc_ops/native/host.cpp", "mhc_ops/native/plan.h", "mhc_ops/native/launcher.c"} <= want
    for package, folder in (("mhc_ops", "mhc_ops"), ("mhc_ops/csrc_tilelang", "csrc_tilelang")):
        for kind in ("*.py", "*.cuh", "README.md"):
            for path in (ROOT / folder).rglob(kind):
                want.add(f"{package}/{path.relative_to(ROOT / folder).as_posix()}")
    assert held == want
    kernels = {"post.py", "device.cuh", "steps/post.py"}
    assert {f"mhc_ops/csrc_tilelang/{name}" for name in kernels} <= held


def test_wheel_from_the_sdist_is_the_same(source, wheel, tmp_path):
    build = "import setuptools.build_meta as b, sys; print(b.build_sdist(sys.argv[1]))"
    python(sys.executable, "-c", build, str(tmp_path), cwd=source)
    (sdist,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(sdist, tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    for name in SOURCES:
        files = [path for path in (source / name).rglob("*") if path.is_file()] or [source / name]
        for file in files:
            relative = file.relative_to(source)
            assert (unpacked / relative).is_file(), f"{relative} is not in the sdist"
    second = pip_wheel(unpacked, tmp_path)
    contents = [
        {name: archive.read(name) for name in archive.namelist() if not name.endswith("RECORD")}
        for archive in map(zipfile.ZipFile, (wheel, second))
    ]
    assert contents[0] == contents[1]


LOAD_PACKAGED = """
import sys
from mhc_ops import jit, routes
from mhc_ops.native import host, launcher
for key in routes.keys(256, "sm_80", 8192):
    jit.compile_key(key)
assert "packaged" in launcher.get()._name
assert host.load()
taken = {"tilelang", "tvm", "tvm_ffi"} & sys.modules.keys()
assert not taken, f"{taken} were imported"
"""


def test_a_wheel_with_kernels(source, wheel, tmp_path):
    """Load a kernel from the unpacked wheel, with nothing that could compile one."""
    copy = tmp_path / "copy"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    made = pip_wheel(copy, tmp_path, MHC_OPS_AOT_ARCHS="sm_80", MHC_OPS_AOT_HIDDEN="256")
    version = mhc_ops.__version__
    assert made.name == f"mhc_ops-{version}-py3-none-linux_{platform.machine()}.whl"
    assert wheel.name == f"mhc_ops-{version}-py3-none-any.whl"
    assert needs_of(made) == ["torch<2.15,>=2.11"]  # An engine keeps its own TileLang.
    site = tmp_path / "site"
    python(
        sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target",
        str(site), str(made), cwd=tmp_path,
    )  # fmt: skip
    names = {store.file_name(key) for key in routes.keys(256, "sm_80", 8192)}
    files = {path.name for path in (site / "mhc_ops" / "packaged").iterdir()}
    want = {f"{name}{suffix}" for name in names for suffix in (".cubin", ".json")}
    libraries = (host.name(torches.here()), "launcher")
    want |= {f"{name}{suffix}" for name in libraries for suffix in (".so", ".json")}
    want |= {"ops.txt", "plans-sm_80-256.txt"}
    assert files == want
    python(
        sys.executable, "-c", LOAD_PACKAGED, cwd=tmp_path, PYTHONPATH=str(site), PATH="/nowhere",
        MHC_OPS_DISABLE_JIT="1", TILELANG_CACHE_DIR=str(tmp_path / "cache"),
    )  # fmt: skip
    # A later build in the same folder, without kernels, carries none of the kernels.
    (tmp_path / "plain").mkdir()
    plain = pip_wheel(copy, tmp_path / "plain")
    with zipfile.ZipFile(plain) as archive:
        assert not [name for name in archive.namelist() if "packaged" in name]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MHC_OPS_AOT_ARCHS": "hopper"}, "with an a from sm_90a on, got hopper"),
        ({"MHC_OPS_AOT_ARCHS": "sm_80", "MHC_OPS_AOT_HIDDEN": "100"}, "multiples of 256, got 100"),
        (
            {"MHC_OPS_AOT_ARCHS": "sm_80", "MHC_OPS_AOT_TORCH": "mhc_ops"},
            "copy/mhc_ops, which has no",
        ),
    ],
)
def test_a_wheel_with_kernels_that_cannot_be_built(source, tmp_path, environment, message):
    copy = tmp_path / "copy"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    with pytest.raises(AssertionError) as error:
        pip_wheel(copy, tmp_path, **environment)
    assert message in str(error.value)
    assert f"MHC_OPS_AOT_ARCHS={environment['MHC_OPS_AOT_ARCHS']}: the kernels were not built" in (
        str(error.value)
    )


def test_an_editable_install_carries_no_kernels(source, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    build = "import setuptools.build_meta as b, sys; b.build_editable(sys.argv[1])"
    with pytest.raises(AssertionError, match="an editable install carries no kernels; use"):
        python(sys.executable, "-c", build, str(tmp_path), cwd=copy, MHC_OPS_AOT_ARCHS="sm_80")


def metadata_of(wheel):
    """Return (fields of the wheel's metadata, names of its files)."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        parent = zipfile.Path(archive, metadata).parent
        return importlib.metadata.PathDistribution(parent).metadata, names


def needs_of(wheel):
    """Return what the wheel needs wherever it is installed."""
    fields, _ = metadata_of(wheel)
    return [text for text in fields.get_all("Requires-Dist") if "extra" not in text]


def test_metadata(wheel):
    fields, names = metadata_of(wheel)
    assert (fields["Name"], fields["Version"]) == ("mhc-ops", mhc_ops.__version__)
    assert fields["Requires-Python"] == ">=3.11"
    assert fields["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert needs_of(wheel) == ["torch<2.15,>=2.11", "tilelang==0.1.15"]
    assert len(DEPENDENCIES) == 2
    assert 'transformers<6,>=5.17; extra == "transformers"' in fields.get_all("Requires-Dist")


@pytest.mark.parametrize("group", ["vllm.general_plugins", "sglang.srt.plugins"])
def test_entry_points_of_the_engines(environment, tmp_path, group):
    """Find and load an entry point as its engine does; without the engine it changes nothing."""
    interpreter, _ = environment
    load = (
        "from importlib.metadata import entry_points\n"
        f"(found,) = entry_points(group={group!r})\n"
        "found.load()()\n"
        "print(found.name)"
    )
    assert python(interpreter, "-c", load, cwd=tmp_path) == "mhc_ops\n"


def test_every_op_runs_from_the_wheel(environment, tmp_path):
    interpreter, site = environment
    loaded = Path(python(interpreter, "-c", RUN_EVERY_OP, cwd=tmp_path).strip())
    assert loaded.resolve() == (site / "mhc_ops" / "__init__.py").resolve()


def test_kernel_sources_are_files(environment, tmp_path):
    """Find each kernel's source as a file, because TileLang reads the source with ``inspect``."""
    interpreter, site = environment
    find = "import importlib.util; print(importlib.util.find_spec('mhc_ops.csrc_tilelang').origin)"
    found = Path(python(interpreter, "-c", find, cwd=tmp_path).strip())
    assert found.resolve() == (site / "mhc_ops" / "csrc_tilelang" / "__init__.py").resolve()
    for kernel in (ROOT / "csrc_tilelang").rglob("*.py"):
        packaged = found.parent / kernel.relative_to(ROOT / "csrc_tilelang")
        assert packaged.read_text() == kernel.read_text()


@pytest.mark.parametrize("name", ["host.cpp", "launcher.c"])
def test_the_native_libraries_are_built_from_the_wheel(environment, tmp_path, name):
    """Find the sources; ``test_host.py`` and ``test_launcher.py`` show that the sources build."""
    interpreter, site = environment
    find = f"from mhc_ops.native import {name.split('.')[0]} as m; print(m.SOURCE)"
    found = Path(python(interpreter, "-c", find, cwd=tmp_path).strip())
    assert found.resolve() == (site / "mhc_ops" / "native" / name).resolve()
    assert found.read_text() == (ROOT / "mhc_ops" / "native" / name).read_text()


def test_command_line_from_the_wheel(environment, tmp_path):
    interpreter, _ = environment
    assert python(interpreter, "-m", "mhc_ops", "--version", cwd=tmp_path) == (
        f"mhc_ops {mhc_ops.__version__}\n"
    )
    assert mhc_ops.__version__ in python(interpreter, "-m", "mhc_ops", "info", cwd=tmp_path)


def test_constraints_pin_what_the_package_needs():
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    names = {
        re.match(r"[\w-]+", text)[0] for text in itertools.chain(DEPENDENCIES, *optional.values())
    }
    assert names - {"mhc-ops"} <= pins.keys()
    assert not [version for version in pins.values() if "+" in version], "a local version"


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = PROJECT["optional-dependencies"]
# A wheel without kernels has these; test_metadata compares them with its metadata.
DEPENDENCIES = re.findall(r'"(\w+[<>=]=[\d.,<]+)"', (ROOT / "setup.py").read_text())
RUN_TIME = [*DEPENDENCIES, *OPTIONAL["cli"], *OPTIONAL["plot"], *OPTIONAL["transformers"]]


@pytest.mark.parametrize("need", RUN_TIME)
def test_every_dependency_is_bounded_and_justified(need):
    package, bounds = re.fullmatch(r"(\w+)(.*)", need).groups()
    assert bounds.startswith("==") or re.fullmatch(r">=[\d.]+,<[\d.]+", bounds)
    rows = re.findall(r"\| (\w+)(?: \(extra\))? \| `(.*?)` \| (.+) \|", CONTRIBUTING)
    assert [(name, text) for name, text, _ in rows if name == package] == [(package, bounds)]


def test_only_declared_packages_are_imported():
    """Import only what is Python's own, declared, or comes with what is declared."""
    came_along = {"tvm_ffi", "sympy", "safetensors"}
    optional = {"sglang", "vllm"}
    declared = {re.match(r"\w+", need)[0] for need in RUN_TIME} | came_along | optional
    imported = set()
    for folder in ("mhc_ops", "csrc_tilelang"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    imported |= {name.name.split(".")[0] for name in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    imported.add(node.module.split(".")[0])
    assert imported - sys.stdlib_module_names - {"mhc_ops"} <= declared
    assert not imported & {"http", "pickle", "requests", "socket", "urllib"}


def test_pip_check():
    """Find no package of this environment without what it needs, or with a wrong version of it."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout

"""Test the ops without Python: from a folder of kernels, by the native library alone.

Each test runs a process in which mhc_ops is not imported (``standalone_process.py``), or a program
in C++, with the driver without a GPU of ``fake_driver.py``.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fake_driver
import mhc_ops
from helpers import NORMS, OPS, call
from mhc_ops import jit, routes, store, support
from mhc_ops.native import ahead, host, launcher, library, torches
from mhc_ops.testing import make_inputs

HIDDEN = 256
TESTS = Path(__file__).parent
PACKAGE = Path(mhc_ops.__file__).parent
EXAMPLE = TESTS.parent / "examples" / "aoti"
CXX = os.environ.get("CXX", "g++")
NAME = host.name(torches.here())

pytestmark = pytest.mark.skipif(shutil.which(CXX) is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """Return a folder with the driver without a GPU, under the name of the real driver."""
    folder = tmp_path_factory.mktemp("driver")
    fake_driver.build_driver(folder).rename(folder / "libcuda.so.1")
    return folder


def fill(folder, archs, compiled):
    """Put what ``mhc_ops build`` makes into a folder."""
    for arch in archs:
        for key in routes.keys(HIDDEN, arch, 8192):
            store.save_kernel(folder, key, compiled(key))
        ahead.write_plans(folder, arch, HIDDEN)
    ahead.write_ops(folder)
    launcher.build(folder)
    of = torches.here()
    built = library.obtain(NAME, host.built_with(of), host.command(of))
    shutil.copy(built, folder / f"{NAME}.so")
    return folder


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """Return a folder of kernels that the driver without a GPU takes."""
    return fill(tmp_path_factory.mktemp("kernels"), ("sm_90a", "sm_80"), fake_driver.compiled)


def write_cases(folder, device="cpu"):
    """Write (op, arguments, what Python gives); for head on a CPU nothing, as stand-ins do."""
    cases = []
    for op in OPS:
        for norm in NORMS[op]:
            for tokens in (3, 130):
                inputs = make_inputs(op, tokens, HIDDEN, norm=norm, sinkhorn_repeat=3)
                here = {k: v.to(device) if isinstance(v, torch.Tensor) else v
                        for k, v in inputs.items()}  # fmt: skip
                with torch.no_grad():
                    want = {name: value.cpu() for name, value in call(op, here).items()}
                cases.append((op, inputs, want if device != "cpu" or op != "head" else {}))
    torch.save(cases, folder / "cases.pt")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return a folder with cases, for a package of AOTInductor, too."""
    folder = tmp_path_factory.mktemp("data")
    write_cases(folder)
    return folder


def make_package(folder, **environment):
    """Have the example write a package of AOTInductor, and what it gives in Python."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLE / "package.py"), str(folder)],
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{folder}/stack.pt2: 3 results, on ")
    return folder


@pytest.fixture(scope="module")
def package(data):
    """Return the folder with the package of the example, on the CPU."""
    return make_package(data, CUDA_VISIBLE_DEVICES="")


def without_gpu(driver):
    """Return the environment of a process that takes this driver for the real one."""
    path = os.pathsep.join(filter(None, (str(driver), os.environ.get("LD_LIBRARY_PATH"))))
    return {"LD_LIBRARY_PATH": path, "CUDA_VISIBLE_DEVICES": ""}


def run(name, folder, driver, data, *more):
    """Return what a check printed in a process of its own; a None ``driver`` is the real one."""
    libraries = folder / f"{NAME}.so", driver and driver / "libcuda.so.1"
    arguments = (name, folder, *libraries, PACKAGE, data, *more)
    done = subprocess.run(
        [sys.executable, str(TESTS / "standalone_process.py"), *map(str, arguments)],
        env=os.environ | (without_gpu(driver) if driver else {}),
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(f"{name} passed\n")
    return done.stdout


@pytest.mark.parametrize("name", ["bits", "refusals", "capture", "early", "threads", "own_folder"])
def test_without_python(kernels, driver, data, name):
    run(name, kernels, driver, data)


@pytest.mark.parametrize(("arch", "sms"), [("sm_90a", 132), ("sm_80", 108), ("sm_80", 40)])
def test_launches_are_those_of_python(kernels, driver, data, arch, sms):
    """Compare launches at the device's multiprocessors, which the files leave open."""
    run("launches", kernels, driver, data, arch, sms)


@pytest.mark.slow
def test_a_package_of_aotinductor(kernels, driver, package):
    run("aoti", kernels, driver, package)


BUILD = "; build the folder with python -m mhc_ops build"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "ops.txt").unlink(), f"mhc: there is no FOLDER/ops.txt{BUILD}\n"),
        (
            lambda f: (f / "ops.txt").write_text((f / "ops.txt").read_text()[:-20]),
            f"mhc: FOLDER/ops.txt is truncated or changed{BUILD}\n",
        ),
        (
            lambda f: (f / "ops.txt").write_text(""),
            f"mhc: FOLDER/ops.txt is of another version of mhc_ops (, expected {host.source()}); "
            "build the folder again, with this one\n",
        ),
        (
            lambda f: (f / "launcher.so").unlink(),
            "mhc: the launcher cannot be loaded: FOLDER/launcher.so: cannot open shared object",
        ),
    ],
)
def test_a_folder_that_cannot_be_served_from(kernels, driver, data, tmp_path, damage, message):
    folder = tmp_path / "kernels"
    shutil.copytree(kernels, folder)
    damage(folder)
    assert run("damaged", folder, driver, data).startswith(message)


@pytest.mark.slow
def test_a_program_in_cpp(kernels, driver, package, tmp_path):
    """Build and run the example: it makes every launch of the package's plans, and says so.

    A library in between has CPU tensors served. The kernels are empty: the bits are not Python's.
    """
    (tmp_path / "between.c").write_text("""
        #include <dlfcn.h>
        #include <stdio.h>
        static int launched(const char* kernel) { fprintf(stderr, "%s\\n", kernel); return 0; }
        const char* mhc_serve(const char* folder) {
          void* driver = dlopen("libcuda.so.1", RTLD_NOW);
          ((void (*)(void*))dlsym(driver, "fake_callback"))((void*)launched);
          void* library = dlopen(LIBRARY, RTLD_NOW);
          ((void (*)(void))dlsym(library, "mhc_serve_cpu"))();
          return ((const char* (*)(const char*))dlsym(library, "mhc_serve"))(folder);
        }
    """)
    between, program = tmp_path / "between.so", tmp_path / "main"
    subprocess.run(
        ["cc", "-shared", "-fPIC", f'-DLIBRARY="{kernels / NAME}.so"', str(tmp_path / "between.c"),
         "-o", str(between), "-ldl"],
        check=True,
    )  # fmt: skip
    build_example(program)
    environment = os.environ | without_gpu(driver)

    def run_program(library):
        return subprocess.run(
            [str(program), str(library), str(package)],
            env=environment, capture_output=True, text=True, timeout=250,
        )  # fmt: skip

    done = run_program(between)
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(", the bits")[0] for line in lines] == [
        f"a call, hidden [{tokens}, 256], streams [{tokens}, 4, 256]" for tokens in (8, 1, 300)
    ]
    few = ["expand_pre-256-1", *["fused_post_pre-256-1"] * 3, "post_head-256-1-1-0"]
    many = ["expand_pre-256-1", *["fused_post_pre_persistent-256-1"] * 3, "post_head-256-1-1-0"]
    # torch 2.14 warns on the same stream of what a package has no need of.
    launched = [line for line in done.stderr.splitlines() if not line.startswith("[WARNING]")]
    assert launched == [*few, *few, *many]
    done = run_program(kernels / f"{NAME}.so")
    assert done.returncode == 2
    assert (
        "mhc::expand_pre: expected tensors on a CUDA device, got cpu; without Python there are no "
        "kernels for it"
    ) in done.stderr


def build_example(program, *options):
    """Compile the example by the command line that its source gives."""
    home = torches.here().home
    libraries = ["torch", "torch_cpu", "c10", "dl"]
    libraries += ["torch_cuda", "c10_cuda", "cudart"] if options else []
    subprocess.run(
        [
            CXX, "-std=c++20", "-O1", str(EXAMPLE / "main.cpp"), "-o", str(program), *options,
            f"-I{home}/include", f"-I{home}/include/torch/csrc/api/include", f"-L{home}/lib",
            f"-Wl,-rpath,{home}/lib", "-Wl,--no-as-needed", *(f"-l{name}" for name in libraries),
        ],
        check=True,
    )  # fmt: skip


def cuda_home():
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    return next((h for h in homes if h and (Path(h) / "include/cuda_runtime.h").exists()), None)


@pytest.fixture(scope="module")
def gpu_kernels(tmp_path_factory):
    """Return a folder of this GPU's kernels."""
    arch = support.arch(torch.device("cuda", 0))
    return fill(tmp_path_factory.mktemp("kernels"), (arch,), jit.compile_key)


@pytest.mark.gpu
def test_gpu_bits_are_those_of_python(gpu_kernels, tmp_path):
    write_cases(tmp_path, "cuda")
    run("gpu", gpu_kernels, None, tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(cuda_home() is None, reason="needs CUDA's headers")
def test_gpu_a_program_in_cpp(gpu_kernels, tmp_path):
    """Compare calls of the package and replays of its CUDA graph with what Python gave."""
    make_package(tmp_path)
    home, program = cuda_home(), tmp_path / "main"
    build_example(program, "-DWITH_CUDA", f"-I{home}/include", f"-L{home}/lib64")
    done = subprocess.run(
        [str(program), str(gpu_kernels / f"{NAME}.so"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("the bits of Python: yes") == 6

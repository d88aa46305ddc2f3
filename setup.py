"""Package ``mhc_ops`` as it is, and ``csrc_tilelang`` as ``mhc_ops.csrc_tilelang``.

With ``MHC_OPS_AOT_ARCHS=sm_90a,sm_100a`` set, kernels for these architectures are built ahead and
put into the wheel, for the hidden sizes of ``MHC_OPS_AOT_HIDDEN``, with a native library for each
torch of ``MHC_OPS_AOT_TORCH``, a list of wheels or package folders. Without these two variables the
sizes and the torch are those of ``python -m mhc_ops build``. Such a build needs torch and TileLang,
so ``--no-build-isolation``, nvcc and a C++ compiler.

Everything else stands in pyproject.toml, which has no way to map one package to another folder, nor
to let the dependencies depend on what is built.
"""

import os
import shutil
import subprocess
import sys

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel
from setuptools.errors import SetupError

ARCHS = os.environ.get("MHC_OPS_AOT_ARCHS")
HIDDEN = os.environ.get("MHC_OPS_AOT_HIDDEN")
TORCH = os.environ.get("MHC_OPS_AOT_TORCH")

KERNELS = "mhc_ops.csrc_tilelang"

# CONTRIBUTING.md gives the reason for each dependency and range. A wheel that carries kernels needs
# torch alone, so it can be installed beside an engine that pins another TileLang.
DEPENDENCIES = ["torch>=2.11,<2.15", *(() if ARCHS else ("tilelang==0.1.15",))]


class BuildWithKernels(build_py):
    """Compile kernels with the package that has just been put together."""

    def run(self):
        super().run()
        packaged = os.path.join(os.path.abspath(self.build_lib), "mhc_ops", "packaged")
        # An earlier build in the same folder may have left kernels.
        shutil.rmtree(packaged, ignore_errors=True)
        if not ARCHS:
            return
        home = os.path.abspath(self.build_lib)
        command = [sys.executable, "-m", "mhc_ops", "build", "--arch", ARCHS]
        command += ["--hidden", HIDDEN] if HIDDEN else []
        # The paths are relative to the folder in which the build was started.
        paths = [
            os.path.abspath(os.path.expanduser(path)) for path in (TORCH or "").split(",") if path
        ]
        command += ["--torch", ",".join(paths)] if paths else []
        command += ["--output", packaged]
        # The command runs in the build folder, so that it imports mhc_ops from there, and neither
        # from the checkout nor from an installed package.
        done = subprocess.run(command, cwd=home, env=os.environ | {"PYTHONPATH": home})
        if done.returncode:
            raise SetupError(f"MHC_OPS_AOT_ARCHS={ARCHS}: the kernels were not built, see above")


class EditableWithoutKernels(editable_wheel):
    """Refuse kernels in an editable install, whose package is the checkout itself."""

    def run(self):
        if ARCHS:
            raise SetupError(
                "MHC_OPS_AOT_ARCHS: an editable install carries no kernels; use "
                f"'python -m mhc_ops build --arch {ARCHS} -o DIR' and MHC_OPS_KERNELS=DIR"
            )
        super().run()


class WheelWithKernels(bdist_wheel):
    """Tag a wheel with kernels for one platform and any Python, which its libraries do not use."""

    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = not ARCHS

    def get_tag(self):
        platform = super().get_tag()[2]
        return "py3", "none", platform


setup(
    packages=[
        *find_packages(include=["mhc_ops", "mhc_ops.*"]),
        KERNELS,
        *(f"{KERNELS}.{name}" for name in find_packages("csrc_tilelang")),
    ],
    install_requires=DEPENDENCIES,
    package_dir={KERNELS: "csrc_tilelang"},
    package_data={
        "mhc_ops": ["py.typed"],
        "mhc_ops.native": ["*.cpp", "*.h", "*.c"],
        KERNELS: ["*.cuh", "README.md"],
    },
    cmdclass={
        "build_py": BuildWithKernels,
        "bdist_wheel": WheelWithKernels,
        "editable_wheel": EditableWithoutKernels,
    },
)

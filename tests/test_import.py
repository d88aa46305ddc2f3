"""Test what importing the package does and does not do, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mhc_ops
from helpers import HANG
from mhc_ops.testing import OUTPUTS

ROOT = Path(mhc_ops.__file__).parents[1]


def run(code, **environment):
    """Return what the code printed, in a new interpreter that finds this package."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_registers_the_ops():
    code = """
import torch
before = set(torch._C._dispatch_get_all_op_names())
import mhc_ops
print(sorted(set(torch._C._dispatch_get_all_op_names()) - before))
"""
    internal = "mhc_internal::refuse_backward"
    assert run(code) == str(sorted([*(f"mhc::{op}" for op in OUTPUTS), internal]))


@pytest.mark.parametrize("module", ["mhc_ops", "mhc_ops.testing", "mhc_ops.prewarm"])
def test_import_is_light(module):
    """Import neither TileLang nor transformers, and leave CUDA uninitialised."""
    code = f"""
import sys
import torch
before = {{name.split(".")[0] for name in sys.modules}}
import {module}
heavy = ("tilelang", "tvm", "tvm_ffi", "transformers", "sglang", "vllm", "triton")
found = sorted(({{name.split(".")[0] for name in sys.modules}} - before) & set(heavy))
print(found, torch.cuda.is_initialized())
"""
    assert run(code) == "[] False"


def test_cpu_calls_import_nothing_heavy():
    code = """
import sys
import mhc_ops
from mhc_ops.testing import OUTPUTS, make_inputs
for op in OUTPUTS:
    getattr(mhc_ops, op)(**make_inputs(op, 2, 32))
print("tilelang" in sys.modules, "transformers" in sys.modules)
"""
    assert run(code) == "False False"


def test_import_survives_a_wrong_switch():
    """Read switches when a model is wired: a typo does not break the import."""
    assert run("import mhc_ops; print('ok')", MHC_OPS_FUSE_POST_PRE="maybe") == "ok"


def test_import_without_tilelang():
    code = """
import sys
sys.modules["tilelang"] = None
import mhc_ops
from mhc_ops.testing import make_inputs
print(mhc_ops.post(**make_inputs("post", 2, 32)).shape)
"""
    assert run(code) == "torch.Size([2, 4, 32])"


def test_public_names():
    assert set(mhc_ops.__all__) <= set(vars(mhc_ops))
    assert {*OUTPUTS, "is_supported"} <= set(mhc_ops.__all__)
    assert all(getattr(mhc_ops, name).__doc__ for name in mhc_ops.__all__)

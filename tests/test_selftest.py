"""Test selftest: its verdict and exit status, right, wrong and where there is no GPU."""

import importlib
import json
import types

import pytest

from mhc_ops import __main__, reference, selftest, support
from mhc_ops.selftest import FAILED, NOT_RUN, PASSED, Check
from mhc_ops.testing import KINDS, OUTPUTS

REASON = "no CUDA device is available"


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(support, "is_supported", lambda device=None: (False, REASON))


def answer(capsys, *options):
    status = __main__.main(["selftest", "--json", *options])
    return status, json.loads(capsys.readouterr().out)


def test_without_a_gpu(no_gpu, capsys):
    """Check everything of the CPU; the GPU is named as not checked, and never counts as passed."""
    status, found = answer(capsys)
    assert status == 3
    assert found["result"] == NOT_RUN
    assert found["verdict"] == f"CPU KERNELS RIGHT, GPU NOT CHECKED: {REASON}"
    *cpu, gpu = found["checks"]
    assert (gpu["part"], gpu["result"], gpu["detail"]) == ("gpu", NOT_RUN, REASON)
    assert {check["part"] for check in cpu} == {"cpu"}
    assert {check["result"] for check in cpu} == {PASSED}
    for op in OUTPUTS:
        (numerics,) = (c for c in cpu if c["name"].startswith(f"{op}, hidden"))
        norms = 1 if op == "post" else 2
        cases = len(KINDS) * len(selftest.CPU_TOKENS) * norms
        assert numerics["detail"].startswith(f"{cases} cases, largest error ")
    assert found["seconds"] < 60
    assert found["versions"]["torch"]


def test_where_no_gpu_is_asked_for(capsys):
    status, found = answer(capsys, "--cpu")
    assert status == 0
    assert found["result"] == PASSED
    assert found["verdict"].endswith("checks of the CPU kernels; no GPU was asked for")


def test_a_wrong_answer(no_gpu, monkeypatch, capsys):
    """Make post's streams a tenth too large: post fails, and so does post_head, judged by them."""
    op = importlib.import_module("mhc_ops.ops.post")
    wrong = types.SimpleNamespace(post=lambda *tensors: reference.post(*tensors) * 1.1)
    monkeypatch.setattr(op, "reference", wrong)
    status, found = answer(capsys)
    assert status == 1
    assert found["result"] == FAILED
    assert found["verdict"] == f"FAILED: 2 of {len(found['checks'])} checks"
    failed = [check for check in found["checks"] if check["result"] == FAILED]
    for check, op, output in zip(
        failed, ("post", "post_head"), ("residual_out", "layer_input"), strict=True
    ):
        assert check["name"] == f"{op}, hidden {selftest.CPU_HIDDEN}, against float64"
        assert check["detail"].startswith(f"AssertionError: {output}")


def test_a_crash_is_a_failure():
    def crash():
        raise OSError("no such library")

    check = selftest._run("gpu", "prewarm", crash)
    assert check[:4] == ("gpu", "prewarm", FAILED, "OSError: no such library")


@pytest.mark.parametrize(
    ("results", "result", "sentence"),
    [
        ("cp gp", PASSED, "PASSED: 2 checks of the CPU and GPU kernels"),
        ("cp cp", PASSED, "PASSED: 2 checks of the CPU kernels; no GPU was asked for"),
        ("cp gn", NOT_RUN, "CPU KERNELS RIGHT, GPU NOT CHECKED: why"),
        ("cf gn", FAILED, "FAILED: 1 of 2 checks"),
        ("cp gf", FAILED, "FAILED: 1 of 2 checks"),
    ],
)
def test_verdicts(results, result, sentence):
    words = {"c": "cpu", "g": "gpu", "p": PASSED, "f": FAILED, "n": NOT_RUN}
    checks = [Check(words[part], "", words[end], "why", 0.0) for part, end in results.split()]
    assert selftest.judge(checks) == (result, sentence)
    assert selftest.STATUS[result] == {PASSED: 0, FAILED: 1, NOT_RUN: 3}[result]


def test_table(no_gpu, monkeypatch, capsys):
    checks = [Check("cpu", "post", PASSED, "fine", 0.1), Check("gpu", "all", NOT_RUN, "why", 0.0)]
    monkeypatch.setattr(selftest, "run", lambda gpu: checks)
    assert __main__.main(["selftest"]) == 3
    out = capsys.readouterr().out
    assert "not run" in out
    assert out.endswith("CPU KERNELS RIGHT, GPU NOT CHECKED: why\n")


def test_a_wrong_switch(monkeypatch, capsys):
    monkeypatch.setenv("MHC_OPS_DISABLE_JIT", "maybe")
    assert __main__.main(["selftest"]) == 2
    assert capsys.readouterr().err == "MHC_OPS_DISABLE_JIT: expected 0 or 1, got 'maybe'\n"


@pytest.mark.gpu
def test_on_a_gpu(capsys):
    status, found = answer(capsys)
    assert status == 0, found["checks"]
    assert found["verdict"].endswith("checks of the CPU and GPU kernels")
    speeds = [c["detail"] for c in found["checks"] if c["part"] == "gpu" and "speed" in c["name"]]
    assert len(speeds) == len(selftest.TIMED_TOKENS)
    assert all(" us a boundary" in speed for speed in speeds)

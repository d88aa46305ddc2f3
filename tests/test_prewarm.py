"""prewarm: what it refuses, what it compiles, and that nothing compiles after it."""

import re

import pytest
import torch

import mhc_ops
from mhc_ops import dispatch, host, jit, support
from mhc_ops.testing import make_inputs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": []}, "mhc_ops.prewarm: expected at least one hidden size, got none"),
        (
            {"hidden": [4096, 100]},
            "mhc_ops.prewarm: expected hidden sizes that are multiples of 256, got 100",
        ),
        (
            {"hidden": [256], "max_tokens": 0},
            "mhc_ops.prewarm: expected max_tokens of at least 1, got 0",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        mhc_ops.prewarm(**arguments)


def test_unsupported_device(monkeypatch):
    monkeypatch.setattr(support, "is_supported", lambda device: (False, "no CUDA device"))
    with pytest.raises(RuntimeError, match=r"^mhc_ops\.prewarm: no CUDA device$"):
        mhc_ops.prewarm([256])


def test_fewer_tokens_need_fewer_kernels():
    few = set(dispatch.keys(4096, "sm_90a", 16))
    assert few < set(dispatch.keys(4096, "sm_90a", 8192))


@pytest.mark.gpu
@pytest.mark.parametrize("max_tokens", [8, 300])
def test_nothing_compiles_or_loads_afterwards(monkeypatch, max_tokens):
    hidden = 512
    report = mhc_ops.prewarm([hidden], max_tokens=max_tokens)
    assert set(report.kernels) == set(
        dispatch.keys(hidden, support.arch(report.device), max_tokens)
    )

    def refuse(key, device):
        raise AssertionError(f"{key} was not ready on {device}")

    monkeypatch.setattr(jit, "_prepare", refuse)
    for tokens in {1, 2, 17, 33, 97, 129, max_tokens}:
        if tokens > max_tokens:
            continue
        for op in ("post", "pre", "fused_post_pre", "head"):
            for norm in (False,) if op == "post" else (False, True):
                inputs = make_inputs(op, tokens, hidden, norm=norm, device=report.device)
                getattr(torch.ops.mhc, op).default(**inputs)
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_calls_of_one_launch_are_native_afterwards():
    """Whatever their number of tokens, from the first one on."""
    hidden = 512
    report = mhc_ops.prewarm([hidden], max_tokens=8)
    if not dispatch.takes_one_launch(1, hidden, support.arch(report.device)):
        pytest.skip("this GPU has no one-launch kernel")
    before = host.calls()
    for tokens in (1, 8, 33, 128):
        for norm in (False, True):
            inputs = make_inputs("fused_post_pre", tokens, hidden, norm=norm, device=report.device)
            torch.ops.mhc.fused_post_pre.default(**inputs)
    assert host.calls() - before == 8

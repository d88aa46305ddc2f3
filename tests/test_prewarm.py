"""Test prewarm: what it refuses, what it compiles, and that nothing compiles after it."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch

import mhc_ops
from helpers import NORMS, OPS
from mhc_ops import jit, nn, routes, support
from mhc_ops.native import host, launcher
from mhc_ops.native.plan import plan
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
    refusal = r"^mhc_ops\.prewarm: expected a GPU that the ops support: no CUDA device$"
    with pytest.raises(RuntimeError, match=refusal):
        mhc_ops.prewarm([256])


def test_fewer_tokens_need_fewer_kernels():
    few = set(routes.keys(4096, "sm_90a", 16))
    assert few < set(routes.keys(4096, "sm_90a", 8192))


# These are all counts up to beyond the bounds of the table of routes, and some large ones.
EVERY = (*range(1, 180), 448, 449, 512, 2048, 8192)


def reached(arch, hidden, max_tokens):
    """Return the kernels that the plans of every op name at every token count."""
    return {
        step.key
        for op in OPS
        for norm in NORMS[op]
        for tokens in EVERY
        if tokens <= max_tokens
        for step in plan(op, hidden, arch, 132, norm).range(tokens).steps
    }


@pytest.mark.parametrize("max_tokens", [1, 8, 96, 97, 129, 8192])
@pytest.mark.parametrize("hidden", [256, 4096, 5120, 8192])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_no_call_reaches_a_kernel_that_is_not_ready(monkeypatch, arch, hidden, max_tokens):
    """Ask, for every op and token count, for what was compiled and loaded, and nothing else."""
    loaded, remembered = [], []
    monkeypatch.setattr(support, "arch", lambda device: arch)
    monkeypatch.setattr(support, "sm_count", lambda device: 132)
    monkeypatch.setattr(jit, "load", lambda key, device: loaded.append(key))
    monkeypatch.setattr(host, "load", lambda: True)
    monkeypatch.setattr(host, "remember", lambda of, device: remembered.append(of))
    sys.modules["mhc_ops.prewarm"]._load(hidden, max_tokens, torch.device("meta"))
    assert len(set(loaded)) == len(loaded)
    assert set(loaded) == set(routes.keys(hidden, arch, max_tokens))
    assert set(loaded) == reached(arch, hidden, max_tokens)
    assert {(of.recipe.op, of.norm) for of in remembered} == {
        (op, norm) for op in OPS for norm in NORMS[op]
    }


def config(**changes):
    return SimpleNamespace(**({"hidden_size": 512, "hc_mult": 4} | changes))


def stack(hidden=512, hc_mult=4):
    return nn.DecoderStack([(torch.tanh, torch.tanh)], hidden, hc_mult)


class WithConfig(torch.nn.Module):
    """Stand for a model of transformers before anything is applied to it."""

    config = config()


class TestModels:
    @pytest.mark.parametrize(
        ("of", "sizes"),
        [
            (stack(), [512]),
            (torch.nn.ModuleList([stack(), stack(256), stack()]), [256, 512]),
            (nn.HyperHead(768), [768]),
            (WithConfig(), [512]),
            (config(), [512]),
        ],
        ids=["stack", "two stacks", "head", "model", "config"],
    )
    def test_sizes(self, monkeypatch, of, sizes):
        """Compile the kernels of the hidden sizes that a model has, and load those."""
        prewarm = sys.modules["mhc_ops.prewarm"]
        compiled, loaded = [], []
        monkeypatch.setattr(support, "is_supported", lambda device: (True, "yes"))
        monkeypatch.setattr(support, "cuda_device", lambda device: torch.device("meta"))
        monkeypatch.setattr(support, "arch", lambda device: "sm_90a")
        monkeypatch.setattr(torch.cuda, "device", torch.device)
        monkeypatch.setattr(jit, "compile_key", compiled.append)
        monkeypatch.setattr(prewarm, "_load", lambda size, *rest: loaded.append((size, *rest)))
        report = mhc_ops.prewarm(of, max_tokens=64)
        keys = {key for size in sizes for key in routes.keys(size, "sm_90a", 64)}
        assert set(compiled) == set(report.kernels) == keys
        assert loaded == [(size, 64, torch.device("meta")) for size in sizes]

    def test_a_real_config(self):
        transformers = pytest.importorskip("transformers")
        assert sys.modules["mhc_ops.prewarm"]._hidden_sizes(transformers.DeepseekV4Config()) == [
            transformers.DeepseekV4Config().hidden_size
        ]

    @pytest.mark.parametrize("of", [stack(hc_mult=2), config(hc_mult=2)], ids=["model", "config"])
    def test_another_hc_mult(self, of):
        with pytest.raises(ValueError, match=r"^mhc_ops\.prewarm: expected hc_mult 4, got 2$"):
            mhc_ops.prewarm(of)

    @pytest.mark.parametrize("of", [torch.nn.Linear(2, 2), SimpleNamespace(hidden_size=256), 4096])
    def test_something_else(self, of):
        with pytest.raises(TypeError, match=rf"or config with .* got {type(of).__name__}: "):
            mhc_ops.prewarm(of)

    def test_a_hidden_size_that_cuda_cannot_serve(self):
        with pytest.raises(ValueError, match="multiples of 256, got 100"):
            mhc_ops.prewarm(stack(100))

    @pytest.mark.gpu
    def test_on_the_device_of_the_model(self):
        report = mhc_ops.prewarm(stack().to("cuda"), max_tokens=8)
        assert report.device == torch.device("cuda", torch.cuda.current_device())
        assert {key.hidden for key in report.kernels} == {512}


@pytest.mark.gpu
@pytest.mark.parametrize("max_tokens", [8, 300])
def test_nothing_compiles_or_loads_afterwards(monkeypatch, max_tokens):
    hidden = 512
    report = mhc_ops.prewarm([hidden], max_tokens=max_tokens)
    assert set(report.kernels) == set(routes.keys(hidden, support.arch(report.device), max_tokens))

    def refuse(*arguments):
        raise AssertionError(f"{arguments}: not ready")

    monkeypatch.setattr(jit, "load", refuse)
    monkeypatch.setattr(launcher, "load", refuse)
    for tokens in range(1, max_tokens + 1):
        for op in OPS:
            for norm in NORMS[op]:
                inputs = make_inputs(op, tokens, hidden, norm=norm, device=report.device)
                getattr(torch.ops.mhc, op).default(**inputs)
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_calls_take_the_short_way_afterwards(op):
    """Take the short way for any number of tokens, from the first call on."""
    hidden = 512
    report = mhc_ops.prewarm([hidden], max_tokens=300)
    before = host.calls()
    for tokens in (1, 8, 33, 128, 129, 300):
        for norm in NORMS[op]:
            inputs = make_inputs(op, tokens, hidden, norm=norm, device=report.device)
            getattr(torch.ops.mhc, op).default(**inputs)
    assert host.calls() - before == 6 * len(NORMS[op])

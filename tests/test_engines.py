"""Test the adapters of SGLang and vLLM on stand-ins, and signatures against engines' sources."""

import ast
import importlib
import importlib.metadata
import inspect
import logging
import os
import subprocess
import sys
import tomllib
import types
import zipfile
from pathlib import Path

import engines
import pytest
import torch
from call_counts import CallCounts

from helpers import assert_equal, folder_of_kernels
from mhc_ops import compiler, formula, jit, ops, routes, store, support
from mhc_ops.integrations import _fallback, sglang, vllm
from mhc_ops.testing import as_outputs, make_inputs

ROOT = Path(__file__).parents[1]

ADAPTERS = {"sglang": sglang, "vllm": vllm}
ENGINES = tuple(ADAPTERS)
ARCH = "meta"
WHEELS = os.environ.get("ENGINE_WHEELS")  # CONTRIBUTING.md describes this folder.

# An engine leads to a dict of op to (module, name).
FUNCTIONS = {
    engine: dict(
        zip(
            ("post", "pre", "fused_post_pre", "head"),
            ((r.module, r.name) for r in adapter.REPLACEMENTS[:4]),
            strict=True,
        )
    )
    for engine, adapter in ADAPTERS.items()
}


def forget(engine):
    for name in [name for name in sys.modules if name.partition(".")[0] == engine]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def _undecided(monkeypatch):
    monkeypatch.setattr(_fallback, "_decided", {})
    monkeypatch.setattr(_fallback, "_told", set())


@pytest.fixture
def served(monkeypatch):
    """Let meta tensors count as on a device that the kernels serve, under ``ARCH``."""
    stock_support, stock_arch, stock_obtainable = support.is_supported, support.arch, jit.obtainable

    def is_supported(device=None):
        on_meta = device is not None and torch.device(device).type == "meta"
        return (True, "meta") if on_meta else stock_support(device)

    def cuda_device(device=None):
        return torch.device(device)

    def arch(device):
        return ARCH if device.type == "meta" else stock_arch(device)

    def obtainable(hidden, arch):
        return (True, "meta") if arch == ARCH else stock_obtainable(hidden, arch)

    monkeypatch.setattr(support, "is_supported", is_supported)
    monkeypatch.setattr(support, "cuda_device", cuda_device)
    monkeypatch.setattr(support, "arch", arch)
    monkeypatch.setattr(jit, "obtainable", obtainable)


@pytest.fixture
def stand_in(request, tmp_path, monkeypatch):
    """Make an engine's stand-in importable, with the given changes; return the engine's adapter."""

    def make(engine, changes=None):
        engines.write(engine, tmp_path, changes)
        monkeypatch.syspath_prepend(tmp_path)
        forget(engine)
        request.addfinalizer(lambda: forget(engine))
        request.addfinalizer(ADAPTERS[engine].uninstall)
        return ADAPTERS[engine]

    return make


def function(engine, op):
    module, name = FUNCTIONS[engine][op]
    return getattr(importlib.import_module(module), name)


def stock(engine):
    """Say by op whether each function is the stand-in's own."""
    return {op: function(engine, op).__module__.startswith(engine) for op in FUNCTIONS[engine]}


ALL_STOCK = dict.fromkeys(("post", "pre", "fused_post_pre", "head"), True)
ALL_OURS = dict.fromkeys(ALL_STOCK, False)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("op", ALL_STOCK)
@pytest.mark.parametrize("engine", ENGINES)
def test_functions_run_the_ops(engine, op, norm, device, stand_in, served):
    """Call the functions as the engines do: by position, the splits too."""
    adapter = stand_in(engine)
    adapter.install()
    # Neither engine's head has a norm.
    inputs = make_inputs(op, 3, 256, norm=norm and op != "head", device=device)
    keywords = {name: inputs[name] for name in ("norm_weight", "norm_eps") if name in inputs}
    positional = [value for name, value in inputs.items() if name not in keywords]
    splits = {"pre": (2,), "fused_post_pre": (2, 4)}.get(op, ())
    with CallCounts() as calls:
        got = function(engine, op)(*positional, *splits, **keywords)
    assert dict(calls.counts) == {op: 1}
    want = getattr(torch.ops.mhc, op)(**inputs)
    assert_equal(as_outputs(op, got), as_outputs(op, want))


def test_norm_eps_alone_means_nothing_to_vllm(stand_in, served):
    """Ignore ``norm_eps`` alone, whose default in vLLM is a number: it is not half of a norm."""
    stand_in("vllm").install()
    inputs = make_inputs("pre", 2, 256)
    got = function("vllm", "pre")(**inputs, norm_weight=None, norm_eps=1e-5)
    assert_equal(as_outputs("pre", got), as_outputs("pre", torch.ops.mhc.pre(**inputs)))


@pytest.mark.parametrize("engine", ENGINES)
def test_uninstall_undoes_install(engine, stand_in):
    adapter = stand_in(engine)
    assert stock(engine) == ALL_STOCK
    before = {op: function(engine, op) for op in ALL_STOCK}
    adapter.install()
    assert stock(engine) == ALL_OURS
    adapter.install()
    assert stock(engine) == ALL_OURS
    adapter.uninstall()
    assert {op: function(engine, op) for op in ALL_STOCK} == before
    adapter.uninstall()
    assert {op: function(engine, op) for op in ALL_STOCK} == before


@pytest.mark.parametrize("first", ["model", "install"])
@pytest.mark.parametrize("engine", ENGINES)
def test_modules_that_imported_a_function_by_name(engine, first, stand_in):
    """Rebind such modules whether the model's module was imported before ``install`` or after."""
    adapter = stand_in(engine)
    name = {"sglang": "sglang.srt.models.by_name", "vllm": "vllm.models.by_name"}[engine]
    if first == "model":
        importlib.import_module(name)
    adapter.install()
    model = importlib.import_module(name)
    assert model.last_step is adapter.REPLACEMENTS[0].function
    adapter.uninstall()
    assert model.last_step is function(engine, "post")
    assert stock(engine) == ALL_STOCK


def test_functions_that_sglang_looked_up_once(stand_in):
    adapter = stand_in("sglang")
    model = importlib.import_module("sglang.srt.models.deepseek_v4")
    assert model.get_mhc_ops()[0].__module__.startswith("sglang")
    adapter.install()
    assert model.get_mhc_ops()[0] is sglang.mhc_fused_post_pre
    adapter.uninstall()
    assert model.get_mhc_ops()[0].__module__.startswith("sglang")


def names(engine):
    return {op: name for op, (_, name) in FUNCTIONS[engine].items()}


CHANGES = {
    "renamed": ("head", "x, fn_, hc_scale, hc_base, norm_eps, hc_eps"),
    "more": ("post", "x, residual, post_layer_mix, comb_res_mix, extra=None"),
    "default": ("post", "x, residual, post_layer_mix, comb_res_mix=None"),
    "kind": ("post", "x, residual, post_layer_mix, *, comb_res_mix"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("engine", ENGINES)
def test_another_signature_is_refused(engine, change, stand_in):
    op, parameters = CHANGES[change]
    name = names(engine)[op]
    adapter = stand_in(engine, {name: parameters})
    with pytest.raises(RuntimeError) as caught:
        adapter.install()
    module = FUNCTIONS[engine][op][0]
    expected = next(f[name] for f in engines.SIGNATURES[engine].values() if name in f)
    assert str(caught.value) == (
        f"mhc_ops.integrations.{engine}: expected {module}.{name}({expected}), got ({parameters}); "
        f"tested with {engine} {engines.VERSIONS[engine]}"
    )
    assert stock(engine) == ALL_STOCK


@pytest.mark.parametrize("engine", ENGINES)
def test_a_missing_function_is_refused(engine, stand_in):
    module, name = FUNCTIONS[engine]["head"]
    adapter = stand_in(engine, {name: None})
    with pytest.raises(RuntimeError, match=rf"expected {module}\.{name}, got a module without it"):
        adapter.install()
    assert function(engine, "post").__module__ == FUNCTIONS[engine]["post"][0]


@pytest.mark.parametrize("engine", ENGINES)
def test_something_else_in_its_place_is_refused(engine, stand_in, monkeypatch):
    adapter = stand_in(engine)
    module, name = FUNCTIONS[engine]["post"]
    monkeypatch.setattr(importlib.import_module(module), name, torch.nn.Identity())
    with pytest.raises(RuntimeError, match="to be a function, got Identity"):
        adapter.install()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_missing_engine_is_refused(engine, monkeypatch):
    monkeypatch.setitem(sys.modules, engine, None)
    with pytest.raises(RuntimeError, match=rf"{engine}: expected {engine}\..* got an import error"):
        ADAPTERS[engine].install()


@pytest.mark.parametrize("engine", ENGINES)
def test_rocm_is_refused(engine, stand_in, monkeypatch):
    adapter = stand_in(engine)
    monkeypatch.setattr(torch.version, "hip", "7.2")
    with pytest.raises(RuntimeError, match=r"expected a torch built for CUDA, got ROCm 7\.2"):
        adapter.install()
    assert stock(engine) == ALL_STOCK


class TestFallback:
    """Run the engine's own function for what the ops do not serve, and tell the reason once."""

    @pytest.fixture
    def answers(self, stand_in, caplog):
        """Call an engine's function twice; return the results, the calls of ops, the lines told."""

        def call(engine, op, inputs):
            stand_in(engine).install()
            with CallCounts() as calls, caplog.at_level(logging.WARNING, logger="mhc_ops"):
                got = [function(engine, op)(**inputs) for _ in range(2)]
            return got, sum(calls.counts.values()), [r.getMessage() for r in caplog.records]

        return call

    @staticmethod
    def inputs(engine, op, **sizes):
        """Make inputs by the engine's own names, without a norm."""
        values = make_inputs(op, 3, 256, **sizes).values()
        parameters = inspect.signature(ADAPTERS[engine].REPLACEMENTS[list(ALL_STOCK).index(op)][2])
        return dict(zip(parameters.parameters, values, strict=False))

    @pytest.mark.parametrize("op", ALL_STOCK)
    @pytest.mark.parametrize("engine", ENGINES)
    def test_another_device(self, engine, op, answers):
        got, ran, told = answers(engine, op, self.inputs(engine, op, device="meta"))
        assert got == [names(engine)[op]] * 2
        assert ran == 0
        assert told == ["the engine's own mHC functions run: device meta is not a CUDA device"]

    def test_a_reason_is_told_once_for_all_functions(self, stand_in, caplog):
        stand_in("vllm").install()
        with caplog.at_level(logging.WARNING, logger="mhc_ops"):
            for op in ALL_STOCK:
                function("vllm", op)(**self.inputs("vllm", op, device="meta"))
        assert len(caplog.records) == 1

    MISFITS = types.MappingProxyType({
        "hc_mult": (
            lambda inputs: {"residual": inputs["residual"][:, :2].contiguous()},
            "expected hc_mult 4, got 2",
        ),
        "hidden size": (
            lambda inputs: {"residual": inputs["residual"][..., :100].contiguous()},
            "expected a hidden size that is a multiple of 256, got 100",
        ),
        "dtype of the streams": (
            lambda inputs: {"residual": inputs["residual"].half()},
            "expected streams of torch.bfloat16, got torch.float16",
        ),
        "another dtype": (
            lambda inputs: {"fn": inputs["fn"].bfloat16()},
            "mhc::pre: expected fn of dtype torch.float32, got torch.bfloat16",
        ),
        "layout": (
            lambda inputs: {"fn": inputs["fn"].T.contiguous().T},
            "mhc::pre: expected fn with a contiguous last dimension, got strides (1, 24)",
        ),
        "number": (
            lambda inputs: {"sinkhorn_repeat": 0},
            "mhc::pre: expected sinkhorn_repeat from 1 to 10000, got 0",
        ),
        "no streams": (lambda inputs: {"residual": None}, None),
        "one dimension": (lambda inputs: {"residual": inputs["residual"][0, 0]}, None),
    })  # fmt: skip

    @pytest.mark.parametrize("misfit", MISFITS)
    @pytest.mark.parametrize("engine", ENGINES)
    def test_arguments(self, engine, misfit, answers, served):
        change, reason = self.MISFITS[misfit]
        inputs = self.inputs(engine, "pre")
        got, _, told = answers(engine, "pre", inputs | change(inputs))
        assert got == [names(engine)["pre"]] * 2
        assert told == ([] if reason is None else [f"the engine's own mHC functions run: {reason}"])
        # Arguments that fit still run the op afterwards.
        with CallCounts() as calls:
            function(engine, "pre")(**inputs)
        assert dict(calls.counts) == {"pre": 1}

    def test_half_a_norm(self, answers, served):
        inputs = self.inputs("sglang", "pre") | {"norm_eps": 1e-6}
        got, _, told = answers("sglang", "pre", inputs)
        assert got == ["mhc_pre"] * 2
        assert len(told) == 1

    @pytest.mark.gpu
    def test_an_address(self, answers):
        inputs = {
            name: value.cuda() if isinstance(value, torch.Tensor) else value
            for name, value in self.inputs("vllm", "post").items()
        }
        x = inputs["x"]
        inputs["x"] = x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
        got, _, (told,) = answers("vllm", "post", inputs)
        assert got == ["mhc_post_tilelang"] * 2
        assert "expected x to start at a multiple of 16 bytes" in told

    def test_numbers_make_no_other_reason(self, stand_in, served, caplog):
        """Tell a reason once for all token counts, as a line for each would fill the log."""
        stand_in("vllm").install()
        with caplog.at_level(logging.WARNING, logger="mhc_ops"):
            for tokens in (1, 2, 3):
                inputs = make_inputs("post", tokens, 256)
                inputs["x"] = inputs["x"][:, None]
                function("vllm", "post")(**inputs)
        assert len(caplog.records) == 1

    def test_kernels_that_cannot_be_had(self, answers, served, monkeypatch):
        asked = []

        def obtainable(hidden, arch):
            asked.append((hidden, arch))
            return False, "no TileLang"

        monkeypatch.setattr(jit, "obtainable", obtainable)
        got, ran, told = answers("vllm", "post", self.inputs("vllm", "post", device="meta"))
        assert got == ["mhc_post_tilelang"] * 2
        assert ran == 0
        assert told == ["the engine's own mHC functions run: no TileLang"]
        assert asked == [(256, ARCH)]

    def test_a_check_that_fails(self, answers, served, monkeypatch):
        def obtainable(hidden, arch):
            raise OSError("no such thing")

        monkeypatch.setattr(jit, "obtainable", obtainable)
        got, _, told = answers("vllm", "post", self.inputs("vllm", "post", device="meta"))
        assert got == ["mhc_post_tilelang"] * 2
        assert told == ["the engine's own mHC functions run: OSError: no such thing"]

    @pytest.mark.parametrize("capturing", [False, True])
    def test_a_kernel_that_cannot_be_had_after_all(self, answers, served, monkeypatch, capturing):
        """Do not try the kernel again, unless a capture was what was in the way."""
        tried = []

        def post(*args):
            tried.append(args)
            raise jit.KernelUnavailable("nvcc said no")

        monkeypatch.setattr(ops, "post", post)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        got, _, told = answers("vllm", "post", self.inputs("vllm", "post"))
        assert got == ["mhc_post_tilelang"] * 2
        assert told == ["the engine's own mHC functions run: nvcc said no"]
        assert len(tried) == (2 if capturing else 1)

    @pytest.mark.gpu
    def test_a_compile_that_fails(self, answers, monkeypatch):
        """Let the error come through the dispatcher as what it is."""

        def compile_key(key):
            raise RuntimeError("nvcc said no")

        monkeypatch.setattr(jit, "compile_key", compile_key)
        inputs = make_inputs("post", 3, 1280, device="cuda")
        got, _, (told,) = answers("vllm", "post", inputs)
        assert got == ["mhc_post_tilelang"] * 2
        assert told == "the engine's own mHC functions run: nvcc said no"

    def test_other_errors_get_out(self, stand_in, served, monkeypatch):
        def post(*args):
            raise torch.OutOfMemoryError("no memory")

        monkeypatch.setattr(ops, "post", post)
        stand_in("vllm").install()
        with pytest.raises(torch.OutOfMemoryError):
            function("vllm", "post")(**self.inputs("vllm", "post"))

    def test_who_still_holds_ours_after_uninstall(self, stand_in):
        adapter = stand_in("sglang")
        adapter.install()
        held = function("sglang", "post")
        adapter.uninstall()
        assert held(**self.inputs("sglang", "post", device="meta")) == "mhc_post"

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compiled(self, stand_in, served, fresh_dynamo, dynamic):
        """Decide while the function is traced, without a graph break."""
        stand_in("vllm").install()
        post = function("vllm", "post")
        compiled = torch.compile(
            lambda *inputs: post(*inputs), fullgraph=True, backend="eager", dynamic=dynamic
        )
        inputs = make_inputs("post", 3, 256)
        assert_equal({"out": compiled(*inputs.values())}, {"out": ops.post(**inputs)})
        two = make_inputs("post", 3, 256, hc_mult=2)
        assert compiled(*two.values()) == "mhc_post_tilelang"


class TestLate:
    """Replace functions of modules that are the engine's to import."""

    LATE = tuple((e, r) for e, a in ADAPTERS.items() for r in a.REPLACEMENTS if r.late)

    @staticmethod
    def bound(replacement):
        owner = importlib.import_module(replacement.module)
        for name in replacement.name.split("."):
            owner = getattr(owner, name)
        return owner

    @pytest.mark.parametrize("first", ["model", "install"])
    @pytest.mark.parametrize(
        ("engine", "late"), LATE, ids=lambda value: getattr(value, "name", value)
    )
    def test_whether_the_model_was_imported_before_or_after(self, engine, late, first, stand_in):
        adapter = stand_in(engine)
        if first == "model":
            own = self.bound(late)
        adapter.install()
        if first == "install":
            assert late.module not in sys.modules
        assert self.bound(late) is late.function
        adapter.install()
        assert self.bound(late) is late.function
        adapter.uninstall()
        assert self.bound(late).__module__ == late.module
        if first == "model":
            assert self.bound(late) is own

    @pytest.mark.parametrize(
        ("engine", "late"), LATE, ids=lambda value: getattr(value, "name", value)
    )
    @pytest.mark.parametrize("change", ["self, other", None])
    def test_one_that_does_not_fit_costs_itself_alone(self, engine, late, change, stand_in, caplog):
        name = late.name.split(".")[-1]
        adapter = stand_in(engine, {name: change})
        adapter.install()
        module = importlib.import_module(late.module)
        assert stock(engine) == ALL_OURS
        (line,) = [record.getMessage() for record in caplog.records]
        assert line.startswith(f"{engine} keeps its own {late.name}: ")
        assert "tested with" in line
        if change is not None:
            assert self.bound(late).__module__ == module.__name__
        adapter.uninstall()

    def test_a_module_that_fails_is_the_engines_matter(self, stand_in, tmp_path):
        stand_in("sglang").install()
        (tmp_path / "sglang/srt/models/glm5_next.py").write_text("raise OSError('torn')")
        for _ in range(2):
            with pytest.raises(OSError, match="torn"):
                importlib.import_module("sglang.srt.models.glm5_next")

    def test_a_module_that_is_not_there(self, stand_in, tmp_path):
        stand_in("sglang").install()
        (tmp_path / "sglang/srt/models/glm5_next.py").unlink()
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("sglang.srt.models.glm5_next")

    def test_modules_are_found_and_loaded_as_without(self, stand_in):
        stand_in("sglang").install()
        module = importlib.import_module("sglang.srt.models.deepseek_v4_nextn")
        assert type(module.__spec__.loader) is type(engines_loader())
        assert "class DeepseekV4ModelNextN" in inspect.getsource(module)

    def test_uninstall_waits_for_no_module(self, stand_in):
        before = list(sys.meta_path)
        adapter = stand_in("sglang")
        adapter.install()
        adapter.uninstall()
        assert sys.meta_path == before
        importlib.import_module("sglang.srt.models.deepseek_v4_nextn")
        assert all(self.bound(r).__module__ == r.module for _, r in self.LATE if _ == "sglang")


def engines_loader():
    return engines.__spec__.loader


class TestFirstCall:
    """Load every kernel of a hidden size at the first call of a model."""

    @pytest.fixture
    def warmed(self, monkeypatch):
        calls = []
        monkeypatch.setattr(
            _fallback, "prewarm", lambda hidden, **named: calls.append((hidden, named["device"]))
        )
        return calls

    def test_once_for_all_functions(self, stand_in, served, monkeypatch):
        loaded = []
        monkeypatch.setattr(_fallback, "load_kernels", lambda *place: loaded.append(place))
        stand_in("vllm").install()
        for _ in range(2):
            for op in ALL_STOCK:
                inputs = make_inputs(op, 3, 256, device="meta")
                function("vllm", op)(*inputs.values())
        assert loaded == [(256, torch.device("meta"))]

    def test_not_on_a_cpu(self, warmed):
        _fallback.load_kernels(256, torch.device("cpu"))
        assert warmed == []

    @pytest.mark.parametrize("capturing", [False, True])
    def test_not_in_a_capture(self, warmed, monkeypatch, capturing):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        device = torch.device("cuda", 0)
        _fallback.load_kernels(256, device)
        assert warmed == ([] if capturing else [([256], device)])

    def test_kernels_that_do_not_compile(self, stand_in, served, monkeypatch, caplog):
        def load_kernels(hidden, device):
            raise RuntimeError("nvcc said no")

        monkeypatch.setattr(_fallback, "load_kernels", load_kernels)
        stand_in("vllm").install()
        inputs = make_inputs("post", 3, 256, device="meta")
        assert function("vllm", "post")(**inputs) == "mhc_post_tilelang"
        assert [record.getMessage() for record in caplog.records] == [
            "the engine's own mHC functions run: nvcc said no"
        ]

    @pytest.mark.gpu
    def test_loads_them(self, stand_in):
        stand_in("vllm").install()
        inputs = make_inputs("post", 3, 4096, device="cuda")
        function("vllm", "post")(**inputs)
        device = torch.device("cuda", torch.cuda.current_device())
        for key in routes.keys(4096, support.arch(device), sys.maxsize):
            assert jit.loaded_already(key, device) is not None


@pytest.mark.parametrize("engine", ENGINES)
def test_an_fp32_norm_weight_is_rounded_as_the_engines_do(engine, device, stand_in):
    stand_in(engine).install()
    inputs = make_inputs(
        "fused_post_pre", 3, 4096 if device == "cuda" else 256, norm=True, device=device
    )
    want = ops.fused_post_pre(**inputs)
    weight = inputs.pop("norm_weight").float()
    got = function(engine, "fused_post_pre")(**inputs, norm_weight=weight)
    assert_equal(as_outputs("fused_post_pre", got), as_outputs("fused_post_pre", want))


class TestHidden:
    """Look in ``install(hidden=...)`` before anything is replaced."""

    @pytest.fixture
    def device(self, monkeypatch):
        """Set whether a device is supported, and whether kernels can be had."""

        def make(supported, obtainable):
            monkeypatch.setattr(support, "is_supported", lambda device: supported)
            monkeypatch.setattr(support, "cuda_device", lambda device: torch.device("cuda", 0))
            monkeypatch.setattr(support, "arch", lambda device: "sm_90a")
            monkeypatch.setattr(jit, "obtainable", lambda hidden, arch: obtainable)

        return make

    @pytest.mark.parametrize(
        ("hidden", "supported", "obtainable", "reason"),
        [
            (100, True, True, "expected a hidden size that is a multiple of 256, got 100"),
            (0, True, True, "expected a hidden size that is a multiple of 256, got 0"),
            (4096, False, True, "no device"),
            (4096, True, False, "no kernels"),
        ],
    )
    @pytest.mark.parametrize("engine", ENGINES)
    def test_refused(self, engine, hidden, supported, obtainable, reason, device, stand_in):
        device((supported, "no device"), (obtainable, "no kernels"))
        adapter = stand_in(engine)
        with pytest.raises(RuntimeError) as caught:
            adapter.install(hidden=hidden)
        assert str(caught.value) == (
            f"mhc_ops.integrations.{engine}: expected kernels for hidden size {hidden}: {reason}"
        )
        assert stock(engine) == ALL_STOCK

    @pytest.mark.parametrize("engine", ENGINES)
    def test_served(self, engine, device, stand_in):
        device((True, ""), (True, ""))
        stand_in(engine).install(hidden=4096)
        assert stock(engine) == ALL_OURS


def test_a_model_of_transformers_is_refused_too(monkeypatch):
    """Look at the model's settings and device, all that this test has, before any module."""
    pytest.importorskip("transformers")
    from mhc_ops.integrations import transformers

    gpu = types.SimpleNamespace(device=torch.device("cuda", 0))
    config = types.SimpleNamespace(
        hc_mult=4, hidden_size=4096, hc_sinkhorn_iters=20, hc_eps=1e-6, rms_norm_eps=1e-6
    )
    decoder = types.SimpleNamespace(
        config=config,
        parameters=lambda: iter([gpu]),
        embed_tokens=types.SimpleNamespace(weight=torch.zeros(1, dtype=torch.bfloat16)),
    )
    monkeypatch.setattr(support, "is_supported", lambda device: (False, "too old"))
    with pytest.raises(RuntimeError) as caught:
        transformers._check_settings(decoder)
    assert str(caught.value) == (
        "mhc_ops.integrations.transformers: expected kernels for hidden size 4096 on cuda:0: "
        "too old"
    )


class TestObtainable:
    @pytest.fixture(autouse=True)
    def _nothing(self, monkeypatch, tmp_path):
        """Take away kernels, TileLang and nvcc."""
        monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path / "cache"))
        monkeypatch.setenv("MHC_OPS_KERNELS", str(folder_of_kernels(tmp_path / "ahead")))
        for name in ("MHC_OPS_DISABLE_JIT", "MHC_OPS_TRUST_CACHE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(jit, "_compiled", {})
        monkeypatch.setitem(sys.modules, "tilelang", None)
        monkeypatch.setattr(jit, "_nvcc_is_there", lambda: False)
        self.first = "kernel post for hidden size 256 on sm_90a is neither built ahead nor cached: "

    @staticmethod
    def tilelang(monkeypatch, version):
        def installed(package):
            assert package == "tilelang"
            if version is None:
                raise importlib.metadata.PackageNotFoundError(package)
            return version

        monkeypatch.setattr(importlib.metadata, "version", installed)

    @staticmethod
    def kernel(key):
        return compiler.Compiled(
            cubin=b"machine code",
            symbol=key.kernel,
            parameters=(("x", "pointer"),),
            grid=(formula.name("tokens"), formula.constant(1)),
            block=128,
            cluster=1,
            shared=0,
            pdl=True,
            compiled_with={},
        )

    @pytest.mark.parametrize("installed", [None, "0.1.12"])
    def test_without_its_tilelang(self, monkeypatch, installed):
        self.tilelang(monkeypatch, installed)
        assert jit.obtainable(256, "sm_90a") == (
            False,
            f"{self.first}expected TileLang {compiler.TILELANG} to compile it, "
            f"got {installed or 'none'}",
        )

    def test_without_nvcc(self, monkeypatch):
        self.tilelang(monkeypatch, compiler.TILELANG)
        assert jit.obtainable(256, "sm_90a") == (
            False,
            f"{self.first}expected nvcc to compile it, got none",
        )

    def test_with_a_compiler(self, monkeypatch):
        self.tilelang(monkeypatch, compiler.TILELANG)
        monkeypatch.setattr(jit, "_nvcc_is_there", lambda: True)
        assert jit.obtainable(256, "sm_90a")[0]

    def test_without_jit(self, monkeypatch):
        monkeypatch.setenv("MHC_OPS_DISABLE_JIT", "1")
        assert jit.obtainable(256, "sm_90a") == (False, f"{self.first}MHC_OPS_DISABLE_JIT is set")

    def test_a_misspelt_switch(self, monkeypatch):
        monkeypatch.setenv("MHC_OPS_DISABLE_JIT", "maybe")
        assert jit.obtainable(256, "sm_90a") == (
            False,
            "MHC_OPS_DISABLE_JIT: expected 0 or 1, got 'maybe'",
        )

    def test_a_folder_that_others_can_write(self, tmp_path):
        (tmp_path / "ahead").chmod(0o777)
        served, reason = jit.obtainable(256, "sm_90a")
        assert not served
        assert "can be written by others" in reason

    def test_built_ahead_or_cached(self, monkeypatch, tmp_path):
        """Need every kernel: a missing one is one too few, unless this process has it already."""
        self.tilelang(monkeypatch, None)
        *keys, last = routes.keys(256, "sm_90a", 8192)
        folders = (tmp_path / "ahead", store.cached_folder())
        for i, key in enumerate(keys):
            store.save_kernel(folders[i % 2], key, self.kernel(key))
        assert compiler.describe(last) in jit.obtainable(256, "sm_90a")[1]
        jit._compiled[last] = self.kernel(last)
        assert jit.obtainable(256, "sm_90a") == (True, "built ahead or cached")
        assert not jit.obtainable(512, "sm_90a")[0]

    def test_a_kernel_that_cannot_be_had(self, monkeypatch):
        """Raise ``KernelUnavailable`` with the words of the error that is its cause."""

        def compile_key(key):
            raise RuntimeError("mhc: no") from OSError("full")

        monkeypatch.setattr(jit, "compile_key", compile_key)
        with pytest.raises(jit.KernelUnavailable, match="mhc: no") as caught:
            jit.load(routes.Key("post", "sm_90a", 256), torch.device("cuda", 0))
        assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("home", [None, "CUDA_HOME", "CUDA_PATH"])
def test_nvcc_is_found_where_tilelang_looks(home, monkeypatch, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.touch(mode=0o755)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    if home is None:
        monkeypatch.setenv("PATH", str(nvcc.parent))
    else:
        monkeypatch.setenv("PATH", "/nowhere")
        monkeypatch.setenv(home, str(tmp_path))
    assert jit._nvcc_is_there()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("engine", ENGINES)
def test_an_install_that_fails_in_the_middle(engine, error, stand_in, monkeypatch):
    adapter = stand_in(engine)
    before = {op: function(engine, op) for op in ALL_STOCK}

    class Stubborn(types.ModuleType):
        """Be a module in which nothing but its own function may be bound."""

        def __setattr__(self, name, value):
            if value is not before["pre"]:
                raise error
            super().__setattr__(name, value)

    # This module comes behind the one that defines the function, where the adapter's function is
    # bound by then.
    stubborn = Stubborn(f"{engine}.stubborn")
    vars(stubborn)["held"] = before["pre"]
    monkeypatch.setitem(sys.modules, stubborn.__name__, stubborn)
    with pytest.raises(error):
        adapter.install()
    assert {op: function(engine, op) for op in ALL_STOCK} == before
    assert stubborn.held is before["pre"]


class Odd(BaseException):
    pass


class TestPlugin:
    @pytest.mark.parametrize("engine", ENGINES)
    def test_installs(self, engine, stand_in):
        stand_in(engine)
        ADAPTERS[engine].plugin()
        ADAPTERS[engine].plugin()  # An engine may call the plugin several times in one process.
        assert stock(engine) == ALL_OURS

    @pytest.mark.parametrize("engine", ENGINES)
    def test_leaves_an_engine_that_does_not_fit(self, engine, stand_in, caplog):
        stand_in(engine, {names(engine)["post"]: "x"})
        with caplog.at_level(logging.WARNING, logger="mhc_ops"):
            ADAPTERS[engine].plugin()
        assert stock(engine) == ALL_STOCK
        (record,) = caplog.records
        assert f"keeps its own mHC functions: RuntimeError: mhc_ops.integrations.{engine}: " in (
            record.getMessage()
        )

    @pytest.mark.parametrize("error", [RuntimeError, OSError, KeyError, GeneratorExit, Odd])
    @pytest.mark.parametrize("engine", ENGINES)
    def test_lets_no_exception_out(self, engine, error, monkeypatch, caplog):
        def install():
            raise error("whatever")

        monkeypatch.setattr(ADAPTERS[engine], "install", install)
        with caplog.at_level(logging.WARNING, logger="mhc_ops"):
            ADAPTERS[engine].plugin()
        (record,) = caplog.records
        assert f"{error.__name__}: " in record.getMessage()

    @pytest.mark.parametrize("request_to_end", [KeyboardInterrupt, SystemExit])
    def test_lets_a_process_end(self, request_to_end, monkeypatch):
        def install():
            raise request_to_end

        monkeypatch.setattr(vllm, "install", install)
        with pytest.raises(request_to_end):
            vllm.plugin()

    PROCESS = """
import sys
from importlib.metadata import entry_points

(found,) = entry_points(group=sys.argv[1], name="mhc_ops")
plugin = found.load()
plugin()
import torch
print("cuda", torch.cuda.is_initialized())
if len(sys.argv) == 4:
    import importlib
    function = getattr(importlib.import_module(sys.argv[2]), sys.argv[3])
    print("ours", hasattr(function, "__wrapped__"))
    streams = torch.zeros(1, 4, 256, dtype=torch.bfloat16, device="meta")
    print(function(streams[0, :1], streams, None, None))
"""
    GROUPS = types.MappingProxyType({
        "sglang": "sglang.srt.plugins", "vllm": "vllm.general_plugins",
    })  # fmt: skip

    def run(self, tmp_path, *arguments):
        """Run a fresh process that finds the package's entry points as the engines do."""
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        metadata = tmp_path / "mhc_ops-0.0.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Name: mhc-ops\nVersion: 0.0.0\n")
        lines = [
            line
            for group, points in project["entry-points"].items()
            for line in (f"[{group}]", *(f"{name} = {where}" for name, where in points.items()))
        ]
        (metadata / "entry_points.txt").write_text("\n".join(lines))
        environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
        return subprocess.run(
            [sys.executable, "-c", self.PROCESS, *arguments],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip

    @pytest.mark.slow
    @pytest.mark.parametrize("engine", ENGINES)
    def test_in_a_fresh_process(self, engine, tmp_path):
        engines.write(engine, tmp_path)
        module, name = FUNCTIONS[engine]["post"]
        done = self.run(tmp_path, self.GROUPS[engine], module, name)
        assert done.stdout.split("\n")[:3] == ["cuda False", "ours True", name]
        assert done.stderr == (
            "the engine's own mHC functions run: device meta is not a CUDA device\n"
        )

    @pytest.mark.slow
    @pytest.mark.parametrize("raised", ["ImportError('x')", "BaseException('x')", "OSError('x')"])
    @pytest.mark.parametrize("engine", ENGINES)
    def test_an_engine_that_fails_in_a_fresh_process(self, engine, raised, tmp_path):
        engines.write(engine, tmp_path)
        module, _ = FUNCTIONS[engine]["post"]
        (tmp_path / f"{module.replace('.', '/')}.py").write_text(f"raise {raised}")
        done = self.run(tmp_path, self.GROUPS[engine])
        assert done.stdout == "cuda False\n"
        (line,) = done.stderr.splitlines()
        assert "keeps its own mHC functions: " in line


@pytest.mark.parametrize("engine", ENGINES)
def test_versions_are_those_of_the_documents(engine):
    assert engines.VERSIONS[engine] == ADAPTERS[engine].TESTED
    assert engines.VERSIONS[engine] in ADAPTERS[engine].__doc__


@pytest.mark.parametrize("engine", ENGINES)
def test_stand_ins_have_the_signatures_of_the_wheels(engine):
    if WHEELS is None:
        pytest.skip("needs ENGINE_WHEELS, a folder with the wheels of the engines")
    found = sorted(Path(WHEELS).glob(f"{engine}-{engines.VERSIONS[engine]}-*.whl"))
    if not found:
        pytest.skip(f"no wheel of {engine} {engines.VERSIONS[engine]} in {WHEELS}")
    with zipfile.ZipFile(found[0]) as wheel:
        for path, functions in engines.SIGNATURES[engine].items():
            definitions = {
                node.name: node
                for node in ast.parse(wheel.read(path)).body
                if isinstance(node, ast.FunctionDef)
            }
            for name, parameters in functions.items():
                arguments = definitions[name].args
                for argument in (*arguments.args, *arguments.kwonlyargs):
                    argument.annotation = None
                assert ast.unparse(arguments) == ast.unparse(
                    ast.parse(f"def f({parameters}): pass").body[0].args
                )
                assert not definitions[name].decorator_list


@pytest.mark.parametrize("engine", ENGINES)
def test_adapters_have_the_signatures_of_the_stand_ins(engine):
    for replacement in ADAPTERS[engine].REPLACEMENTS:
        path = replacement.module.replace(".", "/") + ".py"
        *owner, name = replacement.name.split(".")
        if replacement.late:
            parameters = engines.LATE[engine][path]["".join(owner)][name]
        else:
            parameters = engines.SIGNATURES[engine][path][name]
        namespace = {}
        exec(f"def f({parameters}): pass", namespace)
        want = inspect.signature(namespace["f"]).parameters
        got = inspect.signature(replacement.function).parameters
        assert [(p.name, p.kind, p.default) for p in got.values()] == [
            (p.name, p.kind, p.default) for p in want.values()
        ]

"""The adapters of SGLang and vLLM, on stand-ins; their signatures against the engines' sources."""

import ast
import importlib
import inspect
import logging
import os
import sys
import zipfile
from pathlib import Path

import engines
import pytest
import torch
from call_counts import CallCounts

from helpers import assert_equal
from mhc_ops.integrations import sglang, vllm
from mhc_ops.testing import as_outputs, make_inputs

ADAPTERS = {"sglang": sglang, "vllm": vllm}
ENGINES = tuple(ADAPTERS)
WHEELS = os.environ.get("ENGINE_WHEELS")  # a folder, see CONTRIBUTING.md

# by engine: op to (module, name)
FUNCTIONS = {
    engine: dict(
        zip(
            ("post", "pre", "fused_post_pre", "head"),
            ((r.module, r.name) for r in adapter.REPLACEMENTS),
            strict=True,
        )
    )
    for engine, adapter in ADAPTERS.items()
}


def forget(engine):
    for name in [name for name in sys.modules if name.partition(".")[0] == engine]:
        del sys.modules[name]


@pytest.fixture
def stand_in(request, tmp_path, monkeypatch):
    """The adapter of an engine whose stand-in can be imported, with the given changes."""

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
    """Whether each function is the stand-in's own, by op."""
    return {op: function(engine, op).__module__.startswith(engine) for op in FUNCTIONS[engine]}


ALL_STOCK = dict.fromkeys(("post", "pre", "fused_post_pre", "head"), True)
ALL_OURS = dict.fromkeys(ALL_STOCK, False)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("op", ALL_STOCK)
@pytest.mark.parametrize("engine", ENGINES)
def test_functions_run_the_ops(engine, op, norm, device, stand_in):
    """Called as the engines call them: by position, the splits too."""
    adapter = stand_in(engine)
    adapter.install()
    # neither engine's head has a norm
    inputs = make_inputs(op, 3, 256, norm=norm and op != "head", device=device)
    keywords = {name: inputs[name] for name in ("norm_weight", "norm_eps") if name in inputs}
    positional = [value for name, value in inputs.items() if name not in keywords]
    splits = {"pre": (2,), "fused_post_pre": (2, 4)}.get(op, ())
    with CallCounts() as calls:
        got = function(engine, op)(*positional, *splits, **keywords)
    assert dict(calls.counts) == {op: 1}
    want = getattr(torch.ops.mhc, op)(**inputs)
    assert_equal(as_outputs(op, got), as_outputs(op, want))


def test_norm_eps_alone_means_nothing_to_vllm(stand_in):
    """Its default is a number: the op must not take it for half of a norm."""
    stand_in("vllm").install()
    inputs = make_inputs("pre", 2, 64)
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
    """Whether the model's module was imported before or after."""
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


class TestPlugin:
    def test_installs(self, stand_in):
        stand_in("vllm")
        vllm.plugin()
        vllm.plugin()  # several processes, and several times in one
        assert stock("vllm") == ALL_OURS

    def test_leaves_a_vllm_that_does_not_fit(self, stand_in, caplog):
        stand_in("vllm", {"mhc_post_tilelang": "x"})
        with caplog.at_level(logging.WARNING, logger="mhc_ops"):
            vllm.plugin()
        assert stock("vllm") == ALL_STOCK
        (record,) = caplog.records
        assert record.getMessage().startswith("vLLM keeps its own mHC functions: mhc_ops.integr")


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
        namespace = {}
        exec(f"def f({engines.SIGNATURES[engine][path][replacement.name]}): pass", namespace)
        want = inspect.signature(namespace["f"]).parameters
        got = inspect.signature(replacement.function).parameters
        assert [(p.name, p.kind, p.default) for p in got.values()] == [
            (p.name, p.kind, p.default) for p in want.values()
        ]

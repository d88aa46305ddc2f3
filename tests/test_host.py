"""Test the short way: what it gives the kernels, what it leaves to Python, how it is built.

A CPU has no kernels. These tests give the CPU a driver without a GPU, whose kernels are the
reference (``fake_driver.py``), so the short way serves CPU tensors as it serves those of a GPU.
"""

import ctypes
import logging
import os
import shutil
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.decorators import mark_unbacked
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import mhc_ops
from fake_driver import ARCH, CPU
from helpers import (
    HANG,
    NORMS,
    OPS,
    assert_equal,
    call,
    clone,
    overload,
    split,
    stride_out,
    tensors,
)
from mhc_ops import jit, reference, routes, store
from mhc_ops._arguments import recipe
from mhc_ops.native import early, host, launcher, library, torches
from mhc_ops.native.serve import serve
from mhc_ops.testing import OUTPUTS, as_outputs, make_inputs

OP = "fused_post_pre"
HIDDEN = 256
NAME = host.name(torches.here())
MOST = routes.ONE_ROUND_TOKENS  # The loaded kernel of fused_post_pre takes so many tokens.
ROOT = Path(mhc_ops.__file__).parents[1]
OUT = OUTPUTS[OP]
INPUTS = ("x", "residual", "post_layer_mix", "comb_res_mix", "fn", "hc_scale", "hc_base")
OP_AND_NORM = [pytest.param(op, norm, id=f"{op}-{norm}") for op in OPS for norm in NORMS[op]]

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler"
)


@pytest.fixture
def kernel(driver):
    """Return the driver, with plans of every op and the kernels for few tokens loaded."""
    if not host.load():
        pytest.skip("there is no native library here")
    for op in OPS:
        for norm in NORMS[op]:
            of = driver.plan(op, HIDDEN, norm)
            for step in of.range(1).steps:
                jit.loaded(step.key, CPU)
            if op == OP:
                jit.loaded(of.range(MOST).steps[0].key, CPU)
            host.remember(of, CPU)
    return driver


def remember(driver, op, norm, tokens=1):
    """Remember a plan with the kernels for so many tokens loaded."""
    of = driver.plan(op, HIDDEN, norm)
    for step in of.range(tokens).steps:
        jit.loaded(step.key, CPU)
    host.remember(of, CPU)


def inputs_of(tokens=3, norm=True, **make):
    return make_inputs(OP, tokens, HIDDEN, norm=norm, sinkhorn_repeat=3, **make)


def python(inputs, op=OP):
    """Return what the CPU implementation gives."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    with torch.no_grad():
        return as_outputs(op, overload(op).redispatch(keys, **inputs))


def long_way(inputs, op=OP):
    """Return what the op gives by the long way, with the same driver."""
    outputs = serve(op, recipe(op).bind((), inputs))
    return dict(zip(OUTPUTS[op], outputs, strict=True))


# ------------------------------------------------------------------ which calls the short way takes


@pytest.mark.parametrize("leading", [(), (1,), (3,), (2, 3), (1, 2, 1, 3)], ids=str)
@pytest.mark.parametrize(("op", "norm"), OP_AND_NORM)
def test_it_serves_a_call(kernel, op, norm, leading):
    if op == "head":  # The stand-ins for the kernels of head make no output.
        kernel.run = lambda launch: None
    inputs = make_inputs(op, leading, HIDDEN, norm=norm, sinkhorn_repeat=3)
    before = host.calls()
    outputs = call(op, inputs)
    assert host.calls() - before == 1
    assert len(kernel.launches) == (2 if op == "head" else 1)
    if op != "head":
        assert_equal(outputs, python(inputs, op))
    for name, out in outputs.items():
        assert out.shape == python(inputs, op)[name].shape
        assert out.is_contiguous()
        assert out.untyped_storage().nbytes() == out.numel() * out.element_size()


@pytest.mark.parametrize("leading", [(0,), (2, 0)], ids=str)
@pytest.mark.parametrize(("op", "norm"), OP_AND_NORM)
def test_it_serves_a_call_without_tokens(kernel, op, norm, leading):
    inputs = make_inputs(op, leading, HIDDEN, norm=norm)
    before = host.calls()
    outputs = call(op, inputs)
    assert host.calls() - before == 1
    assert not kernel.launches
    for name, want in python(inputs, op).items():
        assert (outputs[name].shape, outputs[name].dtype) == (want.shape, want.dtype)


def facts(launch, held):
    """Return what a launch was given; a tensor counts by its address if the op was given it."""
    places = {value.data_ptr() for value in tensors(held).values()}
    return launch._replace(
        arguments={
            name: (v.dtype, v.shape, v.data_ptr() if v.data_ptr() in places else None)
            if isinstance(v, torch.Tensor)
            else (type(v), v)
            for name, v in launch.arguments.items()
        }
    )


@pytest.mark.parametrize("tokens", [1, 3, 40, 49, 100, 128, 129, 200, 449, 1000])
@pytest.mark.parametrize(("op", "norm"), OP_AND_NORM)
def test_both_ways_launch_alike(kernel, op, norm, tokens):
    """Compare kernel, configuration and every argument, for every row of the table of routes."""
    kernel.run = lambda launch: None
    inputs = make_inputs(op, tokens, HIDDEN, norm=norm)
    inputs |= {name: 0.5 + i for i, name in enumerate(NUMBERS) if name in inputs}
    if "hc_post_mult_value" in inputs:
        inputs["hc_post_mult_value"] *= -1
    long_way(inputs, op)  # This loads the missing kernels.
    by_long = kernel.launches.copy()
    kernel.launches.clear()
    before = host.calls()
    call(op, inputs)
    assert host.calls() - before == 1
    names = [launch.key.kernel for launch in kernel.launches]
    assert "+".join(names) == "+".join(
        launch.kernel for launch in routes.row(op, HIDDEN, ARCH, tokens).launches
    )
    for short, long in zip(kernel.launches, by_long, strict=True):
        long.arguments.pop("early", None)  # The long way had the first read.
        assert short.arguments.pop("early", 1) == 1
        assert facts(short, inputs) == facts(long, inputs)


def test_posts_without_their_last_dimension(kernel):
    inputs = inputs_of((2, 2))
    squeezed = inputs | {"post_layer_mix": inputs["post_layer_mix"].squeeze(-1)}
    assert_equal(call(OP, squeezed), call(OP, inputs))
    assert len(kernel.launches) == 2


def test_outputs_are_filled_where_torch_is_asked_to(kernel):
    """Fill outputs as ``torch.empty`` does under ``torch.use_deterministic_algorithms``."""
    kernel.run = lambda launch: None
    torch.use_deterministic_algorithms(True)
    try:
        outputs = call(OP, inputs_of())
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(kernel.launches) == 1
    assert all(out.isnan().all() for out in outputs.values())


def test_scale_and_base_may_lie_anywhere(kernel):
    """Take scale and base at any address, because engines keep both packed in one tensor."""
    inputs = inputs_of()
    packed = torch.cat([torch.zeros(1), inputs["hc_scale"], inputs["hc_base"]])
    inputs |= {"hc_scale": packed[1:4], "hc_base": packed[4:]}
    call(OP, inputs | {"hc_base": torch.cat([torch.zeros(1), packed[4:]])[1:]})
    assert len(kernel.launches) == 1


def test_an_aligned_address_at_an_odd_offset(kernel):
    """Judge alignment by address: the storage may start anywhere."""
    inputs = inputs_of()
    memory = torch.zeros(inputs["x"].numel() + 64, dtype=torch.bfloat16)
    start = -memory.data_ptr() % 16 // 2 + 1
    shifted = torch.from_numpy(memory.view(torch.int16).numpy()[start:]).view(torch.bfloat16)
    offset = (-shifted.data_ptr() % 16) // 2
    assert offset % 8 != 0
    x = shifted[offset:][: inputs["x"].numel()].view(inputs["x"].shape).copy_(inputs["x"])
    assert x.storage_offset() == offset
    assert_equal(call(OP, inputs | {"x": x}), call(OP, inputs))
    assert len(kernel.launches) == 2


def off(name, **changes):
    return pytest.param(lambda inputs: inputs | changes, id=name)


def changed(name, how, change):
    return pytest.param(lambda inputs: inputs | {name: change(inputs[name])}, id=f"{name}-{how}")


def misaligned(tensor):
    """Return the same values, contiguous, 4 bytes off."""
    step = 4 // tensor.element_size()
    moved = tensor.new_empty(tensor.numel() + step)[step:].view(tensor.shape)
    return moved.copy_(tensor)


def without_norm(inputs):
    return inputs | {"norm_weight": None, "norm_eps": None}


NUMBERS = ("rms_eps", "hc_pre_eps", "hc_sinkhorn_eps", "hc_post_mult_value", "norm_eps")
NAN, INF = float("nan"), float("inf")
OFF = [
    *(
        changed(name, "dtype", lambda v: v.float() if v.dtype == torch.bfloat16 else v.double())
        for name in (*INPUTS, "norm_weight")
    ),
    *(changed(name, "shape", lambda v: torch.cat([v, v])) for name in (*INPUTS, "norm_weight")),
    *(changed(name, "dims", lambda v: v[None]) for name in (*INPUTS, "norm_weight")),
    *(changed(name, "more_dims", lambda v: v[..., None]) for name in (*INPUTS, "norm_weight")),
    *(changed(name, "strided", lambda v, n=name: stride_out(n, v)) for name in INPUTS),
    changed("norm_weight", "strided", lambda v: torch.stack([v, v], 1)[:, 0]),
    *(changed(name, "misaligned", misaligned) for name in (*INPUTS[:5], "norm_weight")),
    *(changed(name, "device", lambda v: v.to("meta")) for name in (*INPUTS, "norm_weight")),
    *(changed(name, "none", lambda v: None) for name in INPUTS),
    *(changed(name, "nan", lambda v: NAN) for name in NUMBERS),
    *(changed(name, "inf", lambda v: INF) for name in NUMBERS),
    *(changed(name, "negative", lambda v: -1e-9) for name in NUMBERS if name.endswith("eps")),
    changed("hc_post_mult_value", "minus_inf", lambda v: -INF),
    *(changed(name, "inf_in_fp32", lambda v: 1e39) for name in NUMBERS),
    *(changed(name, "zero_in_fp32", lambda v: 1e-60) for name in NUMBERS),
    *(changed(name, "subnormal_in_fp32", lambda v: 1e-40) for name in NUMBERS),
    off("no_rounds", sinkhorn_repeat=0),
    off("too_many_rounds", sinkhorn_repeat=10_001),
    off("norm_weight_alone", norm_eps=None),
    off("norm_eps_alone", norm_weight=None),
    pytest.param(lambda _: inputs_of(MOST + 1), id="too_many_tokens"),
    pytest.param(lambda _: inputs_of((MOST, 2)), id="too_many_tokens_in_two_dimensions"),
    pytest.param(lambda _: inputs_of(hc_mult=2), id="two_streams"),
    pytest.param(lambda _: inputs_of(hc_mult=8), id="eight_streams"),
    pytest.param(lambda _: make_inputs(OP, 3, 512, norm=True), id="another_hidden_size"),
    pytest.param(
        lambda inputs: {k: v[0] if k in INPUTS[1:4] else v for k, v in inputs.items()},
        id="no_leading_dimension_but_of_x",
    ),
]


@pytest.mark.parametrize("change", OFF)
def test_what_it_leaves_to_python(kernel, change, monkeypatch):
    """Break one condition a case: no kernel is launched, and Python serves or refuses the call."""
    inputs = change(inputs_of())
    served = []

    def stand_in(*arguments, **_):
        served.append(arguments)
        return tuple(torch.empty(0) for _ in OUT[1:])

    refusal = ""
    with monkeypatch.context() as patch:
        patch.setattr(reference, "pre", stand_in)
        try:
            call(OP, inputs)
        except (NotImplementedError, RuntimeError, ValueError) as error:
            refusal = str(error)
    assert ("mhc::" in refusal) != bool(served)
    assert not kernel.launches
    call(OP, inputs_of())
    assert len(kernel.launches) == 1


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_the_norm_is_part_of_the_plan(kernel, norm):
    host.forget()
    remember(kernel, OP, norm)
    call(OP, inputs_of(norm=not norm))
    assert not kernel.launches
    call(OP, inputs_of(norm=norm))
    assert len(kernel.launches) == 1


def test_the_device_is_part_of_the_plan(kernel, monkeypatch):
    host.forget()
    handle = jit.loaded(kernel.plan(OP, HIDDEN, True).range(1).steps[0].key, CPU)
    with monkeypatch.context() as patch:
        patch.setattr(jit, "loaded_already", lambda key, device: handle)
        host.remember(kernel.plan(OP, HIDDEN, True), torch.device("cuda", 0))
    call(OP, inputs_of())
    assert not kernel.launches


def test_plans_that_are_forgotten_and_remembered(kernel):
    host.forget()
    call(OP, inputs_of())
    assert not kernel.launches
    remember(kernel, OP, True)
    call(OP, inputs_of())
    assert len(kernel.launches) == 1


def test_a_kernel_that_is_loaded_later_joins_the_plan(kernel):
    """Serve more tokens in Python until the kernel that the table has for so many is loaded."""
    many = inputs_of(MOST + 1)
    call(OP, many)
    assert not kernel.launches
    long_way(many)
    before = host.calls()
    call(OP, many)
    assert host.calls() - before == 1
    assert [launch.key.kernel for launch in kernel.launches] == ["fused_post_pre_persistent"] * 2


def test_an_error_of_the_launch(kernel):
    kernel.run = lambda launch: 701
    for way in (lambda: call(OP, inputs_of()), lambda: long_way(inputs_of())):
        with pytest.raises(RuntimeError) as error:
            way()
        assert str(error.value).split("\n")[0] == (
            "mhc::fused_post_pre: kernel fused_post_pre for hidden size 256 on sm_90a cannot be "
            "launched (grid 48 x 1, block 256, clusters of 16, 1000 bytes of shared memory, "
            "programmatic launch on): CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES: in words"
        )


def test_arguments_are_let_go(kernel):
    """Keep nothing of a call: neither its arguments nor, once given away, its outputs."""
    inputs = inputs_of()
    held = tensors(inputs)

    def counts():
        return [(sys.getrefcount(v), v._use_count()) for v in held.values()]

    before = counts()
    outputs = call(OP, inputs)
    assert len(kernel.launches) == 1
    kernel.launches.clear()
    assert counts() == before
    alive = [weakref.ref(v.untyped_storage()) for v in (*held.values(), *outputs.values())]
    for kept in (inputs, held, outputs):
        kept.clear()
    assert not any(storage() for storage in alive)


def test_calls_of_threads_that_are_not_pythons(kernel):
    """Call by ``torch.jit.fork``, on a thread that has no state of Python's and so no GIL."""
    inputs = inputs_of(norm=False)
    held = tensors(inputs)
    numbers = ", ".join(str(v) for n, v in inputs.items() if n not in held and v is not None)
    parameters = ", ".join(f"{name}: Tensor" for name in held)
    unit = torch.jit.CompilationUnit(
        f"""
        def boundary({parameters}):
            return torch.ops.mhc.fused_post_pre({", ".join(held)}, {numbers})

        def twice({parameters}):
            first = torch.jit.fork(boundary, {", ".join(held)})
            second = torch.jit.fork(boundary, {", ".join(held)})
            return torch.jit.wait(first), torch.jit.wait(second)
        """
    )
    with torch.no_grad():
        results = unit.twice(*held.values())
    assert len(kernel.launches) == 2
    for result in results:
        assert_equal(dict(zip(OUT, result, strict=True)), python(inputs))


# --------------------------------------------------------------------- what torch makes of the call


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_it_serves_every_grad_mode(kernel, context):
    inputs = inputs_of()
    with context():
        outputs = call(OP, inputs)
    assert len(kernel.launches) == 1
    assert all(out.is_inference() == (context is torch.inference_mode) for out in outputs.values())


def test_tensors_of_inference_mode(kernel):
    with torch.inference_mode():
        inputs = inputs_of()
        call(OP, inputs)
    assert len(kernel.launches) == 1


@pytest.mark.parametrize("name", [*INPUTS, "norm_weight"])
def test_gradients_are_refused(kernel, name):
    """Run the kernel below autograd; backward says why there is no gradient."""
    inputs = inputs_of()
    inputs[name].requires_grad_()
    with torch.no_grad():
        assert not any(out.requires_grad for out in call(OP, inputs).values())
    outputs = call(OP, inputs)
    assert len(kernel.launches) == 2
    for out in outputs.values():
        with pytest.raises(RuntimeError, match="forward only: this op has no backward yet"):
            out.float().sum().backward(retain_graph=True)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_dispatch_mode_sees_the_op(kernel, context):
    inputs = inputs_of()
    with context(), Seen() as seen:
        outputs = call(OP, inputs)
    assert seen.ops == [overload(OP)]
    assert len(kernel.launches) == 1
    assert_equal(outputs, python(inputs))


def test_a_dispatch_mode_that_serves_the_op_itself(kernel):
    class Instead(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return (torch.zeros(1),) * 4

    inputs = inputs_of()
    with Instead():
        assert call(OP, inputs)["post_mix"].shape == (1,)
    assert not kernel.launches


def test_a_function_mode_sees_the_op(kernel):
    seen = []

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Functions():
        call(OP, inputs_of())
    assert overload(OP) in seen
    assert len(kernel.launches) == 1


def test_the_python_dispatcher(kernel):
    """Show that the short way bears a key set with the keys above its kernel, too."""
    inputs = inputs_of()
    want = python(inputs)
    with enable_python_dispatcher():
        assert_equal(call(OP, inputs), want)
        with torch.inference_mode():
            assert_equal(call(OP, inputs), want)
        inputs["fn"].requires_grad_()
        assert call(OP, inputs)["post_mix"].requires_grad


class Wrapped(torch.Tensor):
    """Answer every op without calling it."""

    seen: ClassVar[list] = []

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_subclass(cls, inner)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return (torch.zeros(1),) * 4


@pytest.mark.parametrize("name", [*INPUTS, "norm_weight"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_tensor_subclass_sees_the_op(kernel, name, context):
    inputs = inputs_of()
    inputs[name] = Wrapped(inputs[name])
    Wrapped.seen.clear()
    with context():
        call(OP, inputs)
    assert Wrapped.seen == [overload(OP)]
    assert not kernel.launches


def test_parameters(kernel):
    inputs = inputs_of()
    inputs["fn"] = torch.nn.Parameter(inputs["fn"])
    with torch.no_grad():
        call(OP, inputs)
    assert len(kernel.launches) == 1


def test_a_negative_view_is_resolved_first(kernel):
    inputs = inputs_of()
    negative = inputs | {"x": torch._neg_view(-inputs["x"])}
    assert_equal(call(OP, negative), call(OP, inputs))


def test_fake_tensors(kernel):
    with FakeTensorMode() as mode:
        inputs = {
            name: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v
            for name, v in inputs_of().items()
        }
        outputs = call(OP, inputs)
    assert tuple(outputs["residual_out"].shape) == (3, 4, HIDDEN)
    assert not kernel.launches


@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
def test_make_fx(kernel, tracing):
    inputs = inputs_of()
    held = tensors(inputs)
    with torch.no_grad():
        graph = make_fx(
            lambda *values: overload(OP)(**inputs | dict(zip(held, values, strict=True))),
            tracing_mode=tracing,
        )(*held.values())
    ops = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert [op for op in ops if "mhc" in str(op)] == [overload(OP)]


@pytest.mark.parametrize("transform", ["vmap", "functionalize", "jvp"])
def test_functorch(kernel, transform):
    """Compare with what the ops give without the short way, whatever that is."""
    inputs = inputs_of()

    def run(x):
        return tuple(call(OP, inputs | {"x": x}).values())

    def outcome():
        x = inputs["x"]
        try:
            if transform == "vmap":
                return torch.func.vmap(run)(x[None])
            if transform == "functionalize":
                return torch.func.functionalize(run)(x)
            return torch.func.jvp(run, (x,), (x,))[0]
        except RuntimeError as error:
            return type(error), str(error)

    with torch.no_grad():
        native = outcome()
        host.forget()
        want = outcome()
    if isinstance(want[0], torch.Tensor):
        for got, expected in zip(native, want, strict=True):
            assert torch.equal(got, expected)
    else:
        assert native == want


def test_autocast(kernel):
    inputs = inputs_of()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        call(OP, inputs)
    assert len(kernel.launches) == 1
    assert kernel.launches[0].arguments["fn"].data_ptr() == inputs["fn"].data_ptr()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_code_takes_the_native_way(kernel, fresh_dynamo, backend):
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(mhc_ops.fused_post_pre, backend=counter, fullgraph=True)
    with torch.no_grad():
        for tokens in (2, 3, 5, MOST):
            inputs = inputs_of(tokens)
            for name in INPUTS[:4]:
                mark_unbacked(inputs[name], 0)
            outputs = dict(zip(OUT, compiled(**inputs), strict=True))
            assert_equal(outputs, python(inputs))
    assert len(kernel.launches) == 4
    assert counter.frame_count == 1


def test_opcheck(kernel):
    args, kwargs = split(OP, inputs_of())
    torch.library.opcheck(overload(OP), args, kwargs)
    assert kernel.launches


# ------------------------------------------------------------------------------------------ threads


def test_many_threads(kernel):
    inputs = [inputs_of(1 + i % 6, seed=i) for i in range(16)]
    want = [python(i) for i in inputs]
    wrong = []

    def serve_calls(i):
        for _ in range(50):
            try:
                remember(kernel, OP, True)
                assert_equal(call(OP, inputs[i]), want[i])
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=serve_calls, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(kernel.launches) == 16 * 50


# ---------------------------------------------------------------------------------------- the build


@pytest.fixture
def untried(monkeypatch):
    """Let ``host`` have tried to load nothing, with no library built ahead."""
    monkeypatch.delenv("MHC_OPS_KERNELS", raising=False)
    monkeypatch.setattr(host, "_tried", False)
    monkeypatch.setattr(host, "_library", None)
    monkeypatch.setattr(host, "_remembered", {})
    monkeypatch.setattr(host, "_ops", {})
    monkeypatch.setattr(host, "_reads", host.early_reads())
    # The ops have the short way already, by the library that every test has.
    monkeypatch.setattr(host, "_define", lambda loaded, of: 0)


def test_many_threads_load_once(untried, monkeypatch):
    loads = []
    gate = threading.Event()

    def load():
        loads.append(gate.wait(HANG))
        return object()

    monkeypatch.setattr(host, "_load", load)
    monkeypatch.setattr(host, "use_launcher", lambda loaded, kernels: None)
    results = []
    threads = [threading.Thread(target=lambda: results.append(host.load())) for _ in range(8)]
    for thread in threads:
        thread.start()
    gate.set()
    for thread in threads:
        thread.join()
    assert loads == [True]
    assert results == [True] * 8


@pytest.mark.parametrize("compiler", ["false", "/no/such/compiler"])
def test_without_a_compiler_everything_is_python(untried, monkeypatch, tmp_path, caplog, compiler):
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(host, "_reads", early.Table())
    with caplog.at_level(logging.WARNING, logger="mhc_ops"):
        assert not host.load()
        assert not host.load()
    (record,) = caplog.records
    assert record.getMessage().startswith("no short way of eager calls, ")
    assert compiler in record.getMessage()
    assert [path.name for path in host_folder(tmp_path).iterdir()] == [f"{NAME}.lock"]
    assert isinstance(host.early_reads(), early.Table)
    assert host.calls() == 0
    host.forget()
    call(OP, inputs_of())


def test_an_error_of_the_compiler_is_logged(untried, monkeypatch, tmp_path, caplog):
    broken = tmp_path / "host.cpp"
    broken.write_text("this is no C++")
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(host, "SOURCE", broken)
    with caplog.at_level(logging.WARNING, logger="mhc_ops"):
        assert not host.load()
    assert "error:" in caplog.records[-1].getMessage() or shutil.which("g++") is None


def test_another_source_or_torch_is_another_library(monkeypatch, tmp_path):
    facts = [host.built_with(torches.here())]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.10.0")
        facts.append(host.built_with(torches.here()))
    source = tmp_path / "host.cpp"
    source.write_text(host.SOURCE.read_text() + "\n")
    monkeypatch.setattr(host, "SOURCE", source)
    facts.append(host.built_with(torches.here()))
    assert len({store.digest(f) for f in facts}) == 3


def host_folder(cache):
    """Return the one folder of the library in a cache."""
    (folder,) = (cache / "mhc_ops").glob("host-*")
    return folder


@pytest.mark.slow
@needs_compiler
def test_processes_that_build_at_once(tmp_path):
    """Let one process build the library and the other wait; nothing else is left behind."""
    code = (
        "import logging; logging.basicConfig(level='INFO', format='%(message)s')\n"
        "from mhc_ops.native import host; print(host.load(), host.load())"
    )
    # The path of this process may name another torch, which the libraries are then built for.
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"TILELANG_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    environment.pop("MHC_OPS_KERNELS", None)
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=HANG) for process in running]
    assert [out for out, _ in said] == [b"True True\n"] * 2
    for name in (NAME, "launcher"):
        assert sum(log.count(f"building {name}\n".encode()) for _, log in said) == 1
        (folder,) = (tmp_path / "mhc_ops").glob(f"{name}-*")
        files = sorted(path.name for path in folder.iterdir())
        assert files == [f"{name}.json", f"{name}.lock", f"{name}.so"]
    again = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert (again.stdout, again.stderr) == (b"True True\n", b"")


def test_the_first_call_loads_it(monkeypatch, driver):
    loads = []
    monkeypatch.setattr(host, "load", lambda: loads.append(True))
    long_way(inputs_of())
    assert loads


@needs_compiler
def test_a_library_that_was_built_ahead(untried, monkeypatch, tmp_path, caplog):
    """Take the library without a compiler and without the cache, but not one of another torch."""
    launcher.get()
    ahead = tmp_path / "ahead"
    of = torches.here()
    # The fixture that all tests have has built this.
    built = library.obtain(NAME, host.built_with(of), host.command(of))
    monkeypatch.setattr(library, "compile", lambda name, command: built.read_bytes())
    host.build(ahead, of)
    monkeypatch.setenv("MHC_OPS_KERNELS", str(ahead))
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path / "cache"))
    loaded = []
    cdll = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda path: loaded.append(path) or cdll(str(built)))
    assert host.load()
    assert loaded == [str(ahead / f"{NAME}.so")]
    assert not (tmp_path / "cache").exists()

    # The name says which torch a library is for, so a library of another torch is not looked at.
    monkeypatch.setattr(host, "_tried", False)
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    with caplog.at_level(logging.WARNING, logger="mhc_ops"):
        assert host.load()
    assert loaded[1:] == [str(host_folder(tmp_path / "cache") / "host-torch2.10.so")]
    assert not caplog.records


@needs_compiler
def test_a_library_of_another_commit_of_an_unreleased_torch(untried, monkeypatch, tmp_path, caplog):
    launcher.get()
    monkeypatch.setattr(library, "compile", lambda name, command: b"")
    monkeypatch.setattr(torch, "__version__", "2.99.0a0+git1")
    monkeypatch.setattr(torch.version, "git_version", "before")
    host.build(tmp_path, torches.here())
    monkeypatch.setenv("MHC_OPS_KERNELS", str(tmp_path))
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.version, "git_version", "after")
    with caplog.at_level(logging.WARNING, logger="mhc_ops"):
        assert not host.load()  # The compiled bytes are no library.
    assert caplog.messages[0] == (
        f"{tmp_path / 'host-torch2.99.0a0+git1.so'} is not used: built with torch_commit before, "
        "expected after"
    )


def test_a_cache_that_others_can_write_is_not_loaded_from(untried, monkeypatch, tmp_path, caplog):
    launcher.get()
    tmp_path.chmod(0o777)
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path))
    with caplog.at_level(logging.WARNING, logger="mhc_ops"):
        assert not host.load()
    assert f"{tmp_path} can be written by others (mode 0777)" in caplog.records[-1].getMessage()
    assert not (tmp_path / "mhc_ops").exists()


# ------------------------------------------------------------------------------------------- a GPU


def native(function):
    """Return what the function returned, and how many of its calls took the short way."""
    before = host.calls()
    return function(), host.calls() - before


@pytest.mark.gpu
@pytest.mark.parametrize("leading", [(1,), (33,), (128,), (129,), (2, 300)], ids=str)
@pytest.mark.parametrize(("op", "norm"), OP_AND_NORM)
def test_gpu_bits_are_those_of_the_long_way(op, norm, leading):
    inputs = make_inputs(op, leading, 4096, device="cuda", norm=norm, kind="large_logits")
    call(op, inputs)
    host.forget()
    want, ways = native(lambda: call(op, inputs))
    assert ways == 0
    got, ways = native(lambda: call(op, inputs))
    assert ways == 1
    assert_equal(got, want)


@pytest.mark.gpu
def test_gpu_side_stream():
    inputs = make_inputs(OP, 64, 4096, device="cuda")
    want = call(OP, inputs)
    late = clone(inputs)
    late["residual"].zero_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late["residual"].copy_(inputs["residual"])
        got, ways = native(lambda: call(OP, late))
    stream.synchronize()
    assert ways == 1
    assert_equal(got, want)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gpu_other_current_device():
    here, there = (make_inputs(OP, 3, HIDDEN, device=f"cuda:{i}") for i in range(2))
    want = [call(OP, inputs) for inputs in (here, there)]
    with torch.cuda.device(0):
        got, ways = native(lambda: call(OP, there))
        assert torch.cuda.current_device() == 0
    assert ways == 1
    assert_equal(got, want[1])
    assert_equal({k: v.cpu() for k, v in got.items()}, {k: v.cpu() for k, v in want[0].items()})


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", [*INPUTS, "norm_weight"])
def test_gpu_tensors_of_two_devices(name):
    inputs = make_inputs(OP, 3, HIDDEN, device="cuda:0", norm=True)
    call(OP, inputs)
    with pytest.raises(ValueError, match="expected"):
        call(OP, inputs | {name: inputs[name].to("cuda:1")})


@pytest.mark.gpu
def test_gpu_memory_is_of_the_allocator():
    """Count memory in the allocator as that of ``torch.empty``, and see the memory given back."""
    inputs = make_inputs(OP, 8, 4096, device="cuda", norm=True)
    call(OP, inputs)
    before = torch.cuda.memory_allocated()
    outputs, ways = native(lambda: call(OP, inputs))
    assert ways == 1
    taken = torch.cuda.memory_allocated() - before
    copies = clone(outputs)
    assert torch.cuda.memory_allocated() - before == 2 * taken
    del outputs, copies
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
def test_gpu_captured_graph():
    inputs = make_inputs(OP, 8, 4096, device="cuda", norm=True)
    want = call(OP, inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got, ways = native(lambda: [call(OP, inputs) for _ in range(20)])
    assert ways == 20
    for outputs in got:
        for out in outputs.values():
            out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    for outputs in got:
        assert_equal(outputs, want)


@pytest.mark.gpu
def test_gpu_compiled_code(fresh_dynamo):
    inputs = make_inputs(OP, 8, 4096, device="cuda", norm=True)
    want = call(OP, inputs)
    compiled = torch.compile(mhc_ops.fused_post_pre, fullgraph=True)
    with torch.no_grad():
        compiled(**inputs)
        got, ways = native(lambda: compiled(**inputs))
    assert ways == 1
    assert_equal(dict(zip(OUT, got, strict=True)), want)


@pytest.mark.gpu
def test_gpu_16_threads():
    """Give each thread a stream of its own and another token count."""
    inputs = [make_inputs(OP, 8 * (i + 1), 4096, device="cuda", seed=i) for i in range(16)]
    want = [call(OP, i) for i in inputs]
    torch.cuda.synchronize()
    wrong = []

    def serve(i):
        try:
            with torch.cuda.stream(torch.cuda.Stream()) as _:
                outputs = [call(OP, inputs[i]) for _ in range(200)]
                torch.cuda.current_stream().synchronize()
            for got in outputs:
                assert_equal(got, want[i])
        except BaseException as error:
            wrong.append(error)

    def everything():
        threads = [threading.Thread(target=serve, args=(i,)) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    _, ways = native(everything)
    assert not wrong
    assert ways == 16 * 200


@pytest.mark.gpu
def test_gpu_fn_written_by_the_kernel_in_front():
    inputs = make_inputs(OP, 4, 4096, device="cuda", norm=True)
    others = [torch.randn_like(inputs["fn"]) / 128 for _ in range(4)]
    want = [clone(call(OP, inputs | {"fn": fn})) for fn in others]

    def everything():
        for _ in range(100):
            for fn, expected in zip(others, want, strict=True):
                inputs["fn"].copy_(fn)
                first, second = call(OP, inputs), call(OP, inputs)
                assert_equal(first, expected)
                assert_equal(second, expected)

    _, ways = native(everything)
    assert ways == 800

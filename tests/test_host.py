"""The native way: what it gives the kernel, what it leaves to Python, and how it is built.

A CPU has no kernel. These tests give it one, a function that records its arguments, which the
native library calls for CPU tensors as it calls a compiled kernel for those of a GPU.
"""

import ctypes
import gc
import importlib
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
import tvm_ffi
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.decorators import mark_unbacked
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import mhc_ops
from fake_kernel import FakeKernel
from helpers import assert_equal, call, clone, overload, split, stride_out, tensors
from mhc_ops import dispatch, host, jit, reference, support
from mhc_ops.testing import make_inputs

OP = "fused_post_pre"
module = importlib.import_module(f"mhc_ops.ops.{OP}")  # its function hides it
HIDDEN = 256
TORCH = torch.__version__
MOST = 6  # tokens that the fake kernel serves
CPU = torch.device("cpu")
ROOT = Path(mhc_ops.__file__).parents[1]
OUT = ("residual_out", "post_mix", "comb_mix", "layer_input")
NORMS = pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
INPUTS = ("x", "residual", "post_layer_mix", "comb_res_mix", "fn", "hc_scale", "hc_base")

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler"
)


def group_tokens(most=MOST):
    return tuple(100 + tokens for tokens in range(1, most + 1))


def work(*arguments):
    """What the kernel does, by the reference."""
    norm = isinstance(arguments[7], torch.Tensor) and arguments[7].dim() == 1
    streams, weights = arguments[:4], arguments[4:7]
    outputs = arguments[7 + norm : 11 + norm]
    *scalars, _group, _early = arguments[11 + norm :]
    norm_weight, norm_eps = (arguments[7], scalars.pop()) if norm else (None, None)
    residual = reference.post(*streams)
    mixes = reference.pre(residual, *weights, *scalars, norm_weight=norm_weight, norm_eps=norm_eps)
    for out, result in zip(outputs, (residual, *mixes), strict=True):
        out.copy_(result)


@pytest.fixture
def library():
    if not host.load():
        pytest.skip("there is no native library here")
    host.forget()
    yield
    host.forget()


@pytest.fixture
def kernel(library):
    """A fake kernel that works, remembered for the CPU with and without the norm."""
    kernel = FakeKernel(work)
    for norm in (False, True):
        host.remember(CPU, HIDDEN, norm, kernel, group_tokens())
    return kernel


def inputs_of(tokens=3, norm=True, **make):
    return make_inputs(OP, tokens, HIDDEN, norm=norm, sinkhorn_repeat=3, **make)


def python(inputs):
    """What the op gives without the native way."""
    return dict(zip(OUT, module._cpu(**inputs), strict=True))


# ----------------------------------------------------------------------------------- what it takes


@pytest.mark.parametrize("leading", [(1,), (3,), (MOST,), (2, 3), (1, 2, 1, 3)], ids=str)
@NORMS
def test_it_serves_a_call(kernel, leading, norm):
    inputs = inputs_of(leading, norm)
    before = host.calls()
    outputs = call(OP, inputs)
    assert len(kernel.calls) == host.calls() - before == 1
    assert_equal(outputs, python(inputs))
    for out in outputs.values():
        assert out.is_contiguous()
        assert out.untyped_storage().nbytes() == out.numel() * out.element_size()


@pytest.mark.parametrize("squeezed", [False, True], ids=["n1", "n"])
@NORMS
def test_it_gives_the_kernel_what_the_python_kernel_gives(kernel, norm, squeezed, monkeypatch):
    """Order, type, shape, strides and value of every argument, against ``launch_fused``."""
    inputs = inputs_of((2, 2), norm)
    if squeezed:
        inputs["post_layer_mix"] = inputs["post_layer_mix"].squeeze(-1)
    inputs |= {name: 0.5 + i for i, name in enumerate(NUMBERS) if name in inputs}
    inputs["hc_post_mult_value"] *= -1
    call(OP, inputs)

    launched = []
    monkeypatch.setattr(support, "arch", lambda device: "sm_90a")
    monkeypatch.setattr(jit, "entry_point", lambda key, device: kernel)
    monkeypatch.setattr(jit, "launch", lambda key, device, *arguments: launched.append(arguments))
    monkeypatch.setattr(host, "may_read_early", lambda fn: False)
    monkeypatch.setattr(host, "remember", lambda *plan: launched.append(plan))
    monkeypatch.setattr(dispatch, "group_tokens", lambda tokens: 100 + tokens)
    outputs = python(inputs)
    inputs.setdefault("norm_weight", None)
    inputs.setdefault("norm_eps", None)
    streams, streams_out = (v.view(4, 4, HIDDEN) for v in (inputs["residual"], outputs[OUT[0]]))
    module.launch_fused(
        **{name: v for name, v in inputs.items() if name != "residual"},
        streams=streams,
        streams_out=streams_out,
        outputs=tuple(outputs[name] for name in OUT[1:]),
    )
    arguments, plan = launched
    native = kernel.calls[0]

    def facts(values):  # the outputs come after 7 or 8 inputs, and lie elsewhere
        return [
            (v.dtype, v.shape, v.stride(), v.data_ptr() if i < 7 + norm else None)
            if isinstance(v, torch.Tensor)
            else (type(v), v)
            for i, v in enumerate(values)
        ]

    assert facts(native) == facts(arguments)
    assert plan == (CPU, HIDDEN, norm, kernel, module._GROUP_TOKENS)
    assert len(module._GROUP_TOKENS) == dispatch.ONE_LAUNCH_MAX_TOKENS


def test_outputs_are_filled_where_torch_is_asked_to(library):
    """``torch.use_deterministic_algorithms`` fills what ``torch.empty`` gives."""
    host.remember(CPU, HIDDEN, True, FakeKernel(), group_tokens())
    torch.use_deterministic_algorithms(True)
    try:
        outputs = call(OP, inputs_of())
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(out.isnan().all() for out in outputs.values())


def test_scale_and_base_may_lie_anywhere(kernel):
    """The kernel reads them number by number; engines keep them packed in one tensor."""
    inputs = inputs_of()
    packed = torch.cat([torch.zeros(1), inputs["hc_scale"], inputs["hc_base"]])
    inputs |= {"hc_scale": packed[1:4], "hc_base": packed[4:]}
    call(OP, inputs | {"hc_base": torch.cat([torch.zeros(1), packed[4:]])[1:]})
    assert len(kernel.calls) == 1


def off(name, **changes):
    return pytest.param(lambda inputs: inputs | changes, id=name)


def changed(name, how, change):
    return pytest.param(lambda inputs: inputs | {name: change(inputs[name])}, id=f"{name}-{how}")


def misaligned(tensor):
    """The same values, contiguous, 4 bytes off."""
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
    off("no_rounds", sinkhorn_repeat=0),
    off("too_many_rounds", sinkhorn_repeat=10_001),
    off("norm_weight_alone", norm_eps=None),
    off("norm_eps_alone", norm_weight=None),
    pytest.param(lambda _: inputs_of(0), id="no_tokens"),
    pytest.param(lambda _: inputs_of(MOST + 1), id="too_many_tokens"),
    pytest.param(lambda _: inputs_of((MOST, 2)), id="too_many_tokens_in_two_dimensions"),
    pytest.param(lambda _: inputs_of(hc_mult=2), id="two_streams"),
    pytest.param(lambda _: inputs_of(hc_mult=8), id="eight_streams"),
    pytest.param(lambda _: make_inputs(OP, 3, 512, norm=True), id="another_hidden_size"),
    pytest.param(
        lambda inputs: {k: v[0] if k in INPUTS[:4] else v for k, v in inputs.items()},
        id="no_leading_dimension",
    ),
]


@pytest.mark.parametrize("change", OFF)
def test_what_it_leaves_to_python(kernel, change, monkeypatch):
    """One case a condition: the kernel is not called, Python serves the call or refuses it."""
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
    assert not kernel.calls
    call(OP, inputs_of())
    assert len(kernel.calls) == 1


@NORMS
def test_the_norm_is_part_of_the_plan(library, norm):
    kernel = FakeKernel(work)
    host.remember(CPU, HIDDEN, norm, kernel, group_tokens())
    call(OP, inputs_of(norm=not norm))
    assert not kernel.calls
    call(OP, inputs_of(norm=norm))
    assert len(kernel.calls) == 1


def test_the_device_is_part_of_the_plan(library):
    kernel = FakeKernel(work)
    host.remember(torch.device("cuda", 0), HIDDEN, True, kernel, group_tokens())
    call(OP, inputs_of())
    assert not kernel.calls


def test_a_later_plan_takes_the_place_of_an_earlier_one(kernel):
    second = FakeKernel(work)
    host.remember(CPU, HIDDEN, True, second, group_tokens())
    call(OP, inputs_of())
    assert (len(kernel.calls), len(second.calls)) == (0, 1)
    host.forget()
    call(OP, inputs_of())
    assert (len(kernel.calls), len(second.calls)) == (0, 1)


def test_an_error_of_the_kernel(library):
    def fail(*arguments):
        raise ValueError("out of luck")

    host.remember(CPU, HIDDEN, True, FakeKernel(fail), group_tokens())
    with pytest.raises(RuntimeError, match=r"^mhc::fused_post_pre: ValueError: out of luck"):
        call(OP, inputs_of())


def test_arguments_are_let_go(kernel):
    """Nothing of a call stays behind: neither its arguments nor, once given away, its outputs."""
    inputs = inputs_of()
    held = tensors(inputs)

    def counts():
        return [(sys.getrefcount(v), v._use_count()) for v in held.values()]

    before = counts()
    outputs = call(OP, inputs)
    assert len(kernel.calls) == 1
    kernel.calls.clear()
    assert counts() == before
    alive = [weakref.ref(v.untyped_storage()) for v in (*held.values(), *outputs.values())]
    for kept in (inputs, held, outputs):
        kept.clear()
    assert not any(storage() for storage in alive)


def test_calls_of_threads_that_are_not_pythons(kernel):
    """``torch.jit.fork`` runs on a thread that has no state of Python's, and so no GIL."""
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
    assert len(kernel.calls) == 2
    for result in results:
        assert_equal(dict(zip(OUT, result, strict=True)), python(inputs))


# --------------------------------------------------------------------- what torch makes of the call


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_it_serves_every_grad_mode(kernel, context):
    inputs = inputs_of()
    with context():
        outputs = call(OP, inputs)
    assert len(kernel.calls) == 1
    assert all(out.is_inference() == (context is torch.inference_mode) for out in outputs.values())


def test_tensors_of_inference_mode(kernel):
    with torch.inference_mode():
        inputs = inputs_of()
        call(OP, inputs)
    assert len(kernel.calls) == 1


@pytest.mark.parametrize("name", [*INPUTS, "norm_weight"])
def test_gradients_are_refused(kernel, name):
    """The kernel runs, below autograd, and backward says why there is none."""
    inputs = inputs_of()
    inputs[name].requires_grad_()
    with torch.no_grad():
        assert not any(out.requires_grad for out in call(OP, inputs).values())
    outputs = call(OP, inputs)
    assert len(kernel.calls) == 2
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
    assert len(kernel.calls) == 1
    assert_equal(outputs, python(inputs))


def test_a_dispatch_mode_that_serves_the_op_itself(kernel):
    class Instead(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return (torch.zeros(1),) * 4

    inputs = inputs_of()
    with Instead():
        assert call(OP, inputs)["post_mix"].shape == (1,)
    assert not kernel.calls


def test_a_function_mode_sees_the_op(kernel):
    seen = []

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Functions():
        call(OP, inputs_of())
    assert overload(OP) in seen
    assert len(kernel.calls) == 1


def test_the_python_dispatcher(kernel):
    """It gives a kernel the whole key set, also what lies above the kernel."""
    inputs = inputs_of()
    want = python(inputs)
    with enable_python_dispatcher():
        assert_equal(call(OP, inputs), want)
        with torch.inference_mode():
            assert_equal(call(OP, inputs), want)
        inputs["fn"].requires_grad_()
        assert call(OP, inputs)["post_mix"].requires_grad


class Wrapped(torch.Tensor):
    """A subclass that answers every op itself."""

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
    assert not kernel.calls


def test_parameters(kernel):
    inputs = inputs_of()
    inputs["fn"] = torch.nn.Parameter(inputs["fn"])
    with torch.no_grad():
        call(OP, inputs)
    assert len(kernel.calls) == 1


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
    assert not kernel.calls


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
    """As without the native way, whatever that is."""
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
    assert len(kernel.calls) == 1
    assert kernel.calls[0][4].dtype == torch.float32


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
    assert len(kernel.calls) == 4
    assert counter.frame_count == 1


def test_opcheck(kernel):
    args, kwargs = split(OP, inputs_of())
    torch.library.opcheck(overload(OP), args, kwargs)
    assert kernel.calls


# ------------------------------------------------------------------------------------ early reading


def early(kernel):
    return [arguments[-1] for arguments in kernel.calls]


def test_fn_is_read_early_from_its_second_call_on(kernel):
    inputs = inputs_of()
    for _ in range(3):
        call(OP, inputs)
    call(OP, inputs | {"fn": inputs["fn"].clone()})
    assert early(kernel) == [0, 1, 1, 0]


def test_a_written_fn_is_read_late(kernel):
    inputs = inputs_of()
    for _ in range(2):
        inputs["fn"].mul_(2)
        call(OP, inputs)
        call(OP, inputs)
    inputs["fn"].detach().mul_(2)  # shares the version
    call(OP, inputs)
    assert early(kernel) == [0, 1, 0, 1, 0]


def test_a_replaced_fn_is_read_late(kernel):
    """Assigning to ``.data`` leaves the tensor and its version, and gives it other memory."""
    inputs = inputs_of()
    call(OP, inputs)
    call(OP, inputs)
    version = inputs["fn"]._version
    inputs["fn"].data = inputs["fn"].clone()
    assert inputs["fn"]._version == version
    call(OP, inputs)
    call(OP, inputs)
    assert early(kernel) == [0, 1, 0, 1]


def test_a_view_of_fn_is_another_tensor(kernel):
    inputs = inputs_of()
    for _ in range(2):
        call(OP, inputs | {"fn": inputs["fn"].detach()})
    assert early(kernel) == [0, 0]


def test_fn_of_inference_mode_is_read_late(kernel):
    with torch.inference_mode():
        inputs = inputs_of()
        for _ in range(2):
            call(OP, inputs)
    assert early(kernel) == [0, 0]


def test_both_ways_share_one_table(kernel):
    inputs = inputs_of()
    assert not host.may_read_early(inputs["fn"])
    call(OP, inputs)
    assert early(kernel) == [1]
    inputs["fn"].mul_(2)
    call(OP, inputs)
    assert host.may_read_early(inputs["fn"])


def test_the_table_forgets_the_dead(library):
    kept = [torch.empty(1) for _ in range(100)]
    for fn in kept:
        host.may_read_early(fn)
    for _ in range(5000):
        host.may_read_early(torch.empty(1))
    gc.collect()
    assert host.tracked() < 2000
    assert all(host.may_read_early(fn) for fn in kept)


def test_a_tracked_tensor_gives_its_memory_back(library):
    fn = torch.empty(1)
    storage = fn.untyped_storage()
    count = torch._C._storage_Use_Count(storage._cdata)
    host.may_read_early(fn)
    del fn
    assert torch._C._storage_Use_Count(storage._cdata) == count - 1


# ------------------------------------------------------------------------------------------ threads


def test_many_threads(library):
    kernel = FakeKernel(work)
    inputs = [inputs_of(1 + i % MOST, seed=i) for i in range(16)]
    want = [python(i) for i in inputs]
    wrong = []

    def serve(i):
        for _ in range(50):
            try:
                host.remember(CPU, HIDDEN, True, kernel, group_tokens())
                assert_equal(call(OP, inputs[i]), want[i])
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(kernel.calls) == 16 * 50


# ---------------------------------------------------------------------------------------- the build


@pytest.fixture
def untried(monkeypatch):
    """A ``host`` that has not tried to load anything."""
    monkeypatch.setattr(host, "_tried", False)
    monkeypatch.setattr(host, "_library", None)
    monkeypatch.setattr(host, "_plans", {})


def test_many_threads_load_once(untried, monkeypatch):
    loads = []
    gate = threading.Event()

    def load():
        loads.append(gate.wait(5))
        return object()

    monkeypatch.setattr(host, "_load", load)
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
    with caplog.at_level(logging.WARNING, logger="mhc_ops"):
        assert not host.load()
        assert not host.load()
    (record,) = caplog.records
    assert record.getMessage().startswith("no native host path, ")
    assert compiler in record.getMessage()
    assert [path.name for path in host_folder(tmp_path).iterdir()] == ["host.lock"]
    fn = torch.empty(1)
    host.remember(CPU, HIDDEN, True, FakeKernel(), group_tokens())
    host.forget()
    assert not host.may_read_early(fn)
    assert not host.may_read_early(fn)
    assert host.calls() == host.tracked() == 0
    call(OP, inputs_of())


def test_an_error_of_the_compiler_is_logged(untried, monkeypatch, tmp_path, caplog):
    broken = tmp_path / "_host.cpp"
    broken.write_text("this is no C++")
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(host, "SOURCE", broken)
    with caplog.at_level(logging.WARNING, logger="mhc_ops"):
        assert not host.load()
    assert "error:" in caplog.records[-1].getMessage() or shutil.which("g++") is None


def test_another_source_torch_or_tvm_ffi_is_another_library(monkeypatch, tmp_path):
    def folder(tvm_ffi_version="0.1.12"):
        return host._cache_folder(host._built_with(tvm_ffi_version))

    folders = {folder(), folder("0.1.13")}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.11.0")
        folders.add(folder())
    source = tmp_path / "_host.cpp"
    source.write_text(host.SOURCE.read_text() + "\n")
    monkeypatch.setattr(host, "SOURCE", source)
    folders.add(folder())
    assert len(folders) == 4


def host_folder(cache):
    """The one folder of libraries in a cache."""
    (folder,) = (cache / "mhc_ops").iterdir()
    return folder


@needs_compiler
def test_processes_that_build_at_once(tmp_path):
    """One builds it, the other waits; nothing else is left behind."""
    code = (
        "import logging; logging.basicConfig(level='INFO', format='%(message)s')\n"
        "from mhc_ops import host; print(host.load(), host.load())"
    )
    environment = os.environ | {"TILELANG_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=280) for process in running]
    assert [out for out, _ in said] == [b"True True\n"] * 2
    assert sum(log.count(b"building host.so") for _, log in said) == 1
    files = sorted(path.name for path in host_folder(tmp_path).iterdir())
    assert files == ["host.json", "host.lock", "host.so"]
    again = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert (again.stdout, again.stderr) == (b"True True\n", b"")


def test_the_first_kernel_of_one_launch_loads_it(monkeypatch):
    loads = []
    monkeypatch.setattr(jit, "_compiled", {})
    monkeypatch.setattr(host, "load", lambda: loads.append(True))
    monkeypatch.setattr(jit, "_obtain", lambda key: lambda *arguments: None)
    jit.compile_key(dispatch.post_key(HIDDEN, "sm_90a"))
    assert not loads
    jit.compile_key(dispatch.fused_post_pre_key(HIDDEN, "sm_90a", True))
    assert loads


@needs_compiler
def test_a_library_that_was_built_ahead(untried, monkeypatch, tmp_path, caplog):
    """It is taken without a compiler and without the cache; one of another torch is not."""
    ahead = tmp_path / "ahead"
    ahead.mkdir()
    # built by the fixture that all tests have
    built = host._cache_folder(host._built_with(tvm_ffi.__version__)) / "host.so"
    monkeypatch.setattr(host, "_build", lambda path, _: path.write_bytes(built.read_bytes()))
    host.build(ahead)
    monkeypatch.setenv("MHC_OPS_KERNELS", str(ahead))
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path / "cache"))
    loaded = []
    cdll = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda path: loaded.append(path) or cdll(str(built)))
    assert host.load()
    assert loaded == [str(ahead / "host.so")]
    assert not (tmp_path / "cache").exists()

    monkeypatch.setattr(host, "_tried", False)
    monkeypatch.setattr(torch, "__version__", "2.11.0")
    with caplog.at_level(logging.WARNING, logger="mhc_ops"):
        assert host.load()
    assert loaded[1:] == [str(host_folder(tmp_path / "cache") / "host.so")]
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{ahead / 'host.so'} is not used: built with torch {TORCH}, expected 2.11.0"
    )


def test_a_cache_that_others_can_write_is_not_loaded_from(untried, monkeypatch, tmp_path, caplog):
    tmp_path.chmod(0o777)
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path))
    with caplog.at_level(logging.WARNING, logger="mhc_ops"):
        assert not host.load()
    assert f"{tmp_path} can be written by others (mode 0777)" in caplog.records[-1].getMessage()
    assert not (tmp_path / "mhc_ops").exists()


# ------------------------------------------------------------------------------------------- a GPU


def native(function):
    """What the function returned, and how many calls took the native way in it."""
    before = host.calls()
    return function(), host.calls() - before


@pytest.mark.gpu
@pytest.mark.parametrize("leading", [(1,), (8,), (33,), (34,), (128,), (2, 3)], ids=str)
@NORMS
def test_gpu_bits_are_those_of_the_python_kernel(leading, norm):
    inputs = make_inputs(OP, leading, 4096, device="cuda", norm=norm, kind="large_logits")
    call(OP, inputs)
    host.forget()
    want, ways = native(lambda: call(OP, inputs))
    assert ways == 0
    got, ways = native(lambda: call(OP, inputs))
    assert ways == 1
    assert_equal(got, want)
    _, ways = native(lambda: call(OP, make_inputs(OP, 129, 4096, device="cuda", norm=norm)))
    assert ways == 0


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
    """Counted there as that of ``torch.empty`` is, and given back."""
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
    """Each on a stream of its own, with another token count."""
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

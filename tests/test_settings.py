"""Give the same bits under every setting of the process that makes torch's own products coarser."""

import contextlib

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from helpers import OPS, assert_equal, call, overload, split
from mhc_ops import nn, reference
from mhc_ops.testing import as_outputs, make_inputs

# Products of these sizes are large enough for mkldnn, which has its own settings.
TOKENS, HIDDEN = 64, 512


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def matmul_precision(value):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(value)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def fp32_precision(of, value):
    before = of.fp32_precision
    of.fp32_precision = value
    try:
        yield
    finally:
        of.fp32_precision = before


SETTINGS = {
    "autocast": lambda device: torch.autocast(device),
    "autocast to float16": lambda device: torch.autocast(device, dtype=torch.float16),
    "default dtype float64": lambda device: default_dtype(torch.float64),
    "default dtype bfloat16": lambda device: default_dtype(torch.bfloat16),
    "matmul precision high": lambda device: matmul_precision("high"),
    "matmul precision medium": lambda device: matmul_precision("medium"),
    "mkldnn bf16": lambda device: fp32_precision(torch.backends.mkldnn.matmul, "bf16"),
    "mkldnn tf32": lambda device: fp32_precision(torch.backends.mkldnn.matmul, "tf32"),
    "cuda tf32": lambda device: fp32_precision(torch.backends.cuda.matmul, "tf32"),
}


def make_stack(device, monkeypatch, switch="0"):
    """Make a stack that runs on plain functions, where the switch is off."""
    for name in ("FUSE_POST_PRE", "TILELANG_PRE", "TILELANG_POST"):
        monkeypatch.setenv(f"MHC_OPS_{name}", switch)
    stack = nn.DecoderStack([(lambda x: -0.5 * x, lambda x: 0.25 * x)] * 2, HIDDEN)
    for name, parameter in stack.named_parameters():
        if name.endswith(("fn", "base")):
            torch.nn.init.normal_(parameter, std=0.05)
    nn.wire(stack.to(device).requires_grad_(False))
    return stack


def test_torch_heeds_the_settings():
    """See that autocast and the precisions do change a product of torch on this machine."""
    left, right = torch.randn(8, TOKENS, HIDDEN), torch.randn(8, HIDDEN, TOKENS)
    want = left @ right
    changed = []
    for name in SETTINGS:
        with SETTINGS[name]("cpu"):
            changed += [name] * (not torch.equal((left @ right).float(), want))
    assert {"autocast", "autocast to float16"} <= set(changed)
    if torch.cpu._is_avx512_bf16_supported():
        assert {"matmul precision medium", "mkldnn bf16"} <= set(changed)


@pytest.mark.parametrize("op", OPS)
def test_an_op_gives_the_same_bits(device, op, subtests):
    inputs = make_inputs(op, TOKENS, HIDDEN, device=device, norm=op != "post", kind="large_logits")
    want = call(op, inputs)
    for name, setting in SETTINGS.items():
        with subtests.test(name), setting(device):
            assert_equal(call(op, inputs), want)


@pytest.mark.parametrize("op", ["post", "pre", "head"])
def test_a_plain_function_gives_the_same_bits(device, op, subtests):
    inputs = make_inputs(op, TOKENS, HIDDEN, device=device, norm=op != "post", kind="large_logits")
    for dtype in (torch.float32, torch.float64):
        options = inputs | {"compute_dtype": dtype}
        want = as_outputs(op, getattr(reference, op)(**options))
        for name, setting in SETTINGS.items():
            with subtests.test(name, dtype=dtype), setting(device):
                assert_equal(as_outputs(op, getattr(reference, op)(**options)), want)


@pytest.mark.parametrize("switch", ["0", "1"], ids=["plain functions", "ops"])
def test_a_stack_gives_the_same_bits(device, monkeypatch, switch, subtests):
    stack = make_stack(device, monkeypatch, switch)
    embedding = torch.randn(TOKENS, HIDDEN, device=device).bfloat16()
    want = stack(embedding)
    for name, setting in SETTINGS.items():
        with subtests.test(name), setting(device):
            out = stack(embedding)
            assert torch.equal(out.hidden, want.hidden)
            assert torch.equal(out.streams, want.streams)


def test_gradients_of_the_plain_functions_are_the_same(device, subtests):
    inputs = make_inputs("pre", TOKENS, HIDDEN, device=device, kind="large_logits")
    inputs["fn"].requires_grad_()
    inputs["residual"].requires_grad_()

    def gradients():
        out = as_outputs("pre", reference.pre(**inputs))
        loss = sum(value.float().sum() for value in out.values())
        return torch.autograd.grad(loss, [inputs["fn"], inputs["residual"]])

    want = gradients()
    for name, setting in SETTINGS.items():
        with subtests.test(name), setting(device):
            assert all(torch.equal(a, b) for a, b in zip(gradients(), want, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_autocast_casts_no_argument(device, op):
    """Refuse, as ever, the dtypes that autocast would cast, and those that it would make."""
    inputs = make_inputs(op, 3, HIDDEN, device=device)
    streams = "x" if op == "expand_pre" else "residual"
    with torch.autocast(device):
        for dtype in (torch.float32, torch.float16):
            with pytest.raises(ValueError, match=f"expected {streams} of dtype torch.bfloat16"):
                call(op, inputs | {streams: inputs[streams].to(dtype)})


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("op", OPS)
def test_compiled_and_eager_agree_under_autocast(device, op, backend, fresh_dynamo):
    inputs = make_inputs(op, TOKENS, HIDDEN, device=device, norm=op != "post", kind="large_logits")
    want = call(op, inputs)
    args, kwargs = split(op, inputs)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(overload(op), fullgraph=True, backend=counter)
    with torch.no_grad():
        with torch.autocast(device):
            assert_equal(as_outputs(op, compiled(*args, **kwargs)), want)
        assert_equal(as_outputs(op, compiled(*args, **kwargs)), want)
        with torch.autocast(device), matmul_precision("medium"):
            assert_equal(as_outputs(op, compiled(*args, **kwargs)), want)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_plain_functions_are_the_same(device, monkeypatch, backend, fresh_dynamo):
    """Compare compiled code with itself, since Inductor leaves out roundings of eager code."""
    stack = make_stack(device, monkeypatch)
    embedding = torch.randn(TOKENS, HIDDEN, device=device).bfloat16()
    with torch.no_grad():
        want = torch.compile(stack, fullgraph=True, backend=backend)(embedding)
        for setting in (torch.autocast(device), matmul_precision("medium")):
            torch._dynamo.reset()
            with setting:
                got = torch.compile(stack, fullgraph=True, backend=backend)(embedding)
            assert torch.equal(got.hidden, want.hidden)
            assert torch.equal(got.streams, want.streams)
        if backend == "aot_eager":
            assert torch.equal(want.hidden, stack(embedding).hidden)

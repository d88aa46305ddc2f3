"""Test hyper-connections as modules: the carried state, the wiring, the steps."""

import logging

import pytest
import torch
from call_counts import CallCounts
from torch._dynamo.testing import CompileCounterWithBackend

import mhc_ops
from mhc_ops import nn, reference, support
from mhc_ops.nn import wiring

HIDDEN, TOKENS, LAYERS = 256, 5, 2
FUSED = {"MHC_OPS_FUSE_POST_PRE": "1"}
OFF = {"MHC_OPS_TILELANG_PRE": "0", "MHC_OPS_TILELANG_POST": "0"}


class Stack(torch.nn.Module):
    """Run hyper-connections in the order of a model; the sublayers are exact in bf16."""

    def __init__(self, hc_mult=4, hidden=HIDDEN):
        super().__init__()
        self.connections = torch.nn.ModuleList(
            nn.HyperConnection(hidden, hc_mult, sinkhorn_repeat=5) for _ in range(2 * LAYERS)
        )
        self.norms = torch.nn.ModuleList(
            nn.FoldedRMSNorm(hidden, dtype=torch.float32) for _ in range(2 * LAYERS)
        )
        self.head = nn.HyperHead(hidden, hc_mult)
        self.final_norm = nn.FoldedRMSNorm(hidden)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))

    def states(self, streams):
        entry = self.connections[0].pre(streams, self.norms[0])
        yield entry.after(-0.5 * entry.layer_input)
        state = entry.after(-0.5 * entry.layer_input)
        for connection, norm in zip(self.connections[1:], self.norms[1:], strict=True):
            entry = connection.boundary(state, norm)
            state = entry.after(-0.5 * entry.layer_input)
            yield state

    def forward(self, streams):
        *_, state = self.states(streams)
        return self.head.collapse(state, self.final_norm)


def make(device, monkeypatch, switches=FUSED, **options):
    for name, value in switches.items():
        monkeypatch.setenv(name, value)
    stack = Stack(**options).to(device).requires_grad_(False)
    nn.wire(stack)
    return stack


def streams(device, hc_mult=4, dtype=torch.bfloat16):
    return torch.randn(TOKENS, hc_mult, HIDDEN, device=device).to(dtype)


def test_boundary_is_the_fused_op(device, monkeypatch):
    stack, residual = make(device, monkeypatch), streams(device)
    first, second = stack.connections[:2]
    state = first.pre(residual, stack.norms[0]).after(-residual[:, 0])
    got = second.boundary(state, stack.norms[1])
    norm = stack.norms[1]
    want = mhc_ops.fused_post_pre(
        *(state.x, state.residual, state.post, state.comb),
        *(second.fn, second.scale, second.base, 1e-6, 1e-6, 1e-6, 2.0, 5),
        norm_weight=norm.weight,
        norm_eps=norm.norm_eps,
    )
    assert torch.equal(got.residual, want.residual_out)
    assert torch.equal(got.layer_input, want.layer_input)
    assert torch.equal(got.post, want.post_mix)
    assert torch.equal(got.comb, want.comb_mix)
    assert torch.equal(got.residual, state.materialise())


def test_fused_and_unfused_have_the_same_residuals(device, monkeypatch):
    """Compare bits at every boundary that starts from the same state."""
    stack, residual = make(device, monkeypatch), streams(device)
    states = list(stack.states(residual))
    monkeypatch.setenv("MHC_OPS_FUSE_POST_PRE", "0")
    unfused = Stack().to(device)
    unfused.load_state_dict(stack.state_dict())
    nn.wire(unfused)
    for state, a, b, norm in zip(
        states, stack.connections[1:], unfused.connections[1:], stack.norms[1:], strict=False
    ):
        fused, plain = a.boundary(state, norm), b.boundary(state, norm)
        assert torch.equal(fused.residual, plain.residual)
        torch.testing.assert_close(fused.post, plain.post, rtol=0, atol=1e-3)
        torch.testing.assert_close(fused.comb, plain.comb, rtol=0, atol=1e-3)
        torch.testing.assert_close(fused.layer_input, plain.layer_input, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("switches", "counts"),
    [
        (FUSED, {"pre": 1, "fused_post_pre": 2 * LAYERS - 1, "post_head": 1}),
        ({}, {"pre": 2 * LAYERS, "post": 2 * LAYERS, "head": 1}),
        (FUSED | {"MHC_OPS_TILELANG_PRE": "0"}, {"post": 2 * LAYERS}),
        (FUSED | {"MHC_OPS_TILELANG_POST": "0"}, {"pre": 2 * LAYERS, "head": 1}),
        (FUSED | OFF, {}),
    ],
)
def test_switches_steer_the_steps(device, monkeypatch, caplog, switches, counts):
    stack = make(device, monkeypatch, switches)
    with CallCounts() as calls:
        stack(streams(device))
    assert dict(calls.counts) == counts
    off = [name for name in switches if switches[name] == "0"]
    assert len(caplog.records) == bool(off)
    for name in off:
        assert f"{name} is off" in caplog.text


def test_switches_are_read_when_the_model_is_wired(monkeypatch):
    stack = make("cpu", monkeypatch)
    monkeypatch.setenv("MHC_OPS_FUSE_POST_PRE", "0")
    with CallCounts() as calls:
        stack(streams("cpu"))
    assert calls.counts["fused_post_pre"] == 2 * LAYERS - 1


@pytest.mark.parametrize("switches", [FUSED, FUSED | OFF])
def test_plain_functions_compute_the_same(monkeypatch, switches):
    """Get the same bits on any path, because on the CPU the ops are the plain functions."""
    stack = make("cpu", monkeypatch, switches)
    residual = streams("cpu")
    post, comb, y = reference.pre(
        residual,
        *(stack.connections[0].fn, stack.connections[0].scale, stack.connections[0].base),
        *(1e-6, 1e-6, 1e-6, 2.0, 5),
        norm_weight=stack.norms[0].weight.bfloat16(),
        norm_eps=1e-6,
    )
    entry = stack.connections[0].pre(residual, stack.norms[0])
    assert torch.equal(entry.layer_input, y)
    assert torch.equal(entry.post, post)
    assert torch.equal(entry.comb, comb)
    new = reference.post(-y, residual, post, comb)
    got = stack.connections[1].boundary(entry.after(-y), stack.norms[1])
    assert torch.equal(got.residual, new)


def test_unsupported_device_falls_back_with_one_line(monkeypatch, caplog):
    monkeypatch.setattr(wiring, "_device_refusal", lambda *place: "compute capability 7.5")
    with caplog.at_level(logging.INFO, logger="mhc_ops"):
        stack = make("cpu", monkeypatch)
    with CallCounts() as calls:
        stack(streams("cpu"))
        stack(streams("cpu"))
    assert not calls.counts
    (record,) = caplog.records
    assert record.name == "mhc_ops"
    assert record.getMessage() == (
        "Stack runs on plain PyTorch functions: every step: compute capability 7.5"
    )


def test_what_a_cuda_device_cannot_serve():
    """Give the reason of is_supported where CUDA is missing, and shapes where CUDA is there."""
    supported, reason = mhc_ops.is_supported("cuda")
    got = wiring._device_refusal(torch.device("cuda"), 4, HIDDEN)
    assert got is None if supported else got == reason


@pytest.mark.parametrize(
    ("hc_mult", "hidden", "text"), [(2, 256, "hc_mult is 2"), (4, 128, "hidden size is 128")]
)
def test_shapes_that_cuda_cannot_serve(monkeypatch, hc_mult, hidden, text):
    monkeypatch.setattr(support, "is_supported", lambda device: (True, "yes"))
    assert text in wiring._device_refusal(torch.device("cuda"), hc_mult, hidden)


def test_other_dtype_falls_back_with_one_line(caplog, monkeypatch):
    stack = make("cpu", monkeypatch)
    nn.wire(stack, dtype=torch.float32)
    (record,) = caplog.records
    assert "torch.float32" in record.getMessage()
    out = stack(streams("cpu", dtype=torch.float32))
    assert out.dtype == torch.float32


def test_any_hc_mult_on_the_cpu(monkeypatch):
    stack = make("cpu", monkeypatch, hc_mult=3)
    assert stack(streams("cpu", hc_mult=3)).shape == (TOKENS, HIDDEN)


def test_unwired_module_says_so():
    with pytest.raises(RuntimeError, match=r"HyperConnection is not wired: expected .*wire\("):
        nn.HyperConnection(HIDDEN).pre(streams("cpu"))


def test_wire_refuses_a_model_without_hyper_connections():
    with pytest.raises(ValueError, match="got Linear without any"):
        nn.wire(torch.nn.Linear(2, 2))


def test_backward_says_forward_only(device, monkeypatch):
    stack = make(device, monkeypatch).requires_grad_(True)
    with pytest.raises(RuntimeError, match="forward only"):
        stack(streams(device)).float().sum().backward()


def test_a_norm_by_itself_is_an_rms_norm():
    norm = nn.FoldedRMSNorm(HIDDEN, eps=1e-5)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
    x = torch.randn(3, HIDDEN)
    want = torch.nn.functional.rms_norm(x, (HIDDEN,), norm.weight.float(), 1e-5)
    torch.testing.assert_close(norm(x), want)


@pytest.mark.parametrize("switches", [FUSED, {}], ids=["fused", "unfused"])
def test_every_module_with_parameters_is_called(monkeypatch, switches):
    """Run the hooks of every module before its parameters are read, as FSDP2 and others need."""
    stack, residual = make("cpu", monkeypatch, switches), streams("cpu")
    want = stack(residual)
    held = {}

    def lend(module, *_):
        for name, value in held[module].items():
            module._parameters[name] = value

    def withdraw(module, *_):
        for name in held[module]:
            module._parameters[name] = None

    for module in stack.modules():
        if module._parameters:
            held[module] = dict(module._parameters)
            module.register_forward_pre_hook(lend)
            module.register_forward_hook(withdraw)
            withdraw(module)
    assert len(held) == 4 * LAYERS + 2
    assert torch.equal(stack(residual), want)


def test_compiles_to_one_graph_with_the_bits_of_eager(device, monkeypatch, fresh_dynamo):
    stack, residual = make(device, monkeypatch), streams(device)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(stack, fullgraph=True, backend=counter)
    assert torch.equal(compiled(residual), stack(residual))
    assert counter.frame_count == 1

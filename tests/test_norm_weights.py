"""Test that the ops read the norm weight that a module has now, however it was changed."""

import copy
import io
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call

import mhc_ops
from mhc_ops import nn

HIDDEN, TOKENS = 256, 5

each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])


class Model(torch.nn.Module):
    """Run one pre step with a norm folded in."""

    def __init__(self, dtype):
        super().__init__()
        self.connection = nn.HyperConnection(HIDDEN, sinkhorn_repeat=3)
        self.norm = nn.FoldedRMSNorm(HIDDEN, dtype=dtype)

    def forward(self, streams):
        return self.connection.pre(streams, self.norm).layer_input


def make(dtype, device="cpu"):
    model = Model(dtype).to(device).requires_grad_(False)
    nn.wire(model)
    return model


def streams(device="cpu"):
    return torch.randn(TOKENS, 4, HIDDEN, device=device).bfloat16()


def weights(model):
    weight = model.norm.weight
    return torch.randn(HIDDEN, device=weight.device).to(weight.dtype)


def expected(model, x, weight):
    """Call the op with a weight by hand."""
    of = model.connection
    with torch.no_grad():
        return mhc_ops.pre(
            x, of.fn, of.scale, of.base, 1e-6, 1e-6, 1e-6, 2.0, 3,
            norm_weight=weight.detach().bfloat16(), norm_eps=1e-6,
        ).layer_input  # fmt: skip


def assert_reads(model, weight, call=None):
    """Check that a model computes with this weight."""
    x = streams(weight.device)
    with torch.no_grad():
        got = model(x) if call is None else call(x)
    assert torch.equal(got, expected(model, x, weight))


def by_mul(model, new):
    model.norm.weight.mul_(new)


def by_copy(model, new):
    model.norm.weight.copy_(new)


def by_foreach(model, new):
    torch._foreach_mul_([model.norm.weight], [new])


def by_data_of_another(model, new):
    model.norm.weight.data = new


def by_swap(model, new):
    torch.utils.swap_tensors(model.norm.weight, torch.nn.Parameter(new, requires_grad=False))


def by_parameter(model, new):
    model.norm.weight = torch.nn.Parameter(new, requires_grad=False)


def by_state_dict(model, new):
    model.load_state_dict({"norm.weight": new}, strict=False)


def by_assigned_state_dict(model, new):
    model.load_state_dict({"norm.weight": new}, strict=False, assign=True)


def by_merge(model, new):
    """Merge an adapter into the weight, as LoRA does."""
    model.norm.weight += new - 1


def by_lerp(model, new):
    """Move an average towards a weight, as torch.optim.swa_utils does."""
    model.norm.weight.detach().lerp_(new, 1.0)


WRITES = (
    by_mul, by_copy, by_foreach, by_data_of_another, by_swap, by_parameter, by_state_dict,
    by_assigned_state_dict, by_merge, by_lerp,
)  # fmt: skip


@each_dtype
@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_a_write_takes_effect(device, dtype, write):
    model = make(dtype, device)
    model(streams(device))
    new = weights(model)
    with torch.no_grad():
        write(model, new.clone())
    assert_reads(model, model.norm.weight)
    assert not torch.equal(model.norm.weight, torch.ones_like(new))


@each_dtype
@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_a_write_under_inference_mode_takes_effect(dtype, write):
    model = make(dtype)
    new = weights(model)
    with torch.inference_mode():
        model(streams())
        if write in (by_mul, by_copy, by_foreach, by_state_dict):
            write(model, new)
            assert_reads(model, model.norm.weight)
    with torch.no_grad():
        write(model, new.clone())
    with torch.inference_mode():
        assert_reads(model, model.norm.weight)


@each_dtype
def test_swapping_an_average_in_and_out(dtype):
    model = make(dtype)
    with torch.no_grad():
        model.norm.weight.copy_(weights(model))
    average = weights(model)
    for _ in range(3):
        model.norm.weight.data, average = average, model.norm.weight.data
        assert_reads(model, model.norm.weight)


@each_dtype
def test_writes_that_nothing_counts_need_a_refresh_unless_bf16(dtype):
    model = make(dtype)
    model.norm.weight.data.copy_(weights(model))
    if dtype == torch.float32:
        nn.refresh_norm_weight_cache(model)
    assert_reads(model, model.norm.weight)


@pytest.mark.parametrize("refresh", [nn.wire, nn.refresh_norm_weight_cache])
def test_wire_refreshes(refresh):
    model = make(torch.float32)
    model.norm.weight.data.copy_(weights(model))
    refresh(model)
    assert_reads(model, model.norm.weight)


@each_dtype
@pytest.mark.parametrize("wired", ["before", "after"])
def test_made_on_meta_and_loaded_by_assignment(dtype, wired):
    with torch.device("meta"):
        model = Model(dtype).requires_grad_(False)
    if wired == "before":
        nn.wire(model)
    other = make(dtype)
    with torch.no_grad():
        other.norm.weight.copy_(weights(other))
    model.load_state_dict(other.state_dict(), assign=True)
    if wired == "after":
        nn.wire(model)
    assert_reads(model, other.norm.weight)
    nn.refresh_norm_weight_cache(model)
    assert_reads(model, other.norm.weight)


@each_dtype
def test_functional_call(dtype):
    model = make(dtype)
    with torch.no_grad():
        model.norm.weight.copy_(weights(model))
    own = model.norm.folded_weight()
    before = own.clone()
    new = weights(model)
    assert_reads(model, new, lambda x: functional_call(model, {"norm.weight": new}, x))
    # A captured graph reads the memory of the copy.
    assert model.norm.folded_weight().data_ptr() == own.data_ptr()
    assert torch.equal(own, before)
    assert_reads(model, model.norm.weight)


@each_dtype
@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
@pytest.mark.parametrize("grad", [False, True], ids=["frozen", "requires_grad"])
def test_exported_program_with_new_weights(dtype, strict, grad):
    model = make(dtype).requires_grad_(grad)
    program = torch.export.export(model, (streams(),), strict=strict)
    loaded = program.module()
    new = weights(model)
    loaded.load_state_dict(model.state_dict() | {"norm.weight": new})
    assert_reads(model, new, loaded)
    assert "norm.weight" in program.state_dict


@each_dtype
@pytest.mark.parametrize("grad", [False, True], ids=["frozen", "requires_grad"])
def test_compiled_without_a_recompilation(dtype, grad, fresh_dynamo):
    model = make(dtype).requires_grad_(grad)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    assert_reads(model, model.norm.weight, compiled)
    for write in (by_mul, by_copy, by_foreach, by_state_dict, by_merge, by_data_of_another):
        with torch.no_grad():
            write(model, weights(model))
        assert_reads(model, model.norm.weight, compiled)
    assert counter.frame_count == 1


@each_dtype
def test_copies_and_pickles_have_their_own_weights(dtype):
    model = make(dtype)
    with torch.no_grad():
        model.norm.weight.copy_(weights(model))
    twin, restored = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    want = model.norm.weight.clone()
    with torch.no_grad():
        model.norm.weight.zero_()
    for other in (twin, restored, loaded):
        assert_reads(other, want)
        with torch.no_grad():
            other.norm.weight.mul_(2)
        assert_reads(other, 2 * want)


@pytest.mark.parametrize("fused", [False, True], ids=["adamw", "fused_adamw"])
def test_after_a_step_of_an_optimizer(fused, monkeypatch):
    """Read the new weight also after an optimizer whose writes PyTorch does not count."""
    monkeypatch.setenv("MHC_OPS_TILELANG_PRE", "0")  # the plain functions have a backward
    model = make(torch.float32).requires_grad_(True)
    nn.wire(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, fused=fused)
    for _ in range(2):
        model(streams()).float().square().sum().backward()
        assert model.norm.weight.grad is not None
        assert_reads(model, model.norm.weight)  # between the backward and the step
        optimizer.step()
        with torch.inference_mode():
            assert_reads(model, model.norm.weight)


def test_an_optimizer_step_after_a_compiled_forward(monkeypatch, fresh_dynamo):
    monkeypatch.setenv("MHC_OPS_TILELANG_PRE", "0")
    model = make(torch.float32).requires_grad_(True)
    nn.wire(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, fused=True)
    torch.compile(model, backend="aot_eager")(streams()).float().square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.norm.weight, torch.ones(HIDDEN))
    assert_reads(model, model.norm.weight)


def test_made_under_inference_mode():
    with torch.inference_mode():
        model = make(torch.float32)
        model.norm.weight.mul_(weights(model))
        assert_reads(model, model.norm.weight)
        model.norm.weight.mul_(2)
        assert_reads(model, model.norm.weight)


def test_what_is_handed_to_the_op():
    """Hand a bf16 weight over as it is, and one copy of an fp32 weight for all calls."""
    norm = make(torch.bfloat16).norm
    assert norm.folded_weight() is norm.weight
    norm = make(torch.float32).norm
    kept = norm.folded_weight()
    assert kept.dtype == torch.bfloat16
    assert norm.folded_weight() is kept
    with torch.no_grad():
        norm.weight.mul_(3)
    assert norm.folded_weight() is kept
    assert torch.equal(kept, norm.weight.bfloat16())
    assert list(norm.state_dict()) == ["weight"]
    assert not list(norm.buffers())


@pytest.mark.parametrize("change", [torch.float32, torch.float16, torch.float64])
def test_another_dtype(change):
    norm = make(torch.bfloat16).norm
    with torch.no_grad():
        norm.weight.normal_()
    norm.to(change)
    nn.refresh_norm_weight_cache(norm)
    assert torch.equal(norm.folded_weight(), norm.weight.bfloat16())
    norm.bfloat16()
    assert norm.folded_weight() is norm.weight


@pytest.mark.gpu
class TestCapture:
    """Capture a model with a norm in fp32."""

    @staticmethod
    def captured(model, x):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        return graph, out

    def test_refreshed_weights_reach_the_graph(self):
        model, x = make(torch.float32, "cuda"), streams("cuda")
        model(x)
        graph, out = self.captured(model, x)
        model.norm.weight.mul_(weights(model))
        nn.refresh_norm_weight_cache(model)
        graph.replay()
        assert torch.equal(out, expected(model, x, model.norm.weight))

    def test_a_stale_copy_is_left_alone_by_a_capture(self):
        model, x = make(torch.float32, "cuda"), streams("cuda")
        model(x)
        model.norm.weight.mul_(weights(model))
        graph, out = self.captured(model, x)
        want = expected(model, x, model.norm.weight)
        assert torch.equal(model(x), want)
        graph.replay()
        assert torch.equal(out, want)

    def test_a_refresh_inside_is_refused(self):
        model, x = make(torch.float32, "cuda"), streams("cuda")
        model(x)
        with (
            pytest.raises(RuntimeError, match="outside of a CUDA-graph capture"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            nn.refresh_norm_weight_cache(model)

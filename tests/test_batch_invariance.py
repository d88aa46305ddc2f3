"""Give a token the same bits alone, in any batch and at any position, on CPU and GPU."""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import NORMS, OPS, assert_equal, bounds, call, clone, tensors
from mhc_ops import reference, routes, support
from mhc_ops.testing import KINDS, make_inputs

TOKEN = ("x", "residual", "post_layer_mix", "comb_res_mix")
THREADS = (1, 2)
TOKENS = 37
# The sizes give less than one part of the projection's sum, parts and a rest, and a mean that
# threads would share.
HIDDEN = (64, 264, 4096, 8192)


@contextmanager
def run_on(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cut(values, start, end):
    """Cut these tokens out of all that carries tokens, as views."""
    return {name: v[start:end] if name in TOKEN else v for name, v in values.items()}


def start_at(remainder, tensor):
    """Copy values to memory that starts ``remainder`` bytes behind a multiple of 64."""
    size = tensor.numel() * tensor.element_size()
    memory = torch.empty(size + 128, dtype=torch.uint8).numpy()
    offset = (remainder - memory.ctypes.data) % 64
    view = torch.frombuffer(memory[offset : offset + size], dtype=tensor.dtype).view(tensor.shape)
    assert view.data_ptr() % 64 == remainder
    assert view.storage_offset() == 0
    return view.copy_(tensor)


def check_cut(op, inputs, batch, start, end):
    """Check some tokens alone, in the batch's memory where an op takes that, and in new memory."""
    part = cut(inputs, start, end)
    want = {name: value[start:end] for name, value in batch.items()}
    if all(value.data_ptr() % 16 == 0 for value in tensors(part).values()):
        assert_equal(call(op, part), want)
    assert_equal(call(op, clone(part)), want)


@given(
    op=st.sampled_from(OPS),
    norm=st.booleans(),
    hidden=st.sampled_from((8, 64, 264, 1000)),
    hc_mult=st.sampled_from((4, 4, 1, 7, 8)),
    kind=st.sampled_from(list(KINDS)),
    threads=st.sampled_from(THREADS),
    tokens=st.integers(1, 300),
    data=st.data(),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_part_of_any_batch(op, norm, hidden, hc_mult, kind, threads, tokens, data):
    inputs = make_inputs(
        op, tokens, hidden, hc_mult=hc_mult, norm=norm and op != "post", kind=kind,
        sinkhorn_repeat=3,
    )  # fmt: skip
    start = data.draw(st.integers(0, tokens - 1), label="start")
    end = data.draw(st.integers(start + 1, tokens), label="end")
    with run_on(threads):
        check_cut(op, inputs, call(op, inputs), start, end)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("op", OPS)
def test_a_token_alone(op, hidden, threads):
    inputs = make_inputs(op, TOKENS, hidden, norm=NORMS[op][-1])
    with run_on(threads):
        batch = call(op, inputs)
        for token in (0, 5, 18, TOKENS - 1):
            check_cut(op, inputs, batch, token, token + 1)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("op", OPS)
def test_batches_that_threads_share(op, threads):
    """Run batches so large that threads share elementwise functions and small sums.

    torch shares both from 32768 elements on: the four weights of each of 8192 tokens.
    """
    inputs = make_inputs(op, 9000, 8, norm=NORMS[op][-1], sinkhorn_repeat=3)
    with run_on(threads):
        batch = call(op, inputs)
        for start, end in ((0, 1), (4499, 4502), (4095, 8200), (8999, 9000), (17, 9000)):
            check_cut(op, inputs, batch, start, end)


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("op", OPS)
def test_any_number_of_threads(op, hidden):
    inputs = make_inputs(op, TOKENS, hidden, norm=NORMS[op][-1])
    with run_on(1):
        want = call(op, inputs)
    for threads in (2, 3, 8):
        with run_on(threads):
            assert_equal(call(op, inputs), want)


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("op", OPS)
def test_memory_that_starts_anywhere(op, hidden):
    """Take memory that starts anywhere, as that of weights does that were mapped from a file."""
    for tokens in (1, 9):
        inputs = make_inputs(op, tokens, hidden, norm=NORMS[op][-1])
        want = call(op, inputs)
        for remainder in (4, 8, 16, 28, 32):
            moved = {name: start_at(remainder, v) for name, v in tensors(inputs).items()}
            assert_equal(call(op, inputs | moved), want)


@pytest.mark.parametrize("op", OPS)
def test_two_token_dimensions(op):
    inputs = make_inputs(op, (3, 5), 64, norm=NORMS[op][-1])
    flat = {name: v.flatten(0, 1) if name in TOKEN else v for name, v in inputs.items()}
    got = {name: value.flatten(0, 1) for name, value in call(op, inputs).items()}
    assert_equal(got, call(op, flat))


def test_steps_in_one_call_and_each_by_itself():
    inputs = make_inputs("fused_post_pre", TOKENS, 264, norm=True)
    post = {name: inputs.pop(name) for name in TOKEN}
    residual = call("post", post)["residual_out"]
    want = {"residual_out": residual} | call("pre", {"residual": residual} | inputs)
    assert_equal(call("fused_post_pre", post | inputs), want)


def test_exactness_of_a_token_alone():
    """Come as close to float64 as a product of one matrix for all tokens."""
    inputs = make_inputs("pre", 64, 4096)
    flat, fn = inputs["residual"].flatten(-2).float(), inputs["fn"]
    want = flat.double() @ fn.double().t()

    def error(got):
        return (got - want).square().mean().sqrt()

    assert error(reference._linear(flat, fn)) < 2 * error(flat @ fn.t())


def test_a_gradient_of_the_weights_takes_no_memory_for_every_token():
    """Train reference functions by one product for all tokens, which does not copy fn."""
    values, weights = torch.randn(3, 8), torch.randn(4, 8, requires_grad=True)
    product = reference._linear(values, weights)
    product.sum().backward()
    torch.testing.assert_close(weights.grad, values.sum(0).expand(4, 8))
    torch.testing.assert_close(product.detach(), reference._linear(values, weights.detach()))


# ------------------------------------------------------------------------ GPUs with clusters of 16

GPU_HIDDEN = (2816, 4096, 5120, 7168)
MANY = 1111


@pytest.fixture
def clusters():
    if support.arch(torch.device("cuda", 0)) not in routes.CLUSTER_ARCHS:
        pytest.skip("needs a GPU with clusters of 16 CTAs")


@pytest.mark.gpu
@pytest.mark.usefixtures("clusters")
@pytest.mark.parametrize("hidden", GPU_HIDDEN)
@pytest.mark.parametrize(("op", "norm"), [(op, norm) for op in OPS for norm in NORMS[op]])
def test_any_batch_on_a_gpu(op, norm, hidden):
    """Try both sides of every bound of the table: other kernels, clusters, groups and tiles."""
    inputs = make_inputs(op, MANY, hidden, device="cuda", norm=norm, kind="large_logits")
    batch = call(op, inputs)
    for tokens in sorted({2, 7, 8, 9, 16, 17, 20, 300, *bounds(hidden)}):
        for start in (0, (MANY - tokens) // 2, MANY - tokens):
            check_cut(op, inputs, batch, start, start + tokens)
    for token in (3, 31, 32, 500, MANY - 2):
        check_cut(op, inputs, batch, token, token + 1)


@pytest.mark.gpu
@pytest.mark.usefixtures("clusters")
@pytest.mark.parametrize("hidden", GPU_HIDDEN)
@pytest.mark.parametrize("repeats", [9, 64], ids=["4599_tokens", "32704_tokens"])
@pytest.mark.parametrize("op", ["fused_post_pre", "head", "post_head_streams"])
def test_many_tokens_on_a_gpu(op, repeats, hidden):
    """Give the same tokens again and again: each has the bits of the first time."""
    inputs = make_inputs(op, 511, hidden, device="cuda", norm=True, kind="large_logits")
    few = call(op, inputs)
    repeated = {
        name: v.repeat(repeats, *(1,) * (v.dim() - 1)) if name in TOKEN else v
        for name, v in inputs.items()
    }
    many = call(op, repeated)
    for name, value in few.items():
        assert torch.equal(
            many[name].unflatten(0, (repeats, 511)), value.expand(repeats, *value.shape)
        ), name


@pytest.mark.gpu
@pytest.mark.usefixtures("clusters")
@pytest.mark.parametrize("op", ["fused_post_pre", "pre", "head", "expand_pre"])
def test_as_many_tokens_as_are_promised_on_a_gpu(op):
    """Run 32,768 tokens, and the first, some and the last of them by themselves."""
    inputs = make_inputs(op, 32768, 5120, device="cuda", norm=True)
    batch = call(op, inputs)
    for start, tokens in ((0, 1), (16383, 3), (8190, 129), (20000, 4096), (32767, 1)):
        check_cut(op, inputs, batch, start, start + tokens)

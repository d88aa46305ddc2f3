"""Hold every op under ``torch.func.vmap`` to a loop over the batch, bit for bit."""

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mhc_ops
from helpers import NORMS, OPS, STREAMS, assert_equal, call, overload
from mhc_ops.testing import OUTPUTS, as_outputs, make_inputs

HIDDEN, BATCH = 256, 3
TOKEN = ("x", "residual", "post_layer_mix", "comb_res_mix")


def elements(op, device, leading, **make):
    """Make the arguments of every element of a batch."""
    return [
        make_inputs(
            op, leading, HIDDEN, device=device, norm=NORMS[op][-1], seed=seed, kind="large_logits",
            sinkhorn_repeat=3, **make,
        )
        for seed in range(BATCH)
    ]  # fmt: skip


def run(op, each, names, dim=0, out_dim=0):
    """Map an op over these arguments, each batched in this dimension; others are the first's."""
    given = [torch.stack([one[name] for one in each], dim) for name in names]

    def function(*values):
        return tuple(call(op, each[0] | dict(zip(names, values, strict=True))).values())

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where it has no rule for an op.
        out = torch.func.vmap(function, in_dims=dim, out_dims=out_dim)(*given)
    return dict(zip(OUTPUTS[op], out, strict=True))


def by_loop(op, each, names, out_dim=0):
    calls = [call(op, each[0] | {name: one[name] for name in names}) for one in each]
    return {name: torch.stack([c[name] for c in calls], out_dim) for name in calls[0]}


def of_tokens(op):
    return [name for name in make_inputs(op, 1, 8) if name in TOKEN]


def of_weights(op):
    inputs = make_inputs(op, 1, 8, norm=NORMS[op][-1])
    return [n for n, v in inputs.items() if isinstance(v, torch.Tensor) and n not in TOKEN]


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_a_batch_of_tokens(device, op, leading, subtests):
    each = elements(op, device, leading)
    names = of_tokens(op)
    for dim in (0, -1):
        with subtests.test(dim=dim):
            assert_equal(run(op, each, names, dim), by_loop(op, each, names))
    assert_equal(run(op, each, names, 0, -1), by_loop(op, each, names, -1))


@pytest.mark.parametrize("op", OPS)
def test_one_batched_argument(device, op, subtests):
    """Batch each argument alone; the others are the same for every element."""
    each = elements(op, device, (5,))
    for name in (*of_tokens(op), *of_weights(op)):
        with subtests.test(name):
            assert_equal(run(op, each, [name]), by_loop(op, each, [name]))


@pytest.mark.parametrize("op", OPS)
def test_a_batch_of_models(device, op):
    """Batch tokens and weights, as for an ensemble."""
    each = elements(op, device, (5,))
    names = [*of_tokens(op), *of_weights(op)]
    assert_equal(run(op, each, names), by_loop(op, each, names))
    assert_equal(run(op, each, names, -1), by_loop(op, each, names))


@pytest.mark.parametrize("op", OPS)
def test_an_empty_batch(device, op):
    one = make_inputs(op, (5,), HIDDEN, device=device, norm=NORMS[op][-1])
    for names in (of_tokens(op), [*of_tokens(op), *of_weights(op)]):
        given = [one[name].new_zeros(0, *one[name].shape) for name in names]

        def function(*values, names=names):
            return tuple(call(op, one | dict(zip(names, values, strict=True))).values())

        got = torch.func.vmap(function)(*given)
        assert [o.shape for o in got] == [(0, *o.shape) for o in call(op, one).values()]


@pytest.mark.parametrize("op", OPS)
def test_a_batch_of_tokens_is_one_call(op):
    """Call the op below once, and in a batch of models once for each element."""
    calls = []
    each = elements(op, "cpu", (5,))

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is overload(op):
                calls.append(func)
            return func(*args, **(kwargs or {}))

    with Count():
        run(op, each, of_tokens(op))
        assert len(calls) == 1
        if of_weights(op):
            run(op, each, of_weights(op))
            assert len(calls) == 1 + BATCH


@pytest.mark.parametrize("op", OPS)
def test_two_levels(device, op):
    each = elements(op, device, (2, 5))
    names = of_tokens(op)
    given = [torch.stack([one[name] for one in each]) for name in names]

    def function(*values):
        return tuple(call(op, each[0] | dict(zip(names, values, strict=True))).values())

    out = torch.func.vmap(torch.func.vmap(function))(*given)
    assert_equal(dict(zip(OUTPUTS[op], out, strict=True)), by_loop(op, each, names))


@pytest.mark.parametrize("op", OPS)
def test_a_single_token(device, op):
    """Give a token without leading dimensions the bits that it has in a batch of one."""
    for norm in NORMS[op]:
        inputs = make_inputs(op, 1, HIDDEN, device=device, norm=norm, kind="large_logits")
        alone = inputs | {name: inputs[name][0] for name in of_tokens(op)}
        want = {name: out[0] for name, out in call(op, inputs).items()}
        assert_equal(call(op, alone), want)
        if "post_layer_mix" in alone:
            alone["post_layer_mix"] = alone["post_layer_mix"].squeeze(-1)
            assert_equal(call(op, alone), want)


@pytest.mark.parametrize("op", OPS)
def test_what_does_not_fit_is_refused(device, op):
    each = elements(op, device, (5,))
    for one in each:
        one[STREAMS[op]] = one[STREAMS[op]].float()
    with pytest.raises(ValueError, match=rf"^mhc::{op}: expected {STREAMS[op]} of dtype"):
        run(op, each, of_tokens(op))


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_compiled(device, op, fresh_dynamo):
    each = elements(op, device, (5,))
    for names in (of_tokens(op), [*of_tokens(op), *of_weights(op)]):
        given = [torch.stack([one[name] for one in each]) for name in names]

        def function(*values, names=names):
            return getattr(mhc_ops, op)(**(each[0] | dict(zip(names, values, strict=True))))

        compiled = torch.compile(torch.func.vmap(function), fullgraph=True)
        with torch.no_grad():
            got = as_outputs(op, compiled(*given))
        assert_equal(got, by_loop(op, each, names))

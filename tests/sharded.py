"""Show that ops on DTensors in a group of processes give the bits of one process for all tokens.

``test_sharding.py`` starts each process of the group as torchrun would: the ranks print one JSON
object each, check to what went wrong, or to an empty text.
"""

import json
import sys
import traceback

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import mhc_ops
from mhc_ops import nn
from mhc_ops.testing import OUTPUTS, as_outputs, make_inputs

TOKEN = ("x", "residual", "post_layer_mix", "comb_res_mix")
# Tokens are more than the processes, as many, fewer, uneven or none, in one or two dimensions.
TOKENS = (8, 7, 1, 0, (3, 5))
HIDDEN = 64


def spread(inputs, mesh, placements):
    """Make every tensor a DTensor: place what carries tokens as told, and replicate weights."""
    whole = [Replicate()] * mesh.ndim
    return {
        name: distribute_tensor(v, mesh, placements if name in TOKEN else whole)
        if isinstance(v, torch.Tensor)
        else v
        for name, v in inputs.items()
    }


def run(op, inputs):
    return as_outputs(op, getattr(mhc_ops, op)(**inputs))


def assert_same(op, inputs, mesh, placements, comms=0):
    """Check that outputs are placed as the inputs, with the bits of one process for all tokens."""
    want = run(op, inputs)
    sharded = spread(inputs, mesh, placements)
    with CommDebugMode() as debug:
        got = run(op, sharded)
    assert debug.get_total_counts() == comms, debug.get_comm_counts()
    for name, value in want.items():
        assert isinstance(got[name], DTensor)
        assert got[name].placements == tuple(placements), (name, got[name].placements)
        assert got[name].shape == value.shape
        assert got[name].dtype == value.dtype
        assert torch.equal(got[name].full_tensor(), value), name


def check_op(op, mesh):
    for tokens in TOKENS:
        for norm in {False, op != "post"}:
            inputs = make_inputs(op, tokens, HIDDEN, norm=norm, sinkhorn_repeat=3)
            for dim in range(1 if isinstance(tokens, int) else 2):
                assert_same(op, inputs, mesh, [Shard(dim)])
            assert_same(op, inputs, mesh, [Replicate()])


def check_inference_mode(mesh):
    with torch.inference_mode():
        for op in OUTPUTS:
            inputs = make_inputs(op, 5, HIDDEN, norm=op != "post", sinkhorn_repeat=3)
            assert_same(op, inputs, mesh, [Shard(0)])


def check_two_mesh_dimensions(mesh):
    if mesh.size() != 4:
        return
    plane = init_device_mesh("cpu", (2, 2))
    for op in OUTPUTS:
        inputs = make_inputs(op, (6, 8), HIDDEN, norm=op != "post", sinkhorn_repeat=3)
        for placements in ([Shard(0), Shard(1)], [Shard(1), Replicate()], [Shard(0), Shard(0)]):
            assert_same(op, inputs, plane, placements)


def check_partial_sums(mesh):
    """Reduce the output of a sublayer that is split over processes to where the streams are."""
    inputs = make_inputs("post", 8, HIDDEN)
    want = run("post", inputs)["residual_out"]
    sharded = spread(inputs, mesh, [Shard(0)])
    share = inputs["x"] if mesh.get_local_rank() == 0 else torch.zeros_like(inputs["x"])
    sharded["x"] = DTensor.from_local(share, mesh, [Partial()])
    with CommDebugMode() as debug:
        got = mhc_ops.post(**sharded)
    (collective,) = debug.get_comm_counts()
    assert "reduce_scatter" in str(collective)
    assert debug.get_total_counts() == 1
    assert got.placements == (Shard(0),)
    assert torch.equal(got.full_tensor(), want)


def check_hidden_is_gathered(mesh):
    """Make streams whole that are sharded on their hidden dimension."""
    inputs = make_inputs("head", 8, HIDDEN)
    got = mhc_ops.head(**spread(inputs, mesh, [Shard(2)]))
    assert got.placements == (Replicate(),)
    assert torch.equal(got.full_tensor(), run("head", inputs)["layer_input"])


def check_sharded_weights(mesh):
    """Make a sharded ``fn`` whole, and refuse a sharded ``norm_weight``."""
    inputs = make_inputs("pre", 8, HIDDEN, norm=True)
    want = run("pre", inputs)
    sharded = spread(inputs, mesh, [Shard(0)])
    sharded["fn"] = distribute_tensor(inputs["fn"], mesh, [Shard(1)])
    got = run("pre", sharded)
    for name, value in want.items():
        assert torch.equal(got[name].full_tensor(), value), name
    sharded["norm_weight"] = distribute_tensor(inputs["norm_weight"], mesh, [Shard(0)])
    refusal = r"mhc::pre: expected norm_weight to be replicated, got \(Shard\(dim=0\),\)"
    with pytest.raises(RuntimeError, match=refusal):
        run("pre", sharded)


def check_modules(mesh):
    """Run a boundary of wired modules whose parameters DTensor has replicated."""
    connection = nn.HyperConnection(HIDDEN, sinkhorn_repeat=3).requires_grad_(False)
    norm = nn.FoldedRMSNorm(HIDDEN)
    nn.wire(connection)
    inputs = make_inputs("post", 7, HIDDEN)

    def state(values):
        names = ("residual", "x", "post_layer_mix", "comb_res_mix")
        return nn.StreamState(*(values[name] for name in names))

    want = connection.boundary(state(inputs), norm)
    torch.distributed.tensor.distribute_module(torch.nn.ModuleList([connection, norm]), mesh)
    sharded = spread(inputs, mesh, [Shard(0)])
    got = connection.boundary(state(sharded), norm)
    for a, b in zip(got, want, strict=True):
        assert a.placements == (Shard(0),)
        assert torch.equal(a.full_tensor(), b)


def check_compiled(mesh):
    """Compile to one graph with the bits of eager."""
    inputs = make_inputs("fused_post_pre", 8, HIDDEN, norm=True, sinkhorn_repeat=3)
    sharded = spread(inputs, mesh, [Shard(0)])
    compiled = torch.compile(mhc_ops.fused_post_pre, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        got = as_outputs("fused_post_pre", compiled(**sharded))
        eager = run("fused_post_pre", sharded)
    for name, value in eager.items():
        assert torch.equal(got[name].to_local(), value.to_local()), name


CHECKS = {op: check_op for op in OUTPUTS} | {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_") and name != "check_op"
}


def run_checks(checks):
    """Run each check with a mesh of all processes, and print what went wrong in this one."""
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    results = {}
    for name, check in checks.items():
        try:
            check(name, mesh) if check is check_op else check(mesh)
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
        dist.barrier()
    print(json.dumps(results), file=sys.stdout, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    run_checks(CHECKS)

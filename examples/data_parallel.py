"""Run a model data-parallel: every process has the whole model and a share of the sequences.

    torchrun --nproc-per-node 2 examples/data_parallel.py

The ops run on DTensors: each process works on its own sequences, without communication.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from mhc_ops import nn

SEQUENCES, TOKENS, HIDDEN = 6, 5, 256

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))

torch.manual_seed(0)  # every process makes the same weights and sequences
layer = torch.nn.ModuleDict(
    {
        "attention_hc": nn.HyperConnection(HIDDEN),
        "mlp_hc": nn.HyperConnection(HIDDEN),
        "head": nn.HyperHead(HIDDEN),
    }
).requires_grad_(False)
nn.wire(layer)
streams = torch.randn(SEQUENCES, TOKENS, 4, HIDDEN).bfloat16()


def attention(x: torch.Tensor) -> torch.Tensor:
    """Stand in for attention: give each token the sum of its sequence so far."""
    return x.float().cumsum(1).bfloat16()


@torch.no_grad()
def forward(streams: torch.Tensor) -> torch.Tensor:
    entry = layer["attention_hc"].pre(streams)
    entry = layer["mlp_hc"].boundary(entry.after(attention(entry.layer_input)))
    return layer["head"].collapse(entry.after(torch.tanh(entry.layer_input)))


want = forward(streams)
distribute_module(layer, mesh)  # the parameters become replicated DTensors
with CommDebugMode() as communication:
    got = forward(distribute_tensor(streams, mesh, [Shard(0)], src_data_rank=None))
share = distribute_tensor(want, mesh, [Shard(0)], src_data_rank=None)  # this communicates nothing
equal = torch.equal(got.to_local(), share.to_local())
print(
    f"rank {dist.get_rank()}: {got.to_local().shape[0]} of {SEQUENCES} sequences, equal: {equal}, "
    f"collectives: {communication.get_total_counts()}"
)
dist.barrier()  # gloo's threads let go of the last tensors before Python ends
dist.destroy_process_group()

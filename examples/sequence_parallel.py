"""Run a model sequence-parallel: streams stay sharded on tokens, and attention sees all tokens.

    torchrun --nproc-per-node 2 examples/sequence_parallel.py

The ops run on DTensors: each process works on its own tokens, without communication.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)

from mhc_ops import nn

TOKENS, HIDDEN = 10, 256

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))

torch.manual_seed(0)  # every process makes the same weights and tokens
layer = torch.nn.ModuleDict(
    {
        "attention_hc": nn.HyperConnection(HIDDEN),
        "mlp_hc": nn.HyperConnection(HIDDEN),
        "head": nn.HyperHead(HIDDEN),
    }
).requires_grad_(False)
nn.wire(layer)
streams = torch.randn(TOKENS, 4, HIDDEN).bfloat16()


def attention(x: torch.Tensor) -> torch.Tensor:
    """Stand in for attention: give each token the mean of the tokens up to it."""
    everything = x.full_tensor() if isinstance(x, DTensor) else x  # the only gather is here
    mean = (everything.float().cumsum(0) / torch.arange(1, TOKENS + 1)[:, None]).bfloat16()
    return DTensor.from_local(mean, mesh, [Replicate()]) if isinstance(x, DTensor) else mean


@torch.no_grad()
def forward(streams: torch.Tensor) -> torch.Tensor:
    entry = layer["attention_hc"].pre(streams)
    entry = layer["mlp_hc"].boundary(entry.after(attention(entry.layer_input)))
    return layer["head"].collapse(entry.after(torch.tanh(entry.layer_input)))


want = forward(streams)
distribute_module(layer, mesh)  # the parameters become replicated DTensors
got = forward(distribute_tensor(streams, mesh, [Shard(0)]))
share = distribute_tensor(want, mesh, [Shard(0)], src_data_rank=None)  # this communicates nothing
equal = torch.equal(got.to_local(), share.to_local())
print(f"rank {dist.get_rank()}: {got.to_local().shape[0]} of {TOKENS} tokens, equal: {equal}")
dist.barrier()  # gloo's threads let go of the last tensors before Python ends
dist.destroy_process_group()

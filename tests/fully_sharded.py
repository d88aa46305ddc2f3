"""Show that modules of ``mhc_ops.nn`` under FSDP2 give the bits of the same modules unsharded.

``test_fsdp.py`` starts each process of the group as ``test_sharding.py`` does. The units are those
of docs/fsdp.md: the fp32 parameters of a layer's hyper-connections, then the layer, then the model.
"""

import copy
import os

import torch
from sharded import run_checks
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mhc_ops import nn

HIDDEN, LAYERS, TOKENS = 64, 2, 5
FULL = StateDictOptions(full_state_dict=True)


def sublayer():
    return torch.nn.Linear(HIDDEN, HIDDEN, dtype=torch.bfloat16)


def norms(model):
    return [module for module in model.modules() if isinstance(module, nn.FoldedRMSNorm)]


def make(seed=0, wire=True):
    """Make a stack whose every parameter matters; the same in every process."""
    torch.manual_seed(seed)
    stack = nn.DecoderStack([(sublayer(), sublayer()) for _ in range(LAYERS)], HIDDEN)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    if wire:
        nn.wire(stack)
    return stack


def embedding(seed=0):
    torch.manual_seed(100 + seed)
    return torch.randn(TOKENS, HIDDEN).bfloat16()


def switch(fuse=False, plain=False):
    os.environ["MHC_OPS_FUSE_POST_PRE"] = str(int(fuse))
    for step in ("PRE", "POST"):
        os.environ[f"MHC_OPS_TILELANG_{step}"] = str(int(not plain))


def shard(stack, mesh, **options):
    """Shard as the page says."""
    for layer in stack.layers:
        fully_shard([layer.attn_hc, layer.ffn_hc], mesh=mesh)
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(stack.head, mesh=mesh)
    return fully_shard(stack, mesh=mesh, **options)


def shard_each(stack, mesh):
    """Make each hyper-connection a unit of its own."""
    for module in stack.modules():
        if isinstance(module, (nn.HyperConnection, nn.HyperHead)):
            fully_shard(module, mesh=mesh)
    for layer in stack.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(stack, mesh=mesh)


def shard_alone(stack, mesh):
    """Shard hyper-connections and leave everything else whole."""
    for layer in stack.layers:
        fully_shard(layer.attn_hc, mesh=mesh)
        fully_shard(layer.ffn_hc, mesh=mesh)
    return stack


def shard_with_norms(stack, mesh):
    """Shard norms in fp32 in one unit with the hyper-connections."""
    for layer in stack.layers:
        fully_shard([layer.attn_hc, layer.attn_norm, layer.ffn_hc, layer.ffn_norm], mesh=mesh)
        fully_shard(layer, mesh=mesh)
    fully_shard([stack.head, stack.norm], mesh=mesh)
    return fully_shard(stack, mesh=mesh)


def shard_each_norm(stack, mesh):
    for norm in norms(stack):
        fully_shard(norm, mesh=mesh)
    return shard(stack, mesh)


def assert_same(got, want):
    assert torch.equal(got.hidden, want.hidden)
    assert torch.equal(got.streams, want.streams)
    for a, b in zip(got.captured, want.captured, strict=True):
        assert torch.equal(a, b)


def assert_forward(model, want_of, mesh):
    """Compare forwards with those of the unsharded model, and see the parameters put away.

    Inference mode comes last: what FSDP2 gathers under it first, it cannot gather without it.
    """
    for seed, mode in ((0, torch.no_grad), (1, torch.no_grad), (2, torch.inference_mode)):
        with mode():
            assert_same(
                model(embedding(seed), capture=(0, 1)), want_of(embedding(seed), capture=(0, 1))
            )
    for layer in model.layers:
        if isinstance(model, FSDPModule):  # FSDP2 leaves the outermost unit gathered
            assert isinstance(layer.attn_hc.fn, DTensor)
            assert layer.attn_hc.fn.to_local().shape[0] == 24 // mesh.size()


def check_inference(mesh):
    for fuse in (True, False):
        switch(fuse)
        for how in (shard, shard_each):
            stack = make()
            assert_forward(how(make(), mesh), stack, mesh)


def check_inference_mode_alone(mesh):
    switch(fuse=True)
    stack, model = make(), shard(make(), mesh)
    with torch.inference_mode():
        for seed in range(2):
            assert_same(model(embedding(seed)), stack(embedding(seed)))


def check_hyper_connections_alone(mesh):
    switch(fuse=True)
    assert_forward(shard_alone(make(), mesh), make(), mesh)


def check_fp32_norms(mesh):
    switch(fuse=True)
    for how in (shard_with_norms, shard_each_norm):
        for wire_last in (False, True):
            stack, model = make(), make()
            for norm in (*norms(stack), *norms(model)):
                norm.float()
            nn.wire(stack)
            model = how(model, mesh)
            if wire_last:
                nn.wire(model)
            assert_forward(model, stack, mesh)


class Loop(torch.nn.Module):
    """Run layers one by one, where the state of each goes into the next."""

    def __init__(self, stack):
        super().__init__()
        self.layers, self.head, self.norm = stack.layers, stack.head, stack.norm

    def forward(self, x):
        state = nn.Copies(x)
        for layer in self.layers:
            state = layer(state)
        return self.head.collapse(state, self.norm)


def check_a_loop_of_its_own(mesh):
    switch(fuse=True)
    want, model = Loop(make()), shard(Loop(make()), mesh)
    with torch.no_grad():
        for seed in range(2):
            assert torch.equal(model(embedding(seed)), want(embedding(seed)))


def check_prefetch(mesh):
    """Gather the next layer early, and hold a model gathered, as people do with other modules."""
    switch(fuse=True)
    stack, model = make(), shard(make(), mesh)
    for layer, following in zip(model.layers, model.layers[1:], strict=False):
        layer.set_modules_to_forward_prefetch([following, following.attn_hc])
    assert_forward(model, stack, mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    with torch.no_grad():
        assert_same(model(embedding()), stack(embedding()))


def check_state_dicts(mesh):
    switch(fuse=True)
    stack, model = make(1), shard(make(1), mesh)
    full = get_model_state_dict(model, options=FULL)
    want = stack.state_dict()
    assert full.keys() == want.keys()
    assert all(torch.equal(full[name], want[name]) for name in full)
    for load in (
        lambda other: set_model_state_dict(other, full, options=FULL),
        lambda other: other.load_state_dict(model.state_dict()),
        lambda other: other.load_state_dict(model.state_dict(), assign=True),
    ):
        other = shard(make(2), mesh)
        with torch.no_grad():
            other(embedding())
        other.reshard()  # torch sets a full state dict only where every unit is sharded
        load(other)
        assert_forward(other, stack, mesh)
        again = get_model_state_dict(other, options=FULL)
        assert all(torch.equal(again[name], want[name]) for name in want)


def check_meta(mesh):
    """Make the model without memory, shard it, and load it in shards."""
    switch(fuse=True)
    stack = make(3)
    with torch.device("meta"):
        model = make(wire=False)
    shard(model, mesh).to_empty(device="cpu")
    set_model_state_dict(
        model,
        stack.state_dict() if mesh.get_local_rank() == 0 else {},
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    )
    nn.wire(model)
    assert_forward(model, stack, mesh)


def check_mixed_precision(mesh):
    """Keep every parameter in fp32; FSDP2 gathers those of sublayers and norms in bf16."""
    switch(fuse=True)
    stack, model = make(), make().float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)
    model = shard(model, mesh, mp_policy=policy)
    assert_forward(model, stack, mesh)


def step(model, optimizer, seed):
    optimizer.zero_grad()
    out = model(embedding(seed))
    (out.hidden.float().square().mean() + out.streams.float().mean()).backward()
    optimizer.step()


def assert_trained(model, stack, value=lambda parameter: parameter.full_tensor()):
    """Compare parameters after steps on the same tokens in every process."""
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (model, stack)]
    before = copy.deepcopy(stack.state_dict())
    for seed in range(2):
        step(model, optimizers[0], seed)
        step(stack, optimizers[1], seed)
    for got, (name, want) in zip(model.parameters(), stack.named_parameters(), strict=True):
        assert torch.equal(value(got), want), name
        assert not torch.equal(want, before[name]), name
    with torch.no_grad():
        assert_same(model(embedding(5)), stack(embedding(5)))


def check_training(mesh):
    """Train on the plain functions, which have a backward."""
    switch(plain=True)
    for how in (shard, shard_each):
        assert_trained(how(make(), mesh), make())


def check_training_fp32_norms(mesh):
    switch(plain=True)
    stack, model = make(), make()
    for norm in (*norms(stack), *norms(model)):
        norm.float()
    for one in (stack, model):
        nn.wire(one)
    assert_trained(shard_with_norms(model, mesh), stack)


def check_ddp(mesh):
    switch(fuse=True)
    stack, model = make(), DistributedDataParallel(make())
    with torch.no_grad():
        assert_same(model(embedding()), stack(embedding()))
    switch(plain=True)
    stack, inner = make(), make()
    assert_trained(DistributedDataParallel(inner), stack, value=lambda parameter: parameter)


def check_transformers(mesh):
    """Shard a DeepSeek-V4 of transformers after apply."""
    from mhc_ops.demo import models
    from mhc_ops.integrations import transformers as integration

    switch(fuse=True)
    stock = integration.apply(models.small_model(0, "cpu", pairs=1).requires_grad_(False))
    model = copy.deepcopy(stock)
    for layer in model.model.layers:
        fully_shard(
            [layer.attn_hc, layer.input_layernorm, layer.ffn_hc, layer.post_attention_layernorm],
            mesh=mesh,
        )
        other = {p for p in layer.parameters() if p.dtype != torch.bfloat16}
        fully_shard(layer, mesh=mesh, ignored_params=other)
    fully_shard([model.model.hc_head, model.model.norm], mesh=mesh)
    fully_shard(model, mesh=mesh)
    tokens = torch.arange(2 * 24).view(2, 24) % 256
    with torch.no_grad():
        for _ in range(2):
            want, got = stock(tokens).logits, model(tokens).logits
            assert torch.equal(got, want)


CHECKS = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}

if __name__ == "__main__":
    run_checks(CHECKS)

"""Compile boundaries with torch.compile into one graph for every token count.

    python examples/compile.py

``mark_unbacked`` says that the size of a dimension is not known while compiling. 0 and 1 tokens
then need no graph of their own, which they would need with ``mark_dynamic``. Mark dimension 0 of
every input that carries tokens; the ops tie these sizes together. Where a model also combines such
tensors outside these ops, pass ``shape_id="tokens"`` too (in the torch versions that have it).
"""

import torch
from torch._dynamo.decorators import mark_unbacked
from torch._dynamo.testing import CompileCounterWithBackend

import mhc_ops
from mhc_ops.testing import make_inputs

HIDDEN = 1024
DEVICE = "cuda" if mhc_ops.is_supported()[0] else "cpu"
STATE = ("x", "residual", "post_layer_mix", "comb_res_mix")

example = make_inputs("fused_post_pre", 1, HIDDEN, device=DEVICE, norm=True)
weights = {name: value for name, value in example.items() if name not in STATE}


def two_boundaries(x, residual, post_mix, comb_mix):
    for _ in range(2):
        residual, post_mix, comb_mix, layer_input = mhc_ops.fused_post_pre(
            x, residual, post_mix, comb_mix, **weights
        )
        x = -0.5 * layer_input  # this stands in for attention or MLP
    return mhc_ops.post(x, residual, post_mix, comb_mix)


counter = CompileCounterWithBackend("inductor")
compiled = torch.compile(two_boundaries, backend=counter, fullgraph=True)

with torch.no_grad():
    for tokens in (0, 1, 2, 7, 64, 512):
        inputs = make_inputs("fused_post_pre", tokens, HIDDEN, device=DEVICE, seed=tokens)
        state = [inputs[name] for name in STATE]
        for tensor in state:
            mark_unbacked(tensor, 0)
        same = torch.equal(compiled(*state), two_boundaries(*state))
        print(f"{tokens:4} tokens on {DEVICE}: equal to eager: {same}")
        if not same:
            raise SystemExit("compiled and eager differ")

print(f"graphs: {counter.frame_count}")

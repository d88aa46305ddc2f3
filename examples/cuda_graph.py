"""Capture boundaries into a CUDA graph, then replay it on new inputs.

python examples/cuda_graph.py
"""

import sys

import torch

import mhc_ops
from mhc_ops.testing import make_inputs

HIDDEN, TOKENS, BOUNDARIES = 4096, 8, 4
STATE = ("x", "residual", "post_layer_mix", "comb_res_mix")

supported, reason = mhc_ops.is_supported()
if not supported:
    print(f"this example needs a GPU, and there is none to use: {reason}")
    sys.exit(0)

# prewarm compiles and loads every kernel that these sizes reach, because nothing may be loaded
# during a capture.
mhc_ops.prewarm(hidden=[HIDDEN], max_tokens=TOKENS)

inputs = make_inputs("fused_post_pre", TOKENS, HIDDEN, device="cuda", norm=True)
state = [inputs[name] for name in STATE]
weights = {name: value for name, value in inputs.items() if name not in STATE}


def boundaries(x, residual, post_mix, comb_mix):
    for _ in range(BOUNDARIES):
        residual, post_mix, comb_mix, x = mhc_ops.fused_post_pre(
            x, residual, post_mix, comb_mix, **weights
        )
    return residual, x


with torch.inference_mode():
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # the capture has a stream of its own
        outputs = boundaries(*state)

    for seed in range(3):
        new = make_inputs("fused_post_pre", TOKENS, HIDDEN, device="cuda", seed=seed)
        for tensor, name in zip(state, STATE, strict=True):
            tensor.copy_(new[name])  # a graph reads the memory that was captured
        graph.replay()
        eager = boundaries(*state)
        same = all(torch.equal(a, b) for a, b in zip(outputs, eager, strict=True))
        print(f"replay {seed}: equal to eager: {same}")
        if not same:
            raise SystemExit("replay and eager differ")

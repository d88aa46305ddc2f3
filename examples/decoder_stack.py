"""Run a model of your own on hyper-connections: whole, in two halves, and with captured layers.

python examples/decoder_stack.py
"""

import os

import torch

import mhc_ops
from mhc_ops import checkpoint, nn

os.environ["MHC_OPS_FUSE_POST_PRE"] = "1"  # wire() reads this variable
HIDDEN, LAYERS, TOKENS = 256, 4, 8
DEVICE = "cuda" if mhc_ops.is_supported()[0] else "cpu"


class Mlp(torch.nn.Module):
    """Stand in for both attention and MLP, because any f(x) -> x will do."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(HIDDEN, 2 * HIDDEN, dtype=torch.bfloat16)
        self.down = torch.nn.Linear(2 * HIDDEN, HIDDEN, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.silu(self.up(x)))


torch.manual_seed(0)
stack = nn.DecoderStack([(Mlp(), Mlp()) for _ in range(LAYERS)], HIDDEN, device=DEVICE).to(DEVICE)
names = checkpoint.stack_names(LAYERS, "deepseek")
tensors = {theirs: torch.randn_like(stack.get_parameter(ours)) for ours, theirs in names.items()}
checkpoint.load_stack(stack, tensors)  # or the path of a real checkpoint's file or folder
nn.wire(stack)
embedding = torch.randn(TOKENS, HIDDEN, device=DEVICE).bfloat16()

with torch.inference_mode():
    hidden, streams, _ = stack(embedding)

    state = nn.expand(embedding)  # the first process of a pipeline starts here
    for layer in stack.layers[:2]:
        state = layer(state)
    sent = state.materialise()
    state = sent  # the second process starts here
    for layer in stack.layers[2:]:
        state = layer(state)
    halves = state.materialise()

    captured = stack(embedding, capture=(0, 2))
    del tensors["layers.1.hc_attn_fn"]
    try:
        checkpoint.load_stack(stack, tensors)
    except ValueError as error:
        print(error)

print(f"hidden {tuple(hidden.shape)}, streams {tuple(streams.shape)}")
print(f"in two halves, largest difference: {(halves - streams).abs().max():.1e}")
print(f"captured changes nothing: {torch.equal(captured.hidden, hidden)}")

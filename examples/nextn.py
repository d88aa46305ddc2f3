"""Run a draft layer (NextN, MTP) on the streams that a target model has before its head.

python examples/nextn.py
"""

import os

import torch

import mhc_ops
from mhc_ops import nn

HIDDEN, TOKENS, VOCABULARY = 256, 8, 64
DEVICE = "cuda" if mhc_ops.is_supported()[0] else "cpu"


def linear() -> torch.nn.Module:
    return torch.nn.Linear(HIDDEN, HIDDEN, bias=False, dtype=torch.bfloat16)


torch.manual_seed(0)
embed = torch.nn.Embedding(VOCABULARY, HIDDEN, dtype=torch.bfloat16)  # target and draft share it
target = nn.DecoderStack([(linear(), linear()) for _ in range(2)], HIDDEN)
draft = nn.NextNLayer(linear(), linear(), nn.DecoderLayer(linear(), linear(), HIDDEN))
model = torch.nn.ModuleList([embed, target, draft]).to(DEVICE)


def generate(switch: str) -> torch.Tensor:
    """Make three draft steps, and return the streams of the draft layer's boundary."""
    os.environ["MHC_OPS_FUSE_POST_PRE"] = switch
    nn.wire(model)
    tokens = torch.arange(TOKENS, device=DEVICE)
    hidden, streams, _ = target(embed(tokens))
    for step in range(1, 4):
        tokens = (hidden @ embed.weight.T).argmax(-1)
        hidden, streams = draft(embed(tokens), streams)
        print(f"draft step {step}: streams {tuple(streams.shape)}, tokens {tokens.tolist()}")

    layer = draft.layer
    entry = layer.attn_hc.pre(nn.expand(embed.weight[:TOKENS]), layer.attn_norm)
    state = entry.after(layer.attention(entry.layer_input))
    return layer.ffn_hc.boundary(state, layer.ffn_norm).residual


with torch.inference_mode():
    same = torch.equal(generate("1"), generate("0"))
print(f"streams of the boundary equal fused and unfused: {same}")

"""Run DeepSeek-V4 of transformers with its hyper-connections on the ops.

    python examples/deepseek_v4_layer.py

Load a real checkpoint with ``DeepseekV4ForCausalLM.from_pretrained(..., dtype=torch.bfloat16)``,
then call ``apply(model)``, which reads the switch.
"""

import os

import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

import mhc_ops
from mhc_ops.integrations.transformers import apply, remove

os.environ["MHC_OPS_FUSE_POST_PRE"] = "1"
DEVICE = "cuda" if mhc_ops.is_supported()[0] else "cpu"

torch.manual_seed(0)
config = DeepseekV4Config(
    vocab_size=256, hidden_size=256, moe_intermediate_size=128, num_hidden_layers=3,
    num_attention_heads=4, head_dim=64, qk_rope_head_dim=16, q_lora_rank=64, o_groups=2,
    o_lora_rank=64, n_routed_experts=8, num_experts_per_tok=2, index_n_heads=4, index_head_dim=32,
    index_topk=8, sliding_window=32, max_position_embeddings=1024,
)  # fmt: skip
model = DeepseekV4ForCausalLM(config).eval().to(DEVICE, torch.bfloat16)
for layer in model.model.layers:  # from_pretrained keeps these in float32 by itself
    layer.attn_hc.float()
    layer.ffn_hc.float()
model.model.hc_head.float()

tokens = torch.randint(0, 256, (1, 48), device=DEVICE)
with torch.inference_mode():
    stock = model(tokens).logits

    apply(model)
    ours = model(tokens).logits
    layer = model.model.layers[0]
    streams = torch.randn(1, 48, config.hc_mult, config.hidden_size, device=DEVICE).bfloat16()

    # These lines do by hand what the first half of a layer does: pre, attention, boundary.
    entry = layer.attn_hc.pre(streams, layer.input_layernorm)
    state = entry.after(torch.zeros_like(entry.layer_input))  # the zeros stand in for attention
    # Because the switch is on, this boundary is one fused_post_pre.
    entry = layer.ffn_hc.boundary(state, layer.post_attention_layernorm)
    print("a boundary keeps the streams:", torch.equal(entry.residual, state.materialise()))

    remove(model)
    again = model(tokens).logits

print(f"largest difference of the logits: {(ours - stock).abs().max():.4f}")
print("stock again after remove:", torch.equal(stock, again))

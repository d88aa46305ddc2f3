"""Run two sublayers on hyper-connections, in single steps and with the boundary fused.

python examples/post_pre.py
"""

import torch

import mhc_ops

TOKENS, STREAMS, HIDDEN = 8, 4, 1024
DEVICE = "cuda" if mhc_ops.is_supported()[0] else "cpu"
MIXES = STREAMS * (STREAMS + 2)

torch.manual_seed(0)


def hyper_connection() -> dict[str, torch.Tensor]:
    """Draw the parameters of one sublayer's hyper-connection at random."""
    return {
        "fn": torch.randn(MIXES, STREAMS * HIDDEN, device=DEVICE) / (STREAMS * HIDDEN) ** 0.5,
        "hc_scale": torch.ones(3, device=DEVICE),
        "hc_base": torch.zeros(MIXES, device=DEVICE),
        "norm_weight": torch.ones(HIDDEN, device=DEVICE, dtype=torch.bfloat16),
    }


# These are DeepSeek-V4's constants.
CONSTANTS = {
    "rms_eps": 1e-6,
    "hc_pre_eps": 1e-6,
    "hc_sinkhorn_eps": 1e-6,
    "hc_post_mult_value": 2.0,
    "sinkhorn_repeat": 20,
    "norm_eps": 1e-6,
}
attention, mlp = hyper_connection(), hyper_connection()


def sublayer(layer_input: torch.Tensor) -> torch.Tensor:
    return torch.tanh(layer_input)  # this stands in for attention or MLP


with torch.inference_mode():
    embedding = torch.randn(TOKENS, HIDDEN, device=DEVICE, dtype=torch.bfloat16)
    streams = embedding.unsqueeze(-2).repeat(1, STREAMS, 1)  # every stream starts as the embedding
    post_mix, comb_mix, layer_input = mhc_ops.pre(streams, **attention, **CONSTANTS)
    x = sublayer(layer_input)

    single_streams = mhc_ops.post(x, streams, post_mix, comb_mix)
    single = mhc_ops.pre(single_streams, **mlp, **CONSTANTS)
    fused = mhc_ops.fused_post_pre(x, streams, post_mix, comb_mix, **mlp, **CONSTANTS)

print(f"{DEVICE}: new streams {tuple(fused.residual_out.shape)}, next input {tuple(x.shape)}")
print(f"streams equal bit for bit: {torch.equal(fused.residual_out, single_streams)}")
difference = (fused.layer_input - single.layer_input).abs().max().item()
print(f"largest difference of the next layer input: {difference:.1e}")
print(f"row sums of the first token's comb: {fused.comb_mix[0].sum(-1).tolist()}")

"""Package a stack with AOTInductor, and save its results in Python, for main.cpp to compare.

python examples/aoti/package.py DIR
"""

import os
import sys
from pathlib import Path

import torch

import mhc_ops
from mhc_ops import nn

os.environ["MHC_OPS_FUSE_POST_PRE"] = "1"  # wire() reads this variable
HIDDEN = int(os.environ.get("HIDDEN", "256"))
DEVICE = "cuda" if mhc_ops.is_supported()[0] else "cpu"
folder = Path(sys.argv[1])


class Mlp(torch.nn.Module):
    """Stand in for both attention and MLP, because any f(x) -> x will do."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(HIDDEN, HIDDEN, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(self.up(x))


torch.manual_seed(0)
stack = nn.DecoderStack([(Mlp(), Mlp()) for _ in range(2)], HIDDEN).to(DEVICE)
for name, parameter in stack.named_parameters():
    if name.endswith(("fn", "base")):
        torch.nn.init.normal_(parameter, std=0.05)
nn.wire(stack.requires_grad_(False))

inputs = [torch.randn(tokens, HIDDEN, device=DEVICE).bfloat16() for tokens in (8, 1, 300)]
with torch.no_grad():
    tokens = torch.export.Dim("tokens", min=1, max=4096)
    program = torch.export.export(stack, (inputs[0],), dynamic_shapes=({0: tokens},))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "stack.pt2"))
    results = [stack(x) for x in inputs]
flat = [t.cpu() for x, r in zip(inputs, results, strict=True) for t in (x, r.hidden, r.streams)]
torch.save(flat, folder / "expected.pt")
print(f"{path}: {len(inputs)} results, on {DEVICE}")

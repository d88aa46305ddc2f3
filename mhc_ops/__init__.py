"""Provide DeepSeek-V4's manifold-constrained hyper-connections (mHC) as PyTorch ops.

Importing this package registers ``torch.ops.mhc.post``, ``pre``, ``fused_post_pre``, ``head``,
``expand_pre``, ``post_head`` and ``post_head_streams`` with CPU, CUDA, fake and autograd
implementations. The import loads neither TileLang nor CUDA; the first CUDA call loads what it
needs.

This example runs a sublayer, then the boundary to the next one, for 2 tokens at hidden size 256:

>>> import torch, mhc_ops
>>> streams = torch.randn(2, 4, 256).bfloat16()
>>> hc = (torch.randn(24, 1024) / 32, torch.ones(3), torch.zeros(24), 1e-6, 1e-6, 1e-6, 2.0, 20)
>>> post_mix, comb_mix, layer_input = mhc_ops.pre(streams, *hc)
>>> x = torch.tanh(layer_input)
>>> out = mhc_ops.fused_post_pre(x, streams, post_mix, comb_mix, *hc)
>>> torch.equal(out.residual_out, mhc_ops.post(x, streams, post_mix, comb_mix))
True
>>> {name: tuple(value.shape) for name, value in out._asdict().items()}
{'residual_out': (2, 4, 256), 'post_mix': (2, 4, 1), 'comb_mix': (2, 4, 4), 'layer_input': (2, 256)}
"""

from . import _sharding
from .ops import (
    ExpandPreOutput,
    FusedPostPreOutput,
    PostHeadOutput,
    PreOutput,
    expand_pre,
    fused_post_pre,
    head,
    post,
    post_head,
    post_head_streams,
    pre,
)
from .prewarm import PrewarmReport, prewarm
from .support import is_supported

_sharding.register_when_imported()

__version__ = "0.2.0"

__all__ = [
    "ExpandPreOutput",
    "FusedPostPreOutput",
    "PostHeadOutput",
    "PreOutput",
    "PrewarmReport",
    "expand_pre",
    "fused_post_pre",
    "head",
    "is_supported",
    "post",
    "post_head",
    "post_head_streams",
    "pre",
    "prewarm",
]

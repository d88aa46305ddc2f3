"""mHC (manifold-constrained hyper-connections) of DeepSeek-V4 as PyTorch ops.

Importing this package registers ``torch.ops.mhc.post``, ``pre``, ``fused_post_pre`` and ``head``
with CPU, CUDA, fake and autograd implementations. It imports neither TileLang nor CUDA: the first
CUDA call does.
"""

from . import _sharding
from .ops import FusedPostPreOutput, PreOutput, fused_post_pre, head, post, pre
from .prewarm import PrewarmReport, prewarm
from .support import is_supported

_sharding.register_when_imported()

__version__ = "0.1.0"

__all__ = [
    "FusedPostPreOutput",
    "PreOutput",
    "PrewarmReport",
    "fused_post_pre",
    "head",
    "is_supported",
    "post",
    "pre",
    "prewarm",
]

"""The ops, one to a file, each in the order checks, fake, CUDA, CPU, autograd, public function."""

from .fused_post_pre import FusedPostPreOutput, fused_post_pre
from .head import head
from .post import post
from .pre import PreOutput, pre

__all__ = ["FusedPostPreOutput", "PreOutput", "fused_post_pre", "head", "post", "pre"]

"""Define the ops, one in each file, in the order CPU function, definition, public function."""

from .expand_pre import ExpandPreOutput, expand_pre
from .fused_post_pre import FusedPostPreOutput, fused_post_pre
from .head import head
from .post import post
from .post_head import post_head
from .post_head_streams import PostHeadOutput, post_head_streams
from .pre import PreOutput, pre

__all__ = [
    "ExpandPreOutput",
    "FusedPostPreOutput",
    "PostHeadOutput",
    "PreOutput",
    "expand_pre",
    "fused_post_pre",
    "head",
    "post",
    "post_head",
    "post_head_streams",
    "pre",
]

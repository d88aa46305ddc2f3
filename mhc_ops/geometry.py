"""Hold the sizes that the kernels and the table of routes share.

A kernel is compiled for these sizes, so a change here is a change of the kernels:
``compiler.sources`` lists this file.
"""

from __future__ import annotations

HC_MULT = 4  # residual streams
HIDDEN_MULTIPLE = 256  # 32 lanes of 8 bf16 elements, the 16-byte loads of a warp
MIXES = HC_MULT * (HC_MULT + 2)  # rows of fn: 4 pre, 4 post, 16 comb
PARTIAL_WIDTH = 32  # floats of a partial row: 24 projections, the squares, padding to 128 bytes

MMA_TOKENS = 16  # rows of one m16n8k16 tile
MMA_COLUMNS = 8  # columns of such a tile, which are tokens of the kernels in clusters

# The kernels in clusters.
CLUSTER = 16  # CTAs of a cluster, each with a sixteenth of the hidden size
GROUP_TOKENS = 19  # the most tokens of a cluster of fused_post_pre: 7 clusters take 128
FEW_CLUSTERS = 3  # Of up to so many clusters of fused_post_pre, two kernels fit side by side.
WIDE_TILE_HIDDEN = 5120  # the largest hidden size whose tiles of 16 tokens fit in shared memory
EXPAND_PRE_GROUP_TOKENS = 32  # the most tokens of a cluster of expand_pre
POST_HEAD_GROUP_TOKENS = 32  # the most tokens of a cluster of post_head that takes them at once
# Up to which hidden size two CTAs of a kernel share an SM.
POST_HEAD_TWO_CTAS_HIDDEN = 4096
POST_HEAD_LOOP_TWO_CTAS_HIDDEN = 5120

# The kernels on a grid.
POST_PROJECTION_SLICE = 32  # hidden elements of a CTA: 128 CTAs read fn at H = 4096
PROJECTION_BLOCK = 32  # columns of one step of a warp: 4 lanes of 8
PROJECTION_WARPS = 4


def tile_tokens(hidden: int) -> int:
    """Return the tokens of a tile of kernels that loop: 16, or 8 if 16 do not fit."""
    return 16 if hidden <= WIDE_TILE_HIDDEN else 8


def post_head_ctas_per_sm(hidden: int, loop: bool) -> int:
    """Return how many CTAs of ``post_head`` share an SM, in a loop over tiles or not."""
    two = POST_HEAD_LOOP_TWO_CTAS_HIDDEN if loop else POST_HEAD_TWO_CTAS_HIDDEN
    return 2 if hidden <= two else 1

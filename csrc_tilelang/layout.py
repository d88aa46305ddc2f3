"""Say who owns what: sizes of lanes and warps, slices of the hidden dimension, tokens of a cluster.

Sizes that the table of routes needs, too, are those of ``mhc_ops.geometry``; kernels and steps take
all of them from here.
"""

import tilelang.language as T

from ..geometry import CLUSTER as CLUSTER
from ..geometry import HC_MULT as HC_MULT
from ..geometry import MIXES as MIXES
from ..geometry import MMA_COLUMNS as MMA_COLUMNS
from ..geometry import MMA_TOKENS as MMA_TOKENS
from ..geometry import PARTIAL_WIDTH as PARTIAL_WIDTH
from ..geometry import POST_PROJECTION_SLICE as POST_PROJECTION_SLICE
from ..geometry import PROJECTION_BLOCK as PROJECTION_BLOCK
from ..geometry import PROJECTION_WARPS as PROJECTION_WARPS

WARP = 32
VECTOR = 8  # bf16 elements in 16 bytes
COMB = 2 * HC_MULT  # The mixes are pre, then post, then comb from this column on.
SQUARES = MIXES  # The column that holds the sum of squares, behind the mixes.
SPLIT_TERMS = 3  # bf16 terms of an fp32 weight: 8 + 8 + 8 bits of mantissa


def halves(size: int) -> tuple[int, ...]:
    """The steps of a sum of ``size`` values as a tree, which a kernel loops over: 8, 4, 2, 1."""
    return tuple(size >> i for i in range(1, size.bit_length()))


@T.macro
def add_tree(values_local, steps):
    """values_local[0] = the sum of 2 * steps[0] values, in an order that nothing changes."""
    for half in steps:
        for i in T.unroll(half):
            values_local[i] = values_local[i] + values_local[i + half]


# The hidden dimension. Each CTA of a cluster owns a slice of the hidden dimension in all streams.

SLICE_TREE = halves(CLUSTER)


def slice_size(hidden: int) -> int:
    """Hidden elements of a CTA, a multiple of 16."""
    return hidden // CLUSTER


# The tokens. Each cluster owns consecutive tokens: ``group_tokens`` of them, and the first
# ``larger_groups`` clusters, which start first, own ``unit`` tokens more. The last cluster owns the
# rest.


def clusters(tokens, group_tokens, larger_groups=0, unit=0):
    """Clusters that share ``tokens``."""
    return T.ceildiv(tokens - larger_groups * unit, group_tokens)


def first_token(cluster, group_tokens, larger_groups=0, unit=0):
    """The first token of a cluster."""
    return cluster * group_tokens + T.min(cluster, larger_groups) * unit


def most_tokens(cluster, group_tokens, larger_groups=0, unit=0):
    """Tokens of a cluster, if so many are left."""
    return group_tokens + T.if_then_else(cluster < larger_groups, unit, 0)


def tokens_of_tile(i, size, count):
    """Tokens of tile ``i`` of ``count`` tokens, in tiles of ``size``; 0 past the end."""
    return T.max(T.min(size, count - i * size), 0)

"""Clusters whose lanes own columns of the hidden dimension: ``post_head`` and ``expand_pre``.

A CTA owns a slice of the hidden dimension, and each of its column warps 32 columns of the slice. A
tile is 8 tokens. A lane owns 8 of the warp's columns of one token of a tile, which are the B
fragment of two mma steps: logical k of both steps at position q of a quad of lanes is physical 8 q
to 8 q + 7.
"""

import tilelang.language as T

from ..arguments import Context
from ..device import prefetch_l2_bulk
from ..layout import CLUSTER, HC_MULT, MMA_COLUMNS, SLICE_TREE, VECTOR, WARP, add_tree, slice_size

QUAD = 4  # lanes that share the columns of a warp
COLUMNS = QUAD * VECTOR  # of a warp
TILE = MMA_COLUMNS  # tokens
# Floats from token to token of the projections that CTAs send: the rows of 8 tokens begin on
# different banks.
SUMS_IN_PITCH = CLUSTER * HC_MULT + 4


def column_warps(hidden: int) -> int:
    """Return how many warps own columns.

    The last one owns only 16 where the slice is not a multiple of 32.
    """
    return -(-slice_size(hidden) // COLUMNS)


class Columns(Context):
    """Where a lane is, and the columns that the lane owns."""

    @property
    def row(self):
        """The token of a tile whose columns the lane owns."""
        return self.lane // QUAD

    @property
    def in_slice(self):
        """The first of the lane's columns, counted from the first one of the slice."""
        return self.warp * COLUMNS + self.lane % QUAD * VECTOR

    @property
    def first_column(self):
        """The first of the lane's columns."""
        return self.rank * slice_size(self.hidden) + self.in_slice

    @property
    def inside(self):
        """Whether the lane's columns exist."""
        size = slice_size(self.hidden)
        return True if size % COLUMNS == 0 else self.in_slice < size

    def tokens(self, i):
        """The number of tokens of tile ``i``, which has at least one."""
        return T.min(TILE, self.count - i * TILE)

    def first_token(self, i):
        """The first token of tile ``i``."""
        return self.first + i * TILE


def columns_of(hidden: int, i_c, first, count) -> Columns:
    """Return where a thread of CTA ``i_c`` is; its cluster has ``count`` tokens from ``first`` on.

    Args:
        hidden: the hidden size.
        i_c: the CTA.
        first: the first token of its cluster, no variable (``T.alloc_var``).
        count: the number of its tokens, likewise.
    """
    tx = T.get_thread_binding()
    return Columns(hidden, tx, tx % WARP, tx // WARP, i_c % CLUSTER, first, count)


@T.macro
def prefetch_rows(fn, columns, threads):
    """This CTA's columns of all rows of fn on their way to L2, asked for by ``threads`` threads."""
    rows = fn.shape[0]
    for i in T.unroll(-(-rows * HC_MULT // threads)):
        segment = i * threads + columns.tx
        if segment < rows * HC_MULT:
            prefetch_l2_bulk(
                fn[
                    segment // HC_MULT,
                    segment % HC_MULT * columns.hidden + columns.rank * slice_size(columns.hidden),
                ],
                slice_size(columns.hidden) * 4,
            )


@T.macro
def add_slices(slices_shared, token, first, stride, total):
    """total[0] = the sum over the CTAs of what each has sent of a token, in one fixed order."""
    slices_local = T.alloc_local((CLUSTER,), "float32")
    for c in T.unroll(CLUSTER):
        slices_local[c] = slices_shared[token, c * stride + first]
    add_tree(slices_local, SLICE_TREE)
    total[0] = slices_local[0]

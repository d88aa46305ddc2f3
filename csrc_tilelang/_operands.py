"""Old names of ``steps.project`` and ``layout``, until no kernel uses them."""

import tilelang.language as T

from .layout import SLICE_TREE as SLICE_TREE
from .layout import add_tree as add_tree
from .layout import slice_size as slice_size
from .steps import project
from .steps.project import ALL_OPERANDS as ALL_OPERANDS
from .steps.project import ALL_PAIRS as ALL_PAIRS
from .steps.project import ALL_STEPS as ALL_STEPS
from .steps.project import BLOCK_TERMS as UNIT_TERMS
from .steps.project import BLOCK_WEIGHTS as UNIT_WEIGHTS
from .steps.project import CHUNK as CHUNK
from .steps.project import OPERANDS as OPERANDS
from .steps.project import ROW_TILES as ROW_TILES
from .steps.project import STEPS as STEPS
from .steps.project import SUMS as SUMS
from .steps.project import SUMS_PITCH as SUMS_PITCH
from .steps.project import add_parts as add_parts
from .steps.project import split_block as split_unit
from .steps.project import store_sums as store_sums
from .steps.project import term as term

__all__ = ["UNIT_TERMS", "UNIT_WEIGHTS", "split_unit"]


@T.macro
def multiply(words_local, lane, terms_local, t0, terms_shared, slot, fragment, part, sums_local):
    """``project.multiply`` with its old parameters."""
    project.multiply(
        words_local, lane, project.Terms(terms_local, t0, terms_shared, slot), fragment, part,
        sums_local,
    )  # fmt: skip

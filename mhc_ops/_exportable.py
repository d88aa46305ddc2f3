"""Named tuples that ``torch.export`` can save and AOTInductor can return."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch.utils._pytree import _register_namedtuple

Class = TypeVar("Class", bound=type)


def exportable(cls: Class) -> Class:
    """Give a class of named tuples the name by which saved programs know it.

    A program that returns named tuples is refused when it is saved or packaged, where their class
    has no such name. torch has no public function that gives it one. Example inputs are saved with
    a program, and read back only where their class counts as safe: it holds tensors and no code.
    """
    torch.serialization.add_safe_globals([cls])
    _register_namedtuple(cls, serialized_type_name=f"mhc_ops.{cls.__name__}")
    return cls

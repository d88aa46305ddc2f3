"""Make named tuples that ``torch.export`` can save and AOTInductor can return."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch.utils._pytree import _register_namedtuple

Class = TypeVar("Class", bound=type)


def exportable(cls: Class) -> Class:
    """Give a class of named tuples the name by which saved programs know it.

    torch refuses to save or package a program that returns named tuples whose class has no such
    name, and has no public function that gives a class the name. Example inputs are saved with a
    program, and read back only if their class is registered as safe. The class of a named tuple of
    tensors is safe, because it holds tensors and no code.
    """
    torch.serialization.add_safe_globals([cls])
    _register_namedtuple(cls, serialized_type_name=f"mhc_ops.{cls.__name__}")
    return cls

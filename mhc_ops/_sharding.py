"""Give DTensor the sharding rules of the ops: each process runs its own tokens.

The ops work token by token. So streams, sublayer outputs and mixes that are sharded on a token
dimension go through an op without communication, and the outputs are sharded in the same way. On
the CPU the outputs have the bits that a single process computes for all tokens. Weights are
replicated.

Importing ``torch.distributed.tensor`` takes long (benchmarks/NOTES.md, "Import of DTensor"), so the
rules are registered when something else imports that module; see :func:`register_when_imported`.

The rules use ``register_op_strategy`` of torch 2.11 to 2.13 instead of the experimental
``register_sharding``, which gathers where there are fewer tokens than processes.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch

from ._library import SCHEMAS

_DTENSOR = "torch.distributed.tensor"

# The first of these that is sharded on tokens decides the placement of all. The largest tensors,
# the streams, come first.
_TOKEN_ARGUMENTS = ("residual", "x", "comb_res_mix", "post_layer_mix")


def _strategy(op: Any, op_schema: Any) -> Any:
    """Return the single way in which DTensor runs an op, from the placements of its arguments.

    On each dimension of the mesh, all token arguments and outputs get the placement of the first
    token argument that is sharded there on a token dimension; where no argument is, they are
    replicated. DTensor redistributes an argument whose placement differs.
    """
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._dtensor_spec import DTensorSpec
    from torch.distributed.tensor._op_schema import OpSpec, OpStrategy

    arguments = [argument for argument in op._schema.arguments if not argument.kwarg_only]
    given = {
        argument.name: strategy.strategies[0].output_spec
        for argument, strategy in zip(arguments, op_schema.args_schema, strict=True)
        if isinstance(strategy, OpStrategy)
    }
    if "residual" in given:
        mesh, token_dims = given["residual"].mesh, given["residual"].ndim - 2
    else:
        mesh, token_dims = given["x"].mesh, given["x"].ndim - 1

    def placement(mesh_dim: int) -> Any:
        for name in _TOKEN_ARGUMENTS:
            wanted = given[name].placements[mesh_dim] if name in given else None
            if isinstance(wanted, Shard) and wanted.dim < token_dims:
                return wanted
        return Replicate()

    by_token = tuple(placement(mesh_dim) for mesh_dim in range(mesh.ndim))
    whole = (Replicate(),) * mesh.ndim
    inputs = [
        DTensorSpec(
            mesh,
            by_token if name in _TOKEN_ARGUMENTS else whole,
            tensor_meta=spec.tensor_meta,
        )
        for name, spec in given.items()
    ]
    norm_weight = op_schema.kwargs_schema.get("norm_weight")
    if norm_weight is not None:
        spec = norm_weight.strategies[0].output_spec
        if spec.placements != whole:  # DTensor does not redistribute keyword arguments
            raise ValueError(
                f"mhc::{op._opname}: expected norm_weight to be replicated, got {spec.placements}"
            )
        inputs.append(spec)
    outputs = tuple(DTensorSpec(mesh, by_token) for _ in op._schema.returns)
    return OpStrategy([OpSpec(outputs if len(outputs) > 1 else outputs[0], inputs)])


def register_rules() -> None:
    """Tell DTensor how to run every op of the package."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo

    propagator = DTensor._op_dispatcher.sharding_propagator
    for name in SCHEMAS:
        op = getattr(torch.ops.mhc, name).default
        # DTensor caches the result of a rule. This key makes it ask the rule again when the
        # placement of norm_weight differs.
        info = RuntimeSchemaInfo(static_kwargkey=["norm_weight"])
        propagator.register_op_strategy(op, partial(_strategy, op), info)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Find DTensor's module as Python does, and register the rules once the module has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _DTENSOR:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            sys.meta_path.remove(self)
            register_rules()

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def register_when_imported() -> None:
    """Register the rules now if DTensor is imported, else as soon as something imports DTensor."""
    if _DTENSOR in sys.modules:
        register_rules()
    else:
        sys.meta_path.insert(0, _WhenImported())

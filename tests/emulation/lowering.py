"""From a TileLang program to CUDA source, parameters and launch configuration; no GPU, no nvcc."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tilelang
from tilelang import tvm


@dataclass(frozen=True)
class Parameter:
    """A parameter of a TileLang program.

    Attributes:
        name: its name in the program and in the CUDA source.
        dtype: TileLang's name of its type.
        shape: ints and names of dynamic sizes; None for a scalar.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...] | None


@dataclass(frozen=True)
class Lowered:
    """A program as TileLang gives it to nvcc and to the launch.

    Attributes:
        source: the CUDA source.
        parameters: in the order of the program.
        waits: whether the kernel calls cudaGridDependencySynchronize.
        dynamic_shared: bytes of dynamic shared memory.
        extents: ``blockIdx.x`` ... ``threadIdx.z`` to an expression of scalars and dynamic sizes.
        cluster: CTAs of a cluster, along x.
    """

    source: str
    parameters: tuple[Parameter, ...]
    waits: bool
    dynamic_shared: int
    extents: Mapping[str, Any]
    cluster: int = 1

    def dim3(self, axis: str, values: Mapping[str, int]) -> tuple[int, int, int]:
        """Extent of ``blockIdx`` or ``threadIdx`` for these scalars and dynamic sizes."""
        x, y, z = (_evaluate(self.extents.get(f"{axis}.{i}", 1), values) for i in "xyz")
        return x, y, z


def _evaluate(expression: Any, values: Mapping[str, int]) -> int:
    if isinstance(expression, int):
        return expression
    free = tvm.tirx.analysis.undefined_vars(expression)
    bound = {var: tvm.tirx.IntImm(var.dtype, values[var.name]) for var in free}
    return int(tvm.arith.Analyzer().simplify(tvm.tirx.stmt_functor.substitute(expression, bound)))


def _size(extent: Any) -> int | str:
    return extent.name if isinstance(extent, tvm.tirx.Var) else int(extent)


def lower(program: Any, arch: str, pass_configs: Mapping[Any, Any]) -> Lowered:
    """Lower a program as ``tilelang.compile`` does, without compiling what comes out.

    Args:
        program: a TileLang prim_func.
        arch: such as ``sm_90a``.
        pass_configs: as for ``tilelang.compile``.
    """
    parameters = []
    for var in program.params:
        if var in program.buffer_map:
            buffer = program.buffer_map[var]
            parameters.append(
                Parameter(buffer.name, str(buffer.dtype), tuple(_size(n) for n in buffer.shape))
            )
        else:
            parameters.append(Parameter(var.name, str(var.dtype), None))

    target = tvm.target.Target({"kind": "cuda", "arch": arch})
    config = {getattr(key, "value", key): value for key, value in pass_configs.items()}
    with tvm.transform.PassContext(opt_level=3, config=config), target:
        artifact = tilelang.lower(program, target=target)
    (function,) = artifact.device_mod.functions.values()
    cluster, *others = (int(n) for n in function.attrs.get("cluster_dims", (1, 1, 1)))
    if others != [1, 1]:
        raise ValueError(f"expected clusters along x, got {(cluster, *others)}")
    return Lowered(
        source=artifact.kernel_source,
        parameters=tuple(parameters),
        waits="cudaGridDependencySynchronize()" in artifact.kernel_source,
        dynamic_shared=int(function.attrs.get("dyn_shared_memory_buf", 0)),
        extents=dict(function.attrs["thread_extent"]),
        cluster=cluster,
    )

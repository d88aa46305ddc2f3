"""Run the ops on the emulation of their kernels, with their own routes, plans and launches.

Only the launch itself goes to the emulation (see ``tests/emulation``), so what is compared with the
oracle is host code and kernels together.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emulation import Kernel
from kept import Kept
from mhc_ops import compiler, formula, jit, routes, support
from mhc_ops._arguments import recipe
from mhc_ops.compiler import Compiled, Lowered
from mhc_ops.native import host, launcher, serve
from mhc_ops.routes import Key
from mhc_ops.testing import OUTPUTS, as_outputs, assert_matches_oracle, poisoned_memory

ARCH = "sm_90a"
MAX_TOKENS = 300  # Only post_head has a bound of the table beyond this number.
HIDDEN = 1280  # A collapse takes several warps, the last of them partly idle.
CASES = tuple((op, norm) for op in OUTPUTS for norm in (False, True) if not (op == "post" and norm))
TOKENWISE = ("x", "residual", "post_layer_mix", "comb_res_mix")
ENDS = ("expand_pre", "post_head")
# These kernels run in clusters.
IN_CLUSTERS = ("fused_post_pre", "fused_post_pre_persistent", "pre", *ENDS)


def key_of(
    kernel: str, hidden: int, *, arch: str = ARCH, norm: bool = False, **options: int
) -> Key:
    """Return the one key of a kernel with these options, with the RMSNorm where it has one."""
    (key,) = {
        launch.key(hidden, arch, norm)
        for op in routes.ops()
        for row in routes.routes(op, hidden, arch)
        for launch in row.launches
        if launch.kernel == kernel and options.items() <= dict(launch.options).items()
    }
    return key


def runs_in_clusters(op: str, hidden: int, arch: str, tokens: int) -> bool:
    """Say whether a kernel in clusters serves a call."""
    launches = routes.row(op, hidden, arch, tokens).launches
    return any(launch.kernel in IN_CLUSTERS for launch in launches)


@functools.cache
def _lowered_by() -> tuple[str, ...]:
    """Return what decides how a program is lowered, besides the program and the architecture."""
    texts = [Path(str(module.__file__)).read_text() for module in (compiler, formula)]
    return (importlib.metadata.version("tilelang"), sys.version, *texts)


# TileLang asks z3 whatever its own simplifier does not prove, which is half of the time that
# lowering takes. z3 without a solver of arithmetic proves less, and nothing that is false.
PROVER = ("smt.arith.solver", "0")


@contextlib.contextmanager
def _quick_prover() -> Iterator[None]:
    import z3  # TileLang brings the package.

    name, value = PROVER
    before = z3.get_param(name)
    z3.set_param(name, value)
    try:
        yield
    finally:
        z3.set_param(name, before)


def lower_key(key: Key, kept: Kept, *, as_shipped: bool = False) -> Lowered:
    """Lower the kernel of a key, or return what was kept of the same program.

    Args:
        key: which kernel.
        kept: where it is kept.
        as_shipped: lower it with all that z3 can prove. What z3 proves changes no kernel, and
            ``test_cubin.py`` compares the sources of both ways.

    Returns:
        The kernel.
    """
    from tilelang import tvm

    program = compiler.program(key)

    def lower(output: Path) -> None:
        with contextlib.nullcontext() if as_shipped else _quick_prover():
            output.write_bytes(pickle.dumps(compiler.lower(program, key.arch)))

    # The text is the whole program, so also what a test has changed in its factory or sizes.
    text = tvm.ir.save_json(program)
    prover = "as shipped" if as_shipped else "=".join(PROVER)
    file = kept.get(key.kernel, ".lowered", (*_lowered_by(), prover, key.arch, text), lower)
    return pickle.loads(file.read_bytes())


def _as_compiled(lowered: Lowered) -> Compiled:
    return Compiled(
        b"",
        lowered.symbol,
        lowered.parameters,
        lowered.grid[:2],
        lowered.block[0],
        lowered.cluster,
        lowered.shared,
        lowered.pdl,
        {},
    )


class Device:
    """Run ops on the emulation, as if it had ``sms`` multiprocessors.

    Attributes:
        launched: the keys that were launched.
    """

    def __init__(self, monkeypatch, kernel: Callable[[Key], Kernel]) -> None:
        self.launched: set[Key] = set()
        self.sms = 4
        self.arch = ARCH
        self._kernel = kernel
        self._loaded: list[tuple[Key, Kernel]] = []  # Handles are its indices.

        monkeypatch.setattr(jit, "loaded", self._load)
        monkeypatch.setattr(launcher, "launch", self._launch)
        monkeypatch.setattr(launcher, "capture", lambda kernel, stream: 0)
        monkeypatch.setattr(serve, "current_stream", lambda device: 0)
        monkeypatch.setattr(host, "remember", lambda plan, device: None)
        monkeypatch.setattr(support, "arch", lambda device: self.arch)
        monkeypatch.setattr(support, "sm_count", lambda device: self.sms)
        monkeypatch.setattr(support, "require", lambda op, device: None)

    def _load(self, key: Key, device: torch.device) -> launcher.Kernel:
        run = self._kernel(key)
        self._loaded.append((key, run))
        return launcher.Kernel(len(self._loaded) - 1, _as_compiled(run.lowered))

    def _launch(
        self,
        op: str,
        kernel: launcher.Kernel,
        grid: Sequence[int],
        values: Mapping[str, Any],
        stream: int,
    ) -> None:
        key, run = self._loaded[kernel.handle]
        shaped = dict(values)
        for argument in run.lowered.arguments:
            # Whatever the shape, a kernel gets an address and as many elements as it asks for.
            if argument.shape is not None and argument.name in shaped:
                sizes = [values[n] if isinstance(n, str) else n for n in argument.shape]
                shaped[argument.name] = shaped[argument.name].view(sizes)
        if values.get("early"):
            run.early = ("fn",)
        self.launched.add(key)
        run(grid, shaped)

    def run(self, op: str, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Run the CUDA implementation of an op; return output name to tensor."""
        with poisoned_memory():
            return as_outputs(op, serve.serve(op, recipe(op).bind((), inputs)))

    def check(self, op: str, inputs: dict[str, Any]) -> None:
        """Run an op and compare every output with the float64 oracle."""
        streams = None
        if op == "post_head":  # The op does not return its streams.
            names = ("x", "residual", "post_layer_mix", "comb_res_mix")
            streams = self.run("post", {name: inputs[name] for name in names})["residual_out"]
        assert_matches_oracle(op, inputs, tuple(self.run(op, inputs).values()), streams)

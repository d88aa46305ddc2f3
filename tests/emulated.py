"""The ops on the emulation of their kernels, with their own dispatch and launches.

Only the launch itself goes to the emulation (see ``tests/emulation``), so what is compared with the
oracle is host code and kernels together.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from emulation import Kernel, Lowered, lower
from mhc_ops import dispatch, host, jit, support
from mhc_ops.testing import OUTPUTS, as_outputs, assert_matches_oracle, poisoned_memory

ARCH = "sm_90a"
MAX_TOKENS = 300  # beyond every threshold of the dispatch but that of post_head
HIDDEN = 1280  # several warps of a collapse, the last of them partly idle
CASES = tuple((op, norm) for op in OUTPUTS for norm in (False, True) if not (op == "post" and norm))
TOKENWISE = ("x", "residual", "post_layer_mix", "comb_res_mix")
EARLY = (dispatch.ONE_LAUNCH, dispatch.PERSISTENT, dispatch.PRE)  # may read fn early
ENDS = ("expand_pre", "post_head")  # in clusters; post_head_streams runs the latter's kernels


def lower_key(key: dispatch.Key) -> Lowered:
    """The kernel of a key as it ships."""
    return lower(jit.program(key), key.arch, jit.pass_configs())


class Device:
    """Runs ops on the emulation, as if it had ``sms`` multiprocessors.

    Attributes:
        launched: the keys that were launched.
    """

    def __init__(self, monkeypatch, kernel: Callable[[dispatch.Key], Kernel]) -> None:
        self.launched: set[dispatch.Key] = set()
        self.sms = 4
        self.arch = ARCH

        def launch(key: dispatch.Key, device: torch.device, *args: Any) -> None:
            run = kernel(key)
            if key.kernel in EARLY and args[-1]:
                run.early = ("fn",)
            self.launched.add(key)
            run(*args)

        monkeypatch.setattr(jit, "launch", launch)
        monkeypatch.setattr(jit, "entry_point", lambda key, device: None)
        monkeypatch.setattr(host, "remember", lambda *plan: None)
        monkeypatch.setattr(support, "arch", lambda device: self.arch)
        monkeypatch.setattr(support, "sm_count", lambda device: self.sms)
        monkeypatch.setattr(support, "require", lambda op, device: None)

    def run(self, op: str, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The CUDA implementation of an op; output name to tensor."""
        module = importlib.import_module(f"mhc_ops.ops.{op}")
        with poisoned_memory():
            return as_outputs(op, module._cuda(**inputs))

    def check(self, op: str, inputs: dict[str, Any]) -> None:
        """Run an op and compare every output with the float64 oracle."""
        streams = None
        if op == "post_head":  # which does not return them
            names = ("x", "residual", "post_layer_mix", "comb_res_mix")
            streams = self.run("post", {name: inputs[name] for name in names})["residual_out"]
        assert_matches_oracle(op, inputs, tuple(self.run(op, inputs).values()), streams)

"""The CUDA source of every kernel, run on the CPU: see ``tests/emulation``.

The ops run as on a GPU, with their own dispatch and launches; only the launch itself goes to the
emulation. So what is compared with the oracle is host code and kernels together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tilelang.language as T
import torch
from torch import Tensor

from emulation import EmulationError, Kernel, Lowered, lower, missing
from emulation.lowering import Parameter
from helpers import STREAMS, assert_equal
from mhc_ops import dispatch, host, jit, reference, store, support
from mhc_ops.csrc_tilelang._device import DEVICE_SOURCE
from mhc_ops.testing import (
    KINDS,
    OUTPUTS,
    as_outputs,
    assert_matches_oracle,
    make_inputs,
    poisoned_memory,
)

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

ARCH = "sm_90a"
MAX_TOKENS = 300  # beyond every threshold of the dispatch but that of post_head
HIDDEN = 1280  # several warps of a collapse, the last of them partly idle
CASES = tuple((op, norm) for op in OUTPUTS for norm in (False, True) if not (op == "post" and norm))
TOKENWISE = ("x", "residual", "post_layer_mix", "comb_res_mix")
EARLY = (dispatch.ONE_LAUNCH, dispatch.PERSISTENT, dispatch.PRE)  # may read fn early
ENDS = ("expand_pre", "post_head")  # in clusters; post_head_streams runs the latter's kernels


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("emulation")


@pytest.fixture(scope="session")
def lowered() -> Callable[[dispatch.Key], Lowered]:
    """Key to lowered kernel, each lowered once."""
    kernels: dict[dispatch.Key, Lowered] = {}

    def get(key: dispatch.Key) -> Lowered:
        if key not in kernels:
            kernels[key] = lower(jit.program(key), key.arch, jit.pass_configs())
        return kernels[key]

    return get


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


@pytest.fixture
def device(monkeypatch, folder, lowered) -> Device:
    return Device(monkeypatch, lambda key: Kernel(lowered(key), folder))


# ------------------------------------------------------------------------------- kernels and ops


@pytest.mark.parametrize(("hidden", "arch"), [(256, ARCH), (HIDDEN, ARCH), (HIDDEN, "sm_80")])
def test_every_kernel_matches_the_oracle(device, hidden, arch):
    device.arch = arch
    # the ends have kernels of their own or run those of other ops, whatever the number of tokens;
    # their own, and that of pre, at one hidden size: they take long to lower
    own = dispatch.takes_one_launch_end(hidden, arch)
    for tokens in dispatch.path_tokens(hidden, arch, MAX_TOKENS):
        own_pre = dispatch.takes_pre(tokens, hidden, arch, False)
        for op, norm in CASES:
            if op.startswith(ENDS) and ((own and hidden == 256) or (not own and tokens > 1)):
                continue
            if op == dispatch.PRE and own_pre and hidden == 256:
                continue
            device.check(op, make_inputs(op, tokens, hidden, norm=norm, seed=tokens))
    keys = dispatch.keys(hidden, arch, MAX_TOKENS)
    elsewhere = {dispatch.PERSISTENT, *((dispatch.PRE, *ENDS) if hidden == 256 else ())}
    assert device.launched == {key for key in keys if key.kernel not in elsewhere}


@pytest.mark.parametrize(("op", "norm"), CASES)
@pytest.mark.parametrize("hidden", [4096, 8448], ids=["flash", "beyond_the_tuned_repetitions"])
def test_large_hidden(device, hidden, op, norm):
    if hidden == 4096 and (op.endswith("streams") or (op in ENDS and not norm)):
        pytest.skip("takes long to lower, and differs little from the kernels that are run")
    device.sms = 132
    device.check(op, make_inputs(op, 2, hidden, norm=norm))


@pytest.mark.parametrize("tokens", [3, 17, 70])
@pytest.mark.parametrize("sms", [1, 132], ids=["tiles_in_turn", "tiles_side_by_side"])
def test_partial_token_tiles(device, tokens, sms):
    device.sms = sms
    for op, norm in CASES:
        device.check(op, make_inputs(op, tokens, HIDDEN, norm=norm, seed=sms))


@pytest.mark.parametrize("kind", KINDS)
def test_hard_inputs(device, kind):
    for op in OUTPUTS:
        device.check(op, make_inputs(op, 3, HIDDEN, norm=True, kind=kind))


@pytest.mark.parametrize("repeat", [1, 2])
def test_few_rounds_of_sinkhorn(device, repeat):
    device.arch = "sm_80"  # whose kernels are quick to emulate; all take the same rounds
    device.check("pre", make_inputs("pre", 2, 256, sinkhorn_repeat=repeat))


def hard_logits() -> dict[str, Tensor]:
    """Logits of combs, among them those that converge slowly, late or not at all."""
    random = torch.Generator().manual_seed(0)
    below = torch.ones(4, 4).tril(-1)
    logits = {
        "uniform": torch.zeros(4, 4),
        "permutation": 12 * torch.eye(4).roll(1, 1),
        "noisy_permutation": 12 * torch.eye(4).roll(1, 1) + torch.randn(4, 4, generator=random),
        "dominant_row": torch.tensor([20.0, 0, 0, 0]).repeat(4, 1) * torch.eye(4)[0].view(4, 1),
        "dominant_column": torch.tensor([20.0, 0, 0, 0]).repeat(4, 1),
        "thirty_of_either_sign": 60 * torch.randint(2, (4, 4), generator=random) - 30.0,
    }
    logits |= {f"below_{size}": -float(size) * below for size in (3, 5, 7, 9)}
    for spread in (1, 2, 4, 10):
        for i in range(2):
            logits[f"spread_{spread}_{i}"] = spread * torch.randn(4, 4, generator=random)
    return logits


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_no_round_of_sinkhorn_is_missed(device, eps):
    """Within 1e-6 of float64 whichever way the rounds are made; streams of zeros: exact logits."""
    device.arch = "sm_80"
    inputs = make_inputs("pre", 1, 256) | {"hc_sinkhorn_eps": eps}
    inputs["residual"].zero_()
    for kind, logits in hard_logits().items():
        inputs["hc_base"][8:] = logits.flatten()
        for repeat in (1, 3, 9, 20):
            inputs["sinkhorn_repeat"] = repeat
            comb = device.run("pre", inputs)["comb_mix"][0].double()
            error = (comb - reference.sinkhorn(logits.double(), eps, repeat)).abs().max()
            assert error < 1e-6, f"{kind}, {repeat} rounds: off by {error:.1e}"


@pytest.mark.parametrize("op", ["fused_post_pre", "post_head_streams"])
def test_fused_streams_are_those_of_post(device, op):
    for tokens in (5, MAX_TOKENS):
        inputs = make_inputs(op, tokens, HIDDEN, kind="large_streams")
        fused = device.run(op, inputs)
        names = ("x", "residual", "post_layer_mix", "comb_res_mix")
        post = device.run("post", {name: inputs[name] for name in names})
        assert torch.equal(fused["residual_out"], post["residual_out"])


@pytest.mark.parametrize(
    ("op", "tokens"), [("fused_post_pre", 18), ("expand_pre", 58), ("post_head_streams", 58)]
)
def test_batches_give_the_bits_of_single_tokens(device, op, tokens):
    inputs = make_inputs(op, tokens, HIDDEN, norm=True)
    batch = device.run(op, inputs)
    for token in (0, 7, tokens - 1):
        single = dict(inputs)
        for name in ("x", "residual", "post_layer_mix", "comb_res_mix"):
            if name in inputs:
                single[name] = inputs[name][token : token + 1]
        alone = device.run(op, single)
        assert_equal(alone, {name: value[token : token + 1] for name, value in batch.items()})


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("hidden", [HIDDEN, 5376], ids=["16_tokens_a_tile", "8_tokens_a_tile"])
def test_the_persistent_kernel(monkeypatch, device, hidden, norm):
    """It loops over tiles, and its bits are those of the kernel for few tokens."""
    if hidden != HIDDEN and not norm:
        pytest.skip("one norm of the larger hidden size: a minute each")
    tokens = 69 if hidden == HIDDEN else 37  # 5 tiles, the last one short, all of one cluster
    inputs = make_inputs("fused_post_pre", tokens, hidden, norm=norm, seed=3)
    few = {name: value[:5] if name in TOKENWISE else value for name, value in inputs.items()}
    expected = device.run("fused_post_pre", few)
    monkeypatch.setattr(dispatch, "ONE_LAUNCH_MAX_TOKENS", 0)
    monkeypatch.setattr(dispatch, "CLUSTERS", 1)
    monkeypatch.setenv("MHC_OPS_BATCH_INVARIANT", "1")
    many = device.run("fused_post_pre", inputs)
    assert dispatch.persistent_key(hidden, ARCH, norm) in device.launched
    assert_matches_oracle("fused_post_pre", inputs, tuple(many.values()))
    assert_equal(expected, {name: value[:5] for name, value in many.items()})


@pytest.mark.parametrize("hidden", [HIDDEN, 5376], ids=["16_tokens_a_tile", "8_tokens_a_tile"])
def test_pre_after_post_is_the_boundary(monkeypatch, device, hidden):
    """The pre kernel loops over tiles, and its bits are those of the boundary in one launch."""
    tokens = 117 if hidden == HIDDEN else 45  # more tiles than buffers, the last one short
    inputs = make_inputs("pre", tokens, hidden, norm=True, seed=3)
    monkeypatch.setattr(dispatch, "CLUSTERS", 1)
    monkeypatch.setenv("MHC_OPS_BATCH_INVARIANT", "1")
    many = device.run("pre", inputs)
    assert_matches_oracle("pre", inputs, tuple(many.values()))
    post = {name: make_inputs("post", 5, hidden)[name] for name in TOKENWISE}
    boundary = device.run("fused_post_pre", inputs | post)
    alone = device.run("pre", inputs | {"residual": boundary.pop("residual_out")})
    assert_equal(alone, boundary)
    few = device.run("pre", inputs | {"residual": inputs["residual"][-3:].clone()})
    assert_equal(few, {name: value[-3:] for name, value in many.items()})


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_the_persistent_kernel_of_post_head(monkeypatch, device, norm):
    """It loops over tiles, and its bits are those of the kernel for few tokens."""
    for name, value in (
        ("CLUSTERS", 1),
        ("POST_HEAD_TWO_CTAS_HIDDEN", 0),
        ("POST_HEAD_PERSISTENT_TWO_CTAS_HIDDEN", 0),
    ):
        monkeypatch.setattr(dispatch, name, value)
    tokens = dispatch.POST_HEAD_GROUP_TOKENS + 5  # 5 tiles in one cluster, the last one short
    inputs = make_inputs("post_head_streams", tokens, HIDDEN, norm=norm, seed=3)
    many = device.run("post_head_streams", inputs)
    assert_matches_oracle("post_head_streams", inputs, tuple(many.values()))
    few = {name: value[:19] if name in TOKENWISE else value for name, value in inputs.items()}
    expected = device.run("post_head_streams", few)
    assert {key.kernel for key in device.launched} == {"post_head", "post_head_persistent"}
    assert_equal(expected, {name: value[:19] for name, value in many.items()})


@pytest.mark.parametrize("op", OUTPUTS)
def test_nan_stays_in_its_token(device, op):
    inputs = make_inputs(op, 18, HIDDEN, norm=True)
    clean = device.run(op, inputs)
    inputs[STREAMS[op]][3].view(-1, HIDDEN)[-1] = torch.nan
    dirty = device.run(op, inputs)
    others = [token for token in range(18) if token != 3]
    assert_equal(
        {name: value[others] for name, value in dirty.items()},
        {name: value[others] for name, value in clean.items()},
    )
    for name, value in dirty.items():
        assert value[3].isnan().all(), name


# ------------------------------------------------------------------------------ ThreadSanitizer


@pytest.mark.parametrize("arch", [ARCH, "sm_80"])
def test_no_races(monkeypatch, folder, lowered, arch):
    def kernel(key: dispatch.Key) -> Kernel:
        first = key not in device.launched
        # two CTAs side by side: they must not write the same elements
        return Kernel(lowered(key), folder, sanitize_threads=first, resident=1 + first)

    def in_cluster(op: str, tokens: int) -> bool:
        if op == dispatch.PRE:
            return dispatch.takes_pre(tokens, 256, arch, False)
        if op == dispatch.ONE_LAUNCH:
            return dispatch.takes_one_launch(tokens, 256, arch)
        return op.startswith(ENDS) and dispatch.takes_one_launch_end(256, arch)

    device = Device(monkeypatch, kernel)
    device.arch = arch
    for tokens in dispatch.path_tokens(256, arch, MAX_TOKENS):
        for op, norm in CASES:
            # a cluster of 16 has more threads than ThreadSanitizer can hold: see below
            if not in_cluster(op, tokens + 16):
                device.check(op, make_inputs(op, tokens + 16, 256, norm=norm))
    assert device.launched == {
        key
        for key in dispatch.keys(256, arch, MAX_TOKENS)
        if key.kernel not in EARLY and not key.kernel.startswith(ENDS)
    }


@contextlib.contextmanager
def kernels_with(*names: str, **constants: int) -> Iterator[list[ModuleType]]:
    """While it lasts, these modules of kernels are made with other constants of ``dispatch``."""
    modules = [importlib.import_module(f"mhc_ops.csrc_tilelang.{name}") for name in names]
    with contextlib.ExitStack() as stack:
        # called in turn from the last: the constants, then the modules
        stack.callback(lambda: [importlib.reload(module) for module in modules])
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in constants.items():
            patch.setattr(dispatch, name, value)
        for module in modules:
            importlib.reload(module)
        yield modules


@pytest.fixture
def small_clusters():
    """Kernels with clusters of 2, which ThreadSanitizer can run two of side by side."""
    with kernels_with(
        "_boundary", "_operands", "fused_post_pre", "_group", "_post_head", *ENDS,
        "post_head_persistent",
        CLUSTER=2, GROUP_TOKENS=4, EXPAND_PRE_GROUP_TOKENS=16,
    ) as modules, pytest.MonkeyPatch.context() as patch:  # fmt: skip
        # three are many already, at whose barrier they arrive relaxed
        patch.setattr(modules[2], "FEW_CLUSTERS", 2)
        yield


def small_cluster_kernel(key: dispatch.Key) -> Lowered:
    return lower(jit.program(key), key.arch, jit.pass_configs())


RACING_KEYS = [
    # with the terms of fn in registers alone, and in shared memory as well
    ("fused_post_pre", 11, dispatch.fused_post_pre_key(256, ARCH, False)),
    ("fused_post_pre", 11, dispatch.fused_post_pre_key(HIDDEN, ARCH, True)),
    # 2 groups, the first of two tiles
    ("expand_pre", 19, dispatch.expand_pre_key(256, ARCH, True)),
    # 2 groups of 3 and 2 tiles, the last one partly empty
    ("post_head_streams", 35, dispatch.post_head_key(256, ARCH, True, True)),
    # 2 groups of 9 and 8 tiles: every buffer and inbox is used again
    ("post_head_streams", 131, dispatch.post_head_persistent_key(256, ARCH, True, True)),
]
per_racing_key = pytest.mark.parametrize(
    ("op", "tokens", "key"), RACING_KEYS, ids=[f"{k.kernel}-{k.hidden}" for _, _, k in RACING_KEYS]
)


def cluster_inputs(op: str, tokens: int, key: dispatch.Key) -> dict[str, Any]:
    return make_inputs(op, tokens, key.hidden, norm=bool(dict(key.options)["norm"]))


@per_racing_key
def test_no_races_in_clusters(monkeypatch, folder, small_clusters, op, tokens, key):
    lowered = small_cluster_kernel(key)
    monkeypatch.setattr(dispatch, "CLUSTERS", 1)  # groups of the ends as large as they get
    device = Device(
        monkeypatch, lambda key: Kernel(lowered, folder, sanitize_threads=True, resident=4)
    )
    device.check(op, cluster_inputs(op, tokens, key))


LOOPING_KEYS = {
    "fused_post_pre": dispatch.persistent_key(256, ARCH, True),
    "pre": dispatch.pre_key(256, ARCH, True),
}


@pytest.fixture(scope="module")
def small_looping_kernel() -> Callable[[str], Lowered]:
    """Op to a kernel in clusters of 8 with tiles of 8: as many threads as ThreadSanitizer holds."""

    @functools.cache
    def get(op: str) -> Lowered:
        key = LOOPING_KEYS[op]
        names = ("_boundary", "_operands", "fused_post_pre", "_persistent", key.kernel)
        with kernels_with(*names, CLUSTER=8) as modules, pytest.MonkeyPatch.context() as patch:
            patch.setattr(modules[-2], "WIDE_TILE_COLUMNS", 0)
            return small_cluster_kernel(key)

    return get


def run_loop(monkeypatch, folder, op: str, lowered: Lowered) -> None:
    """In one cluster, the last tile short: every buffer, gate and inbox is used again."""
    monkeypatch.setattr(dispatch, "ONE_LAUNCH_MAX_TOKENS", 0)
    monkeypatch.setattr(dispatch, "CLUSTERS", 1)
    monkeypatch.setenv("MHC_OPS_BATCH_INVARIANT", "1")
    device = Device(
        monkeypatch, lambda key: Kernel(lowered, folder, sanitize_threads=True, resident=8)
    )
    tokens = 27 if op == "fused_post_pre" else 61  # 3 and 6 buffers
    device.check(op, cluster_inputs(op, tokens, LOOPING_KEYS[op]))
    assert device.launched == {LOOPING_KEYS[op]}


@pytest.mark.parametrize("op", LOOPING_KEYS)
def test_no_races_in_kernels_that_loop(monkeypatch, folder, small_looping_kernel, op):
    run_loop(monkeypatch, folder, op, small_looping_kernel(op))


MIXES_WAIT = re.compile(r"^ *mhc::loads_wait_but<1>\(\);\n", re.M)


def test_mixes_of_token_warps_are_waited_for(monkeypatch, folder, small_looping_kernel):
    lowered = small_looping_kernel("fused_post_pre")
    source, found = MIXES_WAIT.subn("", lowered.source)
    assert found == 1
    broken = dataclasses.replace(lowered, source=source)
    with pytest.raises(EmulationError, match=r"data race|loaded twice without a wait"):
        run_loop(monkeypatch, folder, "fused_post_pre", broken)


WAIT = re.compile(
    r"^ *(__syncthreads\(\)|tl::__sync_thread_partial.*|mhc::inbox_wait\(.*\));\n", re.M
)
WAITS = {"fused_post_pre": 6, "expand_pre": 3, "post_head": 5, "post_head_persistent": 4}


@pytest.mark.parametrize(
    ("op", "tokens", "key"),
    [
        ("fused_post_pre", 11, dispatch.fused_post_pre_key(256, ARCH, True)),
        *RACING_KEYS[2:],
    ],
    ids=WAITS,
)
def test_each_wait_of_a_cluster_is_needed(monkeypatch, folder, small_clusters, op, tokens, key):
    lowered = small_cluster_kernel(key)
    monkeypatch.setattr(dispatch, "CLUSTERS", 1)
    waits = list(WAIT.finditer(lowered.source))
    assert len(waits) == WAITS[key.kernel]
    for wait in waits:
        start, end = wait.span()
        broken = dataclasses.replace(lowered, source=lowered.source[:start] + lowered.source[end:])
        device = Device(
            monkeypatch,
            lambda key, broken=broken: Kernel(broken, folder, sanitize_threads=True),
        )
        with pytest.raises(EmulationError, match=r"data race|waited for|waits for"):
            device.run(op, cluster_inputs(op, tokens, key))


TOKENS = 20  # two token tiles
BARRIER = re.compile(r"^ *(__syncthreads|tl::__sync_thread_partial|__syncwarp)\(.*\);\n", re.M)


def without_barrier(lowered: Lowered, i: int) -> Lowered:
    start, end = list(BARRIER.finditer(lowered.source))[i].span()
    return dataclasses.replace(lowered, source=lowered.source[:start] + lowered.source[end:])


@pytest.mark.parametrize(
    ("op", "key", "barriers"),
    [
        ("fused_post_pre", dispatch.post_projection_plan(TOKENS, HIDDEN, "sm_80", 1).key, 2),
        ("pre", dispatch.projection_plan(TOKENS, HIDDEN, dispatch.MIXES, "sm_80", 1).key, 1),
        ("pre", dispatch.finish_key(HIDDEN, "sm_80", True), 2),
        ("head", dispatch.head_key(HIDDEN, ARCH, True), 2),
    ],
    ids=lambda value: value.kernel if isinstance(value, dispatch.Key) else None,
)
def test_each_barrier_is_needed(monkeypatch, folder, lowered, op, key, barriers):
    inputs = make_inputs(op, TOKENS, HIDDEN, norm=True)
    assert len(BARRIER.findall(lowered(key).source)) == barriers
    for barrier in range(barriers):

        def kernel(launched: dispatch.Key, barrier: int = barrier) -> Kernel:
            if launched != key:
                return Kernel(lowered(launched), folder)
            broken = without_barrier(lowered(key), barrier)
            return Kernel(broken, folder, sanitize_threads=True)

        device = Device(monkeypatch, kernel)
        device.sms = 1  # both token tiles in turn: one may run into the next
        device.arch = key.arch
        with pytest.raises(EmulationError, match="data race"):
            device.run(op, inputs)
        assert key in device.launched


# --------------------------------------------------------------------- the emulation and its twins


DEVICE_FUNCTION = re.compile(
    r"((?:template <[^>]*>\n)?__device__ __forceinline__ [^{};]*?\))\s*\{", re.S
)


def test_every_device_function_has_a_twin():
    twins = (Path(__file__).parent / "emulation/include/mhc_device.h").read_text()
    functions = DEVICE_FUNCTION.findall(DEVICE_SOURCE)
    assert functions
    assert sorted(functions) == sorted(DEVICE_FUNCTION.findall(twins))
    # nothing that the pattern overlooks
    assert DEVICE_SOURCE.count("__device__") == len(functions)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_source_is_the_one_that_ships(monkeypatch, tmp_path, lowered):
    key = dispatch.finish_key(256, ARCH, True)
    # a run before may have left the kernel in the cache
    monkeypatch.setattr(store, "cached_folder", lambda: tmp_path)
    monkeypatch.setattr(jit, "_compiled", {})
    monkeypatch.setattr(jit, "_main", lambda kernel: kernel.get_kernel_source())
    assert jit.compile_key(key) == lowered(key).source


SAMPLES = (Path(__file__).parent / "emulation/samples.cu").read_text()
SAMPLE = {name: i for i, name in enumerate(re.findall(r"^  (\w+),$", SAMPLES, re.M))}
LANE = torch.arange(64)


@pytest.fixture
def sample(folder) -> Callable[..., Tensor]:
    """Run a sample on in[t] = t with ``out`` full of NaN; returns ``out``."""

    def run(
        name: str,
        *,
        given: Tensor | None = None,
        ctas: int = 1,
        cluster: int = 1,
        waits: bool = False,
        **options: Any,
    ) -> Tensor:
        given = LANE.float() if given is None else given
        lowered = Lowered(
            source=SAMPLES,
            parameters=(
                Parameter("out", "float32", ("size",)),
                Parameter("in", "float32", ("size",)),
                Parameter("counter", "int32", (1,)),
                Parameter("sample", "int32", None),
            ),
            waits=waits,
            dynamic_shared=4 * 64,
            extents={"blockIdx.x": ctas, "threadIdx.x": 64},
            cluster=cluster,
        )
        out = torch.full_like(given, torch.nan)
        counter = torch.zeros(1, dtype=torch.int32)
        Kernel(lowered, folder, **options)(out, given, counter, SAMPLE[name])
        return out

    return run


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("WRITE_BEHIND", r"out: access out of bounds, byte 256 of 256 \[thread \(63, 0, 0\)"),
        ("WRITE_IN_FRONT", r"out: a write out of bounds"),
        ("READ_BEHIND", r"in: access out of bounds, byte 256 of 256"),
        ("WRITE_CONST", r"in: write to const memory, byte \d+"),
        ("SHARED_BEHIND", r"shared memory: access out of bounds, byte 256 of 256"),
        ("SHARED_IN_FRONT", r"a write out of the bounds of shared memory"),
        ("STATIC_SHARED_IN_FRONT", r"a write out of the bounds of shared memory"),
        ("LOCAL_BEHIND", r"index \d+ out of bounds for type .float"),
        ("MISALIGNED", r"misaligned address"),
        ("TOUCH_BEFORE_DEPENDENCY", r"in: touched before cudaGridDependencySynchronize"),
        ("MISSED_BARRIER", r"deadlock: .* one waits for barrier 0"),
        ("UNEQUAL_BARRIER", r"barrier 1: expects \d+ threads here and \d+ elsewhere"),
        ("SHUFFLE_WITHOUT_LANE", r"deadlock: .* one waits for exchange of warp 0"),
        ("SHUFFLE_FROM_OUTSIDE", r"shuffle from lane 0, which is not in the mask 0xfffffffe"),
        ("ENDLESS_WAIT", r"did not end within 2 s"),
        ("LOAD_NOT_AWAITED", r"a thread ends without having waited for its asynchronous loads"),
        ("LOAD_TWICE", r"load_stream16: the target is loaded twice without a wait"),
        ("LOAD_OUTSIDE", r"load_async16: the target is not in shared memory"),
        ("LOAD_MISALIGNED", r"load_stream16: the target at byte 8 .* is not aligned to 16 bytes"),
        ("LOAD_SOURCE_WRITTEN", r"the source of an asynchronous load was written before the wait"),
        ("REGISTERS_ODD", r"setmaxnreg: 100 registers, expected a multiple of 8 from 24 to 256"),
        ("GATE_TWICE", r"gate_open: the gate at byte 0 of static shared memory .* is opened twice"),
        ("GATE_OF_NOBODY", r"gate_open: nobody would pass"),
        ("GATE_CLOSED", r"gate_pass: the gate at byte 8 of static .* is not open"),
        ("GATE_MISSED", r"deadlock: .* the gate at byte 0 .*: 1 threads have not passed"),
        ("GATE_IS_INBOX", r"gate_pass: the gate at byte 0 of static .* is not open"),
        ("GATE_OVERWRITTEN", r"the gate at byte 0 of static shared memory .* was overwritten"),
    ],
)
def test_what_no_kernel_may_do(sample, monkeypatch, name, message):
    monkeypatch.setattr("emulation.harness.TIMEOUT", 2)
    with pytest.raises(EmulationError, match=message):
        sample(name, waits=name == "TOUCH_BEFORE_DEPENDENCY")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CLUSTER_ARRIVE_TWICE", r"cluster barrier: a thread arrives twice without waiting"),
        ("CLUSTER_WAIT_TWICE", r"cluster barrier: a thread waits without having arrived"),
        ("CLUSTER_BARRIER_MISSED", r"deadlock: .* one waits for cluster barrier"),
        ("CLUSTER_TOUCHES_BEFORE_DEPENDENCY", r"in: touched before cudaGridDependencySynchronize"),
        ("OPEN_TWICE", r"inbox at byte 0 of static shared memory of .* CTA \d is opened twice"),
        ("OPEN_OUTSIDE", r"inbox_open: the inbox is not in shared memory"),
        ("WAIT_FOR_CLOSED", r"inbox_wait: the inbox at byte 8 of static .* is not open"),
        ("SEND_TO_CLOSED", r"send: the inbox at byte 0 of static .* CTA 1 is not open"),
        ("SEND_WITHOUT_BARRIER", r"no cluster barrier was passed since the inbox .* was opened"),
        ("SEND_TOO_MUCH", r"send: the inbox at byte 8 .* expects 2 bytes and not 4 more"),
        ("SEND_TOO_LITTLE", r"deadlock: .*inbox at byte 8 of .*: 8 bytes are missing"),
        ("SEND_TO_NOBODY", r"send: CTA 2 of a cluster of 2"),
        ("SEND_TO_ENDED", r"send: the CTA of the inbox at .* CTA 1 has ended"),
        ("SEND_TWICE", r"data race: a slot of the inbox at byte 8 .* is sent to twice"),
        ("SLOT_TWICE", r"data race: a slot of the inbox at byte 0 .* is sent to twice"),
        ("SLOT_OF_TWO", r"data race: a slot of the inbox at byte 0 .* CTA 0 is sent to twice"),
        ("SEND_SLOT_OUTSIDE", r"send: the slot is not in shared memory"),
        ("SEND_INBOX_OUTSIDE", r"send: the inbox is not in shared memory"),
        ("SEND4_MISALIGNED", r"the slot at byte 8 of dynamic shared memory is not aligned to 16"),
        ("NOBODY_WAITS", r"nobody waits for the inbox at byte 8 of static shared memory"),
        ("INBOX_OVERWRITTEN", r"the inbox at byte 8 of static shared memory .* was overwritten"),
        ("AGAIN_TOO_EARLY", r"inbox_again: the inbox at byte 0 .* expects 4 bytes already"),
        ("AGAIN_TWICE", r"inbox_again: the inbox at byte 0 .* expects 4 bytes already"),
        ("AGAIN_WITHOUT_WAIT", r"this thread has not waited for the phase before of the inbox"),
        ("AGAIN_TOO_LITTLE", r"inbox_again: 8 bytes have come to the inbox at byte 0 .* and not 4"),
        ("AGAIN_MISSED", r"deadlock: .*the inbox at byte 0 .*: nobody has called inbox_again"),
        ("AGAIN_SEND_TOO_MUCH", r"send: the inbox at byte 0 .* expects 2 bytes and not 4 more"),
        ("AGAIN_SEND_TWICE", r"data race: a slot of the inbox at byte 0 .* is sent to twice"),
        ("AGAIN_NOBODY_WAITS", r"nobody waits for the inbox at byte 0 .* may come after"),
        ("AGAIN_INCOMPLETE", r"some of a phase has come, and 4 bytes are missing"),
        ("PHASES_UNTOLD", r"data race"),
        ("BULK_NOT_FENCED", r"send_bulk: this thread has not called bulk_fence"),
        ("BULK_FENCED_TOO_EARLY", r"the source at byte 0 .* after this thread's bulk_fence"),
        ("BULK_ODD", r"send_bulk: 20 bytes, expected a multiple of 16 up to 1024"),
        ("BULK_TOO_LARGE", r"send_bulk: 1040 bytes, expected a multiple of 16 up to 1024"),
        ("BULK_MISALIGNED", r"send_bulk: the slot at byte 8 .* is not aligned to 16 bytes"),
        ("BULK_SOURCE_WRITTEN", r"data race: the source of a send_bulk to the inbox at byte 0"),
        ("BULK_SOURCE_OUTSIDE", r"send_bulk: the source is not in shared memory"),
    ],
)
@pytest.mark.parametrize("sanitize_threads", [False, True], ids=["fibers", "threads"])
def test_what_no_cluster_may_do(sample, monkeypatch, name, message, sanitize_threads):
    waits = name == "CLUSTER_TOUCHES_BEFORE_DEPENDENCY"
    if sanitize_threads:
        if waits:
            pytest.skip("memory is closed to fibers only")
        monkeypatch.setattr("emulation.harness.PATIENCE", 2)
        if name == "CLUSTER_BARRIER_MISSED":
            message = r"deadlock: cluster barrier 0 still waits for 1 of 128 threads"
        if name == "SEND_TO_ENDED":  # or is about to end: refused all the same
            message += r"|nobody waits for the inbox"
    with pytest.raises(EmulationError, match=message):
        sample(name, ctas=2, cluster=2, waits=waits, sanitize_threads=sanitize_threads)


def test_uninitialised_memory_is_poison(sample):
    assert sample("NOTHING").isnan().all()
    assert sample("READ_IN_FRONT")[0].isnan()
    assert sample("READ_SHARED").isnan().all()
    assert (sample("READ_LOCAL").abs() > 1e30).all()


def test_what_is_loaded_comes_with_its_wait(sample):
    for name, there in (("LOADS", 48), ("LOADS_BUT_TWO", 16), ("LOADS_NONE", 0)):
        out = sample(name)
        assert torch.equal(out[:there], LANE[:there].float()), name
        assert out[there:].isnan().all(), name
    # what is in no group is not waited for with one
    out = sample("LOADS_UNCOMMITTED")
    assert torch.equal(out[:32], LANE[:32].float())
    assert out[32:].isnan().all()


def test_registers_of_a_warpgroup(sample):
    assert sample("REGISTERS").isnan().all()


def test_memory_after_the_dependency(sample):
    assert torch.equal(sample("AFTER_DEPENDENCY", waits=True, ctas=3), LANE.float())
    # threads that do not wait go on as far as they can without memory
    assert torch.equal(sample("ONE_THREAD_WAITS", waits=True), LANE.float())
    # a weight, which no kernel writes
    early = sample("TOUCH_BEFORE_DEPENDENCY", waits=True, early=("in",))
    assert torch.equal(early, LANE.float())


def test_ctas_of_a_cluster(sample):
    assert torch.equal(sample("RANKS", ctas=4, cluster=2), LANE // 16 % 2 * 1.0)
    # one cluster runs side by side; before its threads wait none may touch memory
    assert torch.equal(sample("CLUSTER_WAITS", ctas=4, cluster=2, waits=True), LANE.float())
    with pytest.raises(ValueError, match="whole clusters of 2 CTAs"):
        sample("RANKS", ctas=3, cluster=2)
    with pytest.raises(ValueError, match="at most 6000 OS threads, got 6400"):
        sample("RANKS", ctas=100, cluster=100, sanitize_threads=True)


@pytest.mark.parametrize("ctas", [2, 6])
@pytest.mark.parametrize("resident", [1, 4])
def test_what_ctas_send_each_other(sample, ctas, resident):
    options = {"ctas": ctas, "cluster": 2, "resident": resident}
    assert torch.equal(sample("SEND", **options), LANE.float())
    for name in ("SEND2", "SEND4", "SEND_BULK"):
        assert torch.equal(sample(name, **options), LANE + 100.0)
    for name in ("PHASES", "PHASES_EARLY", "PHASES_TOLD"):
        assert torch.equal(sample(name, **options), LANE % 32 * 15 + 40.0)
    assert torch.equal(sample("LOAD_BEHIND", **options), LANE % 32 * 2 + 32.0)
    # not even what has been sent can be read before everything has
    late = sample("SEND_LATE", **options)
    assert late[LANE % 32 < 31].isnan().all()
    assert late[LANE % 32 == 31].eq(0).all()


def test_a_large_cluster(sample):
    # as many threads as 16 CTAs of 544
    assert torch.equal(sample("CLUSTER_SIZE", ctas=136, cluster=136), LANE * 0.0 + 8704)


def test_lowered_cluster():
    @T.prim_func
    def program(y: T.Tensor((4,), "float32")):
        with T.Kernel(4, threads=32, cluster_dims=(2, 1, 1)) as i:
            if T.get_thread_binding() == 0:
                y[i] = T.cast(T.block_rank_in_cluster(), "float32")

    assert lower(program, ARCH, jit.pass_configs()).cluster == 2


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("SHUFFLE_XOR", LANE ^ 5),
        ("SHUFFLE_XOR_OF_8", torch.where(LANE % 16 < 8, LANE, LANE ^ 9)),
        ("SHUFFLE", LANE // 32 * 32 + 3),
        ("SHUFFLE_OF_4", LANE // 4 * 4 + 1),
        ("SHUFFLE_DOWN_OF_16", torch.where(LANE % 16 < 13, LANE + 3, LANE)),
        ("SHUFFLE_UP_OF_16", torch.where(LANE % 16 < 3, LANE, LANE - 3)),
        ("REDUCE", 2016 + 100 * (LANE // 32 * 32 + 31) - LANE // 32 * 32),
    ],
)
def test_shuffles_and_reductions(sample, name, source):
    assert torch.equal(sample(name), source.float())


def test_mma_is_a_matrix_product(sample):
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 8).bfloat16()
    lane = torch.arange(32)
    g, t = lane // 4, lane % 4
    # the fragments as the PTX ISA draws them: pairs of a in one row, of b in one column
    pairs = [
        torch.stack((a[row, column], a[row, column + 1]), 1)
        for row, column in ((g, 2 * t), (g + 8, 2 * t), (g, 2 * t + 8), (g + 8, 2 * t + 8))
    ]
    pairs += [torch.stack((b[row, g], b[row + 1, g]), 1) for row in (2 * t, 2 * t + 8)]
    words = torch.stack(pairs, 1).contiguous().view(torch.float32)
    acc = sample("MMA", given=words.flatten())[:128].view(32, 4)
    product = a.float() @ b.float()
    for i in range(4):
        want = product[g + i // 2 * 8, 2 * t + i % 2]
        torch.testing.assert_close(acc[:, i] - i, want, rtol=0, atol=1e-5)


def test_split3_keeps_every_bit(sample):
    given = torch.randn(64) * torch.logspace(-10, 10, 64)
    assert torch.equal(sample("SPLIT3", given=given), given)


@pytest.mark.parametrize(
    ("name", "races"),
    [
        ("BY_SYNCTHREADS", False),
        ("BY_SYNCWARP", False),
        ("BY_NAMED_BARRIER", False),
        ("BY_ARRIVE", False),
        ("BY_GATE", False),
        ("BY_SECOND_PHASE", False),
        # a pass orders what was done before it, and a wait what is done after it
        ("BY_FORMER_PHASE", True),
        ("BY_LATE_GATE", True),
        ("BY_LOAD", False),
        # a wait for loads is one of their thread
        ("BY_LATE_LOAD", True),
        # a shuffle hands over a register and orders no memory
        ("BY_SHUFFLE", True),
        ("BY_NOTHING", True),
        ("SAME_ELEMENTS", True),
        ("OWN_ELEMENTS", False),
        ("RELEASE", False),
        ("RELAXED", True),
        # TileLang drops the memory order of an addition whose result nobody reads
        ("RELEASE_WITHOUT_RESULT", True),
    ],
)
def test_what_orders_memory(sample, name, races):
    def run() -> Tensor:
        return sample(name, ctas=1 if name.startswith("BY_") else 2, **options)

    options = {"resident": 1 if name.startswith("BY_") else 2}
    out = run()
    if name.startswith("BY_") and not races:
        assert torch.equal(out[1::2], LANE.float()[::2])
    if name.startswith("RELEASE"):
        assert out[:2].tolist() == [7.0, 7.0]
    options["sanitize_threads"] = True
    if races:
        with pytest.raises(EmulationError, match="data race"):
            run()
    else:
        run()


@pytest.mark.parametrize(
    ("name", "races"),
    [
        ("CLUSTER_BARRIER", False),
        ("CLUSTER_BARRIER_APART", False),
        ("CLUSTER_BARRIER_RELAXED", True),
        ("SEND", False),
        ("SEND2", False),
        ("SEND4", False),
        ("SEND_BULK", False),
        ("SEND_LATE", True),
        ("INBOX", False),
        # the opening of an inbox has a fence of its own
        ("INBOX_OPENED_RELAXED", False),
        ("INBOX_OPENED_IN_TIME", False),
        ("INBOX_OPENED_UNORDERED", True),
        ("INBOX_WITHOUT_WAIT", True),
        # an inbox orders what was sent to it, not what was sent to another one
        ("INBOX_OTHER", True),
        # nor what else the sender wrote
        ("INBOX_OTHER_MEMORY", True),
        ("INBOX_AFTER_READ", True),
        ("SLOT_AGAIN", False),
        # who has had a message back may write again what its sender had read
        ("PHASES", False),
        ("PHASES_EARLY", False),
        ("PHASES_TOLD", False),
        ("PHASES_UNREAD", True),
        ("PHASES_WITHOUT_WAIT", True),
        ("LOAD_BEHIND", False),
        ("LOAD_UNREAD", True),
    ],
)
def test_what_orders_memory_in_a_cluster(sample, name, races):
    options = {"ctas": 2, "cluster": 2}
    out = sample(name, **options)
    if name in ("INBOX", "INBOX_OPENED_RELAXED", "SLOT_AGAIN"):
        assert out[:2].tolist() == [7.0, 7.0]
    if name == "SLOT_AGAIN":
        assert out[32:34].tolist() == [8.0, 8.0]
    options["sanitize_threads"] = True
    if races:
        with pytest.raises(EmulationError, match="data race"):
            sample(name, **options)
    else:
        # two clusters, one after the other and side by side; some write the same elements
        for resident in (1, 2) if name.startswith(("SEND", "PHASES", "LOAD")) else (1, 4):
            sample(name, **{**options, "ctas": 4, "resident": resident})

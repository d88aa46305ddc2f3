"""Run the CUDA source of the kernels under ThreadSanitizer, as it is and without a wait."""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from emulated import (
    ARCH,
    CASES,
    ENDS,
    HIDDEN,
    IN_CLUSTERS,
    MAX_TOKENS,
    Device,
    key_of,
    lower_key,
    runs_in_clusters,
)
from emulation import EmulationError, Kernel, missing
from mhc_ops import geometry, routes
from mhc_ops.compiler import Lowered
from mhc_ops.routes import Key
from mhc_ops.store import file_name
from mhc_ops.testing import make_inputs
from other_routes import other_routes

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def without(lowered: Lowered, pattern: re.Pattern[str], i: int = 0) -> Lowered:
    """Take match ``i`` of a pattern out of the source of a kernel."""
    start, end = list(pattern.finditer(lowered.source))[i].span()
    return lowered._replace(source=lowered.source[:start] + lowered.source[end:])


@pytest.mark.parametrize("arch", [ARCH, "sm_80"])
def test_no_races(monkeypatch, kept, lowered, arch):
    def kernel(key: Key) -> Kernel:
        first = key not in device.launched
        # Two CTAs run side by side and must not write the same elements.
        return Kernel(lowered(key), kept, sanitize_threads=first, resident=1 + first)

    device = Device(monkeypatch, kernel)
    device.arch = arch
    for tokens in routes.bounds(256, arch, MAX_TOKENS):
        for op, norm in CASES:
            # A cluster of 16 has more threads than ThreadSanitizer can hold; other tests shrink it.
            if not runs_in_clusters(op, 256, arch, tokens + 16):
                device.check(op, make_inputs(op, tokens + 16, 256, norm=norm))
    assert device.launched == {
        key for key in routes.keys(256, arch, MAX_TOKENS) if key.kernel not in IN_CLUSTERS
    }


@contextlib.contextmanager
def kernels_with(*names: str, **constants: int) -> Iterator[list[ModuleType]]:
    """Make these modules of kernels with other constants of ``geometry`` for a while."""
    modules = [importlib.import_module(f"mhc_ops.csrc_tilelang.{name}") for name in names]
    with contextlib.ExitStack() as stack:
        # The stack undoes from the last to the first: the constants, then the modules.
        stack.callback(lambda: [importlib.reload(module) for module in modules])
        stack.enter_context(other_routes(**constants))
        for module in modules:
            importlib.reload(module)
        yield modules


@pytest.fixture
def small_clusters():
    """Make kernels with clusters of 2; ThreadSanitizer can run two such clusters side by side."""
    with kernels_with(
        "layout", "steps.project", "steps.columns", "steps.head_tile", "steps.exchange",
        "fused_post_pre", *ENDS, CLUSTER=2, GROUP_TOKENS=4, EXPAND_PRE_GROUP_TOKENS=16,
    ) as modules, pytest.MonkeyPatch.context() as patch:  # fmt: skip
        # Three clusters are many already: they arrive at their barrier relaxed.
        patch.setattr(modules[5], "FEW_CLUSTERS", 2)
        yield


RACING_KEYS = [
    # The terms of fn are in registers alone, and in shared memory as well.
    ("fused_post_pre", 11, key_of("fused_post_pre", 256)),
    ("fused_post_pre", 11, key_of("fused_post_pre", HIDDEN, norm=True)),
    # There are 2 groups, the first of two tiles.
    ("expand_pre", 19, key_of("expand_pre", 256, norm=True)),
    # There are 2 groups of 3 and 2 tiles, the last tile partly empty.
    ("post_head_streams", 35, key_of("post_head", 256, norm=True, streams=1, loop=0)),
    # There are 2 groups of 9 and 8 tiles: every buffer and inbox is used again.
    ("post_head_streams", 131, key_of("post_head", 256, norm=True, streams=1, loop=1)),
]
per_racing_key = pytest.mark.parametrize(
    ("op", "tokens", "key"), RACING_KEYS, ids=[file_name(key) for _, _, key in RACING_KEYS]
)


def cluster_inputs(op: str, tokens: int, key: Key) -> dict[str, Any]:
    return make_inputs(op, tokens, key.hidden, norm=bool(dict(key.options)["norm"]))


@per_racing_key
def test_no_races_in_clusters(monkeypatch, kept, small_clusters, op, tokens, key):
    lowered = lower_key(key, kept)
    device = Device(
        monkeypatch, lambda key: Kernel(lowered, kept, sanitize_threads=True, resident=4)
    )
    with other_routes(CLUSTERS=1):  # Groups of the ends are as large as groups get.
        device.check(op, cluster_inputs(op, tokens, key))
    assert device.launched == {key}


LOOPING_KEYS = {
    "fused_post_pre": key_of("fused_post_pre_persistent", 256, norm=True),
    "pre": key_of("pre", 256, norm=True),
}


@pytest.fixture(scope="module")
def small_looping_kernel(kept) -> Callable[[str], Lowered]:
    """Lower an op's kernel with clusters and tiles of 8: ThreadSanitizer holds no more threads."""

    @functools.cache
    def get(op: str) -> Lowered:
        key = LOOPING_KEYS[op]
        names = ("layout", "steps.project", "steps.tiles", key.kernel)
        with kernels_with(*names, CLUSTER=8, WIDE_TILE_HIDDEN=0):
            return lower_key(key, kept)

    return get


def run_loop(monkeypatch, kept, op: str, lowered: Lowered, sanitize_threads: bool = True) -> None:
    """Run in one cluster with a short last tile: every buffer, gate and inbox is used again."""
    options = {"sanitize_threads": True, "resident": 8} if sanitize_threads else {}
    device = Device(monkeypatch, lambda key: Kernel(lowered, kept, **options))
    tokens = 27 if op == "fused_post_pre" else 61  # The kernels have 3 and 6 buffers.
    with other_routes(CLUSTERS=1, FEW_CLUSTERS_TOKENS=0, ONE_ROUND_TOKENS=0, WIDE_TILE_HIDDEN=0):
        device.check(op, cluster_inputs(op, tokens, LOOPING_KEYS[op]))
    assert device.launched == {LOOPING_KEYS[op]}


@pytest.mark.parametrize("op", LOOPING_KEYS)
def test_no_races_in_kernels_that_loop(monkeypatch, kept, small_looping_kernel, op):
    run_loop(monkeypatch, kept, op, small_looping_kernel(op))


FENCE = re.compile(r"^ *mhc::bulk_fence\(\);\n", re.M)


@pytest.mark.parametrize("op", LOOPING_KEYS)
def test_the_fence_of_bulk_copies_is_needed(monkeypatch, kept, small_looping_kernel, op):
    lowered = small_looping_kernel(op)
    assert len(FENCE.findall(lowered.source)) == 1
    with pytest.raises(EmulationError, match="load_bulk: no bulk_fence"):
        run_loop(monkeypatch, kept, op, without(lowered, FENCE), sanitize_threads=False)


MIXES_WAIT = re.compile(r"^ *mhc::loads_wait_but<1>\(\);\n", re.M)


def test_mixes_of_token_warps_are_waited_for(monkeypatch, kept, small_looping_kernel):
    lowered = small_looping_kernel("fused_post_pre")
    assert len(MIXES_WAIT.findall(lowered.source)) == 1
    with pytest.raises(EmulationError, match=r"data race|loaded twice without a wait"):
        run_loop(monkeypatch, kept, "fused_post_pre", without(lowered, MIXES_WAIT))


WAIT = re.compile(
    r"^ *(__syncthreads\(\)|tl::__sync_thread_partial.*|mhc::inbox_wait\(.*\));\n", re.M
)
WAITING_KEYS = [("fused_post_pre", 11, key_of("fused_post_pre", 256, norm=True)), *RACING_KEYS[2:]]
WAITS = (6, 3, 5, 4)


@pytest.mark.parametrize(
    ("op", "tokens", "key", "waits"),
    [(*case, waits) for case, waits in zip(WAITING_KEYS, WAITS, strict=True)],
    ids=[file_name(key) for _, _, key in WAITING_KEYS],
)
def test_each_wait_of_a_cluster_is_needed(
    monkeypatch, kept, small_clusters, op, tokens, key, waits
):
    lowered = lower_key(key, kept)
    assert len(WAIT.findall(lowered.source)) == waits
    for wait in range(waits):
        broken = without(lowered, WAIT, wait)
        device = Device(
            monkeypatch,
            lambda key, broken=broken: Kernel(broken, kept, sanitize_threads=True),
        )
        refused = pytest.raises(EmulationError, match=r"data race|waited for|waits for")
        with other_routes(CLUSTERS=1), refused:
            device.run(op, cluster_inputs(op, tokens, key))


TOKENS = 20  # They make two token tiles.
PROJECTION_KEY = key_of("projection", HIDDEN, arch="sm_80", rows=geometry.MIXES, token_tiles=1)
BARRIER = re.compile(r"^ *(__syncthreads|tl::__sync_thread_partial|__syncwarp)\(.*\);\n", re.M)


@pytest.mark.parametrize(
    ("op", "key", "barriers"),
    [
        ("fused_post_pre", key_of("post_projection", HIDDEN, arch="sm_80"), 2),
        ("pre", PROJECTION_KEY, 1),
        ("pre", key_of("finish", HIDDEN, arch="sm_80", norm=True), 2),
        ("head", key_of("head", HIDDEN, norm=True), 2),
    ],
    ids=lambda value: value.kernel if isinstance(value, Key) else None,
)
def test_each_barrier_is_needed(monkeypatch, kept, lowered, op, key, barriers):
    inputs = make_inputs(op, TOKENS, HIDDEN, norm=True)
    assert len(BARRIER.findall(lowered(key).source)) == barriers
    for barrier in range(barriers):

        def kernel(launched: Key, barrier: int = barrier) -> Kernel:
            if launched != key:
                return Kernel(lowered(launched), kept)
            broken = without(lowered(key), BARRIER, barrier)
            return Kernel(broken, kept, sanitize_threads=True)

        device = Device(monkeypatch, kernel)
        # Both token tiles run in turn, so one may run into the next.
        device.sms = 1
        device.arch = key.arch
        with pytest.raises(EmulationError, match="data race"):
            device.run(op, inputs)
        assert key in device.launched

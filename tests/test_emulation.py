"""Test the emulation: what it refuses, what it orders, and the twins of the device functions."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tilelang", reason="needs TileLang, which lowers the kernels")

import tilelang
import tilelang.language as T
import torch
from torch import Tensor

from emulated import ARCH, key_of
from emulation import EmulationError, Kernel, missing
from mhc_ops import compiler
from mhc_ops.compiler import Argument, Lowered
from mhc_ops.csrc_tilelang import device
from mhc_ops.formula import constant

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


DEVICE_FUNCTION = re.compile(
    r"((?:template <[^>]*>\n)?__device__ __forceinline__ [^{};]*?(\w+)\([^{};]*?\))\s*\{", re.S
)
HELPERS = {"shared_address", "in_cta"}  # Only other device functions call these.


def test_every_device_function_has_a_twin_and_a_wrapper():
    twins = (Path(__file__).parent / "emulation/include/mhc_device.h").read_text()
    functions = {name: text for text, name in DEVICE_FUNCTION.findall(device.SOURCE)}
    # The pattern overlooks nothing.
    assert device.SOURCE.count("__device__") == len(functions)
    called = {name: text for name, text in functions.items() if name not in HELPERS}
    assert called == {name: text for text, name in DEVICE_FUNCTION.findall(twins)}
    # The wrapper of loads_wait calls loads_wait_but where it is told how many groups may be left.
    assert called.keys() - {"loads_wait_but"} <= vars(device).keys()


def test_source_is_the_one_that_ships(monkeypatch, lowered):
    key = key_of("finish", 256, arch="sm_80", norm=True)
    sources = []

    def compile_cuda(source: str, *rest: Any) -> bytes:
        sources.append(source)
        return b"cubin"

    monkeypatch.setattr("tilelang.cuda.backend.tilelang_callback_cuda_compile", compile_cuda)
    assert compiler.compile_kernel(key).cubin == b"cubin"
    assert sources == [lowered(key).source]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("kernel", ["finish", "fused_post_pre"])
def test_source_is_the_one_that_tilelang_compiles(kernel, lowered):
    key = key_of(kernel, 256, arch="sm_80" if kernel == "finish" else ARCH, norm=True)
    compiled = tilelang.compile(
        compiler.program(key),
        target={"kind": "cuda", "arch": key.arch},
        pass_configs=compiler.pass_configs(),
    )
    assert compiled.get_kernel_source() == lowered(key).source


SAMPLES = (Path(__file__).parent / "emulation/samples.cu").read_text()
SAMPLE = {name: i for i, name in enumerate(re.findall(r"^  (\w+),$", SAMPLES, re.M))}
LANE = torch.arange(64)


@pytest.fixture
def sample(kept) -> Callable[..., Tensor]:
    """Run a sample on in[t] = t with ``out`` full of NaN; return ``out``."""

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
            symbol="sample_kernel",
            parameters=(
                ("out", "pointer"),
                ("in", "pointer"),
                ("counter", "pointer"),
                ("sample", "int32"),
            ),
            arguments=(
                Argument("out", "float32", ("size",)),
                Argument("in", "float32", ("size",)),
                Argument("counter", "int32", (1,)),
                Argument("sample", "int32", None),
            ),
            grid=(constant(ctas), constant(1), constant(1)),
            block=(64, 1, 1),
            cluster=cluster,
            shared=4 * 64,
            pdl=waits,
        )
        out = torch.full_like(given, torch.nan)
        counter = torch.zeros(1, dtype=torch.int32)
        values = {"out": out, "in": given, "counter": counter, "sample": SAMPLE[name]}
        Kernel(lowered, kept, waits=waits, **options)((ctas,), values)
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
    if name == "ENDLESS_WAIT":
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
        ("BULK_ODD", r"load_bulk: 20 bytes, expected a multiple of 16 up to 1024"),
        ("BULK_TOO_LARGE", r"load_bulk: 1040 bytes, expected a multiple of 16 up to 1024"),
        ("BULK_MISALIGNED", r"load_bulk: the slot at byte 8 .* is not aligned to 16 bytes"),
        ("BULK_SOURCE_MISALIGNED", r"load_bulk: the source is not aligned to 16 bytes"),
        ("BULK_NOT_FENCED", r"load_bulk: no bulk_fence since this thread waited"),
        ("BULK_FENCED_TOO_EARLY", r"load_bulk: no bulk_fence since this thread waited"),
        ("LOAD_BULK_APART", r"load_bulk: the lanes of a warp do not ask for the same"),
    ],
)
@pytest.mark.parametrize("sanitize_threads", [False, True], ids=["fibers", "threads"])
def test_what_no_cluster_may_do(sample, monkeypatch, name, message, sanitize_threads):
    waits = name == "CLUSTER_TOUCHES_BEFORE_DEPENDENCY"
    if sanitize_threads:
        if waits:
            pytest.skip("memory is closed to fibers only")
        if message.startswith("deadlock"):
            monkeypatch.setattr("emulation.harness.PATIENCE", 4)
        if name == "CLUSTER_BARRIER_MISSED":
            # The threads give up one by one, and the first of them names what it waits for.
            message = (
                r"deadlock: (cluster barrier 0 still waits for 1|end of CTA \d still waits for \d+)"
                r" of 128 threads"
            )
        # A CTA that is about to end is refused as well.
        if name == "SEND_TO_ENDED":
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
    # A wait for a group does not wait for loads that are in no group.
    out = sample("LOADS_UNCOMMITTED")
    assert torch.equal(out[:32], LANE[:32].float())
    assert out[32:].isnan().all()


def test_registers_of_a_warpgroup(sample):
    assert sample("REGISTERS").isnan().all()


def test_memory_after_the_dependency(sample):
    assert torch.equal(sample("AFTER_DEPENDENCY", waits=True, ctas=3), LANE.float())
    # Threads that do not wait go on as far as they can without memory.
    assert torch.equal(sample("ONE_THREAD_WAITS", waits=True), LANE.float())
    # No kernel writes a weight, so a weight may be read early.
    early = sample("TOUCH_BEFORE_DEPENDENCY", waits=True, early=("in",))
    assert torch.equal(early, LANE.float())


def test_ctas_of_a_cluster(sample):
    assert torch.equal(sample("RANKS", ctas=4, cluster=2), LANE // 16 % 2 * 1.0)
    # One cluster runs side by side; before its threads wait none may touch memory.
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
    for name in ("SEND2", "SEND4"):
        assert torch.equal(sample(name, **options), LANE + 100.0)
    assert torch.equal(sample("LOAD_BULK_AGAIN", **options), LANE.float())
    for name in ("PHASES", "PHASES_EARLY", "PHASES_TOLD"):
        assert torch.equal(sample(name, **options), LANE % 32 * 15 + 40.0)
    assert torch.equal(sample("LOAD_BEHIND", **options), LANE % 32 * 2 + 32.0)
    for name in ("LOAD_BULK", "LOAD_BULK4"):
        assert torch.equal(sample(name, **options), LANE.float())
    # Not even what has been sent can be read before everything has been sent.
    late = sample("SEND_LATE", **options)
    assert late[LANE % 32 < 31].isnan().all()
    assert late[LANE % 32 == 31].eq(0).all()


def test_a_large_cluster(sample):
    # The cluster has as many threads as 16 CTAs of 544.
    assert torch.equal(sample("CLUSTER_SIZE", ctas=136, cluster=136), LANE * 0.0 + 8704)


def test_lowered_cluster():
    @T.prim_func
    def program(y: T.Tensor((4,), "float32")):
        with T.Kernel(4, threads=32, cluster_dims=(2, 1, 1)) as i:
            if T.get_thread_binding() == 0:
                y[i] = T.cast(T.block_rank_in_cluster(), "float32")

    assert compiler.lower(program, ARCH).cluster == 2


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
    # The PTX ISA draws the fragments like this: pairs of a in one row, of b in one column.
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
        # A pass orders what was done before the pass, and a wait what is done after the wait.
        ("BY_FORMER_PHASE", True),
        ("BY_LATE_GATE", True),
        ("BY_LOAD", False),
        # Only the thread that has loaded can wait for its loads.
        ("BY_LATE_LOAD", True),
        # A shuffle hands over a register and orders no memory.
        ("BY_SHUFFLE", True),
        ("BY_NOTHING", True),
        ("SAME_ELEMENTS", True),
        ("OWN_ELEMENTS", False),
        ("RELEASE", False),
        ("RELAXED", True),
        # TileLang drops the memory order of an addition whose result nobody reads.
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
        ("LOAD_BULK_AGAIN", False),
        ("SEND_LATE", True),
        ("INBOX", False),
        # The opening of an inbox has a fence of its own.
        ("INBOX_OPENED_RELAXED", False),
        ("INBOX_OPENED_IN_TIME", False),
        ("INBOX_OPENED_UNORDERED", True),
        ("INBOX_WITHOUT_WAIT", True),
        # An inbox orders what was sent to it, not what was sent to another one.
        ("INBOX_OTHER", True),
        # An inbox does not order what else the sender wrote either.
        ("INBOX_OTHER_MEMORY", True),
        ("INBOX_AFTER_READ", True),
        ("SLOT_AGAIN", False),
        # Who has had a message back may write again what the message's sender had read.
        ("PHASES", False),
        ("PHASES_EARLY", False),
        ("PHASES_TOLD", False),
        ("PHASES_UNREAD", True),
        ("PHASES_WITHOUT_WAIT", True),
        ("LOAD_BEHIND", False),
        ("LOAD_UNREAD", True),
        ("LOAD_BULK", False),
        ("LOAD_BULK4", False),
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
        # Two clusters run one after the other and side by side; some write the same elements.
        for resident in (1, 2) if name.startswith(("SEND", "PHASES", "LOAD")) else (1, 4):
            sample(name, **{**options, "ctas": 4, "resident": resident})

"""Test devices, processes and threads: mixed devices, fork, spawn, 16 threads at once."""

import multiprocessing
import os
import subprocess
import sys
import threading

import pytest
import torch

from helpers import HANG, OPS, STREAMS, assert_equal, call, clone, tensors
from mhc_ops.native import host
from mhc_ops.testing import assert_matches_oracle, make_inputs

HIDDEN = 256
THREADS = 16


def inputs_of(op, device="cpu", tokens=3, seed=0):
    norm = op != "post"
    return make_inputs(op, tokens, HIDDEN, device=device, norm=norm, sinkhorn_repeat=3, seed=seed)


# ----------------------------------------------------------------------------------- mixed devices


@pytest.mark.parametrize("op", OPS)
def test_meta_and_cpu_are_not_mixed(op, subtests):
    """Compare each tensor with the streams; where the streams are moved, they are the odd ones."""
    for name in tensors(inputs_of(op)):
        with subtests.test(name):
            inputs = inputs_of(op)
            inputs[name] = inputs[name].to("meta")
            first, here, there = name, "cpu", "meta"
            if name == STREAMS[op]:
                first, here, there = next(n for n in inputs if n != name), "meta", "cpu"
            with pytest.raises(ValueError, match="expected") as error:
                call(op, inputs)
            assert str(error.value) == f"mhc::{op}: expected {first} on {here}, got {there}"


# --------------------------------------------------------------------------------------- processes


def serve(device, seeds, connection):
    """Run every op on every seed, in another process, and send arrays of numpy.

    Arrays of numpy need no shared memory.
    """
    torch.set_num_threads(1)
    results = []
    for seed in seeds:
        for op in OPS:
            outputs = call(op, inputs_of(op, device, seed=seed))
            results.append({name: t.float().cpu().numpy() for name, t in outputs.items()})
    connection.send(results)
    connection.close()


def in_processes(method, device, count=2):
    """Return what ``serve`` gave in each of so many processes at once."""
    context = multiprocessing.get_context(method)
    running = []
    for _ in range(count):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=serve, args=(device, (0, 1), there))
        process.start()
        there.close()
        running.append((process, here))
    given = []
    for process, here in running:
        assert here.poll(HANG), f"no answer after {method}"
        given.append(here.recv())
        process.join(HANG)
        assert process.exitcode == 0
    return given


def expected(device):
    return [
        {name: t.float().cpu() for name, t in call(op, inputs_of(op, device, seed=seed)).items()}
        for seed in (0, 1)
        for op in OPS
    ]


def check(given, want):
    for results in given:
        for got, outputs in zip(results, want, strict=True):
            assert_equal({name: torch.from_numpy(a) for name, a in got.items()}, outputs)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_on_the_cpu(method):
    """Run the ops in the parent, with the short way loaded, before it forks."""
    host.load()
    # A forked child has none of the parent's threads, and sums depend on the number of threads, so
    # parent and child use one.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        want = expected("cpu")
        given = in_processes(method, "cpu")
    finally:
        torch.set_num_threads(threads)
    check(given, want)


FORK_BEFORE_CUDA = """
import os, sys
import torch, mhc_ops
from mhc_ops.testing import assert_matches_oracle, make_inputs
assert not torch.cuda.is_initialized()
child = os.fork()
inputs = make_inputs("fused_post_pre", 3, 256, device="cuda", norm=True)
assert_matches_oracle("fused_post_pre", inputs, mhc_ops.fused_post_pre(**inputs))
if child == 0:
    os._exit(0)
sys.exit(os.waitpid(child, 0)[1])
"""


@pytest.mark.gpu
def test_gpu_after_fork_with_cuda_uninitialised():
    """Use the GPU in parent and child after the fork."""
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", FORK_BEFORE_CUDA],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_gpu_spawn():
    check(in_processes("spawn", "cuda"), expected("cuda"))


# ----------------------------------------------------------------------------------------- threads


def in_threads(work):
    """Run ``work(i)`` in so many threads that start together; raise what one of them raised."""
    barrier = threading.Barrier(THREADS)
    wrong = []

    def run(i):
        try:
            barrier.wait(HANG)
            work(i)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
        assert not thread.is_alive()
    if wrong:
        raise wrong[0]


def test_threads_on_the_cpu():
    """Give every thread its own inputs, which stay as they were."""
    inputs = [{op: inputs_of(op, tokens=1 + i % 5, seed=i) for op in OPS} for i in range(THREADS)]
    before = [{op: clone(inputs[i][op]) for op in OPS} for i in range(THREADS)]

    def work(i):
        for _ in range(5):
            for op in OPS:
                outputs = call(op, inputs[i][op])
                assert_matches_oracle(op, inputs[i][op], tuple(outputs.values()))

    in_threads(work)
    for i in range(THREADS):
        for op in OPS:
            assert_equal(inputs[i][op], before[i][op])


@pytest.mark.gpu
def test_gpu_threads_on_their_own_streams():
    """Get in each thread the bits of a call made alone; its device and stream stay the same."""
    inputs = [
        {op: inputs_of(op, "cuda", tokens=1 + 9 * i, seed=i) for op in OPS} for i in range(THREADS)
    ]
    want = [{op: clone(call(op, inputs[i][op])) for op in OPS} for i in range(THREADS)]
    streams = [torch.cuda.Stream() for _ in range(THREADS)]
    torch.cuda.synchronize()

    def work(i):
        with torch.cuda.stream(streams[i]):
            for _ in range(50):
                for op in OPS:
                    outputs = call(op, inputs[i][op])
                    assert torch.cuda.current_stream() == streams[i]
                    assert torch.cuda.current_device() == 0
                    assert_equal(outputs, want[i][op])
        streams[i].synchronize()

    in_threads(work)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("op", OPS)
def test_gpu_other_current_device(op):
    """Call with tensors on the second GPU while the first is current, and stays so."""
    there = inputs_of(op, "cuda:1")
    with torch.cuda.device(0):
        outputs = call(op, there)
        assert torch.cuda.current_device() == 0
    assert all(out.device == torch.device("cuda", 1) for out in outputs.values())
    assert_matches_oracle(op, there, tuple(outputs.values()))

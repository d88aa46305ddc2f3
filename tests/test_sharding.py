"""Test DTensor: the ops on sharded tokens, in groups of 2 and 4 processes on the CPU."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import sharded
from test_import import run as run_code

import mhc_ops
from helpers import HANG

TESTS = Path(__file__).parent
PACKAGE = Path(mhc_ops.__file__).parents[1]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_group(script, count):
    """Run a script in so many processes, started as torchrun does; return what each says."""
    group = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, [TESTS, PACKAGE, os.environ.get("PYTHONPATH", "")])),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(TESTS / script)],
            env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    outputs = [process.communicate(timeout=HANG) for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    return [json.loads(output) for output, _ in outputs]


@pytest.fixture(scope="module", params=[2, 4], ids=lambda count: f"{count}_processes")
def results(request):
    return run_group("sharded.py", request.param)


@pytest.mark.slow
@pytest.mark.parametrize("check", sharded.CHECKS)
def test_group(results, check):
    for rank, said in enumerate(results):
        assert not said[check], f"rank {rank}:\n{said[check]}"


@pytest.mark.parametrize(
    "imports", ["mhc_ops, torch.distributed.tensor", "torch.distributed.tensor, mhc_ops"]
)
def test_rules_are_there_in_either_order_of_imports(imports):
    code = f"""
import sys
import torch, {imports}
propagator = torch.distributed.tensor.DTensor._op_dispatcher.sharding_propagator
ops = [getattr(torch.ops.mhc, name).default for name in mhc_ops._library.SCHEMAS]
print([op in propagator.op_strategy_funcs for op in ops])
print(sum("mhc_ops" in type(finder).__module__ for finder in sys.meta_path))
"""
    assert run_code(code) == f"{[True] * 7}\n0"


def test_importing_the_package_does_not_import_dtensor():
    code = "import sys, mhc_ops; print('torch.distributed.tensor' in sys.modules)"
    assert run_code(code) == "False"

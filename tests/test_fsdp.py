"""Test FSDP2 and DDP: modules of ``mhc_ops.nn`` in groups of two processes on the CPU."""

import fully_sharded
import pytest
from test_sharding import run_group


@pytest.fixture(scope="module")
def results():
    return run_group("fully_sharded.py", 2)


@pytest.mark.slow
@pytest.mark.parametrize("check", fully_sharded.CHECKS)
def test_group(results, check):
    for rank, said in enumerate(results):
        assert not said[check], f"rank {rank}:\n{said[check]}"

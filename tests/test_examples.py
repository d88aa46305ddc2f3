"""Run the examples, which must agree with what they say, and stay short."""

import os
import subprocess
import sys
from pathlib import Path

import engines
import pytest

import mhc_ops
from helpers import HANG

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PACKAGE = Path(mhc_ops.__file__).parents[1]

pytestmark = pytest.mark.slow  # Each test starts a process or more.


def run(name, *arguments, beside=(), processes=0, **environment):
    """Run an example and return what it printed; ``beside`` are more folders to import from.

    With ``processes`` the example runs under torchrun, in so many.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    path = os.pathsep.join(map(str, [*beside, PACKAGE, os.environ.get("PYTHONPATH", "")]))
    result = subprocess.run(
        [
            sys.executable,
            *(torchrun if processes else ()),
            str(ROOT / "examples" / name),
            *arguments,
        ],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_short(path):
    assert len(path.read_text().splitlines()) < 60


def test_post_pre():
    output = run("post_pre.py")
    assert "streams equal bit for bit: True" in output


def test_decoder_stack():
    output = run("decoder_stack.py", CUDA_VISIBLE_DEVICES="")
    assert "got missing layers.1.hc_attn_fn" in output
    assert "in two halves, largest difference: 0.0e+00" in output
    assert "captured changes nothing: True" in output


def test_nextn():
    output = run("nextn.py")
    assert "draft step 3: streams (8, 4, 256)" in output
    assert "streams of the boundary equal fused and unfused: True" in output


def test_compile():
    output = run("compile.py")
    assert output.count("equal to eager: True") == 6
    assert "graphs: 1" in output


def test_cuda_graph_without_a_gpu():
    output = run("cuda_graph.py", CUDA_VISIBLE_DEVICES="")
    assert output.startswith("this example needs a GPU")


@pytest.mark.gpu
def test_cuda_graph():
    assert run("cuda_graph.py").count("equal to eager: True") == 3


@pytest.mark.parametrize("engine", engines.VERSIONS)
def test_engine(engine, tmp_path):
    """Run the example of an engine on the stand-in of the engine."""
    engines.write(engine, tmp_path)
    output = run(f"{engine}_engine.py", "some/model", beside=[tmp_path])
    signatures = engines.SIGNATURES[engine].values()
    assert output.count("runs the op: True") == sum(map(len, signatures))
    assert "some/model: Four streams flow" in output


@pytest.mark.parametrize("engine", engines.VERSIONS)
def test_engine_that_is_not_there(engine, tmp_path):
    (tmp_path / f"{engine}.py").write_text("raise ImportError('not installed')")
    output = run(f"{engine}_engine.py", beside=[tmp_path])
    assert output.startswith("this example needs ")
    assert output.rstrip().endswith(
        f"got an import error: not installed; tested with {engine} {engines.VERSIONS[engine]}"
    )


def test_sequence_parallel():
    output = run("sequence_parallel.py", processes=2)
    for rank in range(2):
        assert f"rank {rank}: 5 of 10 tokens, equal: True" in output


def test_data_parallel():
    output = run("data_parallel.py", processes=2)
    for rank in range(2):
        assert f"rank {rank}: 3 of 6 sequences, equal: True, collectives: 0" in output

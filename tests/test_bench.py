"""Check everything of the benchmark but the clock on the CPU, and the clock on a GPU."""

import argparse
import functools
import json
import math
import subprocess
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline
from rich.console import Console

import boundary_time
import mhc_ops
import records
from mhc_ops import bench, info, timing
from mhc_ops.__main__ import main
from mhc_ops.bench import Case
from mhc_ops.timing import Timing

BASELINE = Path(__file__).parents[1] / "benchmarks" / "baselines" / "h100_sglang_0.5.23.json"
SMI = {"driver_version": "580.159.04", "clocks.sm": "1980", "clocks.mem": None}
CASE = Case(8, 4096, "fused")
TIMES = Timing(6.10049, 6.0, 6.25, 4.56789, 64)


def row_of(case=CASE, times=TIMES):
    return bench.make_row(case, times, copy_tb_s=3.026, gpu="NVIDIA H100", smi=SMI)


def text_of(table, width=100):
    console = Console(width=width, color_system=None, highlight=False)
    with console.capture() as capture:
        console.print(table)
    lines = capture.get().replace("─", "-").replace("µ", "u").splitlines()
    return "\n".join(line.rstrip() for line in lines)


@pytest.fixture
def clockless(monkeypatch):
    """Pretend an H100: ``run`` does everything but touch a GPU."""
    times = {"fused": 6.0, "unfused": 9.0, "eager": 300.0, "compile": 30.0}

    def time_case(case, device, *, replays):
        return Timing(times[case.path], times[case.path] - 0.5, times[case.path] + 1, 4.5, 64)

    monkeypatch.setattr(bench.support, "is_supported", lambda device: (True, "pretended"))
    monkeypatch.setattr(bench.support, "cuda_device", lambda device: torch.device("cuda", 0))
    monkeypatch.setattr(bench.info, "nvidia_smi", lambda index, *fields: SMI)
    monkeypatch.setattr(bench.timing, "copy_bandwidth", lambda device: 3.026)
    monkeypatch.setattr(bench, "time_case", time_case)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(bench, "prewarm", lambda hidden, **rest: None)


# ------------------------------------------------------------------------------------- the chain


@pytest.mark.parametrize(
    ("tokens", "length"),
    [(1, 64), (64, 64), (65, 32), (512, 32), (513, 16), (2048, 16), (2049, 8), (100_000, 8)],
)
def test_chain_length(tokens, length):
    assert timing.chain_length(tokens) == length


@pytest.mark.parametrize("hidden", bench.DEFAULT_HIDDEN)
def test_weights_are_cold(hidden):
    """Move more bytes between two uses of a fn than the 60 MB of an H200's L2 hold."""
    for tokens in range(1, 9000, 7):
        length = timing.chain_length(tokens)
        assert (length - 1) * bench.boundary_bytes(tokens, hidden) > 1.5 * 60e6


def test_boundary_bytes_are_those_of_the_tensors():
    tokens, hidden = 5, 256
    x, streams = torch.empty(tokens, hidden), torch.empty(tokens, 4, hidden)
    fn = torch.empty(24, 4 * hidden, dtype=torch.float32)
    bf16 = 2 * (x.numel() + streams.numel() + streams.numel() + x.numel())
    assert bench.boundary_bytes(tokens, hidden) == bf16 + fn.nbytes


def test_floor_is_that_of_the_baseline():
    for row in json.loads(BASELINE.read_text())["rows"]:
        floor = bench.floor_us(row["tokens"], row["hidden"], 3.026)
        assert floor == pytest.approx(row["floor"], abs=0.01, rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("norm", [True, False])
def test_paths_agree_and_stay_finite(norm, monkeypatch):
    # The backend is not Inductor: other tests compile; this test shows that one graph serves.
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    bench._compiled.cache_clear()
    outputs = {}
    for path in bench.PATHS:
        case = Case(3, 64, path, norm=norm)
        run = bench.make_chain(case, "cpu", length=64)
        outputs[path] = run()
        bench.check_finite(case, outputs[path])
        for first, again in zip(outputs[path], run(), strict=True):
            assert torch.equal(first, again), "a replay must start from the same inputs"
    bench._compiled.cache_clear()
    assert len(graphs) == 1
    for path in bench.PATHS:
        for got, want in zip(outputs[path], outputs["fused"], strict=True):
            assert torch.equal(got, want), path


@torch.no_grad()
def test_every_boundary_has_its_own_weights(monkeypatch):
    seen = []

    def step(x, residual, post_mix, comb_mix, fn, *rest):
        seen.append((fn.data_ptr(), x))
        return residual, post_mix, comb_mix, torch.full_like(x, len(seen))

    monkeypatch.setattr(bench, "boundary", lambda case: step)
    bench.make_chain(Case(2, 256, "fused"), "cpu", length=5)()
    assert len({pointer for pointer, _ in seen}) == 5
    assert [x[0, 0].item() for _, x in seen[1:]] == [1, 2, 3, 4], "x is the last layer input"


# ------------------------------------------------------------------------------ samples, records


def test_percentiles():
    assert timing.percentiles([4.0]) == (4.0, 4.0, 4.0)
    samples = [float(value) for value in range(11)]
    assert timing.percentiles(samples[::-1]) == pytest.approx((1.0, 5.0, 9.0))
    assert timing.percentiles([1.0, 2.0]) == pytest.approx((1.1, 1.5, 1.9))


def test_not_finite_is_refused():
    good = torch.ones(2)
    bad = torch.tensor([1.0, math.nan])
    bench.check_finite(CASE, (good, good, good, good))
    with pytest.raises(RuntimeError, match=r"comb_mix of Case.* is not finite after the chain"):
        bench.check_finite(CASE, (good, good, bad, good))


def test_record():
    row = json.loads(json.dumps(row_of() | records.stamp("c0ffee", "bench")))
    row["torch"], row["utc"] = "*", row["utc"][:2] + "*"
    assert_expected_inline(
        json.dumps(row, indent=1),
        """\
{
 "tokens": 8,
 "hidden": 4096,
 "path": "fused",
 "mode": "graph",
 "norm": true,
 "sinkhorn_repeat": 20,
 "us_median": 6.1,
 "us_p10": 6.0,
 "us_p90": 6.25,
 "host_us": null,
 "floor_us": 0.736,
 "copy_tb_s": 3.026,
 "chain": 64,
 "gpu": "NVIDIA H100",
 "driver": "580.159.04",
 "sm_mhz": 1980.0,
 "mem_mhz": null,
 "torch": "*",
 "tilelang": "0.1.15",
 "commit": "c0ffee",
 "command": "bench",
 "utc": "20*"
}""",
    )


def test_host_time_is_recorded():
    row = row_of(CASE._replace(mode="eager"))
    assert (row["mode"], row["host_us"]) == ("eager", 4.568)
    assert row_of(CASE._replace(mode="eager", tokens=65))["host_us"] is None, "the queue is full"


def test_table():
    rows = [
        row_of(Case(8192, 7168, "unfused"), Timing(1234.5, 1234.0, 1239.0, 9.0, 8)),
        row_of(Case(1, 4096, "fused"), Timing(5.3, 5.25, 5.6, 9.0, 64)),
        row_of(Case(1, 4096, "compile", "eager"), Timing(85.3, 80.0, 99.0, 90.0, 64)),
        row_of(Case(1, 4096, "fused", norm=False), Timing(5.0, 5.0, 5.0, 9.0, 64)),
        row_of(Case(3, 4096, "fused"), Timing(5.3, 5.25, 5.6, 9.0, 64)),
    ]
    baseline = records.read_baseline(BASELINE)
    shown = text_of(bench.make_table(rows, [boundary_time.beside(row, baseline) for row in rows]))
    assert max(map(len, shown.splitlines())) <= 100
    assert "…" not in shown
    assert_expected_inline(
        shown,
        """\
                      one boundary, us; NVIDIA H100, copy 3.026 TB/s

 hidden tokens path    mode   median     p10     p90  host  floor x floor baseline vs base
 -----------------------------------------------------------------------------------------
   7168   8192 unfused graph 1234.50 1234.00 1239.00       389.01    3.17   743.00    1.66
   4096      1 fused   graph    5.30    5.25    5.60         0.55    9.69     7.79    0.68
   4096      1 compile eager   85.30   80.00   99.00 90.00   0.55  155.94
   4096      1 fused   graph    5.00    5.00    5.00         0.55    9.14
   4096      3 fused   graph    5.30    5.25    5.60         0.60    8.82
""",
    )
    assert "baseline" not in text_of(bench.make_table(rows))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError"),
        ('{"rows": [{"tokens": 1, "hidden": 4096, "fused": 1.0}]}', "KeyError"),
    ],
)
def test_wrong_baseline(tmp_path, text, message):
    path = tmp_path / "baseline.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"expected JSON with rows of .*{message}"):
        records.read_baseline(path)


def test_commit(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True)

    package = tmp_path / "mhc_ops"
    package.mkdir()
    (package / "__init__.py").touch()
    results = tmp_path / records.RESULTS
    results.mkdir(parents=True)
    (results / "gpu.jsonl").touch()
    monkeypatch.setattr(mhc_ops, "__file__", str(package / "__init__.py"))
    assert records.source_commit() == "unknown"
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=tmp_path, text=True).strip()
    assert records.source_commit() == head
    (results / "gpu.jsonl").write_text("{}\n")
    assert records.source_commit() == head
    (package / "__init__.py").write_text("changed\n")
    assert records.source_commit() == f"{head}-dirty"
    inner = tmp_path / "environment" / "mhc_ops"
    inner.mkdir(parents=True)
    monkeypatch.setattr(mhc_ops, "__file__", str(inner / "__init__.py"))
    assert records.source_commit() == "unknown", "the repository around is not the source"


# ----------------------------------------------------------------------------------- the command


def test_command(capsys, clockless, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    argv = ["bench", "--tokens", "1", "8", "--hidden", "4096"]
    assert main(argv) == 0
    shown = capsys.readouterr()
    assert "16/16 hidden 4096 tokens 8 compile eager: 30.00 µs" in shown.err
    assert "one boundary, µs; NVIDIA H100 80GB HBM3, copy 3.026 TB/s" in shown.out
    assert main([*argv, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(r["tokens"], r["path"], r["mode"]) for r in rows] == [
        (tokens, path, mode) for tokens in (1, 8) for path in bench.PATHS for mode in bench.MODES
    ]
    assert [r["host_us"] for r in rows[:2]] == [None, 4.5]


def test_script_writes_one_record_a_row(tmp_path, capsys, clockless, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    output = tmp_path / "new" / "rows.jsonl"
    argv = ["--tokens", "1", "8", "--hidden", "4096", "--commit", "c0ffee", "-o", str(output)]
    assert boundary_time.main([*argv, "--baseline", str(BASELINE)]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 2 * len(bench.PATHS) * len(bench.MODES)
    assert {r["commit"] for r in rows} == {"c0ffee"}
    assert " --tokens 1 8 --hidden 4096" in rows[0]["command"]
    assert "7.79" in capsys.readouterr().out, "the baseline figure of fused at 1 token"
    assert boundary_time.main([*argv, "--paths", "fused", "--modes", "graph"]) == 0
    assert len(output.read_text().splitlines()) == len(rows) + 1 + 1, "records are appended"


def test_default_output(tmp_path, clockless, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--tokens", "1", "--hidden", "4096", "--paths", "fused", "--modes", "graph"]
    assert boundary_time.main(argv) == 0
    assert (tmp_path / "benchmarks/results/nvidia_h100_80gb_hbm3.jsonl").exists()


def test_defaults():
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    arguments = parser.parse_args([])
    assert arguments.tokens == [1, 8, 16, 32, 64, 128, 512, 2048, 8192]
    assert arguments.hidden == [4096, 7168]
    assert arguments.paths == ["fused", "unfused", "eager", "compile"]
    assert (arguments.norm, arguments.sinkhorn_repeat, arguments.replays) == (True, 20, 15)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tokens", "0"], "argument --tokens: expected a positive integer, got '0'"),
        (["--tokens", "x"], "argument --tokens: expected a positive integer, got 'x'"),
        (["--hidden", "4000"], "argument --hidden: expected a multiple of 256, got '4000'"),
        (["--paths", "quick"], "argument --paths: invalid choice: 'quick'"),
        (["--modes", "lazy"], "argument --modes: invalid choice: 'lazy'"),
        (["--replays", "-1"], "argument --replays: expected a positive integer, got '-1'"),
        (["--sinkhorn-repeat", "0"], "expected a positive integer, got '0'"),
    ],
)
def test_wrong_arguments(capsys, argv, message):
    with pytest.raises(SystemExit) as exit_:
        main(["bench", *argv])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_refuses_without_a_supported_gpu(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench.support, "is_supported", lambda device: (False, "no GPU here"))
    assert main(["bench"]) == 2
    shown = capsys.readouterr()
    assert shown.err == "mhc_ops bench: expected a GPU that the ops support: no GPU here\n"
    assert shown.out == ""
    assert not list(tmp_path.iterdir()), "no results file for a run that did not happen"


def test_missing_baseline_file(capsys):
    assert boundary_time.main(["--baseline", "/nowhere/file.json"]) == 2
    assert "/nowhere/file.json" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- the clock


@pytest.mark.gpu
@pytest.mark.parametrize("mode", bench.MODES)
@pytest.mark.parametrize("path", bench.PATHS)
def test_times_of_a_gpu(path, mode):
    (row,) = bench.run([Case(8, 4096, path, mode)])
    assert 0 < row["us_p10"] <= row["us_median"] <= row["us_p90"]
    assert row["us_median"] > row["floor_us"] > 0
    assert (row["host_us"] is not None) == (mode == "eager")
    assert row["chain"] == 64
    assert row["gpu"] == torch.cuda.get_device_name()
    assert 0.1 < row["copy_tb_s"] < 20
    assert row["driver"] == info.nvidia_smi(0, "driver_version")["driver_version"]


@pytest.mark.gpu
@torch.no_grad()
def test_graph_gives_what_eager_gives():
    device = torch.device("cuda", torch.cuda.current_device())
    chain = bench.make_chain(Case(8, 4096, "fused"), device, length=8)
    graph, outputs = timing.capture(chain)
    for output in outputs:
        output.zero_()
    graph.replay()
    for replayed, eager in zip(outputs, chain(), strict=True):
        assert torch.equal(replayed, eager)

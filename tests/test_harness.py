"""Test the timing harness of the benchmarks: turns, chains, records, and on a GPU the clock."""

import itertools
import json
import sys
from types import SimpleNamespace

import pytest
import torch

import ends_time
import harness
import records
import steps_time
from mhc_ops import timing

SCRIPTS = pytest.mark.parametrize("script", [steps_time, ends_time], ids=["steps", "ends"])
CHAINS = [
    *((steps_time.make_chain, (step,)) for step in steps_time.STEPS),
    *((ends_time.make_chain, (part, path)) for part in ends_time.PARTS for path in ends_time.PATHS),
]


def test_samples_are_taken_in_turn():
    order = []

    def sampler(name, values):
        def sample():
            order.append(name)
            return next(values)

        return sample

    values = itertools.chain([99.0] * harness.WARMUPS, [5.0, 1.0, 3.0])
    samplers = {"a": sampler("a", values), "b": sampler("b", itertools.count())}
    assert harness.in_turn(samplers, 3) == {"a": 3.0, "b": harness.WARMUPS + 1}
    assert order == ["a", "b"] * (harness.WARMUPS + 3)


@pytest.mark.parametrize("graph", [True, False])
def test_time_of_a_chain_is_divided_by_its_length(monkeypatch, graph):
    """Pretend a clock: the first calls are not timed, and what the chain returned is checked."""
    calls, checked = [], []
    replays = itertools.count(1)  # This counts the timed replays.

    def sample_us(run):
        run()
        next(replays)
        return 32.0, 8.0

    def capture(run):
        return SimpleNamespace(replay=lambda: calls.append("replay")), run()

    monkeypatch.setattr(timing, "sample_us", sample_us)
    monkeypatch.setattr(timing, "capture", capture)
    times = timing.time_chain(
        lambda: calls.append("run") or "result", 16, checked.append, graph=graph, replays=5
    )
    assert times == timing.Timing(2.0, 2.0, 2.0, 0.5, 16)
    assert checked == ["result"]
    assert next(replays) == 5 + 1
    made = timing.WARMUPS + 5
    assert calls == (["run"] + ["replay"] * made if graph else ["run"] * (made + 1))


def test_wall_time_is_that_of_the_call():
    calls = []
    assert harness.wall_us(lambda: calls.append(1), "cpu")() > 0
    assert calls == [1]


def test_a_result_that_is_not_finite_is_refused():
    check = harness.require_finite("pre, 3 tokens")
    check(torch.ones(2))
    with pytest.raises(RuntimeError, match="pre, 3 tokens: the result is not finite"):
        check(torch.tensor([1.0, torch.nan]))


@torch.no_grad()
@pytest.mark.parametrize(("make_chain", "kind"), CHAINS)
def test_chains_stay_finite_and_start_anew(make_chain, kind):
    run = make_chain(*kind, 3, 64, "cpu", 16)
    first = run()
    harness.require_finite(str(kind))(first)
    assert torch.equal(run(), first), "a replay must start from the same inputs"


@torch.no_grad()
@pytest.mark.parametrize("part", ends_time.PARTS)
def test_paths_of_an_end_agree(part):
    fused, unfused = (
        ends_time.make_chain(part, path, 3, 64, "cpu", 4)() for path in ends_time.PATHS
    )
    assert torch.equal(fused, unfused)


@SCRIPTS
def test_records(script, tmp_path, capsys, monkeypatch):
    """Record a row for each size and kind, with figures, floor and commit, without a GPU."""
    times = timing.Timing(6.0, 5.5, 6.5, 2.0, 64)
    monkeypatch.setattr(script, "make_chain", lambda *arguments: None)
    monkeypatch.setattr(timing, "time_chain", lambda run, length, check: times)
    monkeypatch.setattr(
        harness, "sweep", lambda tokens, hidden: ((h, t, 4.0) for h in hidden for t in tokens)
    )
    output = tmp_path / "rows.jsonl"
    argv = ["--tokens", "1", "8", "--hidden", "4096", "--commit", "c0ffee", "-o", str(output)]
    script.main(argv)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    kinds = len(steps_time.STEPS) if script is steps_time else len(CHAINS) - len(steps_time.STEPS)
    assert len(rows) == 2 * kinds
    assert {row["commit"] for row in rows} == {"c0ffee"}
    assert all(row["us_median"] == 6.0 > row["floor_us"] > 0 for row in rows)
    assert len({(row["what"], row["tokens"]) for row in rows}) == len(rows)
    assert "6.00" in capsys.readouterr().out


@pytest.mark.gpu
@SCRIPTS
def test_times_of_a_gpu(script, tmp_path):
    output = tmp_path / "rows.jsonl"
    script.main(["--tokens", "8", "--hidden", "4096", "-o", str(output)])
    for row in map(json.loads, output.read_text().splitlines()):
        assert 0 < row["us_p10"] <= row["us_median"] <= row["us_p90"]
        assert row["us_median"] > row["floor_us"] > 0


@pytest.mark.gpu
def test_samplers_of_a_gpu():
    x = torch.zeros(1 << 20, device="cuda")
    us = harness.in_turn(
        {
            "gpu": harness.gpu_us(x.zero_),
            "burst": harness.burst_us(x.zero_, 10),
            "wall": harness.wall_us(x.zero_, "cuda"),
        },
        5,
    )
    assert all(value > 0 for value in us.values())


def test_a_recorded_command_names_no_folder_of_one_machine(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/here/benchmarks/compare.py"])
    said = records.command_line(["--beside", "/here/checkout", "-o", "results/new.jsonl"])
    assert said == "python benchmarks/compare.py --beside checkout -o results/new.jsonl"

"""Test the stress run: its plan, a comparison that can fail, its verdict; a small run on a GPU."""

import json
import os
import time
from collections import Counter

import pytest
import torch

import stress
import stress_plan
from stress import Memory, Result, Settings

SMALL = Settings(
    boundaries=500,
    hidden=(256,),
    largest=20,
    counts=9,
    streams=3,
    graphs=5,
    graph_length=6,
    burst=4,
)
GIB = 1 << 30
FLAT = Memory(4 * GIB, 5 * GIB, 6 * GIB)
RIGHT = Result(
    counts={"graph": 400, "eager": 100, "competing": 250, "pressure": 50},
    compared=500,
    bad={},
    memory=(FLAT, FLAT),
    out_of_memory=(6, 6),
    retried=1,
    seconds=2.5,
    competing=9,
)


class TestPlan:
    def test_token_counts(self):
        counts = stress.token_counts(Settings())
        assert set(stress_plan.END_COUNTS) <= set(counts)
        assert len(counts) == Settings().counts
        assert (min(counts), max(counts)) == (0, 4096)
        *ends, other = stress.token_counts(SMALL)
        assert ends == [0, 1, 2, 3, 16, 17, 19, 20]
        assert 1 <= other <= 20

    def test_every_case_is_in_the_graphs(self):
        graphs = stress.graph_cases(Settings())
        assert {len(cases) for cases in graphs} == {Settings().graph_length}
        times = Counter(case for cases in graphs for case in cases)
        assert len(times) == Settings().counts * 2
        assert max(times.values()) - min(times.values()) <= 1

    def test_rounds(self):
        planned = list(stress.rounds(SMALL))
        assert planned == list(stress.rounds(SMALL)), "one seed, one plan"
        assert planned != list(stress.rounds(SMALL._replace(seed=1)))
        made = 0
        for turns in planned:
            assert made < SMALL.boundaries
            assert sorted(turn.stream for turn in turns) == list(range(SMALL.streams))
            graphs = [turn.graph for turn in turns if turn.graph is not None]
            assert len(set(graphs)) == len(graphs), "no graph beside itself"
            for turn in turns:
                made += len(turn.cases) if turn.graph is None else SMALL.graph_length
                assert (turn.graph is None) == (len(turn.cases) == SMALL.burst)
        assert made >= SMALL.boundaries

    def test_a_million(self):
        kinds = Counter()
        for turns in stress.rounds(Settings()):
            for turn in turns:
                kinds[turn.graph is None] += len(turn.cases) or Settings().graph_length
        assert sum(kinds.values()) >= 1_000_000
        assert 0.05 < kinds[True] / sum(kinds.values()) < 0.2


@pytest.fixture(scope="module")
def cases():
    return stress.make_cases(SMALL, "cpu", lambda: None)


class TestComparison:
    @pytest.fixture
    def worker(self, cases):
        return stress.Worker(SMALL, max(case.words for case in cases), "cpu", None)

    def turn(self, worker, cases):
        worker.turn(cases)
        return worker.comparison.bad.tolist(), int(worker.comparison.compared)

    def test_right(self, worker, cases):
        assert cases[0].tokens == 0
        assert ["norm_weight" in case.inputs for case in cases[2:5]] == [True, False, True]
        assert self.turn(worker, cases[:4]) == ([0, 0, 0, 0], 4)
        assert self.turn(worker, cases[4:8]) == ([0, 0, 0, 0], 8)

    @pytest.mark.parametrize("output", range(4))
    def test_one_bit(self, worker, cases, output):
        want = cases[2].want[output]
        want[-1] ^= 1 << 63 if output == 3 else 1
        try:
            assert self.turn(worker, cases[:4]) == ([0, 0, 1, 0], 4)
        finally:
            want[-1] ^= 1 << 63 if output == 3 else 1
        assert self.turn(worker, cases[:4]) == ([0, 0, 1, 0], 8)

    def test_an_output_that_is_not_written(self, worker, cases, monkeypatch):
        def run(case):
            return tuple(torch.full_like(result, float("nan")) for result in original(case))

        original = stress.Case.run
        monkeypatch.setattr(stress.Case, "run", run)
        assert self.turn(worker, cases[:4]) == ([0, 1, 1, 1], 4), "no tokens, nothing to write"


class TestVerdict:
    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"bad": {"eager": 2}}, "2 results differ from those of quiet calls"),
            ({"compared": 499}, "500 boundaries were made and 499 compared"),
            ({"counts": {"graph": 90, "eager": 9}}, "cut off after 99 of 500 boundaries"),
            ({"out_of_memory": (6, 5)}, "6 calls had no room for their outputs, 5 said so"),
            ({"memory": (FLAT, FLAT._replace(allocated=4 * GIB + 512))}, "tensors took"),
            ({"memory": (FLAT, FLAT._replace(device=6 * GIB))}, "the GPU had"),
            ({"memory": (FLAT, FLAT._replace(host=7 * GIB))}, "the process had"),
        ],
    )
    def test_wrong(self, change, text):
        found = stress.failures(SMALL, RIGHT._replace(**change))
        assert any(text in sentence for sentence in found)

    def test_record(self):
        record = stress.make_record(SMALL, RIGHT, commit="c0ffee", command="stress.py")
        assert record["outcome"].startswith("500 boundaries, every result with the bits of")
        assert (record["commit"], record["command"]) == ("c0ffee", "stress.py")
        assert (record["mismatches"], record["out_of_memory_caught"]) == (0, 6)
        assert record["memory_after"]["allocated"] == 4 * GIB
        assert json.loads(json.dumps(record))["counts"] == RIGHT.counts


def test_watchdog():
    ends = []
    with stress.Watchdog(0.05, ends.append) as watchdog:
        for _ in range(4):
            watchdog.moved("alive")
            time.sleep(0.02)
        assert not ends
        time.sleep(0.3)
    assert ends == [3]


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(stress.support, "is_supported", lambda: (False, "no GPU here"))
    assert stress.main([]) == 2
    assert "no GPU here" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("plant_fault", [False, True], ids=["right", "fault"])
def test_small_run(plant_fault):
    settings = SMALL._replace(
        boundaries=4000,
        hidden=(4096, 7168),
        largest=600,
        counts=20,
        streams=8,
        graphs=12,
        graph_length=16,
        burst=8,
    )
    with stress.Watchdog(settings.hang_seconds) as watchdog:
        result = stress.stress(settings, watchdog, plant_fault)
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Other processes use the same GPU, so its free memory says nothing about this one.
        result = result._replace(
            memory=tuple(memory._replace(device=0) for memory in result.memory)
        )
    found = stress.failures(settings, result)
    if plant_fault:
        assert len(found) == 1
        assert "results differ from those of quiet calls" in found[0]
        assert any("graph" in kind for kind in result.bad)
    else:
        assert found == []
        assert result.counts["competing"] > 0
        assert result.counts["pressure"] > 0

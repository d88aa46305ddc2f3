"""Test the decoding benchmark: a dry run, and the parts that its verdict rests on."""

import copy
import json

import pytest
import torch

pytest.importorskip("transformers")

from transformers import DynamicCache

import transformers_decode as decoding
from mhc_ops.demo import models as demo
from mhc_ops.integrations import transformers as integration

GOOD = decoding.Compared(0, 40, "mhc-ops fused", 0.01, 0.05, 0.98, 0, 0.7, 0.011)
STOCK = GOOD._replace(path="stock", ratio=1.0)


@pytest.fixture(autouse=True)
def _one_thread():
    """Use one thread: in thousands of tiny calls threads wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_dry_run(tmp_path, capsys):
    output = tmp_path / "checks.jsonl"
    argv = ["--device", "cpu", "--tiny", "--commit", "c0ffee", "-o", str(output)]
    assert decoding.main(argv) == 0
    logits, generated, times = (json.loads(line) for line in output.read_text().splitlines())
    assert logits["outcome"].startswith("errors at most ")
    assert [row["path"] for row in logits["rows"]] == list(decoding.NAMES)
    assert generated["outcome"].startswith("all to their end")
    assert [(row["batch"], row["path"]) for row in times["rows"]] == [
        (batch, path) for batch in decoding.TINY.batches for path in decoding.NAMES
    ]
    assert all(row["eager_us"] > 0 for row in times["rows"])
    assert "mhc-ops fused" in capsys.readouterr().out


@pytest.fixture(scope="module")
def exact():
    return demo.small_model(0, "cpu").float()


@torch.no_grad()
def test_decoding_gives_the_logits_of_one_pass(exact):
    """Decode freely, and again with the choices of the first run."""
    tokens = torch.randint(256, (2, 25), generator=torch.Generator().manual_seed(0))
    want = demo.logits_of(exact, tokens)[:, 19:]
    choices = [demo.Choices() for _ in range(6)]
    torch.testing.assert_close(
        decoding.decode(exact, tokens, 20, choices, record=True), want, rtol=1e-3, atol=1e-3
    )
    assert all(step.taken for step in choices)
    torch.testing.assert_close(
        decoding.decode(exact, tokens, 20, choices), want, rtol=1e-3, atol=1e-3
    )


@torch.no_grad()
def test_a_cache_of_the_same_tensors(exact):
    """Step on one cache, and find the other as it was."""
    tokens = torch.arange(22)[None]
    kept = DynamicCache(config=exact.config)
    exact(tokens[:, :-1], past_key_values=kept, use_cache=True)
    before = copy.deepcopy(kept)
    runs = []
    for _ in range(2):
        other = decoding.alike(kept)
        assert other.layers[0].keys is kept.layers[0].keys
        runs.append(exact(tokens[:, -1:], past_key_values=other, use_cache=True).logits)
        assert other.get_seq_length() == 22
    assert kept.get_seq_length() == 21
    assert torch.equal(*runs)
    for layer, old in zip(kept.layers, before.layers, strict=True):
        assert torch.equal(layer.keys, old.keys)
        for name, value in layer.compressed_kv.items():
            assert torch.equal(value, old.compressed_kv[name])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"ratio": 1.06}, "error 1.060 of stock's, at most 1.05 expected"),
        ({"ratio": float("nan")}, "error nan of stock's"),
        ({"other": 2}, "2 other top tokens"),
    ],
)
def test_wrong_logits(change, text):
    assert decoding.wrong_logits([STOCK, GOOD]) == []
    (found,) = decoding.wrong_logits([STOCK, GOOD, GOOD._replace(**change)])
    assert found.startswith("seed 0, prompt 40, mhc-ops fused: ")
    assert text in found


@torch.no_grad()
def test_wrong_mathematics(monkeypatch):
    """Find one wrong constant in the wiring."""
    monkeypatch.setattr(integration.MhcHyperConnection, "hc_post_mult_value", 1.95)
    found = decoding.wrong_logits(decoding.compare(decoding.TINY, "cpu"))
    assert sum("of stock's" in sentence for sentence in found) == len(demo.PATHS)


def test_nothing_covered():
    rows = [row._replace(covered=0.0) for row in (STOCK, GOOD)]
    assert decoding.wrong_logits(rows) == [
        "no position in which float32's margin exceeds stock's largest error"
    ]


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(decoding.support, "is_supported", lambda device: (False, "no GPU here"))
    assert decoding.main([]) == 2
    assert "no GPU here" in capsys.readouterr().err


@pytest.mark.gpu
@torch.no_grad()
def test_times_on_the_gpu():
    """Time few widths on every path: eager, and in a graph where stock allows one."""
    rows = decoding.measure(decoding.TINY, "cuda")
    assert all(row["eager_us"] > 0 for row in rows)
    captured = {row["path"]: "graph_us" in row for row in rows}
    assert captured["mhc-ops fused"] == captured["stock"]

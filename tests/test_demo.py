"""Show that the demo passes, that it can fail, and that the parts of its verdict are right."""

import copy
import io

import pytest
import torch
from rich.console import Console

pytest.importorskip("transformers")

from mhc_ops import __main__, demo
from mhc_ops.demo import models, steps, summary
from mhc_ops.integrations import transformers as integration


@pytest.fixture
def report():
    return summary.Report(Console(quiet=True))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(steps, "SEQUENCES", 2)
    monkeypatch.setattr(steps, "LENGTH", 128)
    monkeypatch.setattr(steps, "PROMPTS", 2)
    monkeypatch.setattr(steps, "NEW_TOKENS", 16)


@pytest.fixture
def case(small):
    return steps.make_case(0, models.readme()[1], "cpu")


@pytest.mark.slow
def test_demo_on_the_cpu(capsys, tmp_path):
    """Run the demo as ``make demo`` does where there is no GPU."""
    picture = tmp_path / "new" / "demo.png"
    assert __main__.main(["demo", "--device", "cpu", "--picture", str(picture)]) == 0
    output = capsys.readouterr().out
    assert f"picture: {picture}" in output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "1 graph for the whole model, 1 wanted" in output
    assert "every check holds" in output
    assert "FAILED" not in output


@pytest.mark.gpu
def test_demo_on_the_gpu(capsys, tmp_path):
    picture = tmp_path / "demo.png"
    assert __main__.main(["demo", "--device", "cuda", "--picture", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert "replay equals eager mode bit for bit" in output
    assert "one boundary" in output


def test_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(demo, "is_supported", lambda device: (False, "no CUDA device"))
    assert demo.main(["--device", "cuda"]) == 2
    assert "expected a GPU that the ops support: no CUDA device" in capsys.readouterr().out


def test_a_failed_check_makes_the_status_1(capsys, monkeypatch):
    monkeypatch.setattr(
        demo, "run", lambda report, device, picture: report.check(False, "the sky is blue")
    )
    assert demo.main(["--device", "cpu"]) == 1
    assert "checks that FAILED: 1" in capsys.readouterr().out


def compared(seed, path, error):
    found = models.Errors(error, 10 * error, 1 - error)
    return summary.Comparison(seed, path, found, found._replace(mean=2 * error))


COMPARED = [
    compared(seed, path, error + seed)
    for seed in (0, 1)
    for path, error in zip(("stock", *models.PATHS), (0.1, 0.05, 0.2), strict=True)
]
TIMES = [
    {"path": path, "hidden": hidden, "tokens": tokens, "us_median": us * tokens}
    for path, us in (("fused", 4.0), ("unfused", 6.0), ("eager", 300.0))
    for hidden in (4096, 7168)
    for tokens in (1, 8, 64, 512)
]


@pytest.mark.parametrize("times", [[], TIMES], ids=["cpu", "gpu"])
def test_table_at_the_end(times):
    console = Console(width=90, record=True, file=io.StringIO())
    summary.summarise(summary.Report(console), COMPARED, times)
    shown = [line.split() for line in console.export_text().replace("│", " ").splitlines()]
    rows = {" ".join(cells[:-n]): cells[-n:] for cells in shown for n in [6 if times else 4]}
    us = {"stock": ["300.00", "153600.00"], "mhc-ops fused": ["4.00", "2048.00"]}
    assert rows["stock"] == ["0.60000", "1.000", "1.000", "40.00%"] + (us["stock"] if times else [])
    assert rows["mhc-ops fused"] == ["0.70000", "1.167", "1.167", "30.00%"] + (
        us["mhc-ops fused"] if times else []
    )


@pytest.mark.parametrize("times", [[], TIMES], ids=["cpu", "gpu"])
def test_picture(tmp_path, times):
    pytest.importorskip("matplotlib")
    summary.draw(COMPARED, times, tmp_path / "demo.svg")
    assert "<svg" in (tmp_path / "demo.svg").read_text()


@pytest.mark.parametrize(
    ("error", "text"),
    [(ImportError(), "matplotlib is not installed"), (OSError("disk full"), "disk full")],
)
def test_no_picture(monkeypatch, tmp_path, error, text):
    def draw(*arguments):
        raise error

    monkeypatch.setattr(summary, "draw", draw)
    console = Console(record=True, file=io.StringIO())
    summary.show_picture(summary.Report(console), COMPARED, [], tmp_path / "demo.png")
    assert f"no picture: {text}" in console.export_text()


class TestTheVerdictDependsOnTheMathematics:
    """Show that one wrong constant in the wiring fails the checks that should fail."""

    def test_right(self, report, case):
        steps.compare_logits(report, [case])
        # With so few positions the choices of a run are luck; the rest is not.
        assert [f for f in report.failures if not f.startswith("own choices")] == []

    def test_wrong_post_multiplier(self, report, case, monkeypatch):
        monkeypatch.setattr(integration.MhcHyperConnection, "hc_post_mult_value", 1.98)
        steps.compare_logits(report, [case])
        assert sum("of stock's" in failure for failure in report.failures) >= 2

    def test_garbage_continuation(self, report, case, monkeypatch):
        monkeypatch.setattr(integration.MhcHyperConnection, "hc_post_mult_value", -2.0)
        steps.continue_greedily(report, case, stock_error=0.025)
        assert len(report.failures) == len(models.PATHS)

    @pytest.mark.slow
    def test_unfused_graph(self, report, case, monkeypatch):
        monkeypatch.setitem(models.PATHS, "mhc-ops fused", models.PATHS["mhc-ops unfused"])
        # A missing compiler makes the demo choose a quick backend.
        monkeypatch.setattr(steps.shutil, "which", lambda name: None)
        steps.compile_model(report, case)
        (failure,) = report.failures
        assert failure.startswith("calls in it: {'pre': 8, 'post': 8, 'head': 1}")


def test_choices_replayed_on_the_same_model_change_nothing(case):
    choices = models.Choices()
    with torch.no_grad():
        with choices.recorded(case.model):
            want = models.logits_of(case.model, case.tokens)
        with choices.replayed(case.model):
            assert torch.equal(models.logits_of(case.model, case.tokens), want)
    # Two routers and two indexers choose.
    assert len(choices.taken) == 4
    assert not any(module._forward_hooks for module in case.model.modules())


def test_choices_of_another_model_are_taken(case):
    choices = models.Choices()
    with torch.no_grad():
        other = models.small_model(5, "cpu")
        with choices.recorded(other):
            models.logits_of(other, case.tokens)
        own = models.logits_of(case.model, case.tokens)
        with choices.replayed(case.model):
            assert not torch.equal(models.logits_of(case.model, case.tokens), own)


def test_errors():
    exact = torch.tensor([[1.0, 0.0, 0.5], [0.0, 2.0, 0.0]])
    logits = exact + torch.tensor([[0.0, 0.0, 0.6], [0.0, 0.0, -0.3]])
    got = models.errors(logits, exact)
    assert got.mean == pytest.approx(0.9 / 6)
    assert got.largest == pytest.approx(0.6)
    assert got.agreement == 0.5
    assert models.top_tokens(logits, exact, 0.4) == (1, 1.0)
    assert models.top_tokens(logits, exact, 0.6) == (0, 0.5)


def test_text_is_read_round_and_round():
    tokens = models.byte_tokens(b"abcde", 1, 2, 3, "cpu")
    assert tokens.tolist() == [[ord(c) for c in row] for row in ("bcd", "eab")]


def test_text_is_the_readme():
    source, text = models.readme()
    assert source.endswith("README.md")
    assert text.startswith(b"# mhc-ops")


def test_text_of_an_installed_package(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "__file__", str(tmp_path / "mhc_ops" / "demo" / "models.py"))
    monkeypatch.setattr(
        models.importlib.metadata,
        "metadata",
        lambda name: {"Description": "# mhc-ops installed"},
    )
    assert models.readme() == ("the metadata of mhc-ops", b"# mhc-ops installed")
    monkeypatch.setattr(models.importlib.metadata, "metadata", lambda name: {"Description": None})
    with pytest.raises(RuntimeError, match="expected a README"):
        models.readme()

    def not_installed(name):
        raise models.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(models.importlib.metadata, "metadata", not_installed)
    with pytest.raises(RuntimeError, match="expected a README"):
        models.readme()


def test_mixes_of_the_model_are_not_degenerate():
    """Find mixes neither uniform nor one-hot, so that a wrong mix shows in the logits."""
    model = models.small_model(0, "cpu")
    streams = torch.randn(64, 1, 4, 256).bfloat16()
    with torch.no_grad():
        post, comb, _ = model.model.layers[0].attn_hc(streams)
    assert comb.std() > 0.1
    assert comb.amax() < 0.999
    assert post.std() > 0.1


def test_same_seed_same_model():
    a, b = models.small_model(2, "cpu"), models.small_model(2, "cpu")
    assert all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())
    kinds = set(a.config.layer_types), set(a.config.mlp_layer_types)
    assert kinds == (
        {"heavily_compressed_attention", "compressed_sparse_attention"},
        {"hash_moe", "moe"},
    )


def test_stock_again_after_a_path(case):
    before = copy.deepcopy(case.model)
    with torch.no_grad():
        with models.path(case.model, "mhc-ops fused"):
            assert isinstance(case.model.model.norm, integration.MhcRMSNorm)
        want = models.logits_of(before, case.tokens)
        assert torch.equal(models.logits_of(case.model, case.tokens), want)

"""Make the figure from records, refuse anything else, and find the README's up to date."""

import json
import re
import sys
from pathlib import Path

import pytest

import figure as drawing
from records import read_baseline

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benchmarks/results/nvidia_h200.jsonl"
BASELINE = ROOT / "benchmarks/baselines/h200_sglang_0.5.23.json"


def test_readme_shows_the_figure_of_the_records():
    name = re.search(r"!\[[^\]]+\]\((\S+\.svg)\)", (ROOT / "README.md").read_text())[1]
    want = drawing.describe(drawing.read_records(RECORDS), read_baseline(BASELINE))
    assert want in (ROOT / name).read_text(), (
        f"draw it anew: python benchmarks/figure.py {name} "
        f"--records {RECORDS.relative_to(ROOT)} --baseline {BASELINE.relative_to(ROOT)}"
    )


def test_command(tmp_path, capsys):
    figure = tmp_path / "new" / "figure.svg"
    argv = ["--records", str(RECORDS), "--baseline", str(BASELINE)]
    assert drawing.main([*argv, str(figure)]) == 0
    first = figure.read_text()
    assert "commit " in capsys.readouterr().out
    assert drawing.main([*argv, str(figure)]) == 0
    assert figure.read_text() == first, "the same records, the same file"
    for colour in drawing.COLOURS[:2]:
        assert colour.lower() in first.lower()


def test_png_without_a_baseline(tmp_path):
    figure = tmp_path / "figure.png"
    records = drawing.read_records(RECORDS)
    drawing.draw(records, None, figure)
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert records[0]["commit"].encode() in figure.read_bytes()


def test_the_last_record_of_a_size_counts(tmp_path):
    first = json.loads(RECORDS.read_text().splitlines()[0])
    later = first | {"us_median": 1.5, "commit": "c0ffee"}
    other = first | {"mode": "eager"}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (first, later, other)))
    assert drawing.read_records(path) == [later]
    assert drawing.describe([later], None) != drawing.describe([first], None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected lines as boundary_time.py writes them"),
        ("{}\n", "expected lines as boundary_time.py writes them"),
        ("", "expected rows of fused in graph mode, got none"),
    ],
)
def test_wrong_records(tmp_path, capsys, text, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    figure = tmp_path / "figure.svg"
    assert drawing.main([str(figure), "--records", str(path)]) == 2
    assert message in capsys.readouterr().err
    assert not figure.exists()


def test_wrong_kind_of_file(tmp_path, capsys):
    assert drawing.main([str(tmp_path / "a.gif"), "--records", str(RECORDS)]) == 2
    assert "expected a figure in .svg or .png" in capsys.readouterr().err


def test_without_records(capsys):
    with pytest.raises(SystemExit):
        drawing.main(["figure.svg"])
    assert "the following arguments are required: --records" in capsys.readouterr().err


def test_without_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert drawing.main([str(tmp_path / "a.svg"), "--records", str(RECORDS)]) == 2
    assert "pip install 'mhc-ops[plot]'" in capsys.readouterr().err

"""Test the notes on speed: every entry has the one form, and every reference finds an entry."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTES = (ROOT / "benchmarks" / "NOTES.md").read_text()
FIELDS = ["Question", "Change", "Predicted", "Measured", "Verdict", "Record"]
ENTRIES = dict(
    entry.split("\n", 1) for entry in re.split(r"^### ", NOTES.split("\n## ", 2)[2], flags=re.M)[1:]
)
ENTRIES = {title: re.split(r"^## ", text, flags=re.M)[0] for title, text in ENTRIES.items()}
RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.parametrize("title", ENTRIES)
def test_entry(title):
    text = ENTRIES[title]
    assert re.findall(r"^\* \*\*(\w+)\*\*: \S", text, re.M) == FIELDS
    record = text.split("* **Record**: ")[1]
    files = re.findall(r"`(\w+\.jsonl)`", record)
    assert files or record.startswith("none kept")
    assert [name for name in files if not (RESULTS / name).exists()] == []


def test_titles_are_names():
    assert len(re.findall(r"^### ", NOTES, re.M)) == len(ENTRIES)


def test_runs_are_in_the_records():
    """Find a line of the tuning record for each run that an entry names, and vice versa."""
    told = set()
    for text in ENTRIES.values():
        record = text.split("* **Record**: ")[1]
        for runs in re.findall(r"nvidia_h100_tuning.jsonl`,\s+runs?\s+([^;]*)", record):
            told |= {" ".join(name.split()) for name in re.findall(r"`([^`]+)`", runs)}
    lines = (RESULTS / "nvidia_h100_tuning.jsonl").read_text()
    assert told == set(re.findall(r'"run": "([^"]+)"', lines))


def test_references():
    referred = {}
    for folder in ("mhc_ops", "csrc_tilelang", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".c", ".cpp", ".h", ".md") and path != Path(__file__):
                text = re.sub(r"\n *(#|//)? *", " ", path.read_text())
                for title in re.findall(r'NOTES\.md, "([^"]+)"', text):
                    referred.setdefault(title, path)
    assert "Bounds of the table of routes" in referred
    assert {title: path for title, path in referred.items() if title not in ENTRIES} == {}

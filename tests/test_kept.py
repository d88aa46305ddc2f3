"""Test what tests keep between runs: made once, whole or not at all, found by what decides it."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from helpers import HANG
from kept import UNUSED_SECONDS, Kept

TESTS = Path(__file__).parent


def test_an_entry_is_found_by_all_that_it_depends_on(tmp_path):
    made = []

    def get(stem, *depends_on):
        def make(path):
            made.append(depends_on)
            path.write_text(" ".join(depends_on))

        return Kept(tmp_path).get(stem, ".txt", depends_on, make)

    first = get("a", "one", "two")
    assert first.read_text() == "one two"
    assert get("a", "one", "two") == first
    assert len(made) == 1
    others = [
        get("a", "onetwo"),
        get("a", "two", "one"),
        get("a", "one", "two", ""),
        get("b", "one"),
    ]
    assert len({first, *others}) == 5
    assert len(made) == 5


def test_what_could_not_be_made_is_not_there(tmp_path):
    def fail(path):
        path.write_text("half")
        raise RuntimeError("no compiler")

    kept = Kept(tmp_path)
    with pytest.raises(RuntimeError, match="no compiler"):
        kept.get("a", ".txt", ["x"], fail)
    assert not [path for path in tmp_path.iterdir() if not path.name.endswith(".lock")]
    assert kept.get("a", ".txt", ["x"], lambda path: path.write_text("x")).read_text() == "x"


def test_threads_make_an_entry_once(tmp_path):
    kept, made, found = Kept(tmp_path), [], []

    def make(path):
        made.append(path)
        time.sleep(0.1)
        path.write_text("x")

    threads = [
        threading.Thread(target=lambda: found.append(kept.get("a", ".txt", ["x"], make)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    assert len(made) == 1
    assert len(found) == 8


PROCESS = """
import sys, time
from pathlib import Path
from kept import Kept

def make(path):
    print("made", flush=True)
    time.sleep(0.5)
    path.write_text("x")

print(Kept(Path(sys.argv[1])).get("a", ".txt", ["x"], make).read_text())
"""


def test_processes_make_an_entry_once(tmp_path):
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path)],
            env=os.environ | {"PYTHONPATH": str(TESTS)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    said = [process.communicate(timeout=HANG)[0].split() for process in running]
    assert sorted(map(len, said)) == [1, 1, 2]
    assert all(words[-1] == "x" for words in said)


def test_what_nobody_uses_goes(tmp_path):
    kept = Kept(tmp_path)
    used, unused = (
        kept.get(stem, ".txt", ["x"], lambda path: path.write_text("x")) for stem in ("a", "b")
    )
    left = tmp_path / "partial-of-a-killed-process"
    left.mkdir()
    long_ago = time.time() - UNUSED_SECONDS - 1
    for path in (used, unused, left):
        os.utime(path, (long_ago, long_ago))
    kept.get("a", ".txt", ["x"], lambda path: pytest.fail("it is there"))
    kept.drop_unused()
    assert used.exists()
    assert not unused.exists()
    assert not left.exists()

"""Read the Markdown pages of the project: their code, commands, links and headings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
# README.md comes first; CHANGELOG.md has no code.
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]

_FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_NEEDS = re.compile(r"(?:^|\. )Needs ([^.:]+):$")
TORCHRUN = "Runs under torchrun:"


class Block(NamedTuple):
    """Hold a block of code.

    Attributes:
        language: what the fence names.
        text: the code.
        line: the line of the page where the code begins.
        needs: what the line above says that the code needs; empty for nothing.
        torchrun: whether the line above says that it runs under torchrun.
    """

    language: str
    text: str
    line: int
    needs: str
    torchrun: bool


def name(page: Path) -> str:
    """Return the page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> Iterator[Block]:
    """Find the blocks of code of a page, in order."""
    text = page.read_text()
    for found in _FENCE.finditer(text):
        before = text[: found.start()].rstrip().rsplit("\n", 1)[-1]
        said = _NEEDS.search(before)
        yield Block(
            found[1],
            found[2],
            text.count("\n", 0, found.start()) + 2,
            said[1] if said else "",
            before == TORCHRUN,
        )


def commands(text: str) -> Iterator[list[str]]:
    """Split a block of shell into commands, each as words, without comments and assignments."""
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word == "&&":
                if words:
                    yield words
                words = []
            elif words or not re.match(r"\w+=", word):
                words.append(word)


def prose(page: Path) -> str:
    """Return a page without its blocks of code and its comments."""
    return _COMMENT.sub("", _FENCE.sub("", page.read_text()))


def links(page: Path) -> list[str]:
    """List the targets of a page's links and images."""
    return _LINK.findall(prose(page))


def anchors(page: Path) -> set[str]:
    """Collect the names by which links reach the headings of a page."""
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in _HEADING.findall(prose(page)))
    return {heading.replace(" ", "-") for heading in kept}


def section(page: Path, title: str) -> str:
    """Return what a page has under a heading of the second level."""
    return page.read_text().split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def rows(text: str) -> list[list[str]]:
    """Return the cells of the tables in a text, without the rules under the heads."""
    found = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [cells for cells in found if not set("".join(cells)) <= set("-: ")]

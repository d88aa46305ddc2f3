"""Plan what a run of ``stress.py`` does, and in which order; one seed makes one plan."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

# These counts lie on both sides of every bound between rows of the table of routes, and between
# tiles of 16 tokens.
END_COUNTS = (0, 1, 2, 3, 16, 17, 19, 20, 32, 33, 48, 49, 80, 127, 128, 129, 512, 2048, 4095, 4096)

EAGER_SHARE = 1 / 3  # this share of a stream's turns are bursts, which are shorter than graphs


class Settings(NamedTuple):
    """Say how much a run does.

    Attributes:
        boundaries: least number of boundaries to run.
        seconds: time after which the run is cut off.
        hidden: hidden sizes.
        largest: largest token count.
        counts: number of token counts for each hidden size.
        streams: number of streams that run at once.
        graphs: number of graphs that are captured, which is more than ``streams``.
        graph_length: number of boundaries of a graph.
        burst: number of eager calls of a turn.
        hang_seconds: time without progress after which the GPU is said to hang.
        seed: seed of the token counts and of every order.
    """

    boundaries: int = 1_000_000
    seconds: float = 240.0
    hidden: tuple[int, ...] = (4096, 7168)
    largest: int = 4096
    counts: int = 64
    streams: int = 8
    graphs: int = 24
    graph_length: int = 32
    burst: int = 8
    hang_seconds: float = 60.0
    seed: int = 0


class Turn(NamedTuple):
    """Say what one stream does in a round: replay a graph, or call these cases in turn."""

    stream: int
    graph: int | None
    cases: tuple[int, ...]


def token_counts(settings: Settings) -> list[int]:
    """Choose every end of a path, and log-uniform counts between 1 and the largest."""
    chance = random.Random(settings.seed)
    ends = [count for count in END_COUNTS if count <= settings.largest][: settings.counts]
    rest = settings.counts - len(ends)
    return ends + [round(settings.largest ** chance.random()) for _ in range(rest)]


def graph_cases(settings: Settings) -> list[tuple[int, ...]]:
    """Draw the cases of each graph so that every case comes about equally often."""
    chance = random.Random(settings.seed + 1)
    everything = range(settings.counts * len(settings.hidden))
    drawn: list[int] = []
    while len(drawn) < settings.graphs * settings.graph_length:
        drawn += chance.sample(everything, len(everything))
    length = settings.graph_length
    return [tuple(drawn[i * length : (i + 1) * length]) for i in range(settings.graphs)]


def rounds(settings: Settings) -> Iterator[list[Turn]]:
    """Make rounds of one turn a stream, in any order, until there are enough boundaries.

    No graph has two turns in a round, since a graph cannot run beside itself.
    """
    chance = random.Random(settings.seed + 2)
    everything = range(settings.counts * len(settings.hidden))
    planned = 0
    while planned < settings.boundaries:
        graphs = chance.sample(range(settings.graphs), settings.streams)
        turns = []
        for stream in chance.sample(range(settings.streams), settings.streams):
            if chance.random() < EAGER_SHARE:
                cases = tuple(chance.choice(everything) for _ in range(settings.burst))
                turns.append(Turn(stream, None, cases))
                planned += settings.burst
            else:
                turns.append(Turn(stream, graphs[stream], ()))
                planned += settings.graph_length
        yield turns

"""Run a million boundaries on one busy GPU; every result must have the bits of a quiet call.

    python benchmarks/stress.py -o benchmarks/results/nvidia_h100_checks.jsonl

The boundaries have token counts from 0 to 4096 (every end of a path, the rest log-uniform), two
hidden sizes, and a norm or none, and run on 8 streams at once. On each stream CUDA graphs of many
boundaries and bursts of eager calls alternate at random. In every other round one more stream keeps
all multiprocessors at work. For a tenth of the run 95 % of the memory is taken. In the middle of
that tenth some calls run out of memory; the error is caught, and the calls are made again.

The quiet results are held to the float64 oracle first. Every later result is compared with the
quiet result on the GPU, all four outputs as integers, into counters that are read once at the end.
Outputs are NaN before each call. The outputs of a graph are filled with NaN at the end of each
replay. In every other eager burst the outputs are filled as they are allocated. In the other bursts
they are filled before their memory is given back, so that no fill runs between two calls there.

The exit status is 0 where all is right, 1 where something is not, and 3 where the GPU has hung.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import os
import random
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mhc_ops
import records
from mhc_ops import support
from mhc_ops.prewarm import progress_bar
from mhc_ops.testing import assert_matches_oracle, make_inputs, poisoned_memory
from stress_plan import Settings, graph_cases, rounds, token_counts

OP_NAME = "fused_post_pre"
OP = torch.ops.mhc.fused_post_pre.default
STATE = ("x", "residual", "post_layer_mix", "comb_res_mix")  # these have a row for each token
NORM = ("norm_weight", "norm_eps")

ROUNDS_AHEAD = 3  # the host may be so many rounds ahead of the GPU
WARM_ROUNDS = 8  # the memory is measured for the first time after so many rounds
PRESSURE = (0.45, 0.55)  # between these shares of the run the memory is taken
PRESSURE_TAKEN = 0.95  # this share of the GPU's memory is taken
ROOMS = (0.0, 0.5, 0.9)  # a call finds only this share of the memory that it needs
# A graph of the competing stream makes so many products of such matrices, which takes some ms.
MATRIX, PRODUCTS = 4096, 8
DEVICE_SLACK = 64 << 20  # the driver may keep so many bytes more for itself
HOST_SLACK = 256 << 20


# --------------------------------------------------------------------------- cases and comparison


def bits(tensor: Tensor) -> Tensor:
    """View a contiguous tensor as one row of 64-bit words, in which NaN equals itself."""
    return tensor.reshape(-1).view(torch.int64)


class Case:
    """Hold one call and its results on a quiet GPU, which were held to the oracle.

    Attributes:
        tokens, hidden: size of the call.
        inputs: arguments by name.
        want: words of each output.
    """

    def __init__(self, inputs: dict[str, Any]) -> None:
        self.tokens, _, self.hidden = inputs["residual"].shape
        self.inputs = inputs
        self._positional = [value for name, value in inputs.items() if name not in NORM]
        self._norm = {name: value for name, value in inputs.items() if name in NORM}
        with poisoned_memory():
            results = self.run()
        assert_matches_oracle(OP_NAME, inputs, results)
        self.want = [bits(result).clone() for result in results]

    def run(self) -> tuple[Tensor, ...]:
        """Make the call."""
        results: tuple[Tensor, ...] = OP(*self._positional, **self._norm)
        return results

    @property
    def words(self) -> int:
        """Count the words of all outputs together."""
        return sum(want.numel() for want in self.want)


def make_cases(settings: Settings, device: str, advance: Callable[[], None]) -> list[Case]:
    """Make a case for each hidden size and token count, on rows of one input for each size."""
    chance = random.Random(settings.seed + 3)
    cases = []
    for hidden in settings.hidden:
        whole = make_inputs(OP_NAME, settings.largest, hidden, device=device, norm=True)
        for index, tokens in enumerate(token_counts(settings)):
            start = chance.randint(0, settings.largest - tokens)
            rows = {name: whole[name][start : start + tokens] for name in STATE}
            left_out = NORM if index % 4 == 3 else ()
            cases.append(Case({k: v for k, v in (whole | rows).items() if k not in left_out}))
            advance()
    return cases


def poison(results: Sequence[Sequence[Tensor]]) -> None:
    """Fill outputs with NaN."""
    for outputs in results:
        for output in outputs:
            output.fill_(float("nan"))


class Comparison:
    """Compare results with what they have to be, and count on the results' device.

    Attributes:
        bad: how often the result of each call of a burst was wrong.
        compared: number of results that were compared.
    """

    def __init__(self, length: int, words: int, device: str) -> None:
        self._differs = torch.zeros(words, dtype=torch.bool, device=device)
        self._wrong = torch.zeros(length, dtype=torch.bool, device=device)
        self.bad = torch.zeros(length, dtype=torch.int64, device=device)
        self.compared = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, cases: Sequence[Case], results: Sequence[Sequence[Tensor]]) -> None:
        """Compare the results of a burst, which has as many cases as the comparison's length."""
        for case, outputs, wrong in zip(cases, results, self._wrong.unbind(), strict=True):
            end = 0
            for output, want in zip(outputs, case.want, strict=True):
                start, end = end, end + want.numel()
                torch.ne(bits(output), want, out=self._differs[start:end])
            torch.any(self._differs[:end], out=wrong)
        self.bad += self._wrong
        self.compared += len(cases)


class Worker:
    """Make the eager calls of one stream; on a CPU the stream is None."""

    def __init__(
        self, settings: Settings, words: int, device: str, stream: torch.cuda.Stream | None
    ) -> None:
        self.stream = stream
        self.comparison = Comparison(settings.burst, words, device)
        self._bursts = 0

    def turn(self, cases: Sequence[Case]) -> None:
        """Make calls one right after another, then compare their results."""
        self._bursts += 1
        filled = poisoned_memory() if self._bursts % 2 else contextlib.nullcontext()
        on = contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)
        with on:
            with filled:
                results = [case.run() for case in cases]
            self.comparison.add(cases, results)
            poison(results)

    def fill_free_memory(self, size: int) -> None:
        """Leave a block of NaN to the allocator, which cuts the first outputs from it."""
        with torch.cuda.stream(self.stream):
            torch.full((size // 4,), float("nan"), device="cuda")


class Graph:
    """Capture many boundaries, their comparison, and NaN for the outputs of the next replay."""

    def __init__(self, cases: Sequence[Case], words: int, stream: torch.cuda.Stream) -> None:
        self.comparison = Comparison(len(cases), words, "cuda")
        self.cases = cases
        self.done = torch.cuda.Event()
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph, stream=stream):
            self._results = [case.run() for case in cases]
            self.comparison.add(cases, self._results)
            poison(self._results)
        # One replay is not counted. After it the outputs are NaN, and the driver has allocated what
        # it needs.
        self._graph.replay()
        torch.cuda.synchronize()
        self.comparison.bad.zero_()
        self.comparison.compared.zero_()
        torch.cuda.synchronize()

    def turn(self, stream: torch.cuda.Stream) -> None:
        """Replay the graph on a stream, after the graph's last replay."""
        with torch.cuda.stream(stream):
            stream.wait_event(self.done)
            self._graph.replay()
            self.done.record(stream)


class Competitor:
    """Keep every multiprocessor at work with a stream of its own."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.replays = 0
        self._done = torch.cuda.Event()
        matrix = torch.randn(MATRIX, MATRIX, device="cuda", dtype=torch.bfloat16)
        product = torch.empty_like(matrix)
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            torch.mm(matrix, matrix, out=product)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self.stream):
            for _ in range(PRODUCTS):
                torch.mm(matrix, matrix, out=product)
        self._matrices = (matrix, product)

    def keep_busy(self) -> None:
        """Start more work if the last is done."""
        if self._done.query():
            with torch.cuda.stream(self.stream):
                self._graph.replay()
                self._done.record(self.stream)
            self.replays += 1


# ------------------------------------------------------------------------------------ the memory


class Memory(NamedTuple):
    """Hold the bytes in use by tensors, by the whole GPU with nothing cached, by this process."""

    allocated: int
    device: int
    host: int


def memory_now() -> Memory:
    """Measure the memory once all work is done and nothing is cached."""
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Memory(torch.cuda.memory_allocated(), total - free, pages * os.sysconf("SC_PAGE_SIZE"))


def grown(before: Memory, after: Memory) -> list[str]:
    """Say in words which memory has grown."""
    found = []
    if after.allocated != before.allocated:
        found.append(f"tensors took {before.allocated} bytes before and {after.allocated} after")
    if after.device > before.device + DEVICE_SLACK:
        found.append(f"the GPU had {before.device} bytes in use before and {after.device} after")
    if after.host > before.host + HOST_SLACK:
        found.append(f"the process had {before.host} bytes before and {after.host} after")
    return found


def take_memory() -> Tensor:
    """Allocate so much that ``PRESSURE_TAKEN`` of the GPU's memory is in use."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return torch.empty(
        max(0, int(free - (1 - PRESSURE_TAKEN) * total)), dtype=torch.uint8, device="cuda"
    )


def _had_room(worker: Worker, called: Sequence[Case]) -> bool:
    """Make a burst; return False, with its memory given back, where the burst ran out of memory."""
    try:
        worker.turn(called)
    except torch.OutOfMemoryError:
        return False
    return True


def run_out_of_memory(case: Case, worker: Worker, burst: int) -> tuple[int, int]:
    """Make calls whose outputs find no room, each followed by the same calls with room.

    The work of the other streams goes on meanwhile.

    Returns:
        (number of calls made without room, number of those that raised torch.OutOfMemoryError).
    """
    _, total = torch.cuda.mem_get_info()
    caught = 0
    for room in ROOMS:
        torch.cuda.empty_cache()
        stream = torch.cuda.Stream()  # the allocator keeps no memory for a new stream
        allowed = torch.cuda.memory_reserved() + int(room * case.words * 8)
        torch.cuda.set_per_process_memory_fraction(allowed / total)
        try:
            with torch.cuda.stream(stream):
                case.run()
        except torch.OutOfMemoryError:
            caught += 1
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        worker.turn([case] * burst)
    return len(ROOMS), caught


# --------------------------------------------------------------------------------------- the run


class Watchdog:
    """End the process when nothing has moved for a while, because a hung GPU never answers.

    Attributes:
        state: what is being done, for the message.
    """

    def __init__(self, seconds: float, end: Callable[[int], None] = os._exit) -> None:
        self.state = "starting"
        self._seconds, self._end = seconds, end
        self._moved = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def moved(self, state: str) -> None:
        """Note that something has moved."""
        self.state, self._moved = state, time.monotonic()

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self._seconds / 4)):
            still = time.monotonic() - self._moved
            if still > self._seconds:
                print(f"HUNG: nothing has moved for {still:.0f} s: {self.state}", file=sys.stderr)
                faulthandler.dump_traceback(sys.stderr)
                sys.stderr.flush()
                self._end(3)
                return


class Result(NamedTuple):
    """Hold what a run has found.

    Attributes:
        counts: number of boundaries by kind: in a graph, eager, beside the competing stream, while
            the memory was taken.
        compared: number of results that the GPU has compared.
        bad: number of results that differed, by size for graphs, and as ``eager``.
        memory: memory before and after the run.
        out_of_memory: (number of calls made without room, number of those that raised).
        retried: number of bursts that ran out of memory without being made to, and were repeated.
        seconds: time of the boundaries alone.
        competing: number of replays of the competing stream's graph.
    """

    counts: dict[str, int]
    compared: int
    bad: dict[str, int]
    memory: tuple[Memory, Memory]
    out_of_memory: tuple[int, int]
    retried: int
    seconds: float
    competing: int


def failures(settings: Settings, result: Result) -> list[str]:
    """Say in words what is wrong; return an empty list where all is right."""
    made = result.counts["graph"] + result.counts["eager"]
    found = []
    if result.bad:
        total = sum(result.bad.values())
        found.append(f"{total} results differ from those of quiet calls: {result.bad}")
    if result.compared != made:
        found.append(f"{made} boundaries were made and {result.compared} compared")
    if made < settings.boundaries:
        found.append(f"cut off after {made} of {settings.boundaries} boundaries")
    if result.out_of_memory[1] != result.out_of_memory[0]:
        tried, caught = result.out_of_memory
        found.append(f"{tried} calls had no room for their outputs, {caught} said so")
    return found + grown(*result.memory)


def stress(
    settings: Settings, watchdog: Watchdog, plant_fault: bool = False, shown: bool = False
) -> Result:
    """Run everything on the current CUDA device.

    Args:
        settings: how much the run does.
        watchdog: watchdog, which is told of progress.
        plant_fault: whether to change one bit of one quiet result, which the comparison has to
            notice.
        shown: whether to show progress bars on standard error.
    """
    with progress_bar(shown) as bar, torch.no_grad():
        mhc_ops.prewarm(settings.hidden, max_tokens=max(settings.largest, 129), progress=False)
        watchdog.moved("prewarmed")
        calls = bar.add_task("quiet calls", total=settings.counts * len(settings.hidden))

        def advance() -> None:
            bar.advance(calls)
            watchdog.moved("quiet calls")

        cases = make_cases(settings, "cuda", advance)
        words = max(case.words for case in cases)
        capturing = bar.add_task("capturing", total=settings.graphs)
        captured_on = torch.cuda.Stream()
        graphs = []
        for numbers in graph_cases(settings):
            graphs.append(Graph([cases[i] for i in numbers], words, captured_on))
            bar.advance(capturing)
            watchdog.moved("capturing")
        if plant_fault:
            seen = next(case for case in graphs[0].cases if case.tokens)
            seen.want[-1][-1] ^= 1
        workers = [
            Worker(settings, words, "cuda", torch.cuda.Stream()) for _ in range(settings.streams)
        ]
        competitor = Competitor()
        largest = max(cases, key=lambda case: case.words)
        return _run(settings, watchdog, bar, cases, graphs, workers, competitor, largest)


def _run(
    settings: Settings,
    watchdog: Watchdog,
    bar: Any,
    cases: Sequence[Case],
    graphs: Sequence[Graph],
    workers: Sequence[Worker],
    competitor: Competitor,
    largest: Case,
) -> Result:
    counts: Counter[str] = Counter(graph=0, eager=0, competing=0, pressure=0)
    out_of_memory = (0, 0)
    retried = 0
    burst_bytes = settings.burst * largest.words * 8
    before = memory_now()
    ballast: Tensor | None = None
    issued: deque[list[torch.cuda.Event]] = deque()
    running = bar.add_task("boundaries", total=settings.boundaries)
    start = time.monotonic()
    for number, turns in enumerate(rounds(settings)):
        done = counts["graph"] + counts["eager"]
        share = done / settings.boundaries
        pressed = PRESSURE[0] <= share < PRESSURE[1]
        if number == WARM_ROUNDS:
            before = memory_now()
        if number in (0, WARM_ROUNDS):  # memory_now has just emptied the allocator's cache
            for worker in workers:
                worker.fill_free_memory(burst_bytes // 8)
        if pressed and ballast is None:
            ballast = take_memory()
        elif not pressed and ballast is not None:
            ballast = None
            torch.cuda.empty_cache()
        for turn in turns:
            if number % 2:
                competitor.keep_busy()
            worker = workers[turn.stream]
            if turn.graph is not None:
                graphs[turn.graph].turn(worker.stream)
                continue
            called = [cases[i] for i in turn.cases]
            if not _had_room(worker, called):
                retried += 1
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                worker.turn(called)
        made = Counter(
            graph=sum(settings.graph_length for turn in turns if turn.graph is not None),
            eager=sum(len(turn.cases) for turn in turns),
        )
        if ballast is not None and not out_of_memory[0] and share >= sum(PRESSURE) / 2:
            small = max(
                (c for c in cases if c.tokens <= 128 and c.words), key=lambda case: case.words
            )
            for case in (largest, small):
                watchdog.moved("running out of memory")
                tried, caught = run_out_of_memory(case, workers[0], settings.burst)
                out_of_memory = (out_of_memory[0] + tried, out_of_memory[1] + caught)
                made["eager"] += tried * settings.burst
        total = made["graph"] + made["eager"]
        made["competing"] = total * (number % 2)
        made["pressure"] = total * (ballast is not None)
        counts += made
        events = [torch.cuda.Event() for _ in workers]
        for event, worker in zip(events, workers, strict=True):
            event.record(worker.stream)
        issued.append(events)
        if len(issued) > ROUNDS_AHEAD:
            for event in issued.popleft():
                event.synchronize()
        bar.update(running, completed=done + total)
        watchdog.moved(f"round {number}, {done + total} boundaries made")
        if time.monotonic() - start > settings.seconds:
            break
    torch.cuda.synchronize()
    seconds = time.monotonic() - start
    del ballast
    watchdog.moved("reading the counters")
    issued.clear()
    after = memory_now()
    bad: Counter[str] = Counter()
    compared = 0
    for graph in graphs:
        compared += int(graph.comparison.compared)
        for case, wrong in zip(graph.cases, graph.comparison.bad.tolist(), strict=True):
            bad[f"hidden {case.hidden}, {case.tokens} tokens, graph"] += wrong
    for worker in workers:
        compared += int(worker.comparison.compared)
        bad["eager"] += int(worker.comparison.bad.sum())
    return Result(
        counts=dict(counts),
        compared=compared,
        bad={name: wrong for name, wrong in bad.items() if wrong},
        memory=(before, after),
        out_of_memory=out_of_memory,
        retried=retried,
        seconds=seconds,
        competing=competitor.replays,
    )


def make_record(
    settings: Settings, result: Result, *, commit: str | None, command: str
) -> dict[str, Any]:
    """Make the record of a run."""
    found = failures(settings, result)
    made = result.counts["graph"] + result.counts["eager"]
    right = f"{made} boundaries, every result with the bits of a quiet call, memory flat"
    return records.make_record(
        "stress: fused_post_pre on a busy GPU",
        "; ".join(found) or right,
        commit=commit,
        command=command,
        settings=settings._asdict(),
        counts=result.counts,
        compared=result.compared,
        mismatches=sum(result.bad.values()),
        memory_before=result.memory[0]._asdict(),
        memory_after=result.memory[1]._asdict(),
        out_of_memory_provoked=result.out_of_memory[0],
        out_of_memory_caught=result.out_of_memory[1],
        out_of_memory_retried=result.retried,
        competing_replays=result.competing,
        seconds=round(result.seconds, 1),
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = Settings()
    parser.add_argument("--boundaries", type=int, default=defaults.boundaries)
    parser.add_argument("--seconds", type=float, default=defaults.seconds, help="at most")
    parser.add_argument("--hang-seconds", type=float, default=defaults.hang_seconds)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument(
        "--plant-fault", action="store_true", help="change one bit of a quiet result: it must fail"
    )
    records.add_arguments(parser)
    arguments = parser.parse_args(argv)
    supported, reason = support.is_supported()
    if not supported:
        print(f"expected a GPU that the ops support: {reason}", file=sys.stderr)
        return 2
    settings = defaults._replace(
        boundaries=arguments.boundaries,
        seconds=arguments.seconds,
        hang_seconds=arguments.hang_seconds,
        seed=arguments.seed,
    )
    print("compiling or loading kernels", file=sys.stderr)
    mhc_ops.prewarm(settings.hidden, max_tokens=settings.largest, progress=True)
    with Watchdog(settings.hang_seconds) as watchdog:
        result = stress(settings, watchdog, arguments.plant_fault, shown=True)
    record = make_record(
        settings, result, commit=arguments.commit, command=records.command_line(argv)
    )
    records.write(record, arguments.output)
    return 1 if failures(settings, result) else 0


if __name__ == "__main__":
    sys.exit(main())

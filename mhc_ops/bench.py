"""Time one boundary (post of one sublayer, pre of the next) on a GPU and record it.

A chain of boundaries runs in one CUDA graph (or call by call in eager mode): the streams, mixes
and layer input of one feed the next, and each has its own ``fn``, so that the weights come from
memory and not from the L2, as they do in a model. The time of a boundary is that of the chain
divided by its length: median, 10th and 90th percentile of the replays.

The floor is what the memory needs for the bytes of one pass, 20 H a token and 384 H of ``fn``, at
the copy bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import functools
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import geometry, info, reference, support
from .prewarm import prewarm

if TYPE_CHECKING:
    from rich.table import Table

PATHS = ("fused", "unfused", "eager", "compile")
OP_PATHS = frozenset({"fused", "unfused"})  # those that run mhc ops; the others run the reference
MODES = ("graph", "eager")
DEFAULT_TOKENS = (1, 8, 16, 32, 64, 128, 512, 2048, 8192)
DEFAULT_HIDDEN = (4096, 7168)  # V4-Flash and V4-Pro
RESULTS = Path("benchmarks/results")

REPLAYS = 15
WARMUPS = 3
# Beyond it the GPU is slower than the host in eager mode, and calls would wait for a full queue.
HOST_MAX_TOKENS = 64
COPY_BYTES = 1 << 31

# (most tokens, boundaries): fewer where each moves more. Every chain moves several times the
# 50 to 126 MB of an L2 between two uses of the same fn.
_CHAIN_LENGTHS = ((64, 64), (512, 32), (2048, 16))
_LONGEST_CHAIN_LENGTH = 8

EPS = 1e-6  # every epsilon of DeepSeek-V4
POST_MULT = 2.0

Streams = tuple[Tensor, Tensor, Tensor, Tensor]  # residual, post mix, comb mix, layer input
Boundary = Callable[..., Streams]


class Case(NamedTuple):
    """One row of the benchmark.

    Attributes:
        tokens: T, at least 1.
        hidden: H.
        path: ``fused`` (mhc::fused_post_pre), ``unfused`` (mhc::post, then mhc::pre), ``eager``
            (the torch reference) or ``compile`` (torch.compile of the reference).
        mode: ``graph`` (one CUDA graph) or ``eager`` (call by call).
        norm: with the RMSNorm that follows.
        sinkhorn_repeat: rounds of Sinkhorn.
    """

    tokens: int
    hidden: int
    path: str
    mode: str = "graph"
    norm: bool = True
    sinkhorn_repeat: int = 20


class Timing(NamedTuple):
    """Microseconds a boundary; ``host_us`` is the host's share of a call in eager mode."""

    us_median: float
    us_p10: float
    us_p90: float
    host_us: float | None
    chain: int


# ------------------------------------------------------------------------------------- the chain


def chain_length(tokens: int) -> int:
    """Boundaries of a chain: 64 for up to 64 tokens, fewer where each moves more."""
    for most, length in _CHAIN_LENGTHS:
        if tokens <= most:
            return length
    return _LONGEST_CHAIN_LENGTH


def boundary_bytes(tokens: int, hidden: int) -> int:
    """Bytes that one pass over a boundary moves.

    x and 4 streams read, 4 streams and the layer input written, all bf16: 20 H a token; the 24
    rows of ``fn`` of 4 H fp32 each: 384 H. The mixes, 80 bytes a token each way, are left out.
    """
    return 20 * hidden * tokens + 384 * hidden


def floor_us(tokens: int, hidden: int, copy_tb_s: float) -> float:
    """Microseconds that :func:`boundary_bytes` take at a copy bandwidth in TB/s."""
    return boundary_bytes(tokens, hidden) / (copy_tb_s * 1e6)


def _fused(x: Tensor, residual: Tensor, post_mix: Tensor, comb_mix: Tensor, *pre: Any) -> Streams:
    *arguments, norm_weight, norm_eps = pre
    return torch.ops.mhc.fused_post_pre.default(
        x, residual, post_mix, comb_mix, *arguments, norm_weight=norm_weight, norm_eps=norm_eps
    )


def _unfused(x: Tensor, residual: Tensor, post_mix: Tensor, comb_mix: Tensor, *pre: Any) -> Streams:
    *arguments, norm_weight, norm_eps = pre
    streams = torch.ops.mhc.post.default(x, residual, post_mix, comb_mix)
    mixes = torch.ops.mhc.pre.default(
        streams, *arguments, norm_weight=norm_weight, norm_eps=norm_eps
    )
    return (streams, *mixes)


def _reference(
    x: Tensor, residual: Tensor, post_mix: Tensor, comb_mix: Tensor, *pre: Any
) -> Streams:
    *arguments, norm_weight, norm_eps = pre
    streams = reference.post(x, residual, post_mix, comb_mix)
    return (
        streams,
        *reference.pre(streams, *arguments, norm_weight=norm_weight, norm_eps=norm_eps),
    )


@functools.lru_cache(maxsize=1)
def _compiled(tokens: int, hidden: int, norm: bool, sinkhorn_repeat: int) -> Boundary:
    """torch.compile of the reference for one shape; both modes of a case share it."""
    torch._dynamo.reset()  # every shape a compilation of its own: no limit, no dynamic kernel
    return torch.compile(_reference, fullgraph=True, dynamic=False)


def boundary(case: Case) -> Boundary:
    """What a case times: (x, residual, post_mix, comb_mix, arguments of pre) to the new streams."""
    if case.path == "compile":
        return _compiled(case.tokens, case.hidden, case.norm, case.sinkhorn_repeat)
    return {"fused": _fused, "unfused": _unfused, "eager": _reference}[case.path]


def make_chain(
    case: Case, device: torch.device | str, *, length: int, seed: int = 0
) -> Callable[[], Streams]:
    """Random inputs, and the chain that runs over them.

    Args:
        case: what to run.
        device: where.
        length: boundaries, each with its own ``fn``.
        seed: of the random numbers.

    Returns:
        A function that runs the chain once on the current stream, from the same inputs each time,
        and returns what its last boundary returned.
    """
    generator = torch.Generator(device).manual_seed(seed)
    normal = functools.partial(torch.randn, generator=generator, device=device)
    uniform = functools.partial(torch.rand, generator=generator, device=device)
    n, mixes, tokens, hidden = geometry.HC_MULT, geometry.MIXES, case.tokens, case.hidden

    x = normal(tokens, hidden).bfloat16()
    residual = normal(tokens, n, hidden).bfloat16()
    post_mix = uniform(tokens, n, 1) * POST_MULT
    comb_mix = reference.sinkhorn(normal(tokens, n, n), EPS, case.sinkhorn_repeat)
    fns = [normal(mixes, n * hidden) * (n * hidden) ** -0.5 for _ in range(length)]
    scale = uniform(3) + 0.5
    base = normal(mixes)
    # small weights of collapse and post: without the norm, which bounds the layer input, the
    # streams would grow beyond bf16 along the chain
    base[: 2 * n] -= 4
    norm_weight = (1 + 0.1 * normal(hidden)).bfloat16() if case.norm else None
    rest = (
        scale, base, EPS, EPS, EPS, POST_MULT, case.sinkhorn_repeat,
        norm_weight, EPS if case.norm else None,
    )  # fmt: skip
    step = boundary(case)

    def run() -> Streams:
        streams = (residual, post_mix, comb_mix, x)
        for fn in fns:
            streams = step(streams[3], *streams[:3], fn, *rest)
        return streams

    return run


# ---------------------------------------------------------------------------------------- timing


def percentiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """(10th, 50th, 90th) percentile, with linear interpolation between samples."""
    points = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    low, middle, high = torch.tensor(samples, dtype=torch.float64).quantile(points).tolist()
    return low, middle, high


def check_finite(case: Case, outputs: Streams) -> None:
    """Refuse to report a time for wrong work.

    Raises:
        RuntimeError: the last boundary of the chain gave a value that is not finite.
    """
    for name, output in zip(
        ("residual_out", "post_mix", "comb_mix", "layer_input"), outputs, strict=True
    ):
        if not output.isfinite().all():
            raise RuntimeError(f"mhc_ops bench: {name} of {case} is not finite after the chain")


def _capture(run: Callable[[], Streams]) -> tuple[torch.cuda.CUDAGraph, Streams]:
    """Warm up on a side stream, then capture on it.

    The graph holds its memory, so the outputs stay valid as long as the graph lives; what the
    closure ``run`` holds (inputs, weights) must live as long too.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outputs = run()
    return graph, outputs


def _event_times(run: Callable[[], object], repeats: int) -> tuple[list[float], list[float]]:
    """(GPU, host) microseconds of each call of ``run``: one at a time, after some warm-up."""
    for _ in range(WARMUPS):
        run()
    device_us, host_us = [], []
    for _ in range(repeats):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        issued = time.perf_counter()
        start.record()
        run()
        end.record()
        host_us.append((time.perf_counter() - issued) * 1e6)
        end.synchronize()
        device_us.append(start.elapsed_time(end) * 1e3)
    return device_us, host_us


def copy_bandwidth(device: torch.device) -> float:
    """Bandwidth of a large device-to-device copy in TB/s, bytes read plus written.

    Args:
        device: a CUDA device.

    Returns:
        That of the median of 15 copies.
    """
    with torch.cuda.device(device):
        free, _ = torch.cuda.mem_get_info()
        size = min(COPY_BYTES, free // 4)
        source = torch.empty(size, dtype=torch.uint8, device=device).random_()
        target = torch.empty_like(source)
        times, _ = _event_times(lambda: target.copy_(source), REPLAYS)
    _, median, _ = percentiles(times)
    return 2 * size / (median * 1e6)


@torch.no_grad()
def time_case(case: Case, device: torch.device, *, replays: int = REPLAYS) -> Timing:
    """Time one case.

    Args:
        case: what to time.
        device: a CUDA device with an index.
        replays: samples that median and percentiles are taken from.

    Returns:
        Its times, a boundary.

    Raises:
        RuntimeError: the outputs of the chain are not finite.
    """
    length = chain_length(case.tokens)
    with torch.cuda.device(device):
        chain = make_chain(case, device, length=length)
        host_us = None
        if case.mode == "graph":
            graph, outputs = _capture(chain)
            times, _ = _event_times(graph.replay, replays)
        else:
            times, host_times = _event_times(chain, replays)
            outputs = chain()
            if case.tokens <= HOST_MAX_TOKENS:
                host_us = percentiles(host_times)[1] / length
        check_finite(case, outputs)
    low, median, high = percentiles(times)
    return Timing(median / length, low / length, high / length, host_us, length)


# --------------------------------------------------------------------------------------- records


def source_commit() -> str:
    """Commit of the checkout that this package lies in, ``-dirty`` if changed, else ``unknown``.

    Files under ``benchmarks/results`` do not count as changes: a run writes there.
    """
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return "unknown"  # installed into an environment that lies in some other repository
        changed = git(
            "status", "--porcelain", "--untracked-files=no", "--", ".", f":(exclude){RESULTS}"
        )
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def make_record(
    case: Case,
    timing: Timing,
    *,
    copy_tb_s: float,
    gpu: str,
    smi: dict[str, str | None],
    commit: str,
    command: str,
) -> dict[str, Any]:
    """One row as it is written to the results file.

    Args:
        case, timing: what was timed, and its times.
        copy_tb_s: copy bandwidth measured in the same run.
        gpu: name of the GPU.
        smi: ``driver_version``, ``clocks.sm`` and ``clocks.mem`` as ``nvidia-smi`` gives them.
        commit: of the source.
        command: that made the row.

    Returns:
        Field to value; microseconds and TB/s with three decimals.
    """
    return {
        **case._asdict(),
        "us_median": round(timing.us_median, 3),
        "us_p10": round(timing.us_p10, 3),
        "us_p90": round(timing.us_p90, 3),
        "host_us": None if timing.host_us is None else round(timing.host_us, 3),
        "floor_us": round(floor_us(case.tokens, case.hidden, copy_tb_s), 3),
        "copy_tb_s": round(copy_tb_s, 3),
        "chain": timing.chain,
        "gpu": gpu,
        "driver": smi["driver_version"],
        "sm_mhz": _number(smi["clocks.sm"]),
        "mem_mhz": _number(smi["clocks.mem"]),
        "torch": torch.__version__,
        "tilelang": info.installed_version("tilelang"),
        "commit": commit,
        "command": command,
        "utc": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def run(
    cases: Iterable[Case],
    *,
    device: torch.device | str | int | None = None,
    replays: int = REPLAYS,
    commit: str | None = None,
    command: str = "mhc_ops.bench.run",
) -> Iterator[dict[str, Any]]:
    """Measure the copy bandwidth, then time one case after another.

    Args:
        cases: what to time.
        device: a CUDA device, its name or index; the current one when None.
        replays: samples a case.
        commit: of the source; asked from git when None.
        command: that made the rows.

    Yields:
        The record of each case, as :func:`make_record` makes it.

    Raises:
        RuntimeError: there is no GPU that the ops support, or outputs are not finite.
    """
    supported, reason = support.is_supported(device)
    if not supported:
        raise RuntimeError(f"mhc_ops bench: needs a GPU that the ops support: {reason}")
    target = support.cuda_device(device)
    commit = source_commit() if commit is None else commit
    copy_tb_s = copy_bandwidth(target)
    for case in cases:
        timing = time_case(case, target, replays=replays)
        # right after the last replay, while the clocks are still those of the work
        smi = info.nvidia_smi(target.index, "driver_version", "clocks.sm", "clocks.mem")
        torch.cuda.empty_cache()
        yield make_record(
            case,
            timing,
            copy_tb_s=copy_tb_s,
            gpu=torch.cuda.get_device_name(target),
            smi=smi,
            commit=commit,
            command=command,
        )


# ----------------------------------------------------------------------------------- the command


def read_baseline(path: Path) -> dict[tuple[int, int, str], float]:
    """(tokens, hidden, path) to microseconds of a baseline file such as ``benchmarks/baselines``'.

    Args:
        path: JSON with ``rows``, each with ``tokens``, ``hidden``, and the microseconds of
            ``fused`` and ``unfused``: graph mode, norm fused, 20 rounds of Sinkhorn.

    Raises:
        ValueError: the file is not of that form.
    """
    try:
        rows = json.loads(path.read_text())["rows"]
        return {
            (row["tokens"], row["hidden"], name): float(row[name])
            for row in rows
            for name in ("fused", "unfused")
        }
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected JSON with rows of tokens, hidden, fused and unfused, got {error!r}"
        ) from error


def make_table(
    records: Sequence[dict[str, Any]],
    baseline: dict[tuple[int, int, str], float] | None = None,
) -> Table:
    """Records as a rich table of at most 100 columns.

    Args:
        records: of one run, at least one.
        baseline: as :func:`read_baseline` gives it; stands beside the rows made like it.

    Returns:
        The table; times in microseconds, ``x floor`` and ``vs base`` are ratios of the median.
    """
    from rich import box
    from rich.table import Table

    first = records[0]
    table = Table(
        title=f"one boundary, µs; {first['gpu']}, copy {first['copy_tb_s']} TB/s",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    for name in ("hidden", "tokens"):
        table.add_column(name, justify="right")
    for name in ("path", "mode"):
        table.add_column(name)
    numbers = ["median", "p10", "p90", "host", "floor", "x floor"]
    for name in numbers + ["baseline", "vs base"] * (baseline is not None):
        table.add_column(name, justify="right")
    for r in records:
        row = [str(r["hidden"]), str(r["tokens"]), r["path"], r["mode"]]
        row += [f"{r[field]:.2f}" for field in ("us_median", "us_p10", "us_p90")]
        row.append("" if r["host_us"] is None else f"{r['host_us']:.2f}")
        row += [f"{r['floor_us']:.2f}", f"{r['us_median'] / r['floor_us']:.2f}"]
        if baseline is not None:
            alike = r["mode"] == "graph" and r["norm"] and r["sinkhorn_repeat"] == 20
            base = baseline.get((r["tokens"], r["hidden"], r["path"])) if alike else None
            row += ["", ""] if base is None else [f"{base:.2f}", f"{r['us_median'] / base:.2f}"]
        table.add_row(*row)
    return table


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return value


def _hidden_size(text: str) -> int:
    value = _positive(text)
    if value % geometry.HIDDEN_MULTIPLE:
        raise argparse.ArgumentTypeError(
            f"expected a multiple of {geometry.HIDDEN_MULTIPLE}, got {text!r}"
        )
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mhc_ops bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--tokens", type=_positive, nargs="+", default=list(DEFAULT_TOKENS))
    add("--hidden", type=_hidden_size, nargs="+", default=list(DEFAULT_HIDDEN))
    add("--paths", nargs="+", choices=PATHS, default=list(PATHS))
    add("--modes", nargs="+", choices=MODES, default=list(MODES))
    add("--norm", action=argparse.BooleanOptionalAction, default=True, help="RMSNorm fused")
    add("--sinkhorn-repeat", type=_positive, default=20)
    add("--replays", type=_positive, default=REPLAYS, help="samples a row")
    add("--device", default=None, help="such as cuda:1; the current one if not given")
    add("--baseline", type=Path, help="JSON of other figures to show beside: benchmarks/baselines")
    add("--commit", help="of the source, where git cannot tell")
    add(
        "-o",
        "--output",
        type=Path,
        help=f"file that the records are appended to; {RESULTS}/<gpu>.jsonl if not given",
    )
    add("--plot", type=Path, help="time nothing: draw --records and --baseline into this .svg")
    add("--records", type=Path, help="file of records to draw")
    return parser


def _default_output(gpu: str) -> Path:
    return RESULTS / f"{'_'.join(gpu.lower().split())}.jsonl"


def _plot(arguments: argparse.Namespace) -> int:
    from . import plot

    try:
        baseline = None if arguments.baseline is None else read_baseline(arguments.baseline)
        records = plot.read_records(arguments.records)
        plot.draw(records, baseline, arguments.plot)
    except ImportError:
        print("expected matplotlib: pip install 'mhc-ops[plot]'", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{arguments.plot}: {plot.describe(records, baseline)}")
    return 0


def main(argv: Sequence[str]) -> int:
    """``python -m mhc_ops bench``; returns the exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if (arguments.plot is None) != (arguments.records is None):
        parser.error("expected --plot and --records together")
    if arguments.plot is not None:
        return _plot(arguments)
    cases = [
        Case(tokens, hidden, path, mode, arguments.norm, arguments.sinkhorn_repeat)
        for hidden in arguments.hidden
        for tokens in arguments.tokens
        for path in arguments.paths
        for mode in arguments.modes
    ]
    from rich.console import Console

    errors = Console(stderr=True, highlight=False, markup=False)
    records: list[dict[str, Any]] = []
    try:
        baseline = None if arguments.baseline is None else read_baseline(arguments.baseline)
        if OP_PATHS.intersection(arguments.paths) and support.is_supported(arguments.device)[0]:
            prewarm(
                arguments.hidden,
                max_tokens=max(arguments.tokens),
                device=arguments.device,
                progress=True,
            )
        for record in run(
            cases,
            device=arguments.device,
            replays=arguments.replays,
            commit=arguments.commit,
            command=shlex.join(["python", "-m", "mhc_ops", "bench", *argv]),
        ):
            output = arguments.output or _default_output(record["gpu"])
            output.parent.mkdir(parents=True, exist_ok=True)
            with output.open("a") as file:
                file.write(json.dumps(record) + "\n")
            records.append(record)
            errors.print(
                f"{len(records)}/{len(cases)} hidden {record['hidden']} tokens {record['tokens']} "
                f"{record['path']} {record['mode']}: {record['us_median']:.2f} µs"
            )
    except (OSError, RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    Console(highlight=False).print(make_table(records, baseline))
    return 0

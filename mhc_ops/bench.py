"""Time one boundary (post of one sublayer, pre of the next) on this machine's GPU.

A chain of boundaries runs in one CUDA graph, or call by call in eager mode. The streams, mixes and
layer input of each boundary feed the next. Each boundary has its own ``fn``, so that the weights
come from memory and not from the L2, as they do in a model. The time of a boundary is the time of
the chain divided by its length: median, 10th and 90th percentile of the replays.

The floor is the time that the bytes of one pass, 20 H a token and 384 H of ``fn``, take at the copy
bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import geometry, info, reference, support, timing
from .prewarm import prewarm
from .testing import EPS, POST_MULT

if TYPE_CHECKING:
    from rich.table import Table

PATHS = ("fused", "unfused", "eager", "compile")
OP_PATHS = frozenset({"fused", "unfused"})  # these run mhc ops; the other paths run the reference
MODES = ("graph", "eager")
DEFAULT_TOKENS = (1, 8, 16, 32, 64, 128, 512, 2048, 8192)
DEFAULT_HIDDEN = (4096, 7168)  # V4-Flash and V4-Pro
# With more tokens the GPU is slower than the host in eager mode, and a call waits for a full queue.
HOST_MAX_TOKENS = 64

# These are the residual streams, the post mix, the comb mix and the layer input.
Streams = tuple[Tensor, Tensor, Tensor, Tensor]
Boundary = Callable[..., Streams]


class Case(NamedTuple):
    """Describe one row of the benchmark.

    Attributes:
        tokens: token count, at least 1.
        hidden: hidden size.
        path: ``fused`` (mhc::fused_post_pre), ``unfused`` (mhc::post, then mhc::pre), ``eager``
            (the torch reference) or ``compile`` (torch.compile of the reference).
        mode: ``graph`` (one CUDA graph) or ``eager`` (call by call).
        norm: whether the RMSNorm that follows is included.
        sinkhorn_repeat: rounds of Sinkhorn.
    """

    tokens: int
    hidden: int
    path: str
    mode: str = "graph"
    norm: bool = True
    sinkhorn_repeat: int = 20


# ------------------------------------------------------------------------------------- the chain


def boundary_bytes(tokens: int, hidden: int) -> int:
    """Count the bytes that one pass over a boundary moves.

    Each token reads x and 4 streams and writes 4 streams and the layer input, all bf16, which is
    20 H bytes. The 24 rows of ``fn`` have 4 H fp32 numbers each, which is 384 H bytes. The mixes,
    80 bytes a token each way, are left out.
    """
    return 20 * hidden * tokens + 384 * hidden


def floor_us(tokens: int, hidden: int, copy_tb_s: float) -> float:
    """Return the microseconds that :func:`boundary_bytes` take at a copy bandwidth in TB/s."""
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
    """Compile the reference for one shape; both modes of a case share the result."""
    # After a reset torch compiles each shape by itself: it meets no recompile limit and makes no
    # kernel with dynamic shapes.
    torch._dynamo.reset()
    return torch.compile(_reference, fullgraph=True, dynamic=False)


def boundary(case: Case) -> Boundary:
    """Return the function that a case times.

    The function takes x, residual, post_mix, comb_mix and the arguments of pre, and returns the
    new streams, the mixes and the layer input.
    """
    if case.path == "compile":
        return _compiled(case.tokens, case.hidden, case.norm, case.sinkhorn_repeat)
    return {"fused": _fused, "unfused": _unfused, "eager": _reference}[case.path]


def make_chain(
    case: Case, device: torch.device | str, *, length: int, seed: int = 0
) -> Callable[[], Streams]:
    """Make random inputs and the chain that runs on them.

    Args:
        case: what to run.
        device: device of the inputs.
        length: number of boundaries, each with its own ``fn``.
        seed: seed of the random numbers.

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
    # The weights of the collapse and of the post step are made small. Without a norm nothing else
    # bounds the layer input, and the streams would grow beyond bf16 along the chain.
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


def check_finite(case: Case, outputs: Streams) -> None:
    """Refuse to report a time of wrong results.

    Raises:
        RuntimeError: the last boundary of the chain gave a value that is not finite.
    """
    for name, output in zip(
        ("residual_out", "post_mix", "comb_mix", "layer_input"), outputs, strict=True
    ):
        if not output.isfinite().all():
            raise RuntimeError(f"mhc_ops bench: {name} of {case} is not finite after the chain")


@torch.no_grad()
def time_case(case: Case, device: torch.device, *, replays: int = timing.REPLAYS) -> timing.Timing:
    """Time one case.

    Args:
        case: what to time.
        device: a CUDA device with an index.
        replays: samples that median and percentiles are taken from.

    Returns:
        The times of one boundary.

    Raises:
        RuntimeError: the outputs of the chain are not finite.
    """
    length = timing.chain_length(case.tokens)
    with torch.cuda.device(device):
        return timing.time_chain(
            make_chain(case, device, length=length),
            length,
            functools.partial(check_finite, case),
            graph=case.mode == "graph",
            replays=replays,
        )


def make_row(
    case: Case,
    times: timing.Timing,
    *,
    copy_tb_s: float,
    gpu: str,
    smi: dict[str, str | None],
) -> dict[str, Any]:
    """Put the figures of a case into one row.

    Args:
        case, times: what was timed, and the times.
        copy_tb_s: copy bandwidth measured in the same run.
        gpu: name of the GPU.
        smi: ``driver_version``, ``clocks.sm`` and ``clocks.mem`` as ``nvidia-smi`` gives them.

    Returns:
        Field to value; microseconds and TB/s with three decimals. ``host_us`` is the host's share
        of a call in eager mode, and None where calls would wait for the GPU.
    """
    host = case.mode == "eager" and case.tokens <= HOST_MAX_TOKENS
    return {
        **case._asdict(),
        "us_median": round(times.us_median, 3),
        "us_p10": round(times.us_p10, 3),
        "us_p90": round(times.us_p90, 3),
        "host_us": round(times.host_us, 3) if host else None,
        "floor_us": round(floor_us(case.tokens, case.hidden, copy_tb_s), 3),
        "copy_tb_s": round(copy_tb_s, 3),
        "chain": times.chain,
        "gpu": gpu,
        "driver": smi["driver_version"],
        "sm_mhz": _number(smi["clocks.sm"]),
        "mem_mhz": _number(smi["clocks.mem"]),
        "torch": torch.__version__,
        "tilelang": info.installed_version("tilelang"),
    }


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def run(
    cases: Iterable[Case],
    *,
    device: torch.device | str | int | None = None,
    replays: int = timing.REPLAYS,
) -> Iterator[dict[str, Any]]:
    """Measure the copy bandwidth, then time one case after another.

    Args:
        cases: what to time.
        device: a CUDA device, its name or index; the current one when None.
        replays: samples a case.

    Yields:
        The row of each case, as :func:`make_row` makes it.

    Raises:
        RuntimeError: there is no GPU that the ops support, or outputs are not finite.
    """
    supported, reason = support.is_supported(device)
    if not supported:
        raise RuntimeError(f"mhc_ops bench: expected a GPU that the ops support: {reason}")
    target = support.cuda_device(device)
    copy_tb_s = timing.copy_bandwidth(target)
    for case in cases:
        times = time_case(case, target, replays=replays)
        # nvidia-smi is asked right after the last replay, while the clocks are still those of the
        # timed work.
        smi = info.nvidia_smi(target.index, "driver_version", "clocks.sm", "clocks.mem")
        torch.cuda.empty_cache()
        gpu = torch.cuda.get_device_name(target)
        yield make_row(case, times, copy_tb_s=copy_tb_s, gpu=gpu, smi=smi)


# ----------------------------------------------------------------------------------- the command


def make_table(
    rows: Sequence[dict[str, Any]], baseline: Sequence[float | None] | None = None
) -> Table:
    """Show rows as a rich table of at most 100 columns.

    Args:
        rows: rows of one run, at least one.
        baseline: microseconds of other code for each row; None for a row without.

    Returns:
        The table; times in microseconds, ``x floor`` and ``vs base`` are ratios of the median.
    """
    from rich import box
    from rich.table import Table

    first = rows[0]
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
    for row, base in zip(rows, baseline or [None] * len(rows), strict=True):
        cells = [str(row["hidden"]), str(row["tokens"]), row["path"], row["mode"]]
        cells += [f"{row[field]:.2f}" for field in ("us_median", "us_p10", "us_p90")]
        cells.append("" if row["host_us"] is None else f"{row['host_us']:.2f}")
        cells += [f"{row['floor_us']:.2f}", f"{row['us_median'] / row['floor_us']:.2f}"]
        if base is not None:
            cells += [f"{base:.2f}", f"{row['us_median'] / base:.2f}"]
        table.add_row(*cells)
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say what is timed."""
    add = parser.add_argument
    add("--tokens", type=_positive, nargs="+", default=list(DEFAULT_TOKENS))
    add("--hidden", type=_hidden_size, nargs="+", default=list(DEFAULT_HIDDEN))
    add("--paths", nargs="+", choices=PATHS, default=list(PATHS))
    add("--modes", nargs="+", choices=MODES, default=list(MODES))
    add("--norm", action=argparse.BooleanOptionalAction, default=True, help="RMSNorm fused")
    add("--sinkhorn-repeat", type=_positive, default=20)
    add("--replays", type=_positive, default=timing.REPLAYS, help="samples a row")
    add("--device", default=None, help="such as cuda:1; the current one if not given")


def run_arguments(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Prewarm, then time what the arguments of :func:`add_arguments` say, with progress.

    Yields:
        Rows, as :func:`run`.

    Raises:
        RuntimeError: as :func:`run`.
    """
    cases = [
        Case(tokens, hidden, path, mode, arguments.norm, arguments.sinkhorn_repeat)
        for hidden in arguments.hidden
        for tokens in arguments.tokens
        for path in arguments.paths
        for mode in arguments.modes
    ]
    if OP_PATHS.intersection(arguments.paths) and support.is_supported(arguments.device)[0]:
        prewarm(
            arguments.hidden,
            max_tokens=max(arguments.tokens),
            device=arguments.device,
            progress=True,
        )
    rows = run(cases, device=arguments.device, replays=arguments.replays)
    for number, row in enumerate(rows, 1):
        print(
            f"{number}/{len(cases)} hidden {row['hidden']} tokens {row['tokens']} "
            f"{row['path']} {row['mode']}: {row['us_median']:.2f} µs",
            file=sys.stderr,
        )
        yield row


def main(argv: Sequence[str]) -> int:
    """Run ``python -m mhc_ops bench``, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m mhc_ops bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    arguments = parser.parse_args(argv)
    try:
        rows = list(run_arguments(arguments))
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        from rich.console import Console

        Console(highlight=False).print(make_table(rows))
    return 0

"""``python -m mhc_ops demo``: a small DeepSeek-V4 of transformers, stock against these ops.

Random weights, real text, the CPU or a GPU. Every claim that the demo prints is checked, and the
exit status is 1 where one does not hold:

1. Teacher-forced logits of stock bf16 and of mhc-ops bf16 (unfused and fused), each compared with
   the stock model in float32. The error of mhc-ops is at most ``ERROR_RATIO`` times stock's own,
   and its top token is float32's wherever float32's margin exceeds stock's largest error.
2. A greedy continuation with the KV cache.
3. ``torch.compile(fullgraph=True)``: one graph.
4. On a GPU: a CUDA graph replayed on new input, and the times of a boundary.

A model of this kind is not continuous: where two experts (or two compressed entries of the sparse
attention) score alike, one rounding changes which is taken, and the logits of that position jump.
Such jumps are 3 to 5 % of the positions and most of the error of any bf16 run, whichever path it
takes. So the comparison is made twice: with the choices of the float32 run given to both, where
the error is that of the arithmetic and is checked seed by seed; and with every run choosing for
itself, as in use, where it is checked over all seeds together.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.metadata
import os
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from . import config, geometry
from .prewarm import prewarm
from .support import is_supported

ERROR_RATIO = 1.05  # largest error of mhc-ops, in units of stock bf16's own
LEAST_COVERED = 0.5  # share of positions that the check of the top token must reach

SEEDS = 4
SEQUENCES, LENGTH = 4, 512  # of one teacher-forced batch
PROMPTS, PROMPT_LENGTH, NEW_TOKENS = 4, 128, 48
GRAPH_SEQUENCES, GRAPH_LENGTH = 2, 64  # of a compiled or captured run
BENCH_TOKENS, BENCH_HIDDEN = (1, 8, 64, 512), (4096, 7168)

KEPT_IN_FLOAT32 = ("attn_hc", "ffn_hc", "hc_head", "sinks", "position_bias", "correction_bias")

PATHS = {
    "mhc-ops unfused": {"MHC_OPS_FUSE_POST_PRE": "0"},
    "mhc-ops fused": {"MHC_OPS_FUSE_POST_PRE": "1"},
}


class Report:
    """Prints what is done and remembers what failed."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.failures: list[str] = []
        self.start = time.monotonic()

    def step(self, text: str) -> None:
        seconds = time.monotonic() - self.start
        self.console.print(f"[bold]{seconds:5.1f} s  {text}[/]", soft_wrap=True)

    def say(self, text: str, mark: str = "") -> None:
        self.console.print(f"         {mark:6}  {text}", soft_wrap=True)

    def check(self, holds: bool, text: str) -> None:
        self.say(text, "[green]ok[/]    " if holds else "[red]FAILED[/]")
        if not holds:
            self.failures.append(text)


def readme() -> tuple[str, bytes]:
    """Where the text comes from, and the text: the README of the checkout or of the package."""
    path = Path(__file__).resolve().parent.parent / "README.md"
    if path.is_file():
        return str(path), path.read_bytes()
    description = importlib.metadata.metadata("mhc-ops")["Description"]
    if not description or not description.strip():
        raise RuntimeError(
            f"expected a README at {path} or in the metadata of mhc-ops, got neither"
        )
    return "the metadata of mhc-ops", description.encode()


def byte_tokens(text: bytes, part: int, rows: int, length: int, device: str) -> Tensor:
    """[rows, length] tokens, one a byte: the given part of a text that is read round and round."""
    start = part * rows * length
    tokens = [text[index % len(text)] for index in range(start, start + rows * length)]
    return torch.tensor(tokens, device=device).view(rows, length)


def to_checkpoint_dtypes(model: Any) -> None:
    """The dtypes of the published checkpoints: bf16, and what they keep in float32."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not (
            "inv_freq" in name or any(part in name for part in KEPT_IN_FLOAT32)
        ):
            tensor.data = tensor.data.bfloat16()


def small_model(seed: int, device: str, pairs: int = 2) -> Any:
    """A DeepSeek-V4 of 2 layers a pair in bf16, with weights that make every part of it count.

    Both kinds of compressed attention, hash and top-k routing. The hyper-connections get mixes
    far from uniform, the norms weights other than 1. dtypes are those of the published
    checkpoints: bf16, the hyper-connections and a few small tensors in float32.
    """
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    settings = DeepseekV4Config(
        vocab_size=256,
        hidden_size=geometry.HIDDEN_MULTIPLE,
        moe_intermediate_size=128,
        num_hidden_layers=2 * pairs,
        num_attention_heads=4,
        head_dim=64,
        qk_rope_head_dim=16,
        q_lora_rank=64,
        o_groups=2,
        o_lora_rank=64,
        num_experts_per_tok=2,
        n_routed_experts=8,
        index_n_heads=4,
        index_head_dim=32,
        index_topk=8,
        sliding_window=64,
        max_position_embeddings=4096,
        layer_types=["heavily_compressed_attention", "compressed_sparse_attention"] * pairs,
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
        mlp_layer_types=["hash_moe"] * pairs + ["moe"] * pairs,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = DeepseekV4ForCausalLM(settings).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor, std: float) -> Tensor:
        return std * torch.randn(like.shape, generator=generator)

    for name, parameter in model.named_parameters():
        connection = "_hc." in name or "hc_head." in name
        fan_in = parameter.shape[-1]
        if connection and name.endswith("fn"):
            value = normal(parameter, 2 / fan_in**0.5)
        elif connection and name.endswith("scale"):
            value = 0.5 + torch.rand(parameter.shape, generator=generator)
        elif connection:
            value = normal(parameter, 2.0)
        elif "norm" in name:
            value = 1 + normal(parameter, 0.2)
        elif "embed" in name or "sinks" in name or "position_bias" in name:
            value = normal(parameter, 1.0)
        else:
            value = normal(parameter, 1 / fan_in**0.5)
        parameter.copy_(value)
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):
            experts = torch.rand((buffer.shape[0], 8), generator=generator)
            buffer.copy_(experts.topk(buffer.shape[1]).indices)
    to_checkpoint_dtypes(model)
    return model.to(device)


@contextlib.contextmanager
def switches(values: dict[str, str]) -> Iterator[None]:
    """The switches of the model wiring: those given, the others at their defaults."""
    before = {name: os.environ.pop(name, None) for name in config.WIRING}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def path(model: Any, name: str) -> Iterator[Any]:
    """The model on one of ``PATHS``, or stock; stock again afterwards."""
    from .integrations import transformers as integration

    if name not in PATHS:
        yield model
        return
    with switches(PATHS[name]):
        integration.apply(model)
    try:
        yield model
    finally:
        integration.remove(model)


class Choices:
    """The discontinuous choices of a run: experts of each router, entries of each indexer."""

    def __init__(self) -> None:
        self.taken: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def _hooks(self, model: torch.nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
        from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

        kinds = (modeling.DeepseekV4TopKRouter, modeling.DeepseekV4Indexer)
        handles = [
            module.register_forward_hook(
                lambda module, _, output, name=name: hook(name, module, output)
            )
            for name, module in model.named_modules()
            if isinstance(module, kinds)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def recorded(self, model: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
        """While it lasts, keep what the model chooses."""

        def keep(name: str, _: torch.nn.Module, output: Any) -> None:
            self.taken[name] = output[2] if isinstance(output, tuple) else output

        return self._hooks(model, keep)

    def replayed(self, model: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
        """While it lasts, the model takes what was recorded, with weights of its own."""

        def replace(name: str, module: Any, output: Any) -> Any:
            taken = self.taken[name]
            if not isinstance(output, tuple):
                return taken
            weights = module.score_fn(output[0]).gather(1, taken)
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
            return output[0], weights * module.routed_scaling_factor, taken

        return self._hooks(model, replace)


class Errors(NamedTuple):
    """How far logits are from those of the float32 model.

    Attributes:
        mean: mean absolute error over all logits.
        largest: largest absolute error.
        agreement: share of positions with float32's top token.
    """

    mean: float
    largest: float
    agreement: float


def errors(logits: Tensor, exact: Tensor) -> Errors:
    """Compare logits [..., vocabulary] with float32's."""
    difference = (logits.float() - exact).abs()
    agreement = (logits.argmax(-1) == exact.argmax(-1)).float().mean()
    return Errors(difference.mean().item(), difference.max().item(), agreement.item())


def top_tokens(logits: Tensor, exact: Tensor, least_margin: float) -> tuple[int, float]:
    """(positions with another top token than float32's, share of positions looked at).

    Args:
        logits: [..., vocabulary].
        exact: the same of the float32 model.
        least_margin: positions where float32's margin is at most this are left out.
    """
    best = exact.topk(2, dim=-1)
    covered = best.values[..., 0] - best.values[..., 1] > least_margin
    other = logits.argmax(-1) != best.indices[..., 0]
    return int((other & covered).sum()), covered.float().mean().item()


def logits_of(model: Any, tokens: Tensor, masks: dict[str, Tensor] | None = None) -> Tensor:
    """[rows, length, vocabulary]; ``masks`` by kind of attention, made by the model when None."""
    return model(tokens, attention_mask=masks, use_cache=False).logits


def readable(tokens: Tensor) -> str:
    """One character a token: those of ASCII as they are, the rest as a dot."""
    return "".join(chr(t) if 32 <= t < 127 else "·" for t in tokens.tolist())


# ------------------------------------------------------------------------------------- the steps


class Case(NamedTuple):
    """One random model and its text.

    Attributes:
        model: stock, in bf16.
        exact: the same weights in float32.
        tokens: [SEQUENCES, LENGTH].
    """

    model: Any
    exact: Any
    tokens: Tensor


def make_case(seed: int, text: bytes, device: str, pairs: int = 2) -> Case:
    model = small_model(seed, device, pairs)
    tokens = byte_tokens(text, seed, SEQUENCES, LENGTH, device)
    return Case(model, copy.deepcopy(model).float(), tokens)


def compare_logits(report: Report, cases: Sequence[Case]) -> float:
    """Check 1; returns the mean error of stock where every run chooses for itself."""
    table = Table(title="error of the logits against float32 (mean; largest; same top token)")
    for column in ("seed", "path", "float32's choices", "own choices"):
        table.add_column(column)
    free: dict[str, list[float]] = {name: [] for name in ("stock", *PATHS)}
    outcomes = []
    for seed, case in enumerate(cases):
        report.step(f"seed {seed}: logits of {SEQUENCES} x {LENGTH} tokens, float32, stock, ours")
        choices = Choices()
        with choices.recorded(case.exact):
            exact = logits_of(case.exact, case.tokens)
        pinned: dict[str, Errors] = {}
        for name in free:
            with path(case.model, name) as model:
                own = errors(logits_of(model, case.tokens), exact)
                with choices.replayed(model):
                    logits = logits_of(model, case.tokens)
            pinned[name] = errors(logits, exact)
            free[name].append(own.mean)
            table.add_row(
                str(seed),
                name,
                *(f"{e.mean:.5f}; {e.largest:.3f}; {e.agreement:.2%}" for e in (pinned[name], own)),
            )
            if name == "stock":
                continue
            ratio = pinned[name].mean / pinned["stock"].mean
            outcomes.append(
                (
                    ratio <= ERROR_RATIO,
                    f"seed {seed}, {name}: error {ratio:.3f} of stock's, at most {ERROR_RATIO}",
                )
            )
            other, covered = top_tokens(logits, exact, pinned["stock"].largest)
            outcomes.append(
                (
                    other == 0 and covered >= LEAST_COVERED,
                    f"seed {seed}, {name}: {other} other top tokens in the {covered:.1%} of the "
                    "positions where float32's margin exceeds stock's largest error",
                )
            )
    report.console.print(table)
    for holds, text in outcomes:
        report.check(holds, text)
    for name in PATHS:
        ratio = sum(free[name]) / sum(free["stock"])
        report.check(
            ratio <= ERROR_RATIO,
            f"own choices, all seeds, {name}: error {ratio:.3f} of stock's, at most {ERROR_RATIO}",
        )
    return sum(free["stock"]) / len(cases)


def continue_greedily(report: Report, case: Case, stock_error: float) -> None:
    """Check 2: float32 ranks the tokens of each continuation first, or almost."""
    report.step(f"greedy continuation with the KV cache: {PROMPTS} prompts, {NEW_TOKENS} tokens")
    prompts = case.tokens.flatten()[: PROMPTS * PROMPT_LENGTH].view(PROMPTS, PROMPT_LENGTH)
    table = Table(title="greedy continuation of a random model, a byte a token")
    for column in ("prompt", "path", "continuation"):
        table.add_column(column, no_wrap=True)
    continuations = {}
    for name in ("stock", *PATHS):
        with path(case.model, name) as model:
            sequences = model.generate(prompts, max_new_tokens=NEW_TOKENS, do_sample=False)
        continuations[name] = sequences[:, PROMPT_LENGTH:]
        exact = logits_of(case.exact, sequences)[:, PROMPT_LENGTH - 1 : -1]
        taken = exact.gather(-1, continuations[name].unsqueeze(-1)).squeeze(-1)
        behind = (exact.amax(-1) - taken).mean().item()
        text = (
            f"{name}: its tokens are on average {behind:.5f} behind float32's best, at most the "
            f"mean error of stock's logits, {stock_error:.5f}"
        )
        if name == "stock":
            report.say(text)
        else:
            report.check(behind <= stock_error, text)
    for row in range(PROMPTS):
        for name, tokens in continuations.items():
            table.add_row(str(row), name, readable(tokens[row]))
        table.add_section()
    report.console.print(table)


def compile_model(report: Report, case: Case) -> None:
    """Check 3: the fused model is one graph, with the ops in it."""
    compilers = (os.environ.get("CXX"), "c++", "g++", "clang++")
    backend = "inductor" if any(shutil.which(c) for c in compilers if c) else "aot_eager"
    why = "" if backend == "inductor" else " (no C++ compiler is installed, Inductor needs one)"
    layers = case.model.config.num_hidden_layers
    report.step(f"torch.compile(fullgraph=True), {layers} layers, backend {backend}{why}")
    tokens = case.tokens[:GRAPH_SEQUENCES, :GRAPH_LENGTH]
    graphs: list[torch.fx.GraphModule] = []
    compile_graph = torch._dynamo.lookup_backend(backend)

    def counting(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return compile_graph(graph, inputs)

    choices = Choices()
    with choices.recorded(case.exact):
        exact = logits_of(case.exact, tokens)
    with choices.replayed(case.model):
        stock = errors(logits_of(case.model, tokens), exact)
    torch._dynamo.reset()
    with (
        path(case.model, "mhc-ops fused") as model,
        choices.replayed(model),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # off for the float32 run
        compiled = errors(
            torch.compile(model, fullgraph=True, backend=counting)(tokens, use_cache=False).logits,
            exact,
        )
    torch._dynamo.reset()
    calls = Counter(
        str(node.target).split(".")[1]
        for graph in graphs
        for node in graph.graph.nodes
        if str(node.target).startswith("mhc.")
    )
    wanted = {"pre": 1, "fused_post_pre": 2 * layers - 1, "post_head": 1}
    report.check(len(graphs) == 1, f"{len(graphs)} graph for the whole model, 1 wanted")
    report.check(calls == wanted, f"calls in it: {dict(calls)}, wanted {wanted}")
    ratio = compiled.mean / stock.mean
    report.check(
        ratio <= ERROR_RATIO,
        f"compiled: error {ratio:.3f} of stock's in eager mode, at most {ERROR_RATIO}",
    )


def replay_cuda_graph(report: Report, case: Case) -> None:
    """Check 4: the fused model captured once and replayed on other tokens."""
    report.step("CUDA graph: captured on one text, replayed on another")
    from transformers.masking_utils import create_sliding_window_causal_mask

    tokens = case.tokens[:GRAPH_SEQUENCES, :GRAPH_LENGTH].clone()
    # transformers builds its mask with a copy from the CPU, which no capture allows
    mask = create_sliding_window_causal_mask(
        config=case.model.config,
        inputs_embeds=case.model.model.embed_tokens(tokens),
        attention_mask=None,
        past_key_values=None,
        position_ids=torch.arange(GRAPH_LENGTH, device=tokens.device).unsqueeze(0),
    )
    masks = {"sliding_attention": mask}
    other = case.tokens[GRAPH_SEQUENCES : 2 * GRAPH_SEQUENCES, :GRAPH_LENGTH]
    experts = case.model.config._experts_implementation
    case.model.set_experts_implementation("batched_mm")  # no sizes that depend on the data
    with path(case.model, "mhc-ops fused") as model:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                logits_of(model, tokens, masks)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = logits_of(model, tokens, masks)
        tokens.copy_(other)
        graph.replay()
        eager = logits_of(model, other, masks)
    case.model.set_experts_implementation(experts)
    report.check(torch.equal(captured, eager), "replay equals eager mode bit for bit")


def time_boundaries(report: Report, device: str) -> None:
    """The times of a boundary at the sizes of V4-Flash and V4-Pro."""
    from . import bench

    report.step("time of one boundary in a CUDA graph")
    prewarm(BENCH_HIDDEN, max_tokens=max(BENCH_TOKENS), device=device)
    cases = [
        bench.Case(tokens, hidden, route)
        for hidden in BENCH_HIDDEN
        for tokens in BENCH_TOKENS
        for route in ("fused", "unfused", "eager")
    ]
    records = list(bench.run(cases, device=device))
    report.console.print(bench.make_table(records))


@torch.no_grad()
def run(report: Report, device: str) -> None:
    """All steps on one device."""
    source, text = readme()
    report.step(f"{SEEDS} random DeepSeek-V4 models on {device}; text: {source}")
    if device == "cuda":
        report.step("compiling the kernels")
        prewarm([geometry.HIDDEN_MULTIPLE], max_tokens=SEQUENCES * LENGTH, device=device)
    cases = [make_case(seed, text, device) for seed in range(SEEDS)]
    stock_error = compare_logits(report, cases)
    continue_greedily(report, cases[0], stock_error)
    compile_model(report, make_case(0, text, device, pairs=1))  # half the time of Inductor
    if device == "cuda":
        replay_cuda_graph(report, cases[0])
        time_boundaries(report, device)


def main(argv: Sequence[str]) -> int:
    """``python -m mhc_ops demo``.

    Args:
        argv: ``--device auto`` (a GPU that the ops support, else the CPU), ``cpu`` or ``cuda``.

    Returns:
        0 where every check holds, 1 where one does not, 2 where the demo cannot run.
    """
    parser = argparse.ArgumentParser(
        prog="python -m mhc_ops demo",
        description="A small DeepSeek-V4 of transformers, stock against mhc-ops.",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    device = parser.parse_args(argv).device
    report = Report(Console(highlight=False))
    supported, reason = is_supported("cuda")
    if device == "cuda" and not supported:
        report.console.print(f"--device cuda: expected a GPU that the ops support: {reason}")
        return 2
    if device == "auto":
        device = "cuda" if supported else "cpu"
        report.console.print(f"device: {device} ({reason})")
    try:
        import transformers
    except ImportError:
        report.console.print("expected transformers: pip install 'mhc-ops[transformers]'")
        return 2
    transformers.utils.logging.set_verbosity_error()
    run(report, device)
    if report.failures:
        report.console.print(f"[red]checks that FAILED: {len(report.failures)}[/]")
        for failure in report.failures:
            report.console.print(f"  {failure}")
        return 1
    report.step("[green]every check holds[/]")
    return 0

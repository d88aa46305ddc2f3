"""Run the parts of the demo, each of which checks what it prints."""

from __future__ import annotations

import copy
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from ..prewarm import prewarm
from .models import (
    ERROR_RATIO,
    PATHS,
    Choices,
    Errors,
    byte_tokens,
    errors,
    logits_of,
    path,
    small_model,
    top_tokens,
)
from .summary import Comparison, Report

LEAST_COVERED = 0.5  # the check of the top token must cover this share of the positions

SEEDS = 4
SEQUENCES, LENGTH = 4, 512  # a teacher-forced batch has this size
PROMPTS, PROMPT_LENGTH, NEW_TOKENS = 4, 128, 48
GRAPH_SEQUENCES, GRAPH_LENGTH = 2, 64  # a compiled or captured run has this size
BENCH_TOKENS, BENCH_HIDDEN = (1, 8, 64, 512), (4096, 7168)


def readable(tokens: Tensor) -> str:
    """Show each token as one character: printable ASCII as it is, the rest as a dot."""
    return "".join(chr(t) if 32 <= t < 127 else "·" for t in tokens.tolist())


# ------------------------------------------------------------------------------------- the parts


class Case(NamedTuple):
    """Hold one random model and its text.

    Attributes:
        model: the stock model in bf16.
        exact: a model with the same weights in float32.
        tokens: [SEQUENCES, LENGTH].
    """

    model: Any
    exact: Any
    tokens: Tensor


def make_case(seed: int, text: bytes, device: str, pairs: int = 2) -> Case:
    model = small_model(seed, device, pairs)
    tokens = byte_tokens(text, seed, SEQUENCES, LENGTH, device)
    return Case(model, copy.deepcopy(model).float(), tokens)


def compare_logits(report: Report, cases: Sequence[Case]) -> list[Comparison]:
    """Check 1: the logits are as near to float32's as those of stock bf16."""
    table = Table(title="error of the logits against float32 (mean; largest; same top token)")
    for column in ("seed", "path", "float32's choices", "own choices"):
        table.add_column(column)
    free: dict[str, list[float]] = {name: [] for name in ("stock", *PATHS)}
    outcomes = []
    compared = []
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
            compared.append(Comparison(seed, name, pinned[name], own))
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
    return compared


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
        # TF32 stays off because the float32 run is the reference.
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
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
    """Check 4: the fused model, captured once and replayed on other tokens, gives eager's bits."""
    report.step("CUDA graph: captured on one text, replayed on another")
    from transformers.masking_utils import create_sliding_window_causal_mask

    tokens = case.tokens[:GRAPH_SEQUENCES, :GRAPH_LENGTH].clone()
    # transformers builds its mask with a copy from the CPU, which no capture allows.
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
    case.model.set_experts_implementation("batched_mm")  # its sizes do not depend on the data
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


def time_boundaries(report: Report, device: str) -> list[dict[str, Any]]:
    """Time a boundary at the sizes of V4-Flash and V4-Pro."""
    from .. import bench

    report.step("time of one boundary in a CUDA graph")
    prewarm(BENCH_HIDDEN, max_tokens=max(BENCH_TOKENS), device=device)
    cases = [
        bench.Case(tokens, hidden, route)
        for hidden in BENCH_HIDDEN
        for tokens in BENCH_TOKENS
        for route in ("fused", "unfused", "eager")
    ]
    rows = list(bench.run(cases, device=device))
    report.console.print(bench.make_table(rows))
    return rows

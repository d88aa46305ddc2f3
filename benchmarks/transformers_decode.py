"""Compare DeepSeek-V4 of transformers, stock and with mhc-ops, while it decodes: logits and time.

    python benchmarks/transformers_decode.py -o benchmarks/results/nvidia_h100_checks.jsonl

The part ``logits`` decodes teacher-forced with the KV cache, 64 steps after prompts of two lengths,
with three random models. Stock in bf16 and mhc-ops (unfused and fused) are compared with stock in
float32, and all are given the choices of experts and of compressed entries of the float32 run
(``mhc_ops/demo/models.py`` says why). The mean error of mhc-ops is at most 1.05 times the error of
stock bf16, and the top token is float32's wherever float32's margin exceeds the largest error of
stock bf16.

The part ``generate`` makes greedy and sampled continuations to their end.

The part ``times`` times one decoding step of a pair of layers of V4-Flash's widths, with few
experts and random weights, called eagerly and replayed as a CUDA graph where the model can be
captured.

``--tiny`` makes a dry run of all parts in seconds, on a CPU too; its times say nothing.

The exit status is 0 where every check holds, 1 where one does not, and 2 where the script cannot
run.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import harness
import mhc_ops
import records
from mhc_ops import geometry, support, timing
from mhc_ops.demo import models as demo

PARTS = ("logits", "generate", "times")
NAMES = ("stock", *demo.PATHS)
CAPTURE_ERROR_LENGTH = 200
FEW_EXPERTS = {"n_routed_experts": 16}  # V4-Flash has 256, of which a token takes 6


class Sizes(NamedTuple):
    """Say how much a run does.

    Attributes:
        seeds: seeds of the models and their text.
        prompts: prompt lengths.
        rows: number of sequences side by side.
        steps: number of decoding steps, each of one token.
        batches, context: batch sizes and tokens of context of the timed steps.
        repeats: number of timed steps of a row.
        widths: settings of the timed pair of layers that replace V4-Flash's.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    prompts: tuple[int, ...] = (40, 200)
    rows: int = 8
    steps: int = 64
    batches: tuple[int, ...] = (1, 8, 32)
    context: int = 250
    repeats: int = 30
    widths: dict[str, Any] = FEW_EXPERTS


TINY = Sizes(
    seeds=(0,),
    prompts=(10,),
    rows=2,
    steps=6,
    batches=(1, 2),
    context=10,
    repeats=2,
    widths={
        "hidden_size": 256,
        "moe_intermediate_size": 64,
        "num_attention_heads": 4,
        "head_dim": 64,
        "q_lora_rank": 64,
        "o_groups": 2,
        "o_lora_rank": 64,
        "n_routed_experts": 8,
        "index_n_heads": 4,
        "index_head_dim": 32,
        "partial_rotary_factor": 0.25,
    },
)


# ---------------------------------------------------------------------------------------- logits


def decode(
    model: Any,
    tokens: Tensor,
    prompt: int,
    choices: Sequence[demo.Choices] = (),
    *,
    record: bool = False,
) -> Tensor:
    """Compute the logits after the prompt and after each token that follows the prompt.

    Args:
        model: a model of transformers.
        tokens: [rows, prompt + steps - 1].
        prompt: length of the prompt.
        choices: one for each step; with none the model makes its own choices.
        record: whether to keep the model's choices in ``choices`` instead of taking them from
            there.

    Returns:
        [rows, steps, vocabulary].
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    found = []
    pieces = tokens.split([prompt] + [1] * (tokens.shape[1] - prompt), dim=1)
    for step, piece in enumerate(pieces):
        hooks: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if choices:
            hooks = (choices[step].recorded if record else choices[step].replayed)(model)
        with hooks:
            out = model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
        found.append(out.logits)
    return torch.cat(found, dim=1)


class Compared(NamedTuple):
    """Compare one path of one model and prompt length with float32.

    Attributes:
        ratio: mean error in units of stock's error, with float32's choices.
        other: number of positions with another top token than float32's, among those where
            float32's margin exceeds stock's largest error.
        covered: share of the positions where float32's margin exceeds stock's largest error.
        own: mean error where the run makes its own choices.
    """

    seed: int
    prompt: int
    path: str
    mean: float
    largest: float
    ratio: float
    other: int
    covered: float
    own: float


def compare(sizes: Sizes, device: str) -> list[Compared]:
    """Compare the teacher-forced logits of every path with float32's."""
    _, text = demo.readme()
    rows = []
    for seed in sizes.seeds:
        model = demo.small_model(seed, device)
        exact_model = copy.deepcopy(model).float()
        for prompt in sizes.prompts:
            tokens = demo.byte_tokens(text, seed, sizes.rows, prompt + sizes.steps - 1, device)
            choices = [demo.Choices() for _ in range(sizes.steps)]
            exact = decode(exact_model, tokens, prompt, choices, record=True)
            stock: demo.Errors | None = None
            for name in NAMES:
                with demo.path(model, name):
                    logits = decode(model, tokens, prompt, choices)
                    own = demo.errors(decode(model, tokens, prompt), exact)
                found = demo.errors(logits, exact)
                stock = stock or found
                other, covered = demo.top_tokens(logits, exact, stock.largest)
                rows.append(
                    Compared(
                        seed, prompt, name, found.mean, found.largest, found.mean / stock.mean,
                        other, covered, own.mean,
                    )
                )  # fmt: skip
    return rows


def wrong_logits(rows: Sequence[Compared]) -> list[str]:
    """Say in words which checks do not hold."""
    found = []
    for row in rows:
        if row.path == "stock":
            continue
        where = f"seed {row.seed}, prompt {row.prompt}, {row.path}"
        if not row.ratio <= demo.ERROR_RATIO:
            found.append(
                f"{where}: error {row.ratio:.3f} of stock's, at most {demo.ERROR_RATIO} expected"
            )
        if row.other:
            found.append(f"{where}: {row.other} other top tokens")
    if not any(row.covered for row in rows):
        found.append("no position in which float32's margin exceeds stock's largest error")
    return found


# -------------------------------------------------------------------------------------- generate


def generate(sizes: Sizes, device: str) -> list[str]:
    """Make continuations of the fused model to their end; say in words what is wrong."""
    _, text = demo.readme()
    model = demo.small_model(sizes.seeds[0], device)
    found = []
    with demo.path(model, "mhc-ops fused"):
        for prompt in sizes.prompts:
            prompts = demo.byte_tokens(text, 0, sizes.rows, prompt, device)
            for sampled in (False, True):
                kind = "sampled" if sampled else "greedy"
                torch.manual_seed(0)
                out = model.generate(
                    prompts, max_new_tokens=sizes.steps, do_sample=sampled,
                    output_logits=True, return_dict_in_generate=True,
                )  # fmt: skip
                if out.sequences.shape != (sizes.rows, prompt + sizes.steps):
                    found.append(f"{kind}, prompt {prompt}: ended at {tuple(out.sequences.shape)}")
                elif not torch.equal(out.sequences[:, :prompt], prompts):
                    found.append(f"{kind}, prompt {prompt}: not a continuation")
                elif not all(step.isfinite().all() for step in out.logits):
                    found.append(f"{kind}, prompt {prompt}: logits that are not finite")
    return found


# ----------------------------------------------------------------------------------------- times


def layer_pair(sizes: Sizes, device: str) -> Any:
    """Make two layers of V4-Flash's widths, with both kinds of compressed attention and routing."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    settings = DeepseekV4Config(
        vocab_size=256,
        num_hidden_layers=2,
        layer_types=["heavily_compressed_attention", "compressed_sparse_attention"],
        mlp_layer_types=["hash_moe", "moe"],
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **sizes.widths,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = DeepseekV4ForCausalLM(settings).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "_hc." in name or "hc_head." in name:
            std = 2 / parameter.shape[-1] ** 0.5 if name.endswith("fn") else 1.0
            parameter.normal_(std=std)
        elif "norm" not in name and parameter.ndim > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):
            chances = torch.rand(buffer.shape[0], settings.n_routed_experts, device=device)
            buffer.copy_(chances.topk(buffer.shape[1]).indices)
    demo.to_checkpoint_dtypes(model)
    return model


@contextlib.contextmanager
def _experts(model: Any, kind: str | None) -> Iterator[None]:
    before = model.config._experts_implementation
    if kind is not None:
        model.set_experts_implementation(kind)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def alike(cache: Any) -> Any:
    """Copy a cache but not its tensors, which a step replaces by others and never writes to."""
    tensors = [
        value
        for layer in cache.layers
        for held in vars(layer).values()
        for value in (held.values() if isinstance(held, dict) else (held,))
        if isinstance(value, Tensor)
    ]
    return copy.deepcopy(cache, {id(tensor): tensor for tensor in tensors})


class Step:
    """Time one decoding step after a prompt, on one path.

    Attributes:
        batch, path: batch size and path of the step.
    """

    def __init__(self, model: Any, sizes: Sizes, batch: int, path: str, device: str) -> None:
        from transformers import DynamicCache

        self.batch, self.path = batch, path
        self._model, self._sizes, self._device = model, sizes, device
        generator = torch.Generator().manual_seed(batch)
        tokens = torch.randint(256, (batch, sizes.context + 1), generator=generator).to(device)
        self._last = tokens[:, -1:].contiguous()
        self._kept = DynamicCache(config=model.config)
        with demo.path(model, path):
            model(
                tokens[:, :-1], past_key_values=self._kept, use_cache=True, logits_to_keep=1
            )  # fmt: skip

    def _run(self, cache: Any) -> None:
        # One token sees everything in the cache, so it needs no mask, which would be made on the
        # CPU.
        self._model(
            self._last, past_key_values=cache, use_cache=True,
            attention_mask={"sliding_attention": None},
        )  # fmt: skip

    def _median_us(self, call: Callable[[], object]) -> float:
        sampler = harness.wall_us(call, self._device)
        return round(harness.in_turn({self.path: sampler}, self._sizes.repeats)[self.path], 1)

    def eager_us(self) -> float:
        """Return the microseconds of an eager step; each step is a token after the one before."""
        cache = alike(self._kept)
        with demo.path(self._model, self.path):
            return self._median_us(lambda: self._run(cache))

    def graph_us(self) -> dict[str, Any]:
        """Return the microseconds of the step as a CUDA graph, or why there is no graph.

        The step follows a context of 250 tokens, so that no window of either kind of compressed
        attention, of 4 and of 128 tokens, ends in the step.
        """
        row: dict[str, Any] = {}
        stream = torch.cuda.current_stream()
        with demo.path(self._model, self.path):
            for kind in (None, "grouped_mm", "batched_mm"):
                try:
                    with _experts(self._model, kind):
                        graph, _ = timing.capture(lambda: self._run(alike(self._kept)), warmups=1)
                except Exception as error:  # a capture can fail with many kinds of errors
                    row["graph_error"] = str(error).splitlines()[0][:CAPTURE_ERROR_LENGTH]
                    torch.cuda.set_stream(stream)  # a failed capture leaves its own stream current
                    torch.cuda.synchronize()
                    continue
                experts = kind or self._model.config._experts_implementation
                return {"graph_us": self._median_us(graph.replay), "graph_experts": experts}
        return row


def measure(sizes: Sizes, device: str) -> list[dict[str, Any]]:
    """Time every batch and path, in the order of the paths within a batch."""
    model = layer_pair(sizes, device)
    steps = [Step(model, sizes, batch, name, device) for batch in sizes.batches for name in NAMES]
    rows = [{"batch": s.batch, "path": s.path, "eager_us": s.eager_us()} for s in steps]
    if device == "cuda":  # graphs come last, because a failed capture may break what follows
        for step, row in zip(steps, rows, strict=True):
            row |= step.graph_us()
    return rows


# ----------------------------------------------------------------------------------- the command


def _print_logits(rows: Sequence[Compared]) -> None:
    print("seed prompt path             mean error  of stock's  other top  covered  own choices")
    for r in rows:
        print(
            f"{r.seed:4} {r.prompt:6} {r.path:16} {r.mean:10.5f} {r.ratio:11.3f} {r.other:10} "
            f"{r.covered:8.1%} {r.own:12.5f}"
        )


def _print_times(rows: Sequence[dict[str, Any]]) -> None:
    print("batch path              eager us  of stock   graph us  of stock")
    stock: dict[str, Any] = {}
    for row in rows:
        stock = row if row["path"] == "stock" else stock
        line = f"{row['batch']:5} {row['path']:16}"
        for field in ("eager_us", "graph_us"):
            us, base = row.get(field), stock.get(field)
            line += f" {'-' if us is None else us:>10}"
            line += f" {us / base:9.3f}" if us and base else f" {'-':>9}"
        print(line, row.get("graph_error", ""))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a dry run")
    records.add_arguments(parser)
    arguments = parser.parse_args(argv)
    device, sizes = arguments.device, TINY if arguments.tiny else Sizes()
    supported, reason = support.is_supported("cuda")
    if device == "cuda" and not supported:
        print(f"expected a GPU that the ops support: {reason}", file=sys.stderr)
        return 2
    try:
        import transformers
    except ImportError:
        print("expected transformers: pip install 'mhc-ops[transformers]'", file=sys.stderr)
        return 2
    transformers.utils.logging.set_verbosity_error()
    if device == "cuda":
        mhc_ops.prewarm(
            sorted({geometry.HIDDEN_MULTIPLE, sizes.widths.get("hidden_size", 4096)}),
            max_tokens=max(sizes.rows * max(sizes.prompts), max(sizes.batches) * sizes.context),
            progress=True,
        )

    def write(what: str, wrong: Sequence[str], right: str, **more: Any) -> None:
        record = records.make_record(
            f"transformers {transformers.__version__}, {what}, on {device}",
            "; ".join(wrong) or right,
            commit=arguments.commit,
            command=records.command_line(argv),
            **more,
        )
        records.write(record, arguments.output)

    failed = False
    with torch.no_grad():
        if "logits" in arguments.parts:
            compared = compare(sizes, device)
            wrong = wrong_logits(compared)
            worst = max(row.ratio for row in compared if row.path != "stock")
            write(
                f"teacher-forced decoding, {sizes.steps} steps, prompts of {sizes.prompts}, "
                f"seeds {sizes.seeds}, {sizes.rows} sequences",
                wrong,
                f"errors at most {worst:.3f} of stock bf16's own, no other top token",
                rows=[
                    {
                        k: round(v, 5) if isinstance(v, float) else v
                        for k, v in row._asdict().items()
                    }
                    for row in compared
                ],
            )
            _print_logits(compared)
            failed |= bool(wrong)
        if "generate" in arguments.parts:
            wrong = generate(sizes, device)
            write(
                f"generate(), greedy and sampled, {sizes.steps} tokens, prompts of {sizes.prompts}",
                wrong,
                "all to their end, with finite logits",
            )
            failed |= bool(wrong)
        if "times" in arguments.parts:
            times = measure(sizes, device)
            write(
                f"time of a decoding step, 2 layers, {sizes.context} tokens of context",
                (),
                "see rows",
                widths=sizes.widths,
                repeats=sizes.repeats,
                rows=times,
            )
            _print_times(times)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

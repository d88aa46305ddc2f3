"""Run a small random DeepSeek-V4 of transformers stock and on these ops, and compare the logits.

A model of this kind is not continuous: where two experts (or two compressed entries of the sparse
attention) have almost the same score, one rounding changes the choice, and the logits of that
position jump. Such jumps make most of the error of any bf16 run on any path (benchmarks/NOTES.md,
"Jumps of a mixture of experts"). So runs are best compared with the choices of the float32 run
given to all of them (:class:`Choices`), where the error comes from the arithmetic alone.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import config, geometry

ERROR_RATIO = 1.05  # the error of mhc-ops may be at most so many times the error of stock bf16
KEPT_IN_FLOAT32 = ("attn_hc", "ffn_hc", "hc_head", "sinks", "position_bias", "correction_bias")

PATHS = {
    "mhc-ops unfused": {"MHC_OPS_FUSE_POST_PRE": "0"},
    "mhc-ops fused": {"MHC_OPS_FUSE_POST_PRE": "1"},
}


def readme() -> tuple[str, bytes]:
    """Return where the text comes from, and the text: the README of the checkout or the package."""
    path = Path(__file__).resolve().parents[2] / "README.md"
    if path.is_file():
        return str(path), path.read_bytes()
    try:
        description = importlib.metadata.metadata("mhc-ops")["Description"]
    except importlib.metadata.PackageNotFoundError:
        description = None
    if not description or not description.strip():
        raise RuntimeError(
            f"expected a README at {path} or in the metadata of mhc-ops, got neither"
        )
    return "the metadata of mhc-ops", description.encode()


def byte_tokens(text: bytes, part: int, rows: int, length: int, device: str) -> Tensor:
    """Return a part of an endlessly repeated text as [rows, length] tokens, one for each byte."""
    start = part * rows * length
    tokens = [text[index % len(text)] for index in range(start, start + rows * length)]
    return torch.tensor(tokens, device=device).view(rows, length)


def to_checkpoint_dtypes(model: Any) -> None:
    """Give a model the dtypes of the published checkpoints: bf16, and a few tensors in float32."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not (
            "inv_freq" in name or any(part in name for part in KEPT_IN_FLOAT32)
        ):
            tensor.data = tensor.data.bfloat16()


def small_model(seed: int, device: str, pairs: int = 2) -> Any:
    """Make a DeepSeek-V4 of 2 layers a pair in bf16, with weights that make every part matter.

    The model has both kinds of compressed attention, and both hash and top-k routing. The mixes of
    the hyper-connections are far from uniform, and the norms have weights other than 1. The dtypes
    are those of the published checkpoints: the hyper-connections and a few small tensors are in
    float32, all others in bf16.
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
    """Set the given switches of the model wiring for a while, and the others to their defaults."""
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
    """Put the model on one of ``PATHS`` for a while; any other name leaves the model stock."""
    from ..integrations import transformers as integration

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
    """Hold the discontinuous choices of a run: experts of each router, entries of each indexer."""

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
        """Keep what the model chooses while the context lasts."""

        def keep(name: str, _: torch.nn.Module, output: Any) -> None:
            self.taken[name] = output[2] if isinstance(output, tuple) else output

        return self._hooks(model, keep)

    def replayed(self, model: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
        """Give the model the recorded choices while the context lasts; its weights stay its own."""

        def replace(name: str, module: Any, output: Any) -> Any:
            taken = self.taken[name]
            if not isinstance(output, tuple):
                return taken
            weights = module.score_fn(output[0]).gather(1, taken)
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
            return output[0], weights * module.routed_scaling_factor, taken

        return self._hooks(model, replace)


class Errors(NamedTuple):
    """Say how far logits are from those of the float32 model.

    Attributes:
        mean: mean absolute error over all logits.
        largest: largest absolute error.
        agreement: share of positions whose top token is float32's.
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
    """Compare the top tokens with float32's where float32's margin is large.

    Args:
        logits: [..., vocabulary].
        exact: [..., vocabulary], logits of the float32 model.
        least_margin: positions where float32's margin is at most this are left out.

    Returns:
        (number of positions with another top token than float32's, share of positions compared).
    """
    best = exact.topk(2, dim=-1)
    covered = best.values[..., 0] - best.values[..., 1] > least_margin
    other = logits.argmax(-1) != best.indices[..., 0]
    return int((other & covered).sum()), covered.float().mean().item()


def logits_of(model: Any, tokens: Tensor, masks: dict[str, Tensor] | None = None) -> Tensor:
    """Compute the logits [rows, length, vocabulary]; without ``masks`` the model makes its own."""
    return model(tokens, attention_mask=masks, use_cache=False).logits

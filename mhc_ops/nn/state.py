"""Hold what a model carries from layer to layer: streams with a post step still to be applied."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .. import geometry, ops, reference
from .._exportable import exportable


@exportable
class Copies(NamedTuple):
    """Stand for the streams that a model starts from, which are all equal and not written yet.

    Attributes:
        x: [..., H] bf16, the embedding, which every stream is a copy of.
    """

    x: Tensor


@exportable
class StreamState(NamedTuple):
    """Hold the state that a model carries: streams with a post step still to be applied.

    Attributes:
        residual: [..., n, H] bf16, the streams before the sublayer that just ran.
        x: [..., H] bf16, output of that sublayer.
        post: [..., n, 1] fp32, post weights of that sublayer.
        comb: [..., n, n] fp32, stream mixing of that sublayer, indexed [old stream, new stream].
    """

    residual: Tensor
    x: Tensor
    post: Tensor
    comb: Tensor

    def materialise(self, post: Callable[..., Tensor] = ops.post) -> Tensor:
        """Apply the pending post step::

            streams[j] = bf16(post[j] * x + sum_i comb[i, j] * residual[i])

        Args:
            post: the function that applies it; a wired module passes its own ``steps.post``.

        Returns:
            The plain streams, [..., n, H] bf16.
        """
        return post(self.x, self.residual, self.post, self.comb)


@exportable
class SublayerEntry(NamedTuple):
    """Hold what a hyper-connection hands to its sublayer.

    Attributes:
        residual: [..., n, H] bf16, the streams that the sublayer starts from.
        layer_input: [..., H] bf16, the sublayer's input, normed where the pre step had a norm.
        post: [..., n, 1] fp32, weight of the sublayer's output in each new stream.
        comb: [..., n, n] fp32, stream mixing, indexed [old stream, new stream].
    """

    residual: Tensor
    layer_input: Tensor
    post: Tensor
    comb: Tensor

    def after(self, x: Tensor) -> StreamState:
        """Return the state after the sublayer has run.

        Args:
            x: [..., H] bf16, the sublayer's output.

        Returns:
            The state with the post step of this sublayer pending.
        """
        return StreamState(self.residual, x, self.post, self.comb)


def expand(embedding: Tensor, hc_mult: int = geometry.HC_MULT) -> Tensor:
    """Copy the embedding into every stream j that a model starts from::

        streams[j] = embedding

    Args:
        embedding: [..., H] bf16.
        hc_mult: number of residual streams, n.

    Returns:
        [..., n, H] bf16, contiguous.
    """
    return reference.expand(embedding, hc_mult)

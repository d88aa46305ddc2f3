"""Bundle what steps take, by name, so that no step has a long list of parameters.

A field is a buffer, a scalar of the kernel, or a number that is known when the kernel is compiled;
None where a kernel has no such argument. A variable (``T.alloc_var``) never stands in a bundle: a
macro takes it as a parameter first, since an ``if`` that reads a variable is split into one ``if``
for each statement (README.md, "Traps").
"""

from typing import Any, NamedTuple, TypeVar

from tilelang import tvm

Bundle = TypeVar("Bundle", bound=NamedTuple)


def named(bundle: Bundle) -> Bundle:
    """Give each buffer of a bundle the name of its field, the later one where two share memory.

    What stands where in shared memory goes by the names, which only an assignment in the body of a
    kernel or macro gives otherwise.
    """
    for name, value in zip(bundle._fields, bundle, strict=True):
        if isinstance(value, tvm.tirx.Buffer):
            tvm.script.ir_builder.IRBuilder.name(name, value)
    return bundle


class Post(NamedTuple):
    """What the post step reads and writes.

    Attributes:
        x: [n, H] bf16, the output of the sublayer.
        residual: [n, 4, H] bf16, the old streams.
        post_layer_mix: [n, 4] fp32.
        comb_res_mix: [n, 4, 4] fp32, [old stream, new stream].
        residual_out: [n, 4, H] bf16, the new streams; None where nobody asks for them.
    """

    x: Any
    residual: Any
    post_layer_mix: Any
    comb_res_mix: Any
    residual_out: Any


class Mixing(NamedTuple):
    """What makes the mixes out of the projection, and where the mixes go.

    Attributes:
        fn: [24, 4 * H] fp32, or [4, 4 * H] of a head.
        hc_scale: [3] fp32, or [1] of a head.
        hc_base: [24] fp32, or [4] of a head.
        rms_eps: added to the mean square of the streams.
        hc_pre_eps: added to the collapse weights.
        hc_sinkhorn_eps: added to the softmax and to every sum of Sinkhorn.
        hc_post_mult_value: factor of the post weights.
        sinkhorn_repeat: rounds of Sinkhorn.
        post_mix: [n, 4] fp32, the post weights.
        comb_mix: [n, 4, 4] fp32, the combs.
    """

    fn: Any
    hc_scale: Any
    hc_base: Any
    rms_eps: Any
    hc_pre_eps: Any
    hc_sinkhorn_eps: Any = None
    hc_post_mult_value: Any = None
    sinkhorn_repeat: Any = None
    post_mix: Any = None
    comb_mix: Any = None


class Collapse(NamedTuple):
    """Where the collapsed streams go, and the RMSNorm on the way there.

    Attributes:
        out: [n, H] bf16, the layer input, or the hidden state of a head.
        norm: whether the RMSNorm follows; without it the next two are not read.
        norm_weight: [H] bf16.
        norm_eps: added to the mean square of the collapsed streams.
    """

    out: Any
    norm: bool
    norm_weight: Any
    norm_eps: Any


class Arguments(NamedTuple):
    """All that a kernel of the boundary is given, in bundles.

    Attributes:
        mixing: what makes the mixes.
        output: the layer input and the norm.
        early: whether fn may be read before the previous kernel has finished.
        post: what the post step takes; None in a kernel that has no such step.
    """

    mixing: Mixing
    output: Collapse
    early: Any
    post: Post | None = None


class Context(NamedTuple):
    """Where a thread is, and what its CTA works on.

    Attributes:
        hidden: the hidden size.
        tx: the thread in its CTA.
        lane: the lane in its warp.
        warp: the warp in its CTA, or in its role where a kernel has roles.
        rank: the CTA in its cluster.
        first: the first token of the cluster.
        count: the tokens of the cluster.
        tiles: the tiles of the cluster, in a kernel that loops over tiles.
    """

    hidden: int
    tx: Any
    lane: Any
    warp: Any
    rank: Any = None
    first: Any = None
    count: Any = None
    tiles: Any = None

"""The one table of routes: which kernels serve a call of an op, and with which scalars.

:func:`routes` maps (op, hidden size, architecture) to rows, one for each range of token counts. A
row lists launches: the kernel, the options that are compiled into it, its scalars as formulas of
the token count, and where one of its parameters has another name than the op's value. A launch's
grid follows from its scalars by the grid rule of the kernel's manifest.

Everything else about routes follows from the table: the kernels to compile (:func:`keys`), the
token counts at which something changes (:func:`bounds`) and the name of a path (:func:`path`).

Hidden sizes up to 7168 on GPUs with clusters of 16 CTAs have kernels in clusters, which give a
token the same bits in any batch. What each bound rests on: NOTES.md, "Bounds of the table of
routes", in ``benchmarks/``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from . import geometry
from .formula import Formula, Value, at_most, ceildiv, constant, maximum, minimum, name, select

CLUSTER_ARCHS = frozenset({"sm_90a", "sm_100a", "sm_103a"})  # sm_120a: clusters of 8, 99 KB
CLUSTER_MAX_HIDDEN = 7168  # 224 KB of shared memory
CLUSTERS = 7  # that an H100 or H200 runs at once, one CTA on an SM

ONE_ROUND_TOKENS = 128  # the most that the clusters of fused_post_pre take at once
FEW_CLUSTERS_TOKENS = 48  # up to which few clusters are faster: the next kernel's fit beside them
MORE_CLUSTERS = 5
MORE_GROUP_TOKENS = 16  # two token tiles: more clusters only where groups would be larger
HEAD_SPLITS = 64  # of K in head: the same for any token count, and so are the bits of a token
POST_HEAD_LEAST_GROUP = 4  # fewer tokens of a cluster have fn read more often for little
POST_HEAD_ONE_CTA_TOKENS = 24  # tokens of a cluster up to which its CTAs have an SM each

POST_PROJECTION_MAX_TOKENS = 96  # and fewer at larger hidden sizes, where tokens * hidden counts
POST_PROJECTION_MAX_ELEMENTS = POST_PROJECTION_MAX_TOKENS * 4096
POST_PROJECTION_CTAS_PER_SM = 2  # beyond, tiles in turn beat more CTAs, which read fn again

TOKENS = name("tokens")
SMS = name("multiprocessors")


class Key(NamedTuple):
    """What a compiled kernel depends on.

    Attributes:
        kernel: stem of its file in ``csrc_tilelang``.
        arch: such as ``sm_90a``.
        hidden: H.
        options: the other arguments of its factory, by name.
    """

    kernel: str
    arch: str
    hidden: int
    options: tuple[tuple[str, int], ...] = ()


class Launch(NamedTuple):
    """One launch of a row.

    Attributes:
        kernel: stem of its file in ``csrc_tilelang``.
        scalars: parameter to formula of ``tokens`` and ``multiprocessors``; the other parameters
            are the op's arguments, its outputs, and memory for one call.
        options: of the kernel's factory, besides ``norm``.
        renamed: parameter to the op's name for it, where they differ.
        norm: whether the kernel exists with and without the RMSNorm.
    """

    kernel: str
    scalars: Mapping[str, Formula] = {}
    options: tuple[tuple[str, int], ...] = ()
    renamed: Mapping[str, str] = {}
    norm: bool = True

    def key(self, hidden: int, arch: str, norm: bool) -> Key:
        """The kernel for a hidden size and an architecture, with or without the RMSNorm."""
        options = (("norm", int(norm)),) if self.norm else ()
        return Key(self.kernel, arch, hidden, (*options, *self.options))


class Row(NamedTuple):
    """The launches that serve a range of token counts.

    Attributes:
        max_tokens: the largest token count that they serve; None for any.
        launches: in order.
    """

    max_tokens: int | None
    launches: tuple[Launch, ...]


Rows = tuple[Row, ...]


class ProjectionTile(NamedTuple):
    """How a CTA of ``projection`` covers tokens.

    Attributes:
        max_tokens: the largest token count that takes it.
        token_tiles: tiles of 16 tokens a CTA. More of them read and split fn less often, fewer
            waste less on few tokens.
        ctas_per_sm: CTAs that an SM holds.
    """

    max_tokens: int | None
    token_tiles: int
    ctas_per_sm: int


PROJECTION_TILES = (ProjectionTile(32, 1, 5), ProjectionTile(None, 2, 4))

HEAD_NAMES = {"hc_scale": "scale", "hc_base": "base", "out": "hidden"}
NEW_STREAMS = {"residual": "residual_out"}  # the kernel reads what a launch before it has written


def in_clusters(hidden: int, arch: str) -> bool:
    """Whether the kernels in clusters serve this hidden size on these GPUs."""
    return hidden <= CLUSTER_MAX_HIDDEN and arch in CLUSTER_ARCHS


def _shared_tiles(clusters: Value, tile: int) -> dict[str, Formula]:
    """Whole tiles shared among clusters; the first clusters, which start first, take one more.

    A tile of few tokens takes about as long as a full one.
    """
    tiles = ceildiv(TOKENS, tile)
    return {"group_tokens": tiles // clusters * tile, "larger_groups": tiles % clusters}


def _pre_groups(group: Formula, tile: int) -> dict[str, Formula]:
    """The groups of ``fused_post_pre`` up to a tile, whole tiles beyond, in as many clusters."""
    fits = at_most(group, tile)
    tiles = _shared_tiles(ceildiv(TOKENS, group), tile)
    return {
        "group_tokens": select(fits, group, tiles["group_tokens"]),
        "larger_groups": select(fits, 0, tiles["larger_groups"]),
    }


def _projection(
    hidden: int, rows: int, tile: ProjectionTile, splits: int | None, renamed: Mapping[str, str]
) -> Launch:
    """``projection``, with K cut into so many splits, or as many as make one wave of CTAs.

    Sums of other splits are other bits, so a given number gives a token the same in any batch.
    """
    blocks = geometry.HC_MULT * hidden // geometry.PROJECTION_BLOCK
    warps = geometry.PROJECTION_WARPS
    ctas = ceildiv(TOKENS, tile.token_tiles * geometry.MMA_TOKENS)
    wave = maximum(1, SMS * tile.ctas_per_sm // ctas)
    wanted = wave if splits is None else constant(splits)
    blocks_per_split = ceildiv(blocks, warps * wanted) * warps
    return Launch(
        "projection",
        {"splits": ceildiv(blocks, blocks_per_split), "blocks_per_split": blocks_per_split},
        (
            ("rows", rows),
            ("token_tiles", tile.token_tiles),
            ("ctas_per_sm", tile.ctas_per_sm),
        ),
        renamed,
        norm=False,
    )


def _projected(
    hidden: int,
    rows: int,
    last: str,
    *,
    splits: int | None = None,
    renamed: Mapping[str, str] = MappingProxyType({}),
) -> Rows:
    """``projection``, then the kernel that makes the outputs from it."""
    found = []
    for tile in PROJECTION_TILES:
        first = _projection(hidden, rows, tile, splits, renamed)
        names = {**(HEAD_NAMES if last == "head" else {}), **renamed}
        scalars = {"splits": first.scalars["splits"]}
        found.append(Row(tile.max_tokens, (first, Launch(last, scalars, renamed=names))))
    return tuple(found)


def _after(launch: Launch, rows: Rows) -> Rows:
    """The rows with a launch before all others."""
    return tuple(Row(row.max_tokens, (launch, *row.launches)) for row in rows)


def _beyond(tokens: int, rows: Rows) -> Rows:
    """The rows that serve more tokens than that."""
    return tuple(row for row in rows if row.max_tokens is None or row.max_tokens > tokens)


def post_projection_max_tokens(hidden: int) -> int:
    """Up to how many tokens ``post_projection`` serves a boundary that is no kernel in clusters."""
    return min(POST_PROJECTION_MAX_TOKENS, POST_PROJECTION_MAX_ELEMENTS // hidden)


_POST = Launch("post", norm=False)


def _on_a_grid(hidden: int) -> dict[str, Rows]:
    """The rows of GPUs without clusters of 16, and of larger hidden sizes."""
    mixes, streams = geometry.MIXES, geometry.HC_MULT
    few = post_projection_max_tokens(hidden)
    slices = hidden // geometry.POST_PROJECTION_SLICE
    ctas = slices * ceildiv(TOKENS, geometry.MMA_TOKENS)
    tiles = ceildiv(ctas, SMS * POST_PROJECTION_CTAS_PER_SM)
    post_projection = Launch(
        "post_projection", {"splits": constant(slices), "tiles": tiles}, norm=False
    )
    finish = Launch("finish", {"splits": constant(slices)}, renamed=NEW_STREAMS)
    pre = _projected(hidden, mixes, "finish", renamed=NEW_STREAMS)
    head = _projected(hidden, streams, "head", renamed=NEW_STREAMS)
    return {
        "post": (Row(None, (_POST,)),),
        "pre": _projected(hidden, mixes, "finish"),
        "fused_post_pre": (
            Row(few, (post_projection, finish)),
            *_beyond(few, _after(_POST, pre)),
        ),
        "head": _projected(hidden, streams, "head"),
        "expand_pre": _after(Launch("expand", norm=False), pre),
        "post_head": _after(_POST, head),
        "post_head_streams": _after(_POST, head),
    }


def _in_clusters(hidden: int) -> dict[str, Rows]:
    """The rows of GPUs with clusters of 16."""
    tile, columns = geometry.tile_tokens(hidden), geometry.MMA_COLUMNS
    few = ceildiv(TOKENS, geometry.FEW_CLUSTERS)
    clusters = maximum(MORE_CLUSTERS, ceildiv(TOKENS, MORE_GROUP_TOKENS))
    more = ceildiv(TOKENS, minimum(CLUSTERS, clusters))
    every = _shared_tiles(minimum(CLUSTERS, ceildiv(TOKENS, tile)), tile)
    expanded = ceildiv(ceildiv(TOKENS, columns), CLUSTERS) * columns

    def ends(streams: bool) -> Rows:
        """The clusters share tokens evenly: single ones up to a tile each, whole tiles beyond."""
        options = (("streams", int(streams)),)

        def launch(kernel: str, clusters: Value, unit: int) -> tuple[Launch]:
            scalars = {"clusters": constant(clusters), "unit": constant(unit)}
            return (Launch(kernel, scalars, options, HEAD_NAMES),)

        all_at_once = CLUSTERS * geometry.post_head_ctas_per_sm(hidden)
        in_turn = CLUSTERS * geometry.post_head_persistent_ctas_per_sm(hidden)
        least = minimum(CLUSTERS, ceildiv(TOKENS, POST_HEAD_LEAST_GROUP))
        rows = [
            Row(CLUSTERS * columns, launch("post_head", least, 1)),
            Row(CLUSTERS * POST_HEAD_ONE_CTA_TOKENS, launch("post_head", CLUSTERS, columns)),
            Row(
                all_at_once * geometry.POST_HEAD_GROUP_TOKENS,
                launch("post_head", all_at_once, columns),
            ),
            Row(None, launch("post_head_persistent", in_turn, columns)),
        ]
        return tuple(rows)

    return {
        "post": (Row(None, (_POST,)),),
        "pre": (
            Row(FEW_CLUSTERS_TOKENS, (Launch("pre", _pre_groups(few, tile)),)),
            Row(ONE_ROUND_TOKENS, (Launch("pre", _pre_groups(more, tile)),)),
            Row(None, (Launch("pre", every),)),
        ),
        "fused_post_pre": (
            Row(FEW_CLUSTERS_TOKENS, (Launch("fused_post_pre", {"group_tokens": few}),)),
            Row(ONE_ROUND_TOKENS, (Launch("fused_post_pre", {"group_tokens": more}),)),
            Row(None, (Launch("fused_post_pre_persistent", every),)),
        ),
        "head": _projected(hidden, geometry.HC_MULT, "head", splits=HEAD_SPLITS),
        "expand_pre": (
            Row(
                None,
                (
                    Launch(
                        "expand_pre",
                        {"group_tokens": minimum(geometry.EXPAND_PRE_GROUP_TOKENS, expanded)},
                    ),
                ),
            ),
        ),
        "post_head": ends(streams=False),
        "post_head_streams": ends(streams=True),
    }


def _table(hidden: int, arch: str) -> dict[str, Rows]:
    return _in_clusters(hidden) if in_clusters(hidden, arch) else _on_a_grid(hidden)


def routes(op: str, hidden: int, arch: str) -> Rows:
    """The rows of an op, by rising token count; the last one serves any.

    Args:
        op: such as ``fused_post_pre``.
        hidden: H.
        arch: such as ``sm_90a``.
    """
    return _table(hidden, arch)[op]


def row(op: str, hidden: int, arch: str, tokens: int) -> Row:
    """The row that serves a call with at least one token."""
    rows = routes(op, hidden, arch)
    return next(row for row in rows if row.max_tokens is None or tokens <= row.max_tokens)


def ops() -> tuple[str, ...]:
    """The ops that the table serves."""
    return tuple(_table(geometry.HIDDEN_MULTIPLE, ""))


def keys(hidden: int, arch: str, max_tokens: int, *, op: str | None = None) -> tuple[Key, ...]:
    """Every kernel that a call can reach, each once.

    Args:
        hidden: H.
        arch: such as ``sm_90a``.
        max_tokens: the largest token count of a call.
        op: the op of the call; any when None.
    """
    found: dict[Key, None] = {}
    for served in ops() if op is None else (op,):
        least = 1
        for row in routes(served, hidden, arch):
            if least > max_tokens:
                break
            for launch in row.launches:
                for norm in (False, True):
                    found[launch.key(hidden, arch, norm)] = None
            least = (row.max_tokens or 0) + 1
    return tuple(found)


def bounds(hidden: int, arch: str, max_tokens: int) -> tuple[int, ...]:
    """The first token count of every row of every op, up to ``max_tokens``: every path's least."""
    ends = {row.max_tokens for op in ops() for row in routes(op, hidden, arch)}
    firsts = {1, *(end + 1 for end in ends if end is not None)}
    return tuple(sorted(tokens for tokens in firsts if tokens <= max_tokens))


def path(op: str, hidden: int, arch: str, tokens: int) -> str:
    """The kernels that serve a call, such as ``projection1+head``; empty without tokens."""
    if tokens == 0:
        return ""
    launches = row(op, hidden, arch, tokens).launches
    return "+".join(
        launch.kernel + str(dict(launch.options).get("token_tiles", "")) for launch in launches
    )

"""Hold the one table of routes: which kernels serve a call of an op, and with which scalars.

:func:`routes` maps (op, hidden size, architecture) to rows, one for each range of token counts. A
row lists launches. A launch names the kernel, the options that are compiled into the kernel, the
scalars as formulas of the token count, and the parameters whose name differs from the op's name
for the value. The grid of a launch follows from the scalars by the formula in the kernel's
manifest.

The kernels to compile (:func:`keys`), the token counts at which the row changes (:func:`bounds`)
and the name of the path of a call (:func:`path`) follow from the table.

Hidden sizes up to 7168 on GPUs with clusters of 16 CTAs have kernels in clusters, which give a
token the same bits in any batch. The token counts at which rows end were measured:
benchmarks/NOTES.md, "Bounds of the table of routes".
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from . import geometry
from .formula import Formula, Value, at_most, ceildiv, constant, maximum, minimum, name, select

# A GPU of sm_120a has clusters of 8 CTAs and 99 KB of shared memory only.
CLUSTER_ARCHS = frozenset({"sm_90a", "sm_100a", "sm_103a"})
CLUSTER_MAX_HIDDEN = 7168  # this size takes 224 KB of shared memory, and a larger one has no room
CLUSTERS = 7  # an H100 or H200 runs so many at once, one CTA on an SM

ONE_ROUND_TOKENS = 128  # the clusters of fused_post_pre take at most so many tokens at once
# Up to so many tokens few clusters are faster, because the next kernel's clusters fit beside them.
FEW_CLUSTERS_TOKENS = 48
MORE_CLUSTERS = 5
# For more tokens there are at least MORE_CLUSTERS clusters, and further ones only where a group
# would be larger than MORE_GROUP_TOKENS, which are two token tiles.
MORE_GROUP_TOKENS = 16
# head cuts K into the same splits for any token count, so a token has the same bits in any batch.
HEAD_SPLITS = 64
POST_HEAD_LEAST_GROUP = 4  # smaller groups would read fn more often and gain little
POST_HEAD_ONE_CTA_TOKENS = 24  # up to so many tokens a cluster, each CTA has an SM to itself

# Larger hidden sizes end at fewer tokens, because the product tokens * hidden decides.
POST_PROJECTION_MAX_TOKENS = 96
POST_PROJECTION_MAX_ELEMENTS = POST_PROJECTION_MAX_TOKENS * 4096
# With more tokens each CTA takes several tiles in turn. More CTAs would each read fn again, and be
# slower.
POST_PROJECTION_CTAS_PER_SM = 2

TOKENS = name("tokens")
SMS = name("multiprocessors")


class Key(NamedTuple):
    """Name a compiled kernel by everything that its code depends on.

    Attributes:
        kernel: stem of the kernel's file in ``csrc_tilelang``.
        arch: architecture, such as ``sm_90a``.
        hidden: hidden size.
        options: name and value of the other arguments of the kernel's factory.
    """

    kernel: str
    arch: str
    hidden: int
    options: tuple[tuple[str, int], ...] = ()


class Launch(NamedTuple):
    """Describe one launch of a row.

    Attributes:
        kernel: stem of the kernel's file in ``csrc_tilelang``.
        scalars: parameter to formula of ``tokens`` and ``multiprocessors``. The other parameters
            are the op's arguments, the op's outputs, and memory for one call.
        options: name and value of the arguments of the kernel's factory, besides ``norm``.
        renamed: parameter to the op's name for the value, where the two differ.
        norm: whether the kernel exists with and without the RMSNorm.
    """

    kernel: str
    scalars: Mapping[str, Formula] = {}
    options: tuple[tuple[str, int], ...] = ()
    renamed: Mapping[str, str] = {}
    norm: bool = True

    def key(self, hidden: int, arch: str, norm: bool) -> Key:
        """Return the kernel for a hidden size and an architecture, with or without the RMSNorm."""
        options = (("norm", int(norm)),) if self.norm else ()
        return Key(self.kernel, arch, hidden, (*options, *self.options))


class Row(NamedTuple):
    """Hold the launches that serve a range of token counts.

    Attributes:
        max_tokens: the largest token count of the range; None for a range without an end.
        launches: the launches, in the order in which they run.
    """

    max_tokens: int | None
    launches: tuple[Launch, ...]


Rows = tuple[Row, ...]


class ProjectionTile(NamedTuple):
    """Say how a CTA of ``projection`` covers tokens.

    Attributes:
        max_tokens: the largest token count that uses this tile; None for any.
        token_tiles: tiles of 16 tokens a CTA. With more tiles fn is read and split less often;
            with fewer tiles less work is wasted on few tokens.
        ctas_per_sm: number of CTAs that an SM holds.
    """

    max_tokens: int | None
    token_tiles: int
    ctas_per_sm: int


PROJECTION_TILES = (ProjectionTile(32, 1, 5), ProjectionTile(None, 2, 4))

HEAD_NAMES = {"hc_scale": "scale", "hc_base": "base", "out": "hidden"}
NEW_STREAMS = {"residual": "residual_out"}  # the kernel reads the streams of an earlier launch


def in_clusters(hidden: int, arch: str) -> bool:
    """Say whether the kernels in clusters serve this hidden size on these GPUs."""
    return hidden <= CLUSTER_MAX_HIDDEN and arch in CLUSTER_ARCHS


def _shared_tiles(clusters: Value, tile: int) -> dict[str, Formula]:
    """Share whole tiles among clusters; the first clusters, which start first, take one more.

    The tiles are whole because a tile of few tokens takes about as long as a full tile.
    """
    tiles = ceildiv(TOKENS, tile)
    return {"group_tokens": tiles // clusters * tile, "larger_groups": tiles % clusters}


def _pre_groups(group: Formula, tile: int) -> dict[str, Formula]:
    """Return the groups of ``fused_post_pre`` if a group fits a tile, else share whole tiles.

    The number of clusters is the same in both cases.
    """
    fits = at_most(group, tile)
    tiles = _shared_tiles(ceildiv(TOKENS, group), tile)
    return {
        "group_tokens": select(fits, group, tiles["group_tokens"]),
        "larger_groups": select(fits, 0, tiles["larger_groups"]),
    }


def _projection(
    hidden: int, rows: int, tile: ProjectionTile, splits: int | None, renamed: Mapping[str, str]
) -> Launch:
    """Return the launch of ``projection`` with K cut into ``splits``.

    With None, as many splits are made as fill one wave of CTAs. The number of splits decides the
    bits of a sum, so a fixed number gives a token the same bits in any batch.
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
    """Return the rows with ``projection``, then the kernel that computes the outputs from it."""
    found = []
    for tile in PROJECTION_TILES:
        first = _projection(hidden, rows, tile, splits, renamed)
        names = {**(HEAD_NAMES if last == "head" else {}), **renamed}
        scalars = {"splits": first.scalars["splits"]}
        found.append(Row(tile.max_tokens, (first, Launch(last, scalars, renamed=names))))
    return tuple(found)


def _after(launch: Launch, rows: Rows) -> Rows:
    """Put a launch before the others in each row."""
    return tuple(Row(row.max_tokens, (launch, *row.launches)) for row in rows)


def _beyond(tokens: int, rows: Rows) -> Rows:
    """Return the rows that serve more than this many tokens."""
    return tuple(row for row in rows if row.max_tokens is None or row.max_tokens > tokens)


def post_projection_max_tokens(hidden: int) -> int:
    """Return the largest token count that ``post_projection`` serves, on GPUs without clusters."""
    return min(POST_PROJECTION_MAX_TOKENS, POST_PROJECTION_MAX_ELEMENTS // hidden)


_POST = Launch("post", norm=False)


def _on_a_grid(hidden: int) -> dict[str, Rows]:
    """Return every op's rows for GPUs without clusters of 16, and for larger hidden sizes."""
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
    """Return every op's rows for GPUs with clusters of 16."""
    tile, columns = geometry.tile_tokens(hidden), geometry.MMA_COLUMNS
    few = ceildiv(TOKENS, geometry.FEW_CLUSTERS)
    clusters = maximum(MORE_CLUSTERS, ceildiv(TOKENS, MORE_GROUP_TOKENS))
    more = ceildiv(TOKENS, minimum(CLUSTERS, clusters))
    every = _shared_tiles(minimum(CLUSTERS, ceildiv(TOKENS, tile)), tile)
    expanded = ceildiv(ceildiv(TOKENS, columns), CLUSTERS) * columns

    def ends(streams: bool) -> Rows:
        """Return the rows of ``post_head``, with or without the streams among the outputs.

        The clusters share the tokens evenly: in units of one token while each cluster has at most
        a tile of them, in whole tiles beyond.
        """

        def launch(clusters: Value, unit: int, loop: bool = False) -> tuple[Launch]:
            scalars = {"clusters": constant(clusters), "unit": constant(unit)}
            options = (("streams", int(streams)), ("loop", int(loop)))
            return (Launch("post_head", scalars, options, HEAD_NAMES),)

        all_at_once = CLUSTERS * geometry.post_head_ctas_per_sm(hidden, loop=False)
        in_turn = CLUSTERS * geometry.post_head_ctas_per_sm(hidden, loop=True)
        least = minimum(CLUSTERS, ceildiv(TOKENS, POST_HEAD_LEAST_GROUP))
        return (
            Row(CLUSTERS * columns, launch(least, 1)),
            Row(CLUSTERS * POST_HEAD_ONE_CTA_TOKENS, launch(CLUSTERS, columns)),
            Row(all_at_once * geometry.POST_HEAD_GROUP_TOKENS, launch(all_at_once, columns)),
            Row(None, launch(in_turn, columns, loop=True)),
        )

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
    """Return the rows of an op, by rising token count; the range of the last row has no end.

    Args:
        op: name of the op, such as ``fused_post_pre``.
        hidden: hidden size.
        arch: architecture, such as ``sm_90a``.
    """
    return _table(hidden, arch)[op]


def row(op: str, hidden: int, arch: str, tokens: int) -> Row:
    """Return the row that serves a call with at least one token."""
    rows = routes(op, hidden, arch)
    return next(row for row in rows if row.max_tokens is None or tokens <= row.max_tokens)


def ops() -> tuple[str, ...]:
    """Return the names of the ops that the table serves."""
    return tuple(_table(geometry.HIDDEN_MULTIPLE, ""))


def keys(hidden: int, arch: str, max_tokens: int, *, op: str | None = None) -> tuple[Key, ...]:
    """List every kernel that a call can reach, each once.

    Args:
        hidden: hidden size.
        arch: architecture, such as ``sm_90a``.
        max_tokens: the largest token count of a call.
        op: the op of the call; None for any op.
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
    """Return the least token count of every row of every op, up to ``max_tokens``.

    Calls with these token counts take every path.
    """
    ends = {row.max_tokens for op in ops() for row in routes(op, hidden, arch)}
    firsts = {1, *(end + 1 for end in ends if end is not None)}
    return tuple(sorted(tokens for tokens in firsts if tokens <= max_tokens))


def path(op: str, hidden: int, arch: str, tokens: int) -> str:
    """Name the kernels that serve a call, such as ``projection1+head``; none serve no tokens."""
    if tokens == 0:
        return ""

    def named(launch: Launch) -> str:
        options = dict(launch.options)
        return f"{launch.kernel}{'_loop' * options.get('loop', 0)}{options.get('token_tiles', '')}"

    return "+".join(map(named, row(op, hidden, arch, tokens).launches))

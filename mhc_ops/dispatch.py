"""(tokens, hidden, device) to kernel keys and grids: pure integers, finite, enumerable.

A key names everything that is compiled into a kernel. The token count never is; it only decides
which of the few kernels runs and how its grid is cut.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import NamedTuple

HC_MULT = 4  # residual streams
HIDDEN_MULTIPLE = 256  # 32 lanes of 8 bf16 elements: a warp's 16-byte loads
MIXES = HC_MULT * (HC_MULT + 2)  # rows of fn: 4 pre, 4 post, 16 comb
PARTIAL_WIDTH = 32  # floats of a partial row: 24 projections, the squares, padding to 128 bytes

# fused_post_pre is one launch, of the kernel of the same name, up to so many tokens and this hidden
# size, where a GPU has clusters of 16 and shared memory for it; see ONE_LAUNCH_ARCHS.
ONE_LAUNCH = "fused_post_pre"
ONE_LAUNCH_MAX_TOKENS = 128
ONE_LAUNCH_MAX_HIDDEN = 7168  # 224 KB of shared memory
ONE_LAUNCH_ARCHS = frozenset({"sm_90a", "sm_100a", "sm_103a"})  # sm_120a: clusters of 8, 99 KB
CLUSTER = 16  # CTAs of a cluster, each with a sixteenth of the hidden size
CLUSTERS = 7  # that an H100 or H200 runs at once, one CTA on an SM
GROUP_TOKENS = 19  # tokens of a cluster at most: 7 clusters take 128
FEW_CLUSTERS = 3  # those of this kernel, the next one's and one to spare fit side by side
FEW_CLUSTERS_TOKENS = 48  # up to which they are faster: 6.4 us for 48 at H = 4096, 4 clusters 7.1
MORE_CLUSTERS = 5  # beyond: for 64 at H = 7168 4, 5, 6, 7 took 11.46, 11.28, 11.40 and 11.86 us
MORE_GROUP_TOKENS = 16  # two token tiles: more clusters only where groups would be larger

# From so many tokens on fused_post_pre is one launch again: of the persistent kernel, on the same
# GPUs and up to the same hidden size. Its bits are those of the kernel for few tokens, which the
# three launches' are not.
PERSISTENT = "fused_post_pre_persistent"
PERSISTENT_LANES_COLUMNS = 32 * 8  # of a token warp's lanes, at a time
# By how many eighths of them have columns: 8 at H = 4096, where it is faster at any number of
# tokens, and 7 at 7168, where three launches are faster from 192 to 224 (17.8 and 19.0 us against
# 18.0 and 20.2): the same bits at any number of tokens are worth that. Fewer at 5120, where it
# takes 16 % longer for 256 (16.9 and 19.6 us), 2 % for 512.
PERSISTENT_MIN_TOKENS = {8: ONE_LAUNCH_MAX_TOKENS + 1, 7: ONE_LAUNCH_MAX_TOKENS + 1}
PERSISTENT_MIN_TOKENS_PARTLY = 640

# pre is one launch, of the kernel of its name, on the same GPUs and up to the same hidden size;
# after post, its bits are those of fused_post_pre in one launch.
PRE = "pre"
# From so many tokens on, by eighths as above: at H = 4096, where it is faster at any number of
# tokens, and at 7168, where two launches are at most 4 % faster (16.7 us for 256, it 17.4), from
# the first on. At 5120 they are 14 % faster for 256 (13.3 and 15.1), it is for 640 (26.8 and 29.2).
# Up to FEW_CLUSTERS_TOKENS it is faster, or at most 5 % slower, everywhere.
PRE_MIN_TOKENS = {8: 1, 7: 1}
PRE_MIN_TOKENS_PARTLY = 640
WIDE_TILE_HIDDEN = 5120  # up to which tiles of 16 tokens fit in shared memory

# expand_pre and post_head are one launch, on the same GPUs and up to the same hidden size: of the
# kernel of the op's name, post_head of the persistent one for more tokens than a round of clusters
# of the other takes.
EXPAND_PRE_GROUP_TOKENS = 32  # tokens of a cluster at most: fn is read once for them
# of a cluster of post_head at least: fewer would have fn read more often for little less to load
POST_HEAD_LEAST_GROUP = 4
POST_HEAD_GROUP_TOKENS = 32  # at most: for 337 at H = 4096 11.2 us, the persistent kernel 13.1
# Up to which hidden size two CTAs share an SM. At 5120 two of post_head had room for 24 tokens each
# and took 9.3 us for 128, one with room for 32 takes 7.7; two of the persistent kernel take 78 us
# for 2048, one 93. There, from 240 to 265 tokens, it is up to 2 % slower than post and head, with
# the streams 6 %: for 256 13.9 and 14.5 us, they 13.7. Everywhere else it is faster than they are.
POST_HEAD_TWO_CTAS_HIDDEN = 4096
POST_HEAD_PERSISTENT_TWO_CTAS_HIDDEN = 5120
# of a cluster, up to which those of post_head have an SM a CTA nevertheless: 7 clusters take 6.6 us
# for 168 at H = 4096, 14 take 7.1
POST_HEAD_ONE_CTA_TOKENS = 24

# Elsewhere fused_post_pre runs post_projection + finish up to so many tokens, and fewer at larger
# hidden sizes, where tokens * hidden counts; post + projection + finish beyond.
POST_PROJECTION_MAX_TOKENS = 96
POST_PROJECTION_MAX_ELEMENTS = POST_PROJECTION_MAX_TOKENS * 4096

POST_PROJECTION_SLICE = 32  # hidden elements a CTA: 128 CTAs read fn at H = 4096
POST_PROJECTION_CTAS_PER_SM = 2  # beyond it tiles in turn beat more CTAs, which read fn again

MMA_TOKENS = 16  # rows of one m16n8k16 tile
MMA_COLUMNS = 8  # its columns: tokens of the kernels in clusters
PROJECTION_BLOCK = 32  # columns of one step of a warp: 4 lanes of 8
PROJECTION_WARPS = 4


class ProjectionTile(NamedTuple):
    """How a CTA of ``projection`` covers tokens: what is compiled in, and up to how many tokens.

    Attributes:
        token_tiles: tiles of 16 tokens a CTA.
        ctas_per_sm: CTAs that an SM holds.
        max_tokens: the largest token count that takes it.
    """

    token_tiles: int
    ctas_per_sm: int
    max_tokens: int


# A larger tile reads and splits fn less often; a smaller one wastes less on few tokens.
PROJECTION_TILES = (
    ProjectionTile(token_tiles=1, ctas_per_sm=5, max_tokens=32),
    ProjectionTile(token_tiles=2, ctas_per_sm=4, max_tokens=sys.maxsize),
)


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


class ProjectionPlan(NamedTuple):
    """A launch of ``projection``: its kernel, grid rows along K, and blocks a row."""

    key: Key
    splits: int
    blocks_per_split: int


class PostProjectionPlan(NamedTuple):
    """A launch of ``post_projection``: its kernel, hidden slices, and token tiles a CTA."""

    key: Key
    slices: int
    tiles: int


def _ceildiv(a: int, b: int) -> int:
    return -(-a // b)


def _takes_clusters(hidden: int, arch: str) -> bool:
    """Whether the kernels in clusters serve this hidden size on these GPUs."""
    return hidden <= ONE_LAUNCH_MAX_HIDDEN and arch in ONE_LAUNCH_ARCHS


def takes_one_launch(tokens: int, hidden: int, arch: str) -> bool:
    """Whether ``fused_post_pre`` runs the kernel of that name for this many tokens."""
    return tokens <= ONE_LAUNCH_MAX_TOKENS and _takes_clusters(hidden, arch)


@functools.cache
def fused_post_pre_key(hidden: int, arch: str, norm: bool) -> Key:
    """The ``fused_post_pre`` kernel, with or without the RMSNorm."""
    return Key(ONE_LAUNCH, arch, hidden, (("norm", norm),))


@functools.cache
def group_tokens(tokens: int) -> int:
    """Tokens of a cluster of the ``fused_post_pre`` kernel.

    Few clusters leave room for the next kernel's, which read their weights meanwhile; more share
    the work. All of them must run at once.
    """
    if tokens <= FEW_CLUSTERS_TOKENS:
        return _ceildiv(tokens, FEW_CLUSTERS)
    clusters = max(MORE_CLUSTERS, _ceildiv(tokens, MORE_GROUP_TOKENS))
    return _ceildiv(tokens, min(CLUSTERS, clusters))


def _filled_eighths(hidden: int) -> int:
    """Eighths of a token warp's lanes that have columns, in the kernels that loop over tiles."""
    columns = hidden // CLUSTER
    places = _ceildiv(columns, PERSISTENT_LANES_COLUMNS) * PERSISTENT_LANES_COLUMNS
    return 8 * columns // places


def persistent_min_tokens(hidden: int) -> int:
    """From how many tokens on the boundary is the ``fused_post_pre_persistent`` kernel's."""
    return PERSISTENT_MIN_TOKENS.get(_filled_eighths(hidden), PERSISTENT_MIN_TOKENS_PARTLY)


def takes_persistent(tokens: int, hidden: int, arch: str, batch_invariant: bool) -> bool:
    """Whether ``fused_post_pre`` runs the ``fused_post_pre_persistent`` kernel.

    Args:
        tokens: at least 1.
        hidden: H.
        arch: such as ``sm_90a``.
        batch_invariant: whether every number of tokens must give the same bits.
    """
    least = ONE_LAUNCH_MAX_TOKENS + 1 if batch_invariant else persistent_min_tokens(hidden)
    return tokens >= least and _takes_clusters(hidden, arch)


@functools.cache
def persistent_key(hidden: int, arch: str, norm: bool) -> Key:
    """The ``fused_post_pre_persistent`` kernel, with or without the RMSNorm."""
    return Key(PERSISTENT, arch, hidden, (("norm", norm),))


def tile_tokens(hidden: int) -> int:
    """Tokens of a tile of ``pre`` and ``fused_post_pre_persistent``: 16, or 8 if 16 do not fit."""
    return 16 if hidden <= WIDE_TILE_HIDDEN else 8


def _share_tiles(tokens: int, hidden: int, clusters: int) -> tuple[int, int]:
    """Tokens of most clusters, in whole tiles, and how many, the first, have a tile more.

    A tile of few tokens takes about as long as a full one, and the first clusters start first.
    """
    tiles, larger = divmod(_ceildiv(tokens, tile_tokens(hidden)), clusters)
    return tiles * tile_tokens(hidden), larger


def persistent_share(tokens: int, hidden: int) -> tuple[int, int]:
    """How ``fused_post_pre_persistent`` shares tokens among clusters, each of which runs once.

    Returns:
        The tokens of a cluster, and how many clusters, the first, have a tile more.
    """
    tiles = _ceildiv(tokens, tile_tokens(hidden))
    return _share_tiles(tokens, hidden, min(CLUSTERS, tiles))


def pre_min_tokens(hidden: int) -> int:
    """From how many tokens on the ``pre`` kernel beats two launches."""
    return PRE_MIN_TOKENS.get(_filled_eighths(hidden), PRE_MIN_TOKENS_PARTLY)


def takes_pre(tokens: int, hidden: int, arch: str, batch_invariant: bool) -> bool:
    """Whether ``pre`` runs the kernel of that name; arguments as of :func:`takes_persistent`."""
    between = FEW_CLUSTERS_TOKENS < tokens < pre_min_tokens(hidden)
    return (batch_invariant or not between) and _takes_clusters(hidden, arch)


@functools.cache
def pre_key(hidden: int, arch: str, norm: bool) -> Key:
    """The ``pre`` kernel, with or without the RMSNorm."""
    return Key(PRE, arch, hidden, (("norm", norm),))


def pre_share(tokens: int, hidden: int) -> tuple[int, int]:
    """The same of ``pre``: among the clusters, and up to a tile in the groups, of the boundary."""
    if tokens > ONE_LAUNCH_MAX_TOKENS:
        return persistent_share(tokens, hidden)
    group = group_tokens(tokens)
    if group <= tile_tokens(hidden):
        return group, 0
    return _share_tiles(tokens, hidden, _ceildiv(tokens, group))


def takes_one_launch_end(hidden: int, arch: str) -> bool:
    """Whether ``expand_pre`` and ``post_head`` are one launch."""
    return _takes_clusters(hidden, arch)


def post_head_ctas_per_sm(hidden: int) -> int:
    """CTAs of ``post_head`` that an SM has room for."""
    return 2 if hidden <= POST_HEAD_TWO_CTAS_HIDDEN else 1


def post_head_persistent_ctas_per_sm(hidden: int) -> int:
    """CTAs of ``post_head_persistent`` that share an SM."""
    return 2 if hidden <= POST_HEAD_PERSISTENT_TWO_CTAS_HIDDEN else 1


def post_head_max_tokens(hidden: int) -> int:
    """Tokens of one round of the clusters of ``post_head``."""
    return CLUSTERS * post_head_ctas_per_sm(hidden) * POST_HEAD_GROUP_TOKENS


def takes_one_round(tokens: int, hidden: int) -> bool:
    """Whether ``post_head`` runs the kernel of that name, and not ``post_head_persistent``."""
    return tokens <= post_head_max_tokens(hidden)


@functools.cache
def post_head_key(hidden: int, arch: str, norm: bool, streams: bool) -> Key:
    """The ``post_head`` kernel, with or without the RMSNorm, writing the streams or not."""
    return Key("post_head", arch, hidden, (("norm", norm), ("streams", streams)))


@functools.cache
def post_head_persistent_key(hidden: int, arch: str, norm: bool, streams: bool) -> Key:
    """The ``post_head_persistent`` kernel, with or without both of them."""
    return Key("post_head_persistent", arch, hidden, (("norm", norm), ("streams", streams)))


@functools.cache
def expand_pre_key(hidden: int, arch: str, norm: bool) -> Key:
    """The ``expand_pre`` kernel, with or without the RMSNorm."""
    return Key("expand_pre", arch, hidden, (("norm", norm),))


def expand_pre_group_tokens(tokens: int) -> int:
    """Tokens of a cluster of ``expand_pre``: whole tiles, as few as run at once.

    More of them read ``fn`` once for more tokens, fewer share the work among more clusters.
    """
    tiles = _ceildiv(_ceildiv(tokens, MMA_COLUMNS), CLUSTERS)
    return min(EXPAND_PRE_GROUP_TOKENS, MMA_COLUMNS * tiles)


def post_head_share(tokens: int, hidden: int) -> tuple[int, int]:
    """Clusters of ``post_head`` or ``post_head_persistent``, which run at once, and their unit.

    They share the tokens evenly, a unit at a time: a token of the first tile of each, whole tiles
    beyond, as a tile of one token takes about as long as one of 8.
    """
    if tokens <= CLUSTERS * MMA_COLUMNS:
        return min(CLUSTERS, _ceildiv(tokens, POST_HEAD_LEAST_GROUP)), 1
    if not takes_one_round(tokens, hidden):
        ctas = post_head_persistent_ctas_per_sm(hidden)
    elif tokens <= CLUSTERS * POST_HEAD_ONE_CTA_TOKENS:
        ctas = 1
    else:
        ctas = post_head_ctas_per_sm(hidden)
    return CLUSTERS * ctas, MMA_COLUMNS


def post_projection_max_tokens(hidden: int) -> int:
    """Up to how many tokens it runs ``post_projection`` + ``finish`` where it is no one launch."""
    return min(POST_PROJECTION_MAX_TOKENS, POST_PROJECTION_MAX_ELEMENTS // hidden)


def takes_post_projection(tokens: int, hidden: int) -> bool:
    """Whether ``fused_post_pre`` runs ``post_projection`` + ``finish`` for this many tokens."""
    return tokens <= post_projection_max_tokens(hidden)


@functools.cache
def post_key(hidden: int, arch: str) -> Key:
    """The ``post`` kernel."""
    return Key("post", arch, hidden)


@functools.cache
def finish_key(hidden: int, arch: str, norm: bool) -> Key:
    """The ``finish`` kernel, with or without the RMSNorm."""
    return Key("finish", arch, hidden, (("norm", norm),))


@functools.cache
def head_key(hidden: int, arch: str, norm: bool) -> Key:
    """The ``head`` kernel, with or without the RMSNorm."""
    return Key("head", arch, hidden, (("norm", norm),))


def _projection_key(hidden: int, rows: int, tile: ProjectionTile, arch: str) -> Key:
    return Key(
        "projection",
        arch,
        hidden,
        (
            ("rows", rows),
            ("token_tiles", tile.token_tiles),
            ("ctas_per_sm", tile.ctas_per_sm),
        ),
    )


@functools.lru_cache(maxsize=4096)
def projection_plan(
    tokens: int, hidden: int, rows: int, arch: str, sm_count: int
) -> ProjectionPlan:
    """How ``projection`` covers ``tokens`` tokens: one wave of CTAs where K can be cut that far.

    Args:
        tokens: at least 1.
        hidden: H.
        rows: rows of fn, 24 for pre and 4 for head.
        arch: such as ``sm_90a``.
        sm_count: multiprocessors of the device.

    Returns:
        The plan; ``splits * blocks_per_split`` covers all blocks of 32 columns.
    """
    tile = next(tile for tile in PROJECTION_TILES if tokens <= tile.max_tokens)
    blocks = HC_MULT * hidden // PROJECTION_BLOCK
    ctas = _ceildiv(tokens, tile.token_tiles * MMA_TOKENS)
    wanted = max(1, sm_count * tile.ctas_per_sm // ctas)
    blocks_per_split = PROJECTION_WARPS * _ceildiv(blocks, PROJECTION_WARPS * wanted)
    key = _projection_key(hidden, rows, tile, arch)
    return ProjectionPlan(key, _ceildiv(blocks, blocks_per_split), blocks_per_split)


@functools.lru_cache(maxsize=4096)
def post_projection_plan(tokens: int, hidden: int, arch: str, sm_count: int) -> PostProjectionPlan:
    """How ``post_projection`` covers ``tokens`` tokens: fixed slices, tiles in turn past a wave.

    Args:
        tokens: at least 1.
        hidden: H.
        arch: such as ``sm_90a``.
        sm_count: multiprocessors of the device.

    Returns:
        The plan.
    """
    slices = hidden // POST_PROJECTION_SLICE
    ctas = slices * _ceildiv(tokens, MMA_TOKENS)
    tiles = _ceildiv(ctas, sm_count * POST_PROJECTION_CTAS_PER_SM)
    return PostProjectionPlan(Key("post_projection", arch, hidden), slices, tiles)


def _several_launches(hidden: int, arch: str) -> tuple[int, int]:
    """The token counts, from the first one to before the second, with a call of several launches.

    Of ``pre`` or ``fused_post_pre``, whose kernels of their own leave them none where the first is
    not below the second.
    """
    if not _takes_clusters(hidden, arch):
        return 1, sys.maxsize
    bounds = (
        (FEW_CLUSTERS_TOKENS + 1, pre_min_tokens(hidden)),
        (ONE_LAUNCH_MAX_TOKENS + 1, persistent_min_tokens(hidden)),
    )
    spans = [(first, end) for first, end in bounds if first < end]
    return min((first for first, _ in spans), default=1), max((end for _, end in spans), default=1)


def path_tokens(hidden: int, arch: str, max_tokens: int) -> tuple[int, ...]:
    """Token counts that reach every path of every op up to ``max_tokens``, one a path."""
    one_launch = takes_one_launch(1, hidden, arch)
    least = ONE_LAUNCH_MAX_TOKENS if one_launch else post_projection_max_tokens(hidden)
    starts = {1, least + 1}
    starts.update(tile.max_tokens + 1 for tile in PROJECTION_TILES)
    if one_launch:
        starts.update((persistent_min_tokens(hidden), pre_min_tokens(hidden)))
        starts.update((FEW_CLUSTERS_TOKENS + 1, post_head_max_tokens(hidden) + 1))
    return tuple(sorted(tokens for tokens in starts if tokens <= max_tokens))


def keys(hidden: int, arch: str, max_tokens: int) -> Iterator[Key]:
    """Every kernel that any op can reach at this hidden size.

    Args:
        hidden: H.
        arch: such as ``sm_90a``.
        max_tokens: the largest token count of a call.

    Yields:
        The keys, each once.
    """
    yield post_key(hidden, arch)
    if takes_one_launch(1, hidden, arch):
        for norm in (False, True):
            yield fused_post_pre_key(hidden, arch, norm)
            yield pre_key(hidden, arch, norm)
            if max_tokens >= persistent_min_tokens(hidden):
                yield persistent_key(hidden, arch, norm)
    else:
        yield post_projection_plan(1, hidden, arch, 1).key
    several = _several_launches(hidden, arch)
    for rows, (first, end) in ((MIXES, several), (HC_MULT, (1, sys.maxsize))):
        least = 1
        for tile in PROJECTION_TILES:
            if max(least, first) <= min(tile.max_tokens, end - 1, max_tokens):
                yield _projection_key(hidden, rows, tile, arch)
            least = tile.max_tokens + 1
    for norm in (False, True):
        if several[0] <= min(several[1] - 1, max_tokens):
            yield finish_key(hidden, arch, norm)
        yield head_key(hidden, arch, norm)
        if takes_one_launch_end(hidden, arch):
            yield expand_pre_key(hidden, arch, norm)
            for streams in (False, True):
                yield post_head_key(hidden, arch, norm, streams)
                if not takes_one_round(max_tokens, hidden):
                    yield post_head_persistent_key(hidden, arch, norm, streams)

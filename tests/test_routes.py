"""Test routes: few rows in order, complete keys, legal scalars at any token count."""

import functools
import itertools
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhc_ops import geometry, routes
from mhc_ops.formula import evaluate
from mhc_ops.testing import OUTPUTS
from other_routes import other_routes

ARCH, OTHER_ARCH = "sm_90a", "sm_80"
ARCHS = (ARCH, OTHER_ARCH)
SMS = 132
SIZES = (256, 768, 1280, 2816, 4096, 5120, 5376, 7168, 7424, 8448, 16384)
HIDDEN = st.integers(1, 64).map(lambda n: n * geometry.HIDDEN_MULTIPLE)
CLUSTER_HIDDEN = st.integers(1, 28).map(lambda n: n * geometry.HIDDEN_MULTIPLE)
TOKENS = st.one_of(st.integers(1, 1300), st.integers(1, 1 << 20))
EVERY_COUNT = (*range(1, 1301), 2048, 4095, 4096, 4097, 32768, 65535, 65536, 100_003, 1 << 20)


def scalars(launch, tokens, sms=SMS):
    """Return the numbers of a launch."""
    known = {"tokens": tokens, "multiprocessors": sms}
    return {name: evaluate(formula, known) for name, formula in launch.scalars.items()}


@functools.cache
def rows_of(op, hidden, arch):
    """Return the rows of an op, and keep them, because making them takes a while."""
    return routes.routes(op, hidden, arch)


def place_of(op, hidden, arch, tokens):
    """Return which of the rows serves a call."""
    ends = [row.max_tokens for row in rows_of(op, hidden, arch)[:-1]]
    return sum(end < tokens for end in ends)


def row_of(op, hidden, arch, tokens):
    """Return the row that ``routes.row`` returns."""
    return rows_of(op, hidden, arch)[place_of(op, hidden, arch, tokens)]


def kernels_of(row):
    """Return (kernel, its options) of every launch."""
    return tuple((launch.kernel, launch.options) for launch in row.launches)


def keys_of(row, hidden, arch):
    """Return the keys of a row, with the RMSNorm and without."""
    return {launch.key(hidden, arch, norm) for launch in row.launches for norm in (False, True)}


def ceildiv(a, b):
    return -(-a // b)


def test_sizes_fit_the_kernels():
    pytest.importorskip("tilelang", reason="needs TileLang, whose language the kernels are in")
    from mhc_ops.csrc_tilelang import layout

    lane_quad = 4 * layout.VECTOR  # The columns that one load of a fragment covers.
    assert geometry.HIDDEN_MULTIPLE == layout.WARP * layout.VECTOR
    assert geometry.POST_PROJECTION_SLICE == geometry.PROJECTION_BLOCK == lane_quad
    assert layout.SQUARES < geometry.PARTIAL_WIDTH
    assert geometry.POST_HEAD_GROUP_TOKENS % geometry.MMA_COLUMNS == 0


# ------------------------------------------------------------------------------------ rows and keys


def test_the_table_serves_every_op():
    assert set(routes.ops()) == set(OUTPUTS)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", routes.ops())
def test_every_row_is_reached_and_the_last_serves_any_count(op, arch, subtests):
    for hidden in SIZES:
        with subtests.test(hidden=hidden):
            rows = routes.routes(op, hidden, arch)
            ends = [row.max_tokens for row in rows]
            assert ends[-1] is None
            assert all(a < b for a, b in itertools.pairwise([0, *ends[:-1]]))
            firsts = [1, *(end + 1 for end in ends[:-1])]
            assert [routes.row(op, hidden, arch, first) for first in firsts] == list(rows)
            assert routes.row(op, hidden, arch, 1 << 40) == rows[-1]
            assert all(row.launches for row in rows)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", routes.ops())
@given(tokens=TOKENS, hidden=HIDDEN)
def test_every_launch_is_among_the_enumerated_keys(op, arch, tokens, hidden):
    every = routes.keys(hidden, arch, tokens)
    of_op = routes.keys(hidden, arch, tokens, op=op)
    assert len(every) == len(set(every))
    assert len(of_op) == len(set(of_op))
    assert routes.row(op, hidden, arch, tokens) == row_of(op, hidden, arch, tokens)
    assert keys_of(row_of(op, hidden, arch, tokens), hidden, arch) <= set(of_op) <= set(every)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("hidden", SIZES)
def test_keys_are_what_calls_up_to_a_token_count_reach(hidden, arch):
    for max_tokens in (1, 16, 32, 33, 48, 49, 96, 97, 128, 129, 168, 500):
        every = set()
        for op in routes.ops():
            places = {place_of(op, hidden, arch, t) for t in range(1, max_tokens + 1)}
            reached = [keys_of(rows_of(op, hidden, arch)[i], hidden, arch) for i in places]
            assert set().union(*reached) == set(routes.keys(hidden, arch, max_tokens, op=op))
            every.update(*reached)
        assert every == set(routes.keys(hidden, arch, max_tokens))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("hidden", SIZES)
def test_no_key_depends_on_the_token_count(hidden, arch):
    """Find no more keys than there are kernels, with each of their options."""
    keys = routes.keys(hidden, arch, sys.maxsize)
    assert len(keys) <= 24
    for key in keys:
        options = dict(key.options)
        assert options.keys() <= {"norm", "streams", "loop", "rows", "token_tiles", "ctas_per_sm"}
        assert options.get("norm", 0) in (0, 1)
        assert all(type(value) is int for value in options.values())
        assert (key.arch, key.hidden) == (arch, hidden)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("hidden", SIZES)
def test_bounds_reach_every_path(hidden, arch):
    max_tokens = 4096
    chosen = routes.bounds(hidden, arch, max_tokens)
    assert list(chosen) == sorted(set(chosen))
    assert chosen[0] == 1
    for op in routes.ops():
        reached = {place_of(op, hidden, arch, tokens) for tokens in chosen}
        assert reached == {place_of(op, hidden, arch, t) for t in range(1, max_tokens + 1)}
        paths = {routes.path(op, hidden, arch, tokens) for tokens in chosen}
        assert {routes.path(op, hidden, arch, t) for t in range(1, max_tokens, 61)} <= paths


def test_paths():
    assert routes.path("post", 4096, ARCH, 0) == ""
    assert routes.path("fused_post_pre", 4096, ARCH, 128) == "fused_post_pre"
    assert routes.path("fused_post_pre", 4096, ARCH, 129) == "fused_post_pre_persistent"
    assert routes.path("head", 4096, ARCH, 32) == "projection1+head"
    assert routes.path("head", 4096, ARCH, 33) == "projection2+head"
    assert routes.path("post_head", 4096, ARCH, 448) == "post_head"
    assert routes.path("post_head", 4096, ARCH, 449) == "post_head_loop"
    assert routes.path("fused_post_pre", 4096, OTHER_ARCH, 96) == "post_projection+finish"
    assert routes.path("fused_post_pre", 4096, OTHER_ARCH, 97) == "post+projection2+finish"
    assert routes.path("expand_pre", 4096, OTHER_ARCH, 1) == "expand+projection1+finish"
    assert routes.path("post_head_streams", 8192, ARCH, 33) == "post+projection2+head"


# ------------------------------------------------------------------------- which GPUs, which sizes


def test_kernels_in_clusters_are_for_clusters_of_16():
    archs = ("sm_80", "sm_89", "sm_90a", "sm_100a", "sm_103a", "sm_120a")
    served = [arch for arch in archs if routes.in_clusters(4096, arch)]
    assert served == ["sm_90a", "sm_100a", "sm_103a"]
    assert routes.in_clusters(7168, ARCH)
    assert not routes.in_clusters(7424, ARCH)
    for op in routes.ops():
        assert routes.routes(op, 7424, ARCH) == routes.routes(op, 7424, OTHER_ARCH)


@given(tokens=TOKENS, hidden=CLUSTER_HIDDEN)
def test_all_sizes_in_clusters_run_the_same_kernels(tokens, hidden):
    """Run the same kernels, but where two CTAs of post_head share an SM, up to another bound."""
    for op in routes.ops():
        want = kernels_of(row_of(op, 4096, ARCH, tokens))
        bound = routes.CLUSTERS * geometry.POST_HEAD_GROUP_TOKENS
        if op.startswith("post_head") and bound < tokens <= 2 * bound:
            at_once = geometry.post_head_ctas_per_sm(hidden, loop=False) == 2
            streams, _ = want[0][1]
            want = (("post_head", (streams, ("loop", int(not at_once)))),)
        assert kernels_of(row_of(op, hidden, ARCH, tokens)) == want


def test_the_rows_in_clusters():
    """Hold every bound that was measured, at every hidden size."""
    for hidden in (256, 768, 2816, 4096, 5120, 7168):
        ends = {
            op: [row.max_tokens for row in routes.routes(op, hidden, ARCH)] for op in routes.ops()
        }
        round_of_post_head = 448 if hidden <= 4096 else 224
        assert ends == {
            "post": [None],
            "pre": [48, 128, None],
            "fused_post_pre": [48, 128, None],
            "head": [32, None],
            "expand_pre": [None],
            "post_head": [56, 168, round_of_post_head, None],
            "post_head_streams": [56, 168, round_of_post_head, None],
        }


def test_the_rows_on_a_grid():
    for hidden in (256, 4096, 7168, 8448):
        ends = {
            op: [row.max_tokens for row in routes.routes(op, hidden, OTHER_ARCH)]
            for op in routes.ops()
        }
        few = {256: 96, 4096: 96, 7168: 54, 8448: 46}[hidden]
        assert routes.post_projection_max_tokens(hidden) == few
        assert ends.pop("post") == [None]
        assert ends.pop("fused_post_pre") == [few, None]
        assert set(map(tuple, ends.values())) == {(32, None)}
    # At this size post_projection serves fewer tokens than the smaller tile of the projection.
    assert [row.max_tokens for row in routes.routes("fused_post_pre", 16384, OTHER_ARCH)] == [
        24, 32, None,
    ]  # fmt: skip


# ------------------------------------------------------------------------- scalars: what runs where


def check_shares(group, larger, tile, tokens, clusters):
    """Check that clusters take every token once, the first ``larger`` a tile more than the others.

    The kernels share tokens like this; a cluster has as many tiles as its tokens fill.
    """
    end = 0
    for cluster in range(clusters):
        assert end == cluster * group + min(cluster, larger) * tile
        most = group + (tile if cluster < larger else 0)
        count = min(most, tokens - end)
        assert ceildiv(count, tile) == ceildiv(most, tile) > 0
        end += count
    assert end == tokens


@pytest.mark.parametrize("hidden", [256, 4096, 5120, 5376, 7168])
def test_clusters_of_the_boundary_share_all_tokens(hidden):
    """Check also that all clusters run at once, for every number of tokens."""
    tile = geometry.tile_tokens(hidden)
    for op in ("fused_post_pre", "pre"):
        for tokens in EVERY_COUNT:
            (launch,) = row_of(op, hidden, ARCH, tokens).launches
            numbers = scalars(launch, tokens)
            group = numbers["group_tokens"]
            assert group >= 1
            if launch.kernel == "fused_post_pre":
                assert numbers.keys() == {"group_tokens"}
                assert group <= geometry.GROUP_TOKENS
                clusters = ceildiv(tokens, group)
                check_shares(group, 0, group, tokens, clusters)
            else:
                assert numbers.keys() == {"group_tokens", "larger_groups"}
                larger = numbers["larger_groups"]
                clusters = ceildiv(tokens - larger * tile, group)  # So many are launched.
                assert 0 <= larger < clusters
                assert group % tile == 0 or (group < tile and larger == 0)
                check_shares(group, larger, tile, tokens, clusters)
            assert 1 <= clusters <= routes.CLUSTERS
            if tokens <= routes.FEW_CLUSTERS_TOKENS:
                assert clusters <= geometry.FEW_CLUSTERS


@pytest.mark.parametrize("hidden", [256, 4096, 7168])
def test_pre_has_the_groups_of_the_boundary(hidden):
    """Find the same groups as long as a tile holds one; beyond, whole tiles in no more clusters."""
    tile = geometry.tile_tokens(hidden)
    for tokens in EVERY_COUNT:
        (boundary,), (pre,) = (
            row_of(op, hidden, ARCH, tokens).launches for op in ("fused_post_pre", "pre")
        )
        want, got = scalars(boundary, tokens), scalars(pre, tokens)
        if tokens > routes.ONE_ROUND_TOKENS:
            assert got == want
        elif want["group_tokens"] <= tile:
            assert got == want | {"larger_groups": 0}
        else:
            clusters = ceildiv(tokens - got["larger_groups"] * tile, got["group_tokens"])
            assert clusters <= ceildiv(tokens, want["group_tokens"])


@pytest.mark.parametrize("hidden", [256, 7168])
def test_groups_of_expand_pre_are_whole_tiles(hidden):
    for tokens in EVERY_COUNT:
        (launch,) = row_of("expand_pre", hidden, ARCH, tokens).launches
        group = scalars(launch, tokens)["group_tokens"]
        assert group % geometry.MMA_COLUMNS == 0
        assert geometry.MMA_COLUMNS <= group <= geometry.EXPAND_PRE_GROUP_TOKENS
        # There is one round of clusters, or groups have the largest size.
        assert (
            ceildiv(tokens, group) <= routes.CLUSTERS or group == geometry.EXPAND_PRE_GROUP_TOKENS
        )


@pytest.mark.parametrize("hidden", [256, 4096, 5120, 7168])
@pytest.mark.parametrize("op", ["post_head", "post_head_streams"])
def test_clusters_of_post_head_run_at_once(op, hidden):
    for tokens in EVERY_COUNT:
        (launch,) = row_of(op, hidden, ARCH, tokens).launches
        numbers = scalars(launch, tokens)
        clusters, unit = numbers["clusters"], numbers["unit"]
        loop = bool(dict(launch.options)["loop"])
        ctas_per_sm = geometry.post_head_ctas_per_sm(hidden, loop)
        assert 1 <= clusters <= routes.CLUSTERS * ctas_per_sm
        assert unit in (1, geometry.MMA_COLUMNS)
        units = ceildiv(tokens, unit)
        assert clusters <= units  # Each cluster has some.
        # The kernel shares units like this: the first clusters get one more.
        share, more = divmod(units, clusters)
        counts = [(share + (cluster < more)) * unit for cluster in range(clusters)]
        assert sum(counts) - unit < tokens <= sum(counts)
        if not loop:
            assert max(counts) <= geometry.POST_HEAD_GROUP_TOKENS
        if unit == 1:
            assert max(counts) <= geometry.MMA_COLUMNS


def test_how_post_head_shares_tokens():
    """Hold the bounds that were measured."""

    def share(tokens, hidden):
        (launch,) = row_of("post_head", hidden, ARCH, tokens).launches
        return tuple(scalars(launch, tokens).values())

    assert [share(n, 4096) for n in (25, 56, 57, 169)] == [(7, 1), (7, 1), (7, 8), (14, 8)]
    assert [share(n, 5120) for n in (57, 224, 225)] == [(7, 8), (7, 8), (14, 8)]
    assert [share(n, 7168) for n in (57, 224, 225)] == [(7, 8), (7, 8), (7, 8)]
    assert share(3, 4096) == (1, 1)


def projections(hidden, tokens, sms):
    """Yield every launch of ``projection``, with its numbers and those of the next launch."""
    for op, arch in itertools.product(routes.ops(), ARCHS):
        row = row_of(op, hidden, arch, tokens)
        for launch, behind in itertools.pairwise((*row.launches, None)):
            if launch.kernel == "projection":
                assert behind is not None
                yield launch, scalars(launch, tokens, sms), scalars(behind, tokens, sms)


@given(TOKENS, HIDDEN, st.integers(1, 200))
def test_projection_splits_cover_every_column_once(tokens, hidden, sms):
    blocks = geometry.HC_MULT * hidden // geometry.PROJECTION_BLOCK
    found = list(projections(hidden, tokens, sms))
    assert found
    for launch, numbers, behind in found:
        splits, blocks_per_split = numbers["splits"], numbers["blocks_per_split"]
        assert (splits - 1) * blocks_per_split < blocks <= splits * blocks_per_split
        assert blocks_per_split % geometry.PROJECTION_WARPS == 0
        assert behind == {"splits": splits}
        options = dict(launch.options)
        tiles = ceildiv(tokens, options["token_tiles"] * geometry.MMA_TOKENS)
        if launch.scalars["splits"].function != "constant":
            # There is one wave of CTAs, unless the tokens alone need more.
            assert tiles * splits <= max(tiles, sms * options["ctas_per_sm"])
        assert tiles <= 65535  # The y dimension of a grid allows no more.


@given(CLUSTER_HIDDEN)
def test_head_in_clusters_is_cut_alike_for_any_token_count(hidden):
    """Find one number of splits, because other splits give other sums, and so other bits."""
    rows = rows_of("head", hidden, ARCH)
    splits = {launch.scalars["splits"] for row in rows for launch in row.launches}
    assert len(splits) == 1
    (number,) = splits
    assert 1 <= evaluate(number, {}) <= routes.HEAD_SPLITS


@given(TOKENS, HIDDEN, st.integers(1, 200))
def test_post_projection_slices_cover_the_hidden_size(tokens, hidden, sms):
    row = row_of("fused_post_pre", hidden, OTHER_ARCH, tokens)
    launch, behind = row.launches[:2]
    assert (launch.kernel == "post_projection") == (
        tokens <= routes.post_projection_max_tokens(hidden)
    )
    if launch.kernel == "post_projection":
        numbers = scalars(launch, tokens, sms)
        assert numbers["splits"] * geometry.POST_PROJECTION_SLICE == hidden
        assert numbers["tiles"] >= 1
        assert scalars(behind, tokens, sms) == {"splits": numbers["splits"]}


# ------------------------------------------------------------------------------------ other routes


def test_other_routes_last_for_a_while():
    assert routes.path("pre", 256, ARCH, 5) == "pre"
    with other_routes(CLUSTER_ARCHS=frozenset(), PROJECTION_BLOCK=64):
        assert routes.path("pre", 256, ARCH, 5) == "projection1+finish"
        assert geometry.PROJECTION_BLOCK == 64
    assert routes.path("pre", 256, ARCH, 5) == "pre"
    assert geometry.PROJECTION_BLOCK == 32

"""dispatch: plans cover the work, keys are few and never depend on the token count."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhc_ops import dispatch
from mhc_ops.csrc_tilelang import _device, post_projection, projection

ARCH = "sm_90a"
SMS = 132
HIDDEN = st.integers(1, 64).map(lambda n: n * dispatch.HIDDEN_MULTIPLE)
TOKENS = st.integers(1, 1 << 20)
ROWS = st.sampled_from([dispatch.MIXES, dispatch.HC_MULT])


def test_constants_are_those_of_the_kernels():
    assert dispatch.HC_MULT == _device.HC_MULT
    assert dispatch.MIXES == _device.MIXES
    assert dispatch.PARTIAL_WIDTH == _device.PARTIAL_WIDTH
    assert dispatch.MMA_TOKENS == _device.MMA_TOKENS
    assert dispatch.HIDDEN_MULTIPLE == _device.WARP * _device.VECTOR
    assert dispatch.POST_PROJECTION_SLICE == post_projection.SLICE
    assert dispatch.PROJECTION_BLOCK == projection.BLOCK
    assert dispatch.PROJECTION_WARPS == projection.WARPS
    assert dispatch.POST_HEAD_GROUP_TOKENS % _device.MMA_COLUMNS == 0


@given(TOKENS, HIDDEN, ROWS, st.integers(1, 200))
def test_projection_splits_cover_every_column_once(tokens, hidden, rows, sms):
    plan = dispatch.projection_plan(tokens, hidden, rows, ARCH, sms)
    blocks = dispatch.HC_MULT * hidden // dispatch.PROJECTION_BLOCK
    assert (plan.splits - 1) * plan.blocks_per_split < blocks
    assert plan.splits * plan.blocks_per_split >= blocks
    assert plan.blocks_per_split % dispatch.PROJECTION_WARPS == 0


@given(TOKENS, HIDDEN, st.integers(1, 200))
def test_post_projection_slices_cover_the_hidden_size(tokens, hidden, sms):
    plan = dispatch.post_projection_plan(tokens, hidden, ARCH, sms)
    assert plan.slices * dispatch.POST_PROJECTION_SLICE == hidden
    assert plan.tiles >= 1
    # y dimension of a grid
    assert -(-tokens // (dispatch.MMA_TOKENS * plan.tiles)) <= 65535


def in_several_launches(tokens, hidden):
    """Whether ``pre`` or ``fused_post_pre`` are."""
    size = tokens, hidden, ARCH
    return not dispatch.takes_pre(*size, False) or not (
        dispatch.takes_one_launch(*size) or dispatch.takes_persistent(*size, False)
    )


@given(TOKENS, HIDDEN, ROWS)
def test_every_plan_is_among_the_enumerated_keys(tokens, hidden, rows):
    keys = list(dispatch.keys(hidden, ARCH, tokens))
    assert len(keys) == len(set(keys))
    several = in_several_launches(tokens, hidden)
    if rows == dispatch.HC_MULT or several:
        assert dispatch.projection_plan(tokens, hidden, rows, ARCH, SMS).key in keys
    one_launch = dispatch.takes_one_launch(1, hidden, ARCH)
    assert (dispatch.post_projection_plan(tokens, hidden, ARCH, SMS).key in keys) != one_launch
    assert dispatch.post_key(hidden, ARCH) in keys
    for norm in (False, True):
        assert (dispatch.fused_post_pre_key(hidden, ARCH, norm) in keys) == one_launch
        assert (dispatch.pre_key(hidden, ARCH, norm) in keys) == one_launch
        assert dispatch.finish_key(hidden, ARCH, norm) in keys or not several
        assert dispatch.head_key(hidden, ARCH, norm) in keys
        assert (dispatch.expand_pre_key(hidden, ARCH, norm) in keys) == one_launch
        for streams in (False, True):
            options = (hidden, ARCH, norm, streams)
            many = one_launch and not dispatch.takes_one_round(tokens, hidden)
            assert (dispatch.post_head_key(*options) in keys) == one_launch
            assert (dispatch.post_head_persistent_key(*options) in keys) == many


@pytest.mark.parametrize("tokens", range(1, dispatch.ONE_LAUNCH_MAX_TOKENS + 1))
def test_groups_of_one_launch_fit(tokens):
    group = dispatch.group_tokens(tokens)
    assert 1 <= group <= dispatch.GROUP_TOKENS
    assert -(-tokens // group) <= dispatch.CLUSTERS


@pytest.mark.parametrize("share", [dispatch.pre_share, dispatch.persistent_share])
@given(tokens=st.one_of(st.integers(1, 600), TOKENS), hidden=HIDDEN)
def test_clusters_share_all_tokens(share, tokens, hidden):
    """As the kernels take them; the tiles of each are those that its tokens fill."""
    tile = dispatch.tile_tokens(hidden)
    group, larger = share(tokens, hidden)
    clusters = -(-(tokens - larger * tile) // group)  # as many as are launched
    assert larger < clusters <= dispatch.CLUSTERS
    end = 0
    for cluster in range(clusters):
        assert end == cluster * group + min(cluster, larger) * tile
        most = group + (tile if cluster < larger else 0)
        count = min(most, tokens - end)
        assert -(-count // tile) == -(-most // tile) > 0
        end += count
    assert end == tokens


@given(TOKENS)
def test_groups_of_expand_pre_are_whole_tiles(tokens):
    group = dispatch.expand_pre_group_tokens(tokens)
    assert group % dispatch.MMA_COLUMNS == 0
    assert dispatch.MMA_COLUMNS <= group <= dispatch.EXPAND_PRE_GROUP_TOKENS
    # one round of clusters, or groups as large as they get
    assert -(-tokens // group) <= dispatch.CLUSTERS or group == dispatch.EXPAND_PRE_GROUP_TOKENS


@given(st.one_of(st.integers(1, 600), TOKENS), HIDDEN)
def test_clusters_of_post_head_run_at_once(tokens, hidden):
    clusters, unit = dispatch.post_head_share(tokens, hidden)
    one_round = dispatch.takes_one_round(tokens, hidden)
    two = hidden <= (4096 if one_round else 5120)
    assert 1 <= clusters <= dispatch.CLUSTERS * (1 + two)
    assert unit in (1, dispatch.MMA_COLUMNS)
    units = -(-tokens // unit)
    assert clusters <= units  # each has some
    if one_round:
        assert -(-units // clusters) * unit <= dispatch.POST_HEAD_GROUP_TOKENS
    if unit == 1:
        assert -(-tokens // clusters) <= dispatch.MMA_COLUMNS


def test_one_launch_is_for_clusters_of_16():
    for arch, served in (("sm_90a", True), ("sm_100a", True), ("sm_120a", False), ("sm_80", False)):
        assert dispatch.takes_one_launch(1, 4096, arch) == served
        assert dispatch.takes_one_launch_end(4096, arch) == served
        assert dispatch.takes_persistent(5000, 4096, arch, False) == served
        assert dispatch.takes_pre(1, 4096, arch, False) == served
    assert not dispatch.takes_one_launch(129, 4096, ARCH)
    assert not dispatch.takes_one_launch(1, 7424, ARCH)
    assert not dispatch.takes_one_launch_end(7424, ARCH)
    assert not dispatch.takes_persistent(5000, 7424, ARCH, True)
    assert not dispatch.takes_pre(5000, 7424, ARCH, True)


def test_where_one_launch_begins_and_ends():
    """The bounds that were measured, and that the same bits are to be had at any size."""
    assert [dispatch.persistent_min_tokens(h) for h in (4096, 5120, 7168)] == [129, 640, 129]
    assert [dispatch.pre_min_tokens(h) for h in (4096, 5120, 7168)] == [1, 640, 1]
    for tokens, taken in ((48, True), (49, False), (639, False), (640, True)):
        assert dispatch.takes_pre(tokens, 5120, ARCH, False) == taken
        assert dispatch.takes_pre(tokens, 5120, ARCH, True)
        assert dispatch.takes_pre(tokens, 4096, ARCH, False)
        assert dispatch.takes_pre(tokens, 7168, ARCH, False)
    assert dispatch.takes_persistent(129, 5120, ARCH, True)
    assert not dispatch.takes_persistent(129, 5120, ARCH, False)
    assert [dispatch.post_head_max_tokens(h) for h in (4096, 5120, 7168)] == [448, 224, 224]
    share = dispatch.post_head_share
    assert [share(n, 4096) for n in (25, 56, 57, 169)] == [(7, 1), (7, 1), (7, 8), (14, 8)]
    assert [share(n, 5120) for n in (57, 224, 225)] == [(7, 8), (7, 8), (14, 8)]
    assert [share(n, 7168) for n in (57, 224, 225)] == [(7, 8), (7, 8), (7, 8)]


@pytest.mark.parametrize("hidden", [256, 4096, 5120, 7168])
def test_no_key_depends_on_the_token_count(hidden):
    reached = {
        dispatch.projection_plan(tokens, hidden, dispatch.MIXES, ARCH, SMS).key
        for tokens in range(1, 5000)
        if in_several_launches(tokens, hidden)
    }
    assert reached == {
        key
        for key in dispatch.keys(hidden, ARCH, 5000)
        if key.kernel == "projection" and dict(key.options)["rows"] == dispatch.MIXES
    }
    assert len({dispatch.post_projection_plan(t, hidden, ARCH, SMS).key for t in range(1, 99)}) == 1


@pytest.mark.parametrize("hidden", [256, 4096, 7168])
def test_path_tokens_reach_every_path(hidden):
    max_tokens = 4096

    def path(tokens):
        return (
            dispatch.takes_one_launch(tokens, hidden, ARCH),
            dispatch.takes_pre(tokens, hidden, ARCH, False),
            dispatch.takes_persistent(tokens, hidden, ARCH, False),
            dispatch.takes_post_projection(tokens, hidden)
            and not dispatch.takes_one_launch(tokens, hidden, ARCH),
            dispatch.projection_plan(tokens, hidden, dispatch.MIXES, ARCH, SMS).key,
        )

    chosen = dispatch.path_tokens(hidden, ARCH, max_tokens)
    assert {path(tokens) for tokens in chosen} == {path(t) for t in range(1, max_tokens + 1)}

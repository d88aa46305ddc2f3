"""Run the CUDA source of every kernel on the CPU and compare results with the oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from emulated import (
    ARCH,
    CASES,
    HIDDEN,
    IN_CLUSTERS,
    MAX_TOKENS,
    TOKENWISE,
    Device,
    key_of,
    runs_in_clusters,
)
from emulation import Kernel, missing
from helpers import STREAMS, assert_equal
from mhc_ops import geometry, reference, routes
from mhc_ops.routes import Key
from mhc_ops.testing import KINDS, OUTPUTS, assert_matches_oracle, make_inputs
from other_routes import other_routes

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture
def device(monkeypatch, kept, lowered) -> Device:
    return Device(monkeypatch, lambda key: Kernel(lowered(key), kept))


ENDS = ("expand_pre", "post_head", "post_head_streams")
NARROW = 7168  # Tiles have 8 tokens here; test_cubin.py lowers these kernels, too.
# The first test runs these kernels at HIDDEN alone, as they take long to lower. So it does with
# fused_post_pre without norm, which test_emulated_races.py runs at 256.
LONG_TO_LOWER = set(IN_CLUSTERS) - {"fused_post_pre"}


def elsewhere(key: Key) -> bool:
    """Say whether the first test leaves a kernel of a small hidden size out."""
    if key.hidden == HIDDEN:
        return False
    plain = key.kernel == "fused_post_pre" and not dict(key.options)["norm"]
    return plain or key.kernel in LONG_TO_LOWER


def calls(hidden: int, arch: str) -> dict[tuple[str, bool], dict[int, set[Key]]]:
    """List calls that reach every kernel: op and norm to tokens to the kernels that serve them."""
    found: dict[tuple[str, bool], dict[int, set[Key]]] = {}
    bounds = sorted(routes.bounds(hidden, arch, MAX_TOKENS))
    for tokens in bounds:
        for op, norm in CASES:
            row = routes.row(op, hidden, arch, tokens)
            keys = {launch.key(hidden, arch, norm) for launch in row.launches}
            if any(map(elsewhere, keys)):
                continue
            in_clusters = runs_in_clusters(op, hidden, arch, tokens)
            if tokens > 1 and op in ENDS and not in_clusters:
                # Other ops have the same kernels, whatever the number of tokens.
                continue
            # Clusters take long to emulate; the last bound runs with any other kernels.
            runs_anyhow = tokens == 1 or (tokens == bounds[-1] and not in_clusters)
            if not runs_anyhow and routes.row(op, hidden, arch, tokens - 1) == row:
                continue  # The first token count of each row runs.
            found.setdefault((op, norm), {})[tokens] = keys
    return found


SIZES = [(256, ARCH), (HIDDEN, ARCH), (256, "sm_80"), (HIDDEN, "sm_80")]


@pytest.mark.parametrize(("hidden", "arch"), SIZES)
def test_the_next_test_runs_every_kernel(hidden, arch):
    keys = {key for key in routes.keys(hidden, arch, MAX_TOKENS) if not elsewhere(key)}
    run = [served for counts in calls(hidden, arch).values() for served in counts.values()]
    assert keys == set().union(*run)


@pytest.mark.parametrize(
    ("hidden", "arch", "op", "norm"), [(*size, *case) for size in SIZES for case in calls(*size)]
)
def test_every_kernel_matches_the_oracle(device, hidden, arch, op, norm):
    device.arch = arch
    for tokens, keys in calls(hidden, arch)[op, norm].items():
        device.launched.clear()
        device.check(op, make_inputs(op, tokens, hidden, norm=norm, seed=tokens))
        assert keys <= device.launched


@pytest.mark.parametrize(("op", "norm"), CASES)
@pytest.mark.parametrize("hidden", [4096, 8448], ids=["flash", "beyond_the_tuned_repetitions"])
def test_large_hidden(device, hidden, op, norm):
    if hidden == 4096 and (op.endswith("streams") or (not norm and op not in ("post", "head"))):
        pytest.skip("takes long to lower, and differs little from the kernels that are run")
    device.sms = 132
    device.check(op, make_inputs(op, 2, hidden, norm=norm))


@pytest.mark.parametrize("tokens", [3, 17, 70])
@pytest.mark.parametrize(
    ("arch", "sms"),
    [(ARCH, 4), ("sm_80", 1), ("sm_80", 132)],
    ids=["clusters", "tiles_in_turn", "tiles_side_by_side"],
)
def test_partial_token_tiles(device, tokens, arch, sms):
    """Run short last tiles; multiprocessors decide about the launches of sm_80 alone."""
    device.arch, device.sms = arch, sms
    for op, norm in CASES:
        device.check(op, make_inputs(op, tokens, HIDDEN, norm=norm, seed=sms))


@pytest.mark.parametrize("kind", KINDS)
def test_hard_inputs(device, kind):
    for op in OUTPUTS:
        device.check(op, make_inputs(op, 3, HIDDEN, norm=True, kind=kind))


@pytest.mark.parametrize("repeat", [1, 2])
def test_few_rounds_of_sinkhorn(device, repeat):
    # The kernels of sm_80 are quick to emulate; all kernels take the same rounds.
    device.arch = "sm_80"
    device.check("pre", make_inputs("pre", 2, 256, sinkhorn_repeat=repeat))


def hard_logits() -> dict[str, Tensor]:
    """Make logits of combs, among them those that converge slowly, late or not at all."""
    random = torch.Generator().manual_seed(0)
    below = torch.ones(4, 4).tril(-1)
    logits = {
        "uniform": torch.zeros(4, 4),
        "permutation": 12 * torch.eye(4).roll(1, 1),
        "noisy_permutation": 12 * torch.eye(4).roll(1, 1) + torch.randn(4, 4, generator=random),
        "dominant_row": torch.tensor([20.0, 0, 0, 0]).repeat(4, 1) * torch.eye(4)[0].view(4, 1),
        "dominant_column": torch.tensor([20.0, 0, 0, 0]).repeat(4, 1),
        "thirty_of_either_sign": 60 * torch.randint(2, (4, 4), generator=random) - 30.0,
    }
    logits |= {f"below_{size}": -float(size) * below for size in (3, 5, 7, 9)}
    for spread in (1, 2, 4, 10):
        for i in range(2):
            logits[f"spread_{spread}_{i}"] = spread * torch.randn(4, 4, generator=random)
    return logits


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_no_round_of_sinkhorn_is_missed(device, eps):
    """Stay within 1e-6 of float64 however rounds are made; streams of zeros give exact logits."""
    device.arch = "sm_80"
    inputs = make_inputs("pre", 1, 256) | {"hc_sinkhorn_eps": eps}
    inputs["residual"].zero_()
    for kind, logits in hard_logits().items():
        inputs["hc_base"][8:] = logits.flatten()
        for repeat in (1, 3, 9, 20):
            inputs["sinkhorn_repeat"] = repeat
            comb = device.run("pre", inputs)["comb_mix"][0].double()
            error = (comb - reference.sinkhorn(logits.double(), eps, repeat)).abs().max()
            assert error < 1e-6, f"{kind}, {repeat} rounds: off by {error:.1e}"


@pytest.mark.parametrize("op", ["fused_post_pre", "post_head_streams"])
def test_fused_streams_are_those_of_post(device, op):
    for tokens in (5, MAX_TOKENS):
        inputs = make_inputs(op, tokens, HIDDEN, kind="large_streams")
        fused = device.run(op, inputs)
        names = ("x", "residual", "post_layer_mix", "comb_res_mix")
        post = device.run("post", {name: inputs[name] for name in names})
        assert torch.equal(fused["residual_out"], post["residual_out"])


@pytest.mark.parametrize(
    ("op", "tokens"), [("fused_post_pre", 18), ("expand_pre", 58), ("post_head_streams", 58)]
)
def test_batches_give_the_bits_of_single_tokens(device, op, tokens):
    inputs = make_inputs(op, tokens, HIDDEN, norm=True)
    batch = device.run(op, inputs)
    for token in (0, 7, tokens - 1):
        single = dict(inputs)
        for name in ("x", "residual", "post_layer_mix", "comb_res_mix"):
            if name in inputs:
                single[name] = inputs[name][token : token + 1]
        alone = device.run(op, single)
        assert_equal(alone, {name: value[token : token + 1] for name, value in batch.items()})


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("hidden", [HIDDEN, NARROW], ids=["16_tokens_a_tile", "8_tokens_a_tile"])
def test_the_persistent_kernel(device, hidden, norm):
    """Loop over tiles, with the bits of the kernel that serves few tokens."""
    if hidden != HIDDEN and not norm:
        pytest.skip("one norm of the larger hidden size: a minute each")
    # There are 5 tiles, the last one short, all of one cluster.
    tokens = 69 if hidden == HIDDEN else 37
    inputs = make_inputs("fused_post_pre", tokens, hidden, norm=norm, seed=3)
    few = {name: value[:5] if name in TOKENWISE else value for name, value in inputs.items()}
    expected = device.run("fused_post_pre", few)
    with other_routes(CLUSTERS=1, FEW_CLUSTERS_TOKENS=0, ONE_ROUND_TOKENS=0):
        many = device.run("fused_post_pre", inputs)
    assert key_of("fused_post_pre_persistent", hidden, norm=norm) in device.launched
    assert_matches_oracle("fused_post_pre", inputs, tuple(many.values()))
    assert_equal(expected, {name: value[:5] for name, value in many.items()})


@pytest.mark.parametrize("hidden", [HIDDEN, NARROW], ids=["16_tokens_a_tile", "8_tokens_a_tile"])
def test_pre_after_post_is_the_boundary(device, hidden):
    """Loop over tiles in the pre kernel, with the bits of the boundary in one launch."""
    # There are more tiles than buffers, all of one cluster, and the last tile is short.
    tokens = 117 if hidden == HIDDEN else 45
    inputs = make_inputs("pre", tokens, hidden, norm=True, seed=3)
    with other_routes(CLUSTERS=1, FEW_CLUSTERS_TOKENS=0, ONE_ROUND_TOKENS=0):
        many = device.run("pre", inputs)
    assert_matches_oracle("pre", inputs, tuple(many.values()))
    post = {name: make_inputs("post", 5, hidden)[name] for name in TOKENWISE}
    boundary = device.run("fused_post_pre", inputs | post)
    alone = device.run("pre", inputs | {"residual": boundary.pop("residual_out")})
    assert_equal(alone, boundary)
    few = device.run("pre", inputs | {"residual": inputs["residual"][-3:].clone()})
    assert_equal(few, {name: value[-3:] for name, value in many.items()})


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_the_loop_of_post_head(device, norm):
    """Loop over tiles, with the bits of the kernel that serves few tokens."""
    # There are 5 tiles in one cluster, the last one short.
    tokens = geometry.POST_HEAD_GROUP_TOKENS + 5
    inputs = make_inputs("post_head_streams", tokens, HIDDEN, norm=norm, seed=3)
    few = {name: value[:19] if name in TOKENWISE else value for name, value in inputs.items()}
    with other_routes(CLUSTERS=1, POST_HEAD_TWO_CTAS_HIDDEN=0, POST_HEAD_LOOP_TWO_CTAS_HIDDEN=0):
        many = device.run("post_head_streams", inputs)
        assert_matches_oracle("post_head_streams", inputs, tuple(many.values()))
        expected = device.run("post_head_streams", few)
    assert device.launched == {
        key_of("post_head", HIDDEN, norm=norm, streams=1, loop=loop) for loop in (0, 1)
    }
    assert_equal(expected, {name: value[:19] for name, value in many.items()})


@pytest.mark.parametrize("op", OUTPUTS)
def test_nan_stays_in_its_token(device, op):
    inputs = make_inputs(op, 18, HIDDEN, norm=True)
    clean = device.run(op, inputs)
    inputs[STREAMS[op]][3].view(-1, HIDDEN)[-1] = torch.nan
    dirty = device.run(op, inputs)
    others = [token for token in range(18) if token != 3]
    assert_equal(
        {name: value[others] for name, value in dirty.items()},
        {name: value[others] for name, value in clean.items()},
    )
    for name, value in dirty.items():
        assert value[3].isnan().all(), name

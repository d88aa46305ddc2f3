"""Run the cases of the engines' own kernel tests, through the signatures of the adapters.

SGLang tests ``mhc_fused_post_pre`` against its own steps, and GLM-5.3's boundary; vLLM tests each
function against a reference, and that ``pre`` gives a token the same bits in any batch. Sizes,
token counts and kinds of inputs are the engines'; the judge is the float64 oracle, whose bounds are
tighter.
"""

from __future__ import annotations

import types

import pytest
import torch

from helpers import assert_equal
from mhc_ops.integrations import sglang, vllm
from mhc_ops.testing import as_outputs, assert_matches_oracle

HC_MULT, EPS = 4, 1e-6


def norm_of(hidden, device, fused):
    weight = torch.ones(hidden, dtype=torch.bfloat16, device=device) if fused else None
    return {"norm_weight": weight, "norm_eps": EPS if fused else None}


class TestSGLang:
    """Take small streams, doubly normalised twice, with and without the norm."""

    ROUNDS = 2

    def inputs(self, tokens, hidden, device, fused):
        def normal(*shape):
            return torch.randn(*shape, device=device)

        def uniform(*shape):
            return torch.rand(*shape, device=device)

        post = {
            "x": (normal(tokens, hidden) * 0.1).bfloat16(),
            "residual": (normal(tokens, HC_MULT, hidden) * 0.1).bfloat16(),
            "post_layer_mix": uniform(tokens, HC_MULT, 1),
            "comb_res_mix": uniform(tokens, HC_MULT, HC_MULT) * 0.25,
        }
        mixing = {
            "fn": normal(24, HC_MULT * hidden) * 0.01,
            "hc_scale": torch.tensor([0.5, 0.25, 0.25], device=device),
            "hc_base": torch.zeros(24, device=device),
            "rms_eps": EPS,
            "hc_pre_eps": EPS,
            "hc_sinkhorn_eps": EPS,
            "hc_post_mult_value": 2.0,
            "sinkhorn_repeat": self.ROUNDS,
        }
        return post, mixing | norm_of(hidden, device, fused)

    @pytest.mark.parametrize("hidden", [4096, 7168])
    @pytest.mark.parametrize("fused", [False, True], ids=["plain", "norm"])
    def test_fused_post_pre_is_post_then_pre(self, hidden, fused, device):
        for tokens in (0, 1, 6, 8, 17, 32, 64):
            post, mixing = self.inputs(tokens, hidden, device, fused)
            streams = sglang.mhc_post(**post)
            want = streams, *sglang.mhc_pre(streams, **mixing)
            got = sglang.mhc_fused_post_pre(**post, **mixing)
            assert got[0].shape == (tokens, HC_MULT, hidden)
            assert_equal(as_outputs("fused_post_pre", got), as_outputs("fused_post_pre", want))
            assert_matches_oracle("fused_post_pre", post | mixing, got)

    @pytest.mark.parametrize("fused", [False, True], ids=["plain", "norm"])
    def test_the_boundary_of_glm(self, fused, device, monkeypatch):
        """Fuse the boundary of GLM at any number of tokens; SGLang stops at 16."""
        monkeypatch.setattr(self, "ROUNDS", 20)
        for tokens in (0, 1, 6, 17):
            post, mixing = self.inputs(tokens, 4096, device, fused)
            layer = types.SimpleNamespace(
                hc_ffn_fn=mixing["fn"],
                hc_ffn_scale=mixing["hc_scale"],
                hc_ffn_base=mixing["hc_base"],
                config=types.SimpleNamespace(
                    hc_mult=HC_MULT, rms_norm_eps=EPS, hc_eps=EPS, hc_sinkhorn_iters=20
                ),
            )
            y, streams, comb, mix, normed = sglang.glm_hc_ffn_post_pre(
                layer, post["x"], post["residual"].flatten(1), post["comb_res_mix"].flatten(1),
                post["post_layer_mix"].flatten(1), mixing["norm_weight"], mixing["norm_eps"],
            )  # fmt: skip
            assert normed is fused
            got = (
                streams.view(tokens, HC_MULT, 4096),
                mix.view(tokens, HC_MULT, 1),
                comb.view(tokens, HC_MULT, HC_MULT),
                y,
            )
            assert_matches_oracle("fused_post_pre", post | mixing, got)


class TestVLLM:
    """Take streams of size 1, a projection of 1e-4 that differs by stream, a post factor of 1."""

    TOKENS = (1, 4, 8, 128)

    @staticmethod
    def post(tokens, hidden, device):
        return {
            "x": torch.randn(tokens, hidden, device=device).bfloat16(),
            "residual": torch.randn(tokens, HC_MULT, hidden, device=device).bfloat16(),
            "post_layer_mix": torch.randn(tokens, HC_MULT, 1, device=device),
            "comb_res_mix": torch.randn(tokens, HC_MULT, HC_MULT, device=device),
        }

    @staticmethod
    def mixing(hidden, device, fused=False):
        by_stream = 1 + torch.arange(HC_MULT, device=device).mul(0.01).view(1, -1, 1)
        fn = torch.randn(24, HC_MULT, hidden, device=device) * 1e-4 * by_stream
        return {
            "fn": fn.flatten(1),
            "hc_scale": torch.randn(3, device=device) * 0.1,
            "hc_base": torch.randn(24, device=device) * 0.1,
            "rms_eps": EPS,
            "hc_pre_eps": EPS,
            "hc_sinkhorn_eps": EPS,
            "hc_post_mult_value": 1.0,
            "sinkhorn_repeat": 20,
        } | norm_of(hidden, device, fused)

    @pytest.mark.parametrize("hidden", [4096, 7168])
    def test_each_function(self, hidden, device):
        for tokens in self.TOKENS:
            post = self.post(tokens, hidden, device)
            assert_matches_oracle("post", post, vllm.mhc_post_tilelang(**post))
            streams = {"residual": post["residual"]}
            for fused in (False, True):
                mixing = self.mixing(hidden, device, fused)
                # norm_eps is a number in vLLM even without a norm.
                given = mixing | ({} if fused else {"norm_eps": EPS})
                got = vllm.mhc_pre_tilelang(**streams, **given)
                assert_matches_oracle("pre", streams | mixing, got)
                got = vllm.mhc_fused_post_pre_tilelang(**post, **given)
                assert_matches_oracle("fused_post_pre", post | mixing, got)
                got = vllm.mhc_pre_broadcast_tilelang(post["x"], **given)
                assert_matches_oracle("expand_pre", {"x": post["x"]} | mixing, got)
            head = {
                "fn": torch.randn(HC_MULT, HC_MULT * hidden, device=device) * 1e-4,
                "scale": torch.randn(1, device=device) * 0.1,
                "base": torch.randn(HC_MULT, device=device) * 0.1,
                "rms_eps": EPS,
                "hc_eps": EPS,
            }
            got = vllm.hc_head_fused_kernel_tilelang(post["residual"], *head.values())
            assert_matches_oracle("head", streams | head, got)

    def test_pre_gives_a_token_the_same_bits_in_any_batch(self, device):
        mixing = self.mixing(4096, device, fused=True)
        pool = torch.randn(2048, HC_MULT, 4096, device=device).bfloat16()
        want = vllm.mhc_pre_tilelang(pool[:1].clone(), **mixing)
        tokens = (1, 2, 7, 63, 64, 65, 127, 128, 129, 511, 512, 1000)
        for count in tokens if device == "cuda" else tokens[:6]:
            for position in sorted({0, count // 2, count - 1}):
                filler = pool[1:count]
                batch = torch.cat([filler[:position], pool[:1], filler[position:]])
                got = vllm.mhc_pre_tilelang(batch, **mixing)
                assert_equal(
                    as_outputs("pre", tuple(out[position : position + 1] for out in got)),
                    as_outputs("pre", want),
                )

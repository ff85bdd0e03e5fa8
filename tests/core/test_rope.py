"""Rotary embeddings: the formulas of transformers, and what is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from qwen_rt.errors import CheckpointError
from qwen_rt.spec import ModelSpec, RopeSpec

from .configs import YARN, config_with


class TestRope:
    def test_default_by_hand(self) -> None:
        inv_freq = RopeSpec(theta=10_000.0).inv_freq(8)
        assert inv_freq.dtype == np.float32
        np.testing.assert_array_equal(inv_freq, np.array([1.0, 0.1, 0.01, 0.001], np.float32))
        assert RopeSpec().attention_scaling == 1.0

    def test_linear_by_hand(self) -> None:
        rope = RopeSpec(theta=10_000.0, kind="linear", factor=4.0)
        np.testing.assert_array_equal(rope.inv_freq(8), np.array([0.25, 0.025, 0.0025, 0.00025], np.float32))
        assert rope.attention_scaling == 1.0

    def test_yarn_by_hand(self) -> None:
        # D=8, theta 10^4, 4096 positions: dimension(32 turns) = 8 ln(4096/64π) / (2 ln 10^4) = 1.308 → low 1,
        # dimension(1 turn) = 8 ln(4096/2π) / (2 ln 10^4) = 2.814 → high 3; ramp over pairs 0..3: 0, 0, 1/2, 1.
        rope = RopeSpec(theta=10_000.0, kind="yarn", factor=4.0, original_max_position_embeddings=4096)
        expected = [1.0, 0.1, 0.01 * (0.5 + 0.5 / 4), 0.001 / 4]
        np.testing.assert_allclose(rope.inv_freq(8), expected, rtol=1e-7)
        assert rope.attention_scaling == pytest.approx(0.1 * math.log(4.0) + 1.0)

    def test_yarn_without_truncation(self) -> None:
        rope = RopeSpec(kind="yarn", factor=4.0, original_max_position_embeddings=4096, truncate=False)
        low = 8 * math.log(4096 / (64 * math.pi)) / (2 * math.log(10_000))
        high = 8 * math.log(4096 / (2 * math.pi)) / (2 * math.log(10_000))
        ramp = (2 - low) / (high - low)
        assert rope.inv_freq(8)[2] == pytest.approx(0.01 * ((1 - ramp) + ramp / 4), rel=1e-6)

    @pytest.mark.parametrize(
        ("keys", "scaling"),
        [
            ({"attention_factor": 1.5}, 1.5),
            ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
            ({"mscale": 0.5, "mscale_all_dim": 2.0}, (0.05 * math.log(4) + 1) / (0.2 * math.log(4) + 1)),
            ({"mscale": 0.5}, 0.1 * math.log(4) + 1),
        ],
    )
    def test_yarn_attention_scaling(self, keys: dict[str, float], scaling: float) -> None:
        spec = ModelSpec.from_config(config_with(rope_scaling={**YARN, **keys}))
        assert spec.rope.attention_scaling == pytest.approx(scaling)

    @pytest.mark.parametrize("theta", [10_000.0, 1_000_000.0, 500_000])
    @pytest.mark.parametrize("head_dim", [2, 64, 128])
    @pytest.mark.parametrize(
        "scaling",
        [
            None,
            {"rope_type": "default"},
            {"rope_type": "linear", "factor": 8.0},
            YARN,
            {"rope_type": "yarn", "factor": 2, "beta_fast": 16, "beta_slow": 2.0},
            {**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.707, "truncate": False},
            {**YARN, "attention_factor": 1.25, "original_max_position_embeddings": 64},
            {**YARN, "factor": 1.0, "beta_fast": None},
            {**YARN, "factor": None, "original_max_position_embeddings": 8192},
        ],
    )
    def test_same_as_transformers(self, theta: float, head_dim: int, scaling: dict[str, Any] | None) -> None:
        import transformers
        from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

        config = config_with(
            max_position_embeddings=32768, rope_theta=theta, head_dim=head_dim, rope_scaling=scaling, torch_dtype=...
        )
        module = Qwen2RotaryEmbedding(transformers.Qwen2Config(**json.loads(json.dumps(config))))
        rope = ModelSpec.from_config(config).rope
        # Theirs is computed in float32: a pow, a division and a blend of two, a few units in the last place.
        np.testing.assert_allclose(rope.inv_freq(head_dim), module.inv_freq.numpy(), rtol=1e-6, atol=0)
        assert rope.attention_scaling == pytest.approx(module.attention_scaling, rel=1e-12)

    def test_context_length_with_yarn(self) -> None:
        spec = ModelSpec.from_config(config_with(max_position_embeddings=32768, rope_scaling=YARN))
        assert (spec.max_position_embeddings, spec.context_length) == (32768, 131072)

    def test_original_positions_from_the_top_level(self) -> None:
        config = config_with(
            rope_scaling={"type": "yarn", "factor": 4.0},
            original_max_position_embeddings=1024,
            max_position_embeddings=4096,
        )
        assert ModelSpec.from_config(config).rope.original_max_position_embeddings == 1024

    @pytest.mark.parametrize("head_dim", [0, -2, True, 2.0, 1 << 20, 10**30])
    def test_head_dim_is_bounded(self, head_dim: Any) -> None:
        with pytest.raises(CheckpointError, match="head_dim="):
            RopeSpec().inv_freq(head_dim)

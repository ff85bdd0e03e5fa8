"""What the parity tests can see: every mistake of the kind they guard against moves the logits out of tolerance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, Qwen2RotaryEmbedding

from qwen_rt.tolerances import PARITY_RELATIVE_FP32

from ..cases import Zoo
from ..checkpoints import SHAPES, THETA_LONG, THETA_MATH, reference_logits


def _swap_eps(config: Any) -> None:
    config.rms_norm_eps = 1e-6 if config.rms_norm_eps == 1e-5 else 1e-5


def _swap_theta(config: Any) -> None:
    rope = config.rope_parameters
    rope["rope_theta"] = THETA_MATH if rope["rope_theta"] == THETA_LONG else THETA_LONG


def _forget_scaling(config: Any) -> None:
    config.rope_parameters = {"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]}


def _forget_attention_factor(config: Any) -> None:
    config.rope_parameters |= {"attention_factor": 1.0}


SCALED = [name for name, shape in SHAPES.items() if shape.rope["rope_type"] != "default"]
YARN = [name for name in SCALED if name.startswith("yarn")]


def _configure(model: Any, config: Any) -> None:
    """Let a model compute as `config` says, weights as they are."""
    model.model.rotary_emb = Qwen2RotaryEmbedding(config)
    for module in model.modules():
        if isinstance(module, Qwen2RMSNorm):
            module.variance_epsilon = config.rms_norm_eps


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *((name, _swap_eps) for name in SHAPES),
        *((name, _swap_theta) for name in SHAPES),
        *((name, _forget_scaling) for name in SCALED),
        *((name, _forget_attention_factor) for name in YARN),
    ],
)
def test_a_wrong_config_value_would_show(zoo: Zoo, name: str, change: Callable[[Any], None]) -> None:
    case = zoo.case(name)
    expected, wrong = case.logits, case.shape.config()
    change(wrong)
    try:
        _configure(case.reference, wrong)
        logits = reference_logits(case.reference, case.ids[None])[0]
    finally:
        _configure(case.reference, case.shape.config())
    _must_differ(logits, expected)
    assert np.array_equal(reference_logits(case.reference, case.ids[None])[0], expected)


@pytest.mark.parametrize("name", ["odd", "one-layer", "yarn", "yarn-mscale", "linear-rope"])
def test_every_tensor_shows(zoo: Zoo, name: str) -> None:
    """Three hundredths off in any one tensor of any layer is out of tolerance."""
    case = zoo.case(name)
    expected = case.logits
    for tensor, weight in case.reference.named_parameters():
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(1.03)
            logits = reference_logits(case.reference, case.ids[None])[0]
            weight.copy_(kept)
        _must_differ(logits, expected, tensor)


def _must_differ(wrong: Any, right: Any, what: str = "") -> None:
    error = float(np.abs(wrong - right).max() / np.abs(right).max())
    assert error > 5 * PARITY_RELATIVE_FP32, f"{what}: only {error:.2g}"

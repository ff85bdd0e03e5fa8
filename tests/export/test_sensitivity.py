"""What the parity tests can see: every mistake of the kind they guard against moves the logits out of tolerance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from qwen_rt.tolerances import PARITY_RELATIVE_FP32
from transformers import Qwen2ForCausalLM

from ..cases import Zoo
from ..checkpoints import SHAPES, THETA_LONG, THETA_MATH, reference_logits

Config = dict[str, Any]


def _swap_eps(config: Config) -> None:
    config["rms_norm_eps"] = 1e-6 if config["rms_norm_eps"] == 1e-5 else 1e-5


def _swap_theta(config: Config) -> None:
    rope = config["rope_parameters"]
    rope["rope_theta"] = THETA_MATH if rope["rope_theta"] == THETA_LONG else THETA_LONG


def _forget_scaling(config: Config) -> None:
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_parameters"]["rope_theta"]}


def _forget_attention_factor(config: Config) -> None:
    config["rope_parameters"] |= {"attention_factor": 1.0}


SCALED = [name for name, shape in SHAPES.items() if shape.rope["rope_type"] != "default"]
YARN = [name for name in SCALED if name.startswith("yarn")]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *((name, _swap_eps) for name in SHAPES),
        *((name, _swap_theta) for name in SHAPES),
        *((name, _forget_scaling) for name in SCALED),
        *((name, _forget_attention_factor) for name in YARN),
    ],
)
def test_a_wrong_config_value_would_show(zoo: Zoo, name: str, change: Callable[[Config], None]) -> None:
    case = zoo.case(name)
    config = case.shape.config().to_dict()
    change(config)
    wrong: Any = Qwen2ForCausalLM(type(case.shape.config())(**config, attn_implementation="eager")).eval()
    wrong.load_state_dict(case.reference.state_dict())
    _must_differ(reference_logits(wrong, case.ids[None])[0], case.logits)


@pytest.mark.parametrize("name", SHAPES)
def test_every_tensor_shows(zoo: Zoo, name: str) -> None:
    """Three hundredths off in any one tensor of any layer is out of tolerance."""
    case = zoo.case(name)
    for tensor, weight in case.reference.named_parameters():
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(1.03)
            logits = reference_logits(case.reference, case.ids[None])[0]
            weight.copy_(kept)
        _must_differ(logits, case.logits, tensor)


def _must_differ(wrong: Any, right: Any, what: str = "") -> None:
    error = float(np.abs(wrong - right).max() / np.abs(right).max())
    assert error > 5 * PARITY_RELATIVE_FP32, f"{what}: only {error:.2g}"

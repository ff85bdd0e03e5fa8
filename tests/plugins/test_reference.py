"""The numpy reference, step by step, against the modules of transformers that it cites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import Qwen2Config
from transformers.models.qwen2 import modeling_qwen2

from qwen_rt.checkpoint import Checkpoint
from qwen_rt.plugins import reference

from ..cases import Zoo
from ..checkpoints import reference_logits
from ..compare import assert_close

# transformers computes in float64 here too, but for what it hard-wires to float32 (norms, rotary tables, softmax).
EXACT, HARDWIRED_FP32 = 1e-13, 1e-6

Normal = Callable[..., NDArray[np.float64]]


@pytest.fixture
def normal() -> Normal:
    rng = np.random.default_rng(0)
    return lambda *shape: rng.standard_normal(shape)


def t(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array))


def test_linear_with_and_without_bias(normal: Normal) -> None:
    x, weight, bias = normal(2, 3, 19), normal(7, 19), normal(7)
    assert_close(reference.linear(x, weight), torch.nn.functional.linear(t(x), t(weight)), relative=EXACT)
    expected = torch.nn.functional.linear(t(x), t(weight), t(bias))
    assert_close(reference.linear(x, weight, bias), expected, relative=EXACT)


@pytest.mark.parametrize("size", [1, 19, 111, 896])
@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_rms_norm(normal: Normal, size: int, eps: float) -> None:
    x, weight = normal(3, 5, size), normal(size)
    module: Any = modeling_qwen2.Qwen2RMSNorm(size, eps).double()
    module.weight.data = t(weight)
    assert_close(reference.rms_norm(x, weight, eps), module(t(x)).detach(), relative=HARDWIRED_FP32)


def test_rms_norm_counts_eps_where_the_row_is_small() -> None:
    x = np.full((1, 4), 1e-3)
    assert_close(reference.rms_norm(x, np.ones(4), 1e-6), x / np.sqrt(2e-6), relative=EXACT)
    assert_close(reference.rms_norm(np.zeros((1, 4)), np.ones(4), 1e-6), np.zeros((1, 4)), relative=0.0)


def test_silu_is_exact_in_both_tails() -> None:
    x = np.array([-1e308, -800.0, -30.0, -1.0, -0.0, 0.0, 1e-300, 1.0, 30.0, 1e308])
    assert_close(reference.silu(x[1:-1]), torch.nn.functional.silu(t(x[1:-1])), relative=EXACT)
    with np.errstate(over="raise"):
        assert reference.silu(x)[[0, -1]].tolist() == [0.0, 1e308]


def test_mlp(normal: Normal) -> None:
    config = Qwen2Config(hidden_size=24, intermediate_size=77)
    module: Any = modeling_qwen2.Qwen2MLP(config).double()  # type: ignore[no-untyped-call]
    x = normal(2, 3, 24)
    weights = [getattr(module, f"{name}_proj").weight.detach().numpy() for name in ("gate", "up", "down")]
    assert_close(reference.mlp(x, *weights), module(t(x)).detach(), relative=EXACT)


@pytest.mark.parametrize("scaling", [1.0, 1.1386])
def test_rotary(normal: Normal, scaling: float) -> None:
    inv_freq = np.array([1.0, 0.3, 0.01, 1e-5])
    positions = np.array([[0, 1, 2], [500, 501, 502]])
    cos, sin = reference.rotary_tables(positions, inv_freq, scaling)
    assert cos.shape == sin.shape == (2, 3, 4)
    assert_close(cos**2 + sin**2, np.full((2, 3, 4), scaling**2), relative=EXACT)
    query, key = normal(2, 3, 3, 8), normal(2, 1, 3, 8)
    full_cos, full_sin = (t(np.concatenate([table, table], -1)) for table in (cos, sin))
    expected = modeling_qwen2.apply_rotary_pos_emb(t(query), t(key), full_cos, full_sin)
    for x, y in zip((query, key), expected, strict=True):
        assert_close(reference.apply_rotary(x, cos, sin), y, relative=EXACT)


def test_rotary_tables_are_those_of_transformers(zoo: Zoo) -> None:
    for name in ("heads-1.5b", "yarn", "yarn-options", "yarn-mscale", "linear-rope"):
        config = zoo.case(name).shape.config()
        spec = Checkpoint.open(zoo.case(name).checkpoint).spec
        positions = np.arange(200)[None]
        cos, sin = modeling_qwen2.Qwen2RotaryEmbedding(config)(torch.zeros(1), t(positions))
        found = reference.rotary_tables(positions, spec.rope.inv_freq(spec.head_dim), spec.rope.attention_scaling)
        half = spec.head_dim // 2
        for ours, theirs in zip(found, (cos, sin), strict=True):  # float32 angles: 200 positions x 2^-23
            assert_close(ours, theirs[..., :half], relative=5e-5, what=name)


def test_write_cache_touches_only_the_new_rows(normal: Normal) -> None:
    cache, new = normal(2, 3, 7, 4), normal(2, 3, 2, 4)
    before = cache.copy()
    written = reference.write_cache(cache, new, [5, 0])
    expected = before.copy()
    expected[0, :, 5:7], expected[1, :, 0:2] = new[0], new[1]
    assert np.array_equal(written, expected)
    assert np.array_equal(cache, before)
    with pytest.raises(IndexError, match="row 0: 2 tokens from 6"):
        reference.write_cache(cache, new, [6, 0])


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_attention_over_a_ragged_cache_full_of_nan(normal: Normal, kv_heads: int) -> None:
    heads, head_dim, capacity, starts = 8, 16, 11, [0, 3, 9]
    query = normal(3, heads, 2, head_dim)
    keys, values = normal(3, kv_heads, capacity, head_dim), normal(3, kv_heads, capacity, head_dim)
    for row, start in enumerate(starts):
        keys[row, :, start + 2 :], values[row, :, start + 2 :] = np.nan, np.nan
    found = reference.attention(query, keys, values, starts, head_dim**-0.5)
    config = Qwen2Config(hidden_size=heads * head_dim, num_attention_heads=heads, num_key_value_heads=kv_heads)
    module = modeling_qwen2.Qwen2Attention(config, 0).eval()
    for row, start in enumerate(starts):
        seen = start + 2
        mask = torch.full((2, seen), -torch.inf, dtype=torch.float64).triu(start + 1)[None, None]
        expected, _ = modeling_qwen2.eager_attention_forward(
            module, t(query[row : row + 1]), t(keys[row : row + 1, :, :seen]), t(values[row : row + 1, :, :seen]),
            mask, scaling=head_dim**-0.5,
        )  # fmt: skip
        assert_close(found[row], expected[0].transpose(0, 1), relative=HARDWIRED_FP32)


@pytest.mark.parametrize("name", ["odd", "yarn", "linear-rope", "one-layer"])
def test_decode_is_the_model_in_one_go_and_in_pieces(zoo: Zoo, name: str) -> None:
    case = zoo.case(name)
    spec = Checkpoint.open(case.checkpoint).spec
    model = case.reference.double()
    expected = reference_logits(model, case.ids[None])[0]
    model.float()
    shape = (1, spec.num_kv_heads, len(case.ids), spec.head_dim)
    keys, values = ([np.full(shape, np.nan)] * spec.num_layers for _ in range(2))
    found, _, _ = reference.decode(spec, case.weights, case.ids[None], keys, values, [0])
    assert_close(found[0], expected, relative=1e-5)
    pieces, start = [], 0
    for stop in (20, 21, 33, len(case.ids)):
        logits, keys, values = reference.decode(spec, case.weights, case.ids[None, start:stop], keys, values, [start])
        pieces.append(logits[0])
        start = stop
    assert_close(np.concatenate(pieces), found[0], relative=1e-12)

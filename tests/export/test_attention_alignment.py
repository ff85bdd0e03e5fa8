"""Why `kv_lengths` counts the padding of a ragged batch: ONNX Attention aligns its mask to the end of the rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper
from onnx.reference import ReferenceEvaluator

B, S, H, HKV, D, T_MAX = 2, 4, 4, 2, 8, 10
Feeds = dict[str, NDArray[np.float32] | NDArray[np.int64]]


def _graph() -> ModelProto:
    """Query over a cache that is complete: what remains of the contract is the mask."""

    def tensor(name: str, shape: list[int], dtype: int = TensorProto.FLOAT) -> object:
        return helper.make_tensor_value_info(name, dtype, shape)

    node = helper.make_node("Attention", ["q", "k", "v", "", "", "", "kv_lengths"], ["out"], is_causal=1)
    inputs = [tensor("q", [B, H, S, D]), tensor("k", [B, HKV, T_MAX, D]), tensor("v", [B, HKV, T_MAX, D])]
    inputs.append(tensor("kv_lengths", [B], TensorProto.INT64))
    graph = helper.make_graph([node], "attention", inputs, [tensor("out", [B, H, S, D])])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


def _expected(feeds: Feeds, starts: list[int]) -> NDArray[np.float64]:
    """Query i of row b sees the cache rows 0 … starts[b] + i."""
    q, k, v = (feeds[name].astype(np.float64) for name in "qkv")
    out = np.zeros((B, H, S, D))
    for b in range(B):
        for h in range(H):
            for i in range(S):
                seen = starts[b] + i + 1
                keys, values = k[b, h // (H // HKV), :seen], v[b, h // (H // HKV), :seen]
                scores = keys @ q[b, h, i] / np.sqrt(D)
                weights = np.exp(scores - scores.max())
                out[b, h, i] = weights @ values / weights.sum()
    return out


@pytest.mark.parametrize("runtime", ["onnxruntime", "reference"])
@pytest.mark.parametrize(("starts", "valid"), [([0, 0], [4, 2]), ([3, 5], [4, 2]), ([3, 5], [1, 3])])
def test_a_ragged_row_must_claim_its_padding(runtime: str, starts: list[int], valid: list[int]) -> None:
    model = _graph()
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    reference = ReferenceEvaluator(model)
    run: Callable[[Feeds], list[NDArray[np.float32]]] = (
        (lambda feeds: session.run(None, feeds))
        if runtime == "onnxruntime"
        else (lambda feeds: reference.run(None, feeds))
    )
    rng = np.random.default_rng(0)
    feeds: Feeds = {"q": rng.standard_normal((B, H, S, D), np.float32)}
    feeds |= {name: rng.standard_normal((B, HKV, T_MAX, D), np.float32) for name in "kv"}
    expected = _expected(feeds, starts)

    def worst(kv_lengths: list[int]) -> float:
        out = run(feeds | {"kv_lengths": np.array(kv_lengths, np.int64)})[0]
        return max(float(np.abs(out[b, :, : valid[b]] - expected[b, :, : valid[b]]).max()) for b in range(B))

    assert worst([start + S for start in starts]) < 1e-6
    assert worst([start + count for start, count in zip(starts, valid, strict=True)]) > 0.1

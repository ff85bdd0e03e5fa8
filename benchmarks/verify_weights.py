"""The weights of a quantized bundle beside its checkpoint's: the gate once more, on the text of `qwen-rt verify`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_rt.bundle import Bundle
from qwen_rt.checkpoint import Checkpoint
from qwen_rt.gate_result import GateResult
from qwen_rt.row_reader import CheckpointRows, StoredRows

__all__ = ["compare_weights"]


def compare_weights(
    bundle: Bundle, checkpoint: Checkpoint, ids: Sequence[int], quiet: bool = False
) -> tuple[GateResult, NDArray[np.float32]]:
    """Run the gate on a quantized bundle.

    Args:
        bundle: The bundle, quantized in its matrices, its cache or both.
        checkpoint: Its source.
        ids: The text.
        quiet: No progress.

    Returns:
        What the gate found, and logits of every position that the bundle's own weights and cache give in float32,
        f32[T, V]: what its runtime should come to.
    """
    from qwen_rt.export.quantize.gate import run_gate

    quantization = bundle.manifest.quantization
    schemes = {} if quantization is None else quantization.weights
    kept: list[NDArray[np.float32]] = []

    def keep(_: Any, own: Any) -> None:
        kept.append(own.numpy())

    with CheckpointRows(checkpoint) as source, StoredRows(bundle.tensors(), schemes) as stored:
        result = run_gate(
            source,
            stored,
            checkpoint.spec,
            ids,
            schemes,
            None if quantization is None else quantization.kv_format,
            text="the text",
            take_logits=keep,
            quiet=quiet,
        )
    return result, kept[0]

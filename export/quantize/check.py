"""The gate on what a build has just written, read back from its files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qwen_rt.checkpoint import Checkpoint
from qwen_rt.export.portable import WeightLocation
from qwen_rt.export.quantize.gate import run_gate
from qwen_rt.export.quantize.gate_text import gate_tokens
from qwen_rt.export.quantize.prepare import Prepared
from qwen_rt.gate_result import GateResult
from qwen_rt.row_reader import StoredRows
from qwen_rt.safetensors_header import TensorRef

__all__ = ["check_weights"]


def check_weights(
    checkpoint: Checkpoint,
    prepared: Prepared,
    kv_format: str | None,
    stage: Path,
    locations: Mapping[str, WeightLocation],
    quiet: bool = False,
) -> GateResult:
    """Compare a quantized model with the checkpoint, layer by layer, in bounded memory.

    Args:
        checkpoint: The source.
        prepared: What was stored how.
        kv_format: Of the cache, or None.
        stage: The folder that the weights' places are relative to, where they are not absolute.
        locations: Where every parameter and part lies.
        quiet: No progress.

    Returns:
        Errors and verdict; what is out of limits is told by the result, not raised.

    Raises:
        CheckpointError: A parameter is missing or of another shape, or tokenizer.json is malformed.
        StorageError: A file cannot be read.
    """
    refs = {
        name: TensorRef(name, place.dtype, place.shape, stage / place.file, place.offset, place.nbytes)
        for name, place in locations.items()
    }
    token_ids, text = gate_tokens(checkpoint.path, checkpoint.spec)
    with StoredRows(refs, prepared.schemes) as stored:
        return run_gate(
            prepared.rows,
            stored,
            checkpoint.spec,
            token_ids,
            prepared.schemes,
            kv_format,
            text=text,
            quiet=quiet,
        )

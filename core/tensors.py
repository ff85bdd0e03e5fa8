"""Names, dtypes and shapes of every tensor that crosses a graph boundary: the contract of exporter and runtime.

Legend, used in every docstring of the project:

    B batch rows      S tokens per row in this call    T valid rows of the KV cache    Tmax rows allocated
    H attention heads Hkv key/value heads              D head dim                      C hidden size
    F MLP intermediate size                            V rows of the embedding         L decoder layers

| tensor                     | dtype     | shape             | meaning                                             |
|----------------------------|-----------|-------------------|-----------------------------------------------------|
| `input_ids`                | int64     | [B, S]            | S tokens per row, right-padded                      |
| `past_key_values.{i}.key`  | KV dtype  | [B, Hkv, Tmax, D] | the whole cache of layer i, allocated once          |
| `past_key_values.{i}.value`| KV dtype  | [B, Hkv, Tmax, D] |                                                     |
| `write_indices`            | int64     | [B]               | cache row of the first token, which is its position |
| `kv_lengths`               | int64     | [B]               | `write_indices + S`: cache rows after the write     |
| `logits_indices`           | int64     | [B]               | the one token of each row whose logits are wanted   |
| `logits`                   | float32   | [B, V]            |                                                     |
| `present.{i}.key`/`.value` | KV dtype  | [B, Hkv, Tmax, D] | the same memory as the past tensors                 |

`kv_lengths` counts the padding of a ragged batch too. ONNX `Attention` aligns its causal mask to the end of the valid
rows, so a row with fewer valid tokens than S must still claim S; its surplus cache rows hold values that no valid
query can see, and the next call overwrites them, because it writes at the row's true length.
"""

from __future__ import annotations

__all__ = [
    "INPUT_IDS",
    "KV_LENGTHS",
    "LOGITS",
    "LOGITS_INDICES",
    "WRITE_INDICES",
    "past_key",
    "past_value",
    "present_key",
    "present_value",
]

INPUT_IDS = "input_ids"
WRITE_INDICES = "write_indices"
KV_LENGTHS = "kv_lengths"
LOGITS_INDICES = "logits_indices"
LOGITS = "logits"


def past_key(layer: int) -> str:
    """Name of the key cache that layer `layer` reads: KV dtype [B, Hkv, Tmax, D]."""
    return f"past_key_values.{layer}.key"


def past_value(layer: int) -> str:
    """Name of the value cache that layer `layer` reads: KV dtype [B, Hkv, Tmax, D]."""
    return f"past_key_values.{layer}.value"


def present_key(layer: int) -> str:
    """Name of the key cache that layer `layer` has written: aliases `past_key(layer)`."""
    return f"present.{layer}.key"


def present_value(layer: int) -> str:
    """Name of the value cache that layer `layer` has written: aliases `past_value(layer)`."""
    return f"present.{layer}.value"

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

Graphs of target `cuda` keep keys and values in blocks of `qwen_rt.ops.BLOCK_SIZE` tokens and take the tokens of all
sequences behind each other, without padding:

    R tokens of all sequences in this call   B sequences   W workspace bytes   blocks: of the cache, block 0 is scratch

| tensor                     | dtype     | shape               | meaning                                              |
|----------------------------|-----------|---------------------|------------------------------------------------------|
| `input_ids`                | int64     | [R]                 | R = B: a decode step, one token for each sequence    |
| `positions`                | int64     | [R]                 | place of each token in its sequence                  |
| `query_starts`             | int32     | [B + 1]             | first token of each sequence, then R                 |
| `block_tables`             | int32     | [B, max_blocks]     | cache block of tokens 64 i … 64 i + 63               |
| `logits_indices`           | int64     | [B]                 | the token of each sequence whose logits are wanted   |
| `workspace`                | uint8     | [W]                 | `qwen_rt.ops.COUNTER_BYTES` zeros, then scratch      |
| `past_key_values.{i}.key`  | bfloat16  | [blocks, Hkv, 64, D]| the whole pool of layer i                            |
| `past_key_values.{i}.value`| bfloat16  | [blocks, Hkv, 64, D]|                                                      |
| `logits`                   | float32   | [B, V]              |                                                      |
| `present.{i}.key`/`.value` | bfloat16  | as past             | the same memory as the past tensors                  |

With a quantized KV cache the pools are float8e4m3fn or int8, and each has scales, one for every token and head:

| tensor                           | dtype   | shape             | meaning                                          |
|----------------------------------|---------|-------------------|--------------------------------------------------|
| `past_key_values.{i}.key_scale`  | float32 | [blocks, Hkv, 64] | what the stored numbers of a key are to be       |
| `past_key_values.{i}.value_scale`| float32 | [blocks, Hkv, 64] | multiplied by (`qwen_rt.quantization`)           |
| `present.{i}.key_scale`, …       | float32 | as past           | the same memory as the past tensors              |

Graphs and engines of targets `tensorrt` and `tensorrt-rtx` have the tensors of the first table, with these differences:

- The KV dtype is that of the activations: bfloat16, float16 or float32. Tmax is fixed when the engine is built.
- `kv_lengths` may be the number of valid rows after the write as well as `write_indices + S`; 0 in an idle row. A token
  sees no row behind its own position either way.
- Every row of a call is written to, also an idle one: `write_indices[b] + S <= Tmax` holds for all b.
- The caches hold finite numbers from the start (zeros): a hidden row has weight 0, and 0 · NaN is NaN.
- One rank of several (tensor parallel) has Hkv / ranks heads in its caches, at least one; the rest is the same.
"""

from __future__ import annotations

__all__ = [
    "BLOCK_TABLES",
    "INPUT_IDS",
    "KV_LENGTHS",
    "LOGITS",
    "LOGITS_INDICES",
    "POSITIONS",
    "QUERY_STARTS",
    "WORKSPACE",
    "WRITE_INDICES",
    "past_key",
    "past_key_scale",
    "past_value",
    "past_value_scale",
    "present_key",
    "present_key_scale",
    "present_value",
    "present_value_scale",
]

INPUT_IDS = "input_ids"
WRITE_INDICES = "write_indices"
KV_LENGTHS = "kv_lengths"
LOGITS_INDICES = "logits_indices"
LOGITS = "logits"
POSITIONS = "positions"
QUERY_STARTS = "query_starts"
BLOCK_TABLES = "block_tables"
WORKSPACE = "workspace"


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


def past_key_scale(layer: int) -> str:
    """Name of the scales of a quantized key cache: float32 [blocks, Hkv, 64]."""
    return f"{past_key(layer)}_scale"


def past_value_scale(layer: int) -> str:
    """Name of the scales of a quantized value cache: float32 [blocks, Hkv, 64]."""
    return f"{past_value(layer)}_scale"


def present_key_scale(layer: int) -> str:
    """Name of the key scales that layer `layer` has written: aliases `past_key_scale(layer)`."""
    return f"{present_key(layer)}_scale"


def present_value_scale(layer: int) -> str:
    """Name of the value scales that layer `layer` has written: aliases `past_value_scale(layer)`."""
    return f"{present_value(layer)}_scale"

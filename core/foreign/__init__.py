"""Quantized checkpoints as other tools write them: found by their config, checked, and repacked without requantizing.

config.json ──► config.py ──► gptq.py · awq.py · compressed_tensors.py · fp8.py ──► QuantizedTensor
                which method    how one matrix is stored, and what it becomes         qwen_rt.quantization
"""

from __future__ import annotations

from qwen_rt.foreign.config import read_quantization
from qwen_rt.foreign.matrix import ForeignMatrix, Quantization, find_matrices

__all__ = ["ForeignMatrix", "Quantization", "find_matrices", "read_quantization"]

"""qwen-rt: compile Qwen2 / Qwen2-Math checkpoints into bundles and run them.

from qwen_rt import LLM

llm = LLM("BUNDLE")
print(llm.chat([{"role": "user", "content": "What is 17 + 25?"}]).text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qwen_rt._version import __version__
from qwen_rt.errors import QwenRtError

if TYPE_CHECKING:
    from qwen_rt.runtime.llm import LLM
    from qwen_rt.runtime.outputs import RequestOutput, StreamChunk
    from qwen_rt.runtime.sampling_params import SamplingParams

__all__ = ["LLM", "QwenRtError", "RequestOutput", "SamplingParams", "StreamChunk", "__version__"]

_LAZY = {
    "LLM": "qwen_rt.runtime.llm",
    "RequestOutput": "qwen_rt.runtime.outputs",
    "SamplingParams": "qwen_rt.runtime.sampling_params",
    "StreamChunk": "qwen_rt.runtime.outputs",
}


def __getattr__(name: str) -> Any:
    """Import the runtime on first use: `import qwen_rt` alone loads neither ONNX Runtime nor the tokenizer."""
    if name not in _LAZY:
        raise AttributeError(f"module 'qwen_rt' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    """Names for completion."""
    return sorted(__all__)

"""A bundle of target cuda without a GPU: nano's, run by the numpy executor in the place of `CudaSession`."""

from __future__ import annotations

import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qwen_rt.bundle import Bundle
from qwen_rt.checkpoint import Checkpoint
from qwen_rt.runtime.cuda.sampling import edits_of
from qwen_rt.runtime.sampling_params import SamplingParams

from ..cli.kit import edit_manifest
from .numpy_executor import NumpyExecutor, weights_of

KV_BYTES_PER_BLOCK = 16 * 4096  # what a block is taken to cost

_weights: dict[Path, dict[str, Any]] = {}


def as_cuda(bundle: Path, folder: Path) -> Path:
    """Copy a CPU bundle and call it one of target cuda."""
    shutil.copytree(bundle, folder)
    edit_manifest(folder, lambda document: document.update(target="cuda"))
    return folder


class NumpyCudaSession(NumpyExecutor):
    """`CudaSession` as far as `LLM` uses it; `made` lists those of a test."""

    made: list[NumpyCudaSession]

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: int = 0,
        kv_memory: int | None = None,
        max_rows: int = 64,
        chunk_tokens: int = 64,
        num_tokens: int | None = None,
        quiet: bool = False,
    ) -> None:
        path = Path(bundle.manifest.checkpoint.path)
        if path not in _weights:
            _weights[path] = weights_of(Checkpoint.open(path))
        self.options = {"device": device, "kv_memory": kv_memory, "quiet": quiet}
        super().__init__(
            bundle.manifest.model,
            _weights[path],
            max_length=bundle.manifest.max_length,
            num_blocks=400 if kv_memory is None else kv_memory // KV_BYTES_PER_BLOCK,
            max_rows=max_rows,
            chunk_tokens=chunk_tokens,
            num_tokens=num_tokens,
        )
        self._num_tokens = self.spec.vocab_size if num_tokens is None else num_tokens
        type(self).made.append(self)

    def read_logits(self, num_rows: int) -> NDArray[np.float32]:
        return self.logits[:num_rows].astype(np.float32)

    def check_params(self, params: SamplingParams) -> None:
        edits_of(params, self._num_tokens)


def install(monkeypatch: pytest.MonkeyPatch) -> list[NumpyCudaSession]:
    """Let `LLM` find it; returns the list of the sessions that will be made."""
    module = types.ModuleType("qwen_rt.runtime.cuda.session")
    module.CudaSession = NumpyCudaSession  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    NumpyCudaSession.made = []
    return NumpyCudaSession.made

"""A bundle's graph on ONNX Runtime's CPU provider: tokens and a cache in, logits out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from qwen_rt import tensors
from qwen_rt.bundle import Bundle
from qwen_rt.errors import BundleError, QwenRtError
from qwen_rt.runtime.kv_cache import KVCache

__all__ = ["CpuSession"]

_MAX_BINDINGS = 8  # of a cache


class CpuSession:
    """One loaded graph.

    Args:
        bundle: An opened bundle of target `cpu`.
        num_threads: Threads for one operator; 0 lets ONNX Runtime take every core.

    Raises:
        BundleError: The bundle is of another target, or ONNX Runtime refuses its graph.
    """

    def __init__(self, bundle: Bundle, num_threads: int = 0) -> None:
        manifest = bundle.manifest
        if manifest.target != "cpu":
            raise BundleError(
                f"{bundle.path} has target {manifest.target}",
                "a bundle of target cpu",
                f"build one: qwen-rt build {manifest.checkpoint.path} -o BUNDLE",
            )
        self.spec = manifest.model
        self.max_length = manifest.max_length
        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.log_severity_level = 3
        try:
            graph, _mapped = _load_graph(bundle, options)  # mapped files have to outlive the loading
            self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions share no base class but Exception
            raise BundleError(
                f"ONNX Runtime {ort.__version__} refuses the graph of {bundle.path}: {error}",
                fix="build the bundle again, or install another onnxruntime",
            ) from None
        self._bindings: WeakKeyDictionary[KVCache, dict[tuple[int, int, int], _Binding]] = WeakKeyDictionary()

    def new_cache(self, num_rows: int, capacity: int) -> KVCache:
        """Allocate a cache for `num_rows` sequences of up to `capacity` tokens."""
        return KVCache(self.spec, num_rows, capacity)

    def run(
        self,
        cache: KVCache,
        first_row: int,
        input_ids: NDArray[np.int64],
        write_indices: NDArray[np.int64],
        logits_indices: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        """Run the model over new tokens and write their keys and values into the cache: see `SlotSession.run`.

        Returns:
            Logits, float32[B, V]. The buffer is reused by the next call of the same shape: copy what must stay.

        Raises:
            QwenRtError: ONNX Runtime fails.
        """
        batch, num_tokens = input_ids.shape
        bindings = self._bindings.setdefault(cache, {})
        key = (first_row, batch, num_tokens)
        binding = bindings.get(key)
        if binding is None:
            while len(bindings) >= _MAX_BINDINGS:
                bindings.pop(next(iter(bindings)))
            binding = bindings[key] = _Binding(self._session, self.spec.vocab_size, cache, *key)
        binding.input_ids[:] = input_ids
        binding.write_indices[:] = write_indices
        np.add(write_indices, num_tokens, out=binding.kv_lengths)
        binding.logits_indices[:] = logits_indices
        try:
            self._session.run_with_iobinding(binding.io)
        except Exception as error:
            raise QwenRtError(f"ONNX Runtime failed in a step of {batch} x {num_tokens} tokens: {error}") from None
        return binding.logits


class _Binding:
    """Inputs and outputs of one call shape, bound once: a decode step writes a few integers and runs.

    It holds the cache's buffers but not the cache, so that both go when the caller drops the cache.
    """

    def __init__(
        self, session: ort.InferenceSession, vocab_size: int, cache: KVCache, first_row: int, batch: int, tokens: int
    ) -> None:
        self.input_ids = np.zeros((batch, tokens), np.int64)
        self.write_indices = np.zeros(batch, np.int64)
        self.kv_lengths = np.zeros(batch, np.int64)
        self.logits_indices = np.zeros(batch, np.int64)
        self.logits = np.empty((batch, vocab_size), np.float32)
        self.io = session.io_binding()
        inputs = {
            tensors.INPUT_IDS: self.input_ids,
            tensors.WRITE_INDICES: self.write_indices,
            tensors.KV_LENGTHS: self.kv_lengths,
            tensors.LOGITS_INDICES: self.logits_indices,
        }
        for name, array in inputs.items():
            self.io.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        self.io.bind_ortvalue_output(tensors.LOGITS, ort.OrtValue.ortvalue_from_numpy(self.logits))
        for past, present, rows in cache.rows(first_row, first_row + batch):
            shared = ort.OrtValue.ortvalue_from_numpy(rows)  # past and present in the same memory: nothing is copied
            self.io.bind_ortvalue_input(past, shared)
            self.io.bind_ortvalue_output(present, shared)


def _load_graph(bundle: Bundle, options: ort.SessionOptions) -> tuple[bytes, list[NDArray[np.uint8]]]:
    """Return the graph with its references resolved to the real files, and tell ONNX Runtime where those are.

    Returns also the mapped files that ONNX Runtime reads while it makes the session; it holds no reference to them.

    ONNX Runtime reads external weights one tensor at a time from one folder, and refuses links that leave it. So
    references become real file names; where the files lie in several folders they are mapped and handed over by the
    names that they have in the graph, which holds the stored weights once more while the session is made.
    """
    data = bundle.graph_file.read_bytes()
    files = bundle.weight_files
    if not files:
        return data, []
    folders = {real.parent for real in files.values()}
    if len(folders) > 1:
        return data, _hand_over(files, options)
    key = "session.model_external_initializers_file_folder_path"
    options.add_session_config_entry(key, str(folders.pop()))
    renamed = {name: real.name for name, real in files.items()}
    if any(name != new for name, new in renamed.items()):
        data = _rename_references(data, renamed)
    return data, []


def _rename_references(data: bytes, renamed: Mapping[str, str]) -> bytes:
    import onnx  # only for checkpoints behind links: loading it takes longer than a small session

    model = onnx.ModelProto.FromString(data)
    for initializer in model.graph.initializer:
        for entry in initializer.external_data:
            if entry.key == "location":
                entry.value = renamed.get(entry.value, entry.value)
    renamed_graph: bytes = model.SerializeToString()
    return renamed_graph


def _hand_over(files: Mapping[str, Path], options: ort.SessionOptions) -> list[NDArray[np.uint8]]:
    arrays: list[NDArray[np.uint8]] = [np.memmap(real, np.uint8, mode="r") for real in files.values()]
    options.add_external_initializers_from_files_in_memory(list(files), arrays, [array.size for array in arrays])
    return arrays

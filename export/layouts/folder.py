"""Write the folder of a layout: one graph, the checkpoint's shards beside it as hard links, its text files."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_rt import errors
from qwen_rt._version import __version__
from qwen_rt.bundle import TEXT_FILES
from qwen_rt.checkpoint import LAYOUT_FILE
from qwen_rt.disk import device_error, require_free_space, storage_errors
from qwen_rt.errors import CheckpointError, StorageError, UnsupportedModelError, UsageError
from qwen_rt.export.layouts.genai_config import genai_config
from qwen_rt.export.layouts.graph import lower_layout
from qwen_rt.export.lower import graph_bytes
from qwen_rt.export.portable import WeightLocation, checkpoint_locations, portable_graph
from qwen_rt.export.source import Source, open_source, refuse_overlap
from qwen_rt.export.weights import copy_file
from qwen_rt.progress import progress
from qwen_rt.storage import StagedDirectory, atomic_write_bytes

__all__ = ["LAYOUTS", "LayoutReport", "export_layout"]

LAYOUTS = ("optimum", "genai")

_GRAPH_FILE = "model.onnx"
_GENAI_FILE = "genai_config.json"
_TOKENIZER = "tokenizer.json"
_PACKAGE = Path(errors.__file__).resolve().parent  # has the nano checkpoint; onnx refuses files with several names
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)


@dataclass(frozen=True)
class LayoutReport:
    """What was written.

    Attributes:
        layout: Which.
        num_layers: Of the model.
        own_nbytes: Bytes of graph and text files.
        linked_nbytes, copied_nbytes: Bytes of the shards that are hard links, and of those that are copies.
        copied_because: Why shards were copied though nobody asked for it; empty if none was.
    """

    layout: str
    num_layers: int
    own_nbytes: int
    linked_nbytes: int
    copied_nbytes: int
    copied_because: str = ""


def export_layout(
    source: str | Path,
    out: str | Path,
    layout: str,
    *,
    max_length: int | None = None,
    self_contained: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> LayoutReport:
    """Write a folder that another runtime loads.

        OUT/model.onnx                    float32 compute; the inputs and outputs of `layouts.graph`
        OUT/*.safetensors                 the shards that the graph refers to: hard links, no second copy
        OUT/config.json, tokenizer.json … the checkpoint's text files
        OUT/genai_config.json             layout `genai` alone
        OUT/qwen_rt_layout.json           what wrote the folder, and from what

    ONNX Runtime reads external data only below the folder of the graph, and follows no symbolic link out of it: hence
    the hard links. Where the file system refuses them, shards are copied, and the report says why.

    Args:
        source: Checkpoint folder, `nano`, or a portable graph's folder.
        out: Folder to make; until it is whole it is not there.
        layout: One of `LAYOUTS`.
        max_length: Positions that the graph can reach; None for the model's context length.
        self_contained: Copy the shards, so that the folder shares nothing with the checkpoint.
        overwrite: Replace an earlier folder of a layout.
        quiet: No progress on stderr.

    Raises:
        UsageError: An option that does not fit the model.
        CheckpointError, UnsupportedModelError: The checkpoint cannot be read, or lacks what the layout needs.
        StorageError: The folder cannot be written. As after any error, nothing of it stays.
    """
    opened = open_source(source)
    length = _check(opened, layout, max_length)
    refuse_overlap(opened, Path(out))
    with StagedDirectory(Path(out), overwrite=overwrite, marker=LAYOUT_FILE) as stage:
        try:
            for child in stage.path.iterdir():  # of an export that was killed: cheap to make anew
                shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
            report = _write(opened, stage.path, layout, length, self_contained, quiet)
            stage.commit()
        except BaseException as error:
            with contextlib.suppress(StorageError, RuntimeError):
                stage.abandon()
            if refused := device_error(error, Path(out)):
                raise refused from error
            raise
    return report


def _check(source: Source, layout: str, max_length: int | None) -> int:
    """Refuse what the layout cannot hold; returns the positions that the graph can reach."""
    checkpoint, spec = source.checkpoint, source.checkpoint.spec
    if layout not in LAYOUTS:
        raise UsageError(f"layout={layout}", f"one of {', '.join(LAYOUTS)}")
    if checkpoint.quantized:
        raise UnsupportedModelError(
            f"{checkpoint.path} is quantized",
            f"a checkpoint of floats for --layout {layout}",
            "build a bundle from it: qwen-rt build",
        )
    if not (checkpoint.path / _TOKENIZER).is_file():
        raise CheckpointError(
            f"{checkpoint.path} has no {_TOKENIZER}",
            f"a checkpoint with its tokenizer for --layout {layout}",
            "add the tokenizer files",
        )
    if layout == "optimum" and spec.head_dim * spec.num_heads != spec.hidden_size:
        raise UnsupportedModelError(
            f"head_dim={spec.head_dim} with {spec.num_heads} heads and hidden_size={spec.hidden_size}",
            "hidden_size / heads, which optimum takes for granted",
            "use --layout genai",
        )
    limit = spec.context_length
    length = limit if max_length is None else max_length
    if not 1 <= length <= limit:
        raise UsageError(
            f"max-length={length}",
            f"1 to {limit}, the model's context length",
            f"choose a {'smaller' if length > limit else 'larger'} --max-length",
        )
    return length


def _write(source: Source, stage: Path, layout: str, length: int, self_contained: bool, quiet: bool) -> LayoutReport:
    checkpoint = source.checkpoint
    with progress(1, f"graph of {checkpoint.spec.num_layers} layers", quiet=quiet) as bar:
        locations = checkpoint_locations(checkpoint)
        model = portable_graph(checkpoint, "float32", locations, source.load_graph())
        atomic_write_bytes(stage / _GRAPH_FILE, graph_bytes(lower_layout(model, checkpoint.spec, length)))
        bar.update(1)
    for name in TEXT_FILES:
        if (checkpoint.path / name).is_file():
            copy_file(checkpoint.path / name, stage / name)
    if layout == "genai":
        settings = checkpoint.generation_config
        document = genai_config(checkpoint.spec, checkpoint.config, settings, length, _GRAPH_FILE)
        atomic_write_bytes(stage / _GENAI_FILE, _json_bytes(document))
    own = sum(file.stat().st_size for file in stage.iterdir())
    linked, copied, why = _place_shards(locations, stage, self_contained, quiet)
    note = {
        "format": "qwen-rt-layout",
        "layout": layout,
        "qwen_rt": __version__,
        "checkpoint": {"path": source.origin, "fingerprint": source.fingerprint},
        "max_length": length,
        "shards": {"linked": sorted(linked), "copied": sorted(copied)},
    }
    atomic_write_bytes(stage / LAYOUT_FILE, _json_bytes(note))
    return LayoutReport(layout, checkpoint.spec.num_layers, own, sum(linked.values()), sum(copied.values()), why)


def _place_shards(
    locations: dict[str, WeightLocation], stage: Path, self_contained: bool, quiet: bool
) -> tuple[dict[str, int], dict[str, int], str]:
    """Put every shard that the graph refers to beside it: name → bytes of hard links and of copies, and why copies."""
    linked: dict[str, int] = {}
    copied: dict[str, int] = {}
    why = ""
    shards = sorted({place.file for place in locations.values()})
    for shard in shards:
        nbytes = shard.stat().st_size
        if not self_contained and shard.resolve().is_relative_to(_PACKAGE):
            why = why or "files of the package get no second name"
        elif not self_contained:
            try:
                os.link(shard.resolve(), stage / shard.name)  # what a symbolic link leads to, not the link
                linked[shard.name] = nbytes
                continue
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    with storage_errors(stage / shard.name):
                        raise
                why = why or _why(error)
        copied[shard.name] = nbytes
    require_free_space(stage, sum(copied.values()))
    with progress(sum(copied.values()), "weights", unit="B", quiet=quiet or not copied) as bar:
        for shard in shards:
            if shard.name in copied:
                copy_file(shard, stage / shard.name, advance=bar.update)
    return linked, copied, why


def _why(error: OSError) -> str:
    if error.errno == errno.EXDEV:
        return "hard links do not reach another file system"
    return f"no hard links: {error.strerror or error}"


def _json_bytes(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()

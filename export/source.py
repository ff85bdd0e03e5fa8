"""What a bundle is built from: a checkpoint, or a portable graph that was exported earlier."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from qwen_rt.bundle import MANIFEST_FILE, Bundle
from qwen_rt.checkpoint import NANO, Checkpoint
from qwen_rt.errors import BundleError, StorageError

__all__ = ["Source", "open_source", "refuse_overlap"]


@dataclass(frozen=True)
class Source:
    """An opened source.

    Attributes:
        checkpoint: Configuration, text files and tensors; a portable graph's tensors lie where it refers to.
        origin: Absolute path of the checkpoint folder that it all began with.
        fingerprint: That checkpoint's fingerprint.
        graph_file: The exported graph; None to trace one.
    """

    checkpoint: Checkpoint
    origin: str
    fingerprint: str
    graph_file: Path | None = None

    def load_graph(self) -> ir.Model | None:
        """Read the exported graph without its weights; None if there is none."""
        if self.graph_file is None:
            return None
        try:
            return ir.serde.deserialize_model(onnx.load_model(str(self.graph_file), load_external_data=False))
        except Exception as error:  # protobuf's DecodeError is not part of its public interface
            raise BundleError(
                f"{self.graph_file} is not an ONNX graph: {error}", fix="export it again: qwen-rt export CHECKPOINT"
            ) from None


def open_source(path: str | Path) -> Source:
    """Open what `qwen-rt build` was given.

    Args:
        path: A checkpoint folder, `nano`, or a folder that `qwen-rt export` wrote.

    Raises:
        CheckpointError, UnsupportedModelError, StorageError: The checkpoint cannot be read or run.
        BundleError: A bundle of another target, or a portable graph that is damaged or whose shards are gone.
    """
    if path == NANO or not (Path(path) / MANIFEST_FILE).is_file():
        checkpoint = Checkpoint.open(path)
        return Source(checkpoint, str(checkpoint.path), checkpoint.fingerprint())
    bundle = Bundle.open(path)
    link = bundle.manifest.checkpoint
    if bundle.manifest.target != "portable":
        raise BundleError(
            f"{path} is a bundle of target {bundle.manifest.target}",
            "a checkpoint or a portable graph",
            f"build from its checkpoint: {link.path}",
        )
    shards = [Path(shard.path) for _, shard in sorted(link.shards.items())] or sorted(bundle.weight_files.values())
    return Source(Checkpoint.open(bundle.path, shards), link.path, link.fingerprint, bundle.graph_file)


def refuse_overlap(source: Source, out: Path, files: Iterable[Path] = (), written: Path | None = None) -> None:
    """Refuse to replace what a build reads, what it would refer to, or what it writes beside the folder.

    Args:
        source: What is built from.
        out: Folder to make.
        files: What else is read, such as a text for calibration.
        written: A file that the build writes.

    Raises:
        StorageError: One of them lies in `out`, or what is referred to has a name that no manifest can hold.
    """
    target = out.resolve()
    referred = [source.checkpoint.path, *(header.path for header in source.checkpoint.headers)]
    for what, paths in (("read", [*referred, *files]), ("written", [] if written is None else [written])):
        for path in paths:
            if path.absolute().is_relative_to(target) or path.resolve().is_relative_to(target):
                raise StorageError(
                    f"{out} holds {path}, which is {what}", "a folder of its own", "choose another --output"
                )
    for path in referred:
        try:
            str(path).encode("utf-8")
        except UnicodeEncodeError:
            raise StorageError(f"{path} is not UTF-8", "a name that a manifest can hold", "rename it") from None

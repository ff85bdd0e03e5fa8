"""Write a portable graph or a bundle: staged beside its final place, hashed, resumable, shown by one rename."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from qwen_rt._version import __version__
from qwen_rt.bundle import (
    GRAPH_FILE,
    KV_DTYPES,
    MANIFEST_FILE,
    PRECISIONS,
    TEXT_FILES,
    WEIGHTS_FOLDER,
    CheckpointLink,
    FileEntry,
    Manifest,
    ShardEntry,
    file_sha256,
)
from qwen_rt.disk import device_error
from qwen_rt.errors import CheckpointError, StorageError, VerificationError
from qwen_rt.export.lower import graph_bytes, lowered_graph
from qwen_rt.export.portable import QuantizedLocation, WeightLocation, checkpoint_locations, portable_graph
from qwen_rt.export.quantize.check import check_weights
from qwen_rt.export.quantize.prepare import Prepared, pieces_of, prepare, quantized_locations
from qwen_rt.export.settings import BuildOptions, QuantizeOptions, Settings, settle
from qwen_rt.export.source import Source, open_source, refuse_overlap
from qwen_rt.export.tensorrt.job import EngineJob
from qwen_rt.export.weights import (
    Piece,
    PlannedFile,
    copy_file,
    float_piece,
    is_whole,
    one_thread_a_worker,
    plan_files,
    write_weight_file,
)
from qwen_rt.manifest_quantization import Quantization
from qwen_rt.progress import progress
from qwen_rt.row_reader import CheckpointRows
from qwen_rt.safetensors_header import read_header
from qwen_rt.storage import StagedDirectory, atomic_write_bytes, require_free_space

__all__ = ["BuildOptions", "QuantizeOptions", "build"]

_JOURNAL = ".journal.json"
_TOOLS = ("torch", "onnx", "onnx-ir", "onnxscript")


def build(source: str | Path, out: str | Path, options: BuildOptions | None = None) -> Manifest:
    """Build a bundle (or portable graph).

    Args:
        source: Checkpoint folder, `nano` for the one that ships with this package, or a portable graph's folder.
        out: Folder to make. Until it is whole it is not there; a killed build resumes when run again.
        options: What to build.

    Returns:
        The manifest that was written.

    Raises:
        UsageError: An option that does not fit the model.
        CheckpointError, UnsupportedModelError: The checkpoint cannot be read or run, or was changed meanwhile.
        StorageError: The folder cannot be written. As after any error but the next, nothing of it stays.
        VerificationError: The gate failed. What was written stays beside `out`, so that a build without the gate only
            has to finish it.
    """
    options = options or BuildOptions()
    opened = open_source(source)
    settings = settle(opened.checkpoint, options)
    refuse_overlap(opened, Path(out), options.quantize.files(), options.quantize.write_overrides)
    with StagedDirectory(Path(out), overwrite=options.overwrite) as stage:
        try:
            manifest = _Job(opened, settings, stage.path).run()
            stage.commit()
        except VerificationError:
            raise
        except Exception as error:  # not an interrupt: as after kill -9, the next build goes on from what is there
            with contextlib.suppress(StorageError):
                stage.abandon()
            if refused := device_error(error, Path(out)):
                raise refused from error
            raise
    return manifest


class _Job:
    """One build in its stage: every finished file is in the journal, and kept if a build is run again."""

    def __init__(self, source: Source, settings: Settings, stage: Path) -> None:
        self.source, self.checkpoint, self.settings, self.stage = source, source.checkpoint, settings, stage
        self.files: dict[str, FileEntry] = {}
        self.engines = None if settings.engine is None else EngineJob(self.checkpoint, settings, stage)
        self.tools = _tool_versions() | ({} if self.engines is None else self.engines.tools())
        self.inputs = self._inputs()  # before anything is read: what changes meanwhile must not pass for what was read
        self.reusable: dict[str, FileEntry] = self._open_journal()

    def run(self) -> Manifest:
        settings, checkpoint = self.settings, self.checkpoint
        prepared = self._prepare()
        if self.engines is not None:
            self.engines.choose({} if prepared is None else prepared.schemes)
        planned = plan_files(self._pieces(prepared), Path(WEIGHTS_FOLDER))
        locations = checkpoint_locations(checkpoint)
        for plan in planned:
            locations.update(plan.locations)
        quantized = {} if prepared is None else quantized_locations(prepared.schemes, locations)
        used = {place.file for name, place in locations.items() if name not in quantized}
        needed = [shard for shard in self._shards() if shard in used]
        copied = needed if settings.self_contained else []
        for shard in copied:
            inside = Path(WEIGHTS_FOLDER) / shard.name
            locations.update(
                {n: _moved(place, inside) if place.file == shard else place for n, place in locations.items()}
            )

        if settings.engine is None:
            self._write_graph(locations, quantized, prepared)
        self._write_weights(planned, copied)
        for name in TEXT_FILES:
            if (checkpoint.path / name).is_file():
                self._keep(name, partial(copy_file, checkpoint.path / name))
        links = {} if settings.self_contained or settings.engine else self._link_shards(needed)
        gate = None if prepared is None else self._check(prepared, locations)
        precision = settings.precision if prepared is None else prepared.precision(settings.precision)
        if self.engines is not None:
            self.engines.write(self.source, locations, quantized, precision, self._keep, self.files)
        manifest = Manifest(
            target=settings.target,
            precision=precision,
            compute_dtype=settings.dtype,
            kv_dtype=self._kv_dtype(),
            max_length=settings.max_length,
            tensor_parallel=1 if settings.engine is None else settings.engine.tensor_parallel,
            model=checkpoint.spec,
            checkpoint=CheckpointLink(self.source.origin, self.source.fingerprint, links),
            files=dict(sorted(self.files.items())),
            tools=self.tools,
            quantization=None if prepared is None else self._quantization(prepared),
            gate=gate,
        )
        self._refuse_changes()
        self._sweep()
        atomic_write_bytes(self.stage / MANIFEST_FILE, manifest.to_json())
        (self.stage / _JOURNAL).unlink()
        return manifest

    def _shards(self) -> list[Path]:
        """The checkpoint's shards that hold parameters as floats."""
        return sorted({ref.path for ref in self.checkpoint.tensors.values()})

    def _prepare(self) -> Prepared | None:
        """Decide how to quantize; None for a build of floats."""
        settings = self.settings
        check = None if self.engines is None else self.engines.check
        if not settings.is_quantized:
            if check is not None:
                check({})
            return None
        return prepare(self.checkpoint, settings.precision, settings.quantize, settings.target, settings.quiet, check)

    def _pieces(self, prepared: Prepared | None) -> list[Piece]:
        """What the bundle stores itself."""
        settings, checkpoint = self.settings, self.checkpoint
        if settings.target == "portable":
            return []
        if prepared is not None:
            return pieces_of(checkpoint, prepared, settings.target, settings.precision, settings.self_contained)
        stored, rows = PRECISIONS[settings.precision], CheckpointRows(checkpoint)
        return [
            float_piece(rows, name, stored)
            for name in checkpoint.spec.parameters()
            if name not in checkpoint.tensors or checkpoint.tensors[name].dtype != stored
        ]

    def _kv_dtype(self) -> str:
        """Of the cache in memory: on the CPU it holds rounded numbers in float32."""
        settings = self.settings
        kv_format = settings.quantize.kv_cache
        return settings.dtype if kv_format is None or settings.target == "cpu" else KV_DTYPES[kv_format]

    def _quantization(self, prepared: Prepared) -> Quantization:
        options = self.settings.quantize
        activations = self.settings.dtype if options.activations == "float32" else options.activations
        return Quantization(prepared.schemes, prepared.method, activations, options.kv_cache, prepared.report)

    def _check(self, prepared: Prepared, locations: Mapping[str, WeightLocation]) -> dict[str, Any]:
        """Run the gate on what was written, or note that it was not wanted.

        Raises:
            VerificationError: It failed.
        """
        if not self.settings.gate:
            return {"skipped": "--no-gate"}
        settings = self.settings
        kv_format = settings.quantize.kv_cache
        result = check_weights(self.checkpoint, prepared, kv_format, self.stage, locations, settings.quiet)
        if not result.passed:
            raise VerificationError(
                f"the accuracy gate failed: {result.failure()}",
                "errors within the limits of the precision",
                "choose a higher --precision, or keep it as it is with --no-gate, which finishes what was written",
            )
        return result.to_dict()

    def _sweep(self) -> None:
        """Remove what an earlier build left in the stage and this one did not ask for."""
        kept = {self.stage / name for name in (*self.files, _JOURNAL)}
        for folder, _, names in os.walk(self.stage):
            for name in names:
                if Path(folder, name) not in kept:
                    Path(folder, name).unlink()

    def _write_graph(
        self,
        locations: dict[str, WeightLocation],
        quantized: Mapping[str, QuantizedLocation],
        prepared: Prepared | None,
    ) -> None:
        settings, spec = self.settings, self.checkpoint.spec

        def write(path: Path) -> FileEntry:
            exported = self.source.load_graph()
            if settings.target == "portable":
                model = portable_graph(self.checkpoint, settings.dtype, locations, exported)
            else:
                model = lowered_graph(
                    self.checkpoint,
                    settings.target,
                    settings.max_length,
                    locations,
                    exported,
                    quantized=quantized,
                    activations=settings.quantize.activations,
                    kv=None if prepared is None else prepared.kv,
                )
            data = graph_bytes(model)
            atomic_write_bytes(path, data)
            return FileEntry(len(data), file_sha256(path))

        with progress(1, f"graph of {spec.num_layers} layers", quiet=settings.quiet) as bar:
            self._keep(GRAPH_FILE, write)
            bar.update(1)

    def _write_weights(self, planned: list[PlannedFile], copied: list[Path]) -> None:
        total = sum(plan.nbytes for plan in planned) + sum(shard.stat().st_size for shard in copied)
        if not total:
            return
        require_free_space(self.stage, total - sum(entry.nbytes for entry in self.reusable.values()))
        num_workers = self.settings.num_workers or os.cpu_count() or 1
        with (
            one_thread_a_worker(),
            progress(total, "weights", unit="B", quiet=self.settings.quiet) as bar,
            ThreadPoolExecutor(num_workers, "weights") as pool,
        ):
            for plan in planned:
                self._keep(
                    f"{WEIGHTS_FOLDER}/{plan.name}",
                    partial(write_weight_file, plan, pool=pool, advance=bar.update),
                    bar.update,
                )
            for shard in copied:
                self._keep(
                    f"{WEIGHTS_FOLDER}/{shard.name}",
                    partial(copy_file, shard, advance=bar.update),
                    bar.update,
                )

    def _link_shards(self, shards: list[Path]) -> dict[str, ShardEntry]:
        """Note where the shards are; a bundle also notes their hashes, a portable graph reads no weight."""
        hashed = self.settings.target != "portable"
        total = sum(shard.stat().st_size for shard in shards) if hashed else 0
        links = {}
        with progress(total, "hashing shards", unit="B", quiet=self.settings.quiet or not total) as bar:
            for shard in shards:
                header = read_header(shard)
                whole = file_sha256(shard, bar.update) if hashed else None
                links[shard.name] = ShardEntry(str(shard.absolute()), header.nbytes, header.sha256, whole)
        return links

    def _keep(
        self, name: str, write: Callable[[Path], FileEntry], skipped: Callable[[int], object] | None = None
    ) -> None:
        """Write a file of the bundle unless an earlier build left it whole, and note it in the journal."""
        path = self.stage / name
        entry = self.reusable.get(name)
        if entry is not None and is_whole(path, entry):
            if skipped is not None:
                skipped(entry.nbytes)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            entry = write(path)
        self.files[name] = entry
        self._write_journal()

    def _inputs(self) -> dict[str, Any]:
        return {
            "tools": self.tools,
            "fingerprint": self.source.fingerprint,
            "graph": file_sha256(self.source.graph_file) if self.source.graph_file else None,
            "sources": [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in self._sources()],
            "settings": {
                k: str(v) for k, v in vars(self.settings).items() if k not in ("quiet", "gate", "num_workers")
            },
            "texts": [_readable_sha256(file) for file in self.settings.quantize.files()],
        }

    def _refuse_changes(self) -> None:
        """Refuse to finish a bundle of two states of its source.

        Raises:
            CheckpointError: A file was changed while the build ran.
        """
        now = self._inputs()
        if now != self.inputs:
            pairs = zip(self.inputs["sources"], now["sources"], strict=False)
            file = next((before[0] for before, after in pairs if before != after), "a file that the build reads")
            raise CheckpointError(f"{file} was changed while the build ran", "a source at rest", "run the build again")

    def _sources(self) -> list[Path]:
        """Every file that is copied or converted."""
        texts = [self.checkpoint.path / name for name in TEXT_FILES]
        return [*self.checkpoint.shards, *(file for file in texts if file.is_file())]

    def _open_journal(self) -> dict[str, FileEntry]:
        """Return the files of an earlier build of the same inputs; anything else in the stage goes."""
        path = self.stage / _JOURNAL
        found: dict[str, FileEntry] = {}
        try:
            journal = json.loads(path.read_bytes())
            if journal["inputs"] == self.inputs:
                found = {name: FileEntry(int(nbytes), str(sha)) for name, (nbytes, sha) in journal["files"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
        if not found:
            for child in self.stage.iterdir():
                shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
        return found

    def _write_journal(self) -> None:
        files = {name: [entry.nbytes, entry.sha256] for name, entry in (self.reusable | self.files).items()}
        atomic_write_bytes(self.stage / _JOURNAL, json.dumps({"inputs": self.inputs, "files": files}).encode())


def _tool_versions() -> dict[str, str]:
    return {"qwen-rt": __version__} | {tool: metadata.version(tool) for tool in _TOOLS}


def _readable_sha256(file: Path) -> str | None:
    """The hash of a file; None if it cannot be read, of which whoever needs it tells."""
    try:
        return file_sha256(file)
    except OSError:
        return None


def _moved(place: WeightLocation, file: Path) -> WeightLocation:
    return WeightLocation(file, place.offset, place.nbytes, place.dtype, place.shape)

"""What is in a bundle, a portable graph or a checkpoint: sizes, operators, and a row per layer."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qwen_rt.bundle import KV_DTYPES, MANIFEST_FILE, Bundle
from qwen_rt.checkpoint import NANO, Checkpoint
from qwen_rt.engine_card import CARD_FILE, ENGINE_TARGETS, EngineCard
from qwen_rt.errors import BundleError, one_line
from qwen_rt.ops import BLOCK_SIZE
from qwen_rt.progress import format_count
from qwen_rt.quantization import Scheme, part_name
from qwen_rt.safetensors_header import BYTES_OF_DTYPE
from qwen_rt.spec import ModelSpec
from qwen_rt.strict_json import show

__all__ = ["Inspection", "LayerRow", "inspect"]

_LAYER = re.compile(r"layers\.([0-9]{1,9})[./]")
_OUTSIDE = "outside"
_ST_NAMES = {1: "F32", 10: "F16", 16: "BF16", 7: "I64", 6: "I32", 2: "U8", 3: "I8", 17: "F8_E4M3"}
"""ONNX data type → safetensors dtype."""

_TARGET_NOTES = {"cuda": "cuda (NVIDIA GPU of compute capability 8.0 or newer)"}


@dataclass
class LayerRow:
    """One row of the table: a decoder layer, or `outside` for embedding, final norm and head.

    Attributes:
        name: Number of the layer, or `outside`.
        num_parameters: Elements of its parameters, whatever they are stored as.
        nbytes: What is stored of them, scales and zero points of quantized matrices among it.
        dtypes: safetensors dtypes of those stored as floats, formats of the quantized ones.
        num_nodes: Nodes of the graph; 0 for a checkpoint.
    """

    name: str
    num_parameters: int = 0
    nbytes: int = 0
    dtypes: set[str] = field(default_factory=set)
    num_nodes: int = 0


@dataclass
class Inspection:
    """What was found.

    Attributes:
        kind: `bundle`, `portable graph` or `checkpoint`.
        path: The folder.
        model: Hyperparameters.
        facts: Label → value, in the order to print.
        files: File → bytes.
        operators: ONNX operator → number of nodes, of engines layer type → number; empty for a checkpoint.
        layers: Rows of the table.
    """

    kind: str
    path: str
    model: ModelSpec
    facts: dict[str, str]
    files: dict[str, int]
    operators: dict[str, int]
    layers: list[LayerRow]

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data."""
        data = asdict(self) | {"model": self.model.to_dict()}
        data["layers"] = [asdict(row) | {"dtypes": sorted(row.dtypes)} for row in self.layers]
        return data

    def render(self, with_layers: bool) -> str:
        """As text; `with_layers` adds the table of layers."""
        width = max(len(label) for label in self.facts)  # names come from files that anyone may have written
        lines = [one_line(f"{self.path}: {self.kind}"), ""]
        lines += [f"  {label:<{width}}  {one_line(value)}" for label, value in self.facts.items()]
        lines += ["", "files"]
        lines += [f"  {format_count(size, 'B'):>9}  {one_line(name)}" for name, size in self.files.items()]
        if self.operators:
            total = sum(self.operators.values())
            listed = ", ".join(f"{one_line(name)} {count}" for name, count in self.operators.items())
            what = f"graph: {total} nodes" if self.layers else f"network: {total} layers, of one rank"
            lines += ["", what, *_wrap(listed, 96)]
        if with_layers and self.layers:
            lines += ["", f"  {'layer':<10} {'parameters':>13} {'stored':>10}  {'dtype':<9} {'nodes':>5}"]
            lines += [
                f"  {row.name:<10} {row.num_parameters:>13,} {format_count(row.nbytes, 'B'):>10}  "
                f"{'+'.join(sorted(row.dtypes)):<9} {row.num_nodes:>5}"
                for row in self.layers
            ]
        return "\n".join(lines)


def inspect(path: str | Path) -> Inspection:
    """Look into a folder; reads headers and the graph, never a weight.

    Args:
        path: A bundle, a portable graph or a checkpoint (or `nano`).

    Raises:
        BundleError, CheckpointError: It is none of these, or broken.
    """
    folder = Path(path)
    is_bundle = (folder / MANIFEST_FILE).is_file() or (folder.is_dir() and not (folder / "config.json").is_file())
    if is_bundle and path != NANO:
        bundle = Bundle.open(path, check="size")
        return _inspect_engines(bundle) if bundle.manifest.target in ENGINE_TARGETS else _inspect_bundle(bundle)
    return _inspect_checkpoint(Checkpoint.open(path))


def _model_facts(spec: ModelSpec) -> dict[str, str]:
    rope = f"theta {spec.rope.theta:g}" + (
        "" if spec.rope.kind == "default" else f", {spec.rope.kind} x{spec.rope.factor:g}"
    )
    return {
        "model": f"{spec.architecture}, {spec.num_parameters / 1e6:,.1f} M parameters",
        "layers": f"{spec.num_layers} x hidden {spec.hidden_size}, ffn {spec.intermediate_size}",
        "attention": f"{spec.num_heads} heads, {spec.num_kv_heads} KV heads, head_dim {spec.head_dim}, rope {rope}",
        "vocabulary": f"{spec.vocab_size} rows, {'tied' if spec.tie_word_embeddings else 'own'} LM head",
        "context": f"{spec.context_length} tokens",
    }


def _inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    spec = checkpoint.spec
    stored = {name: _Stored(ref.dtype, ref.nbytes) for name, ref in checkpoint.tensors.items()}
    stored |= {name: _Stored(matrix.format, matrix.nbytes) for name, matrix in checkpoint.quantized.items()}
    rows = list(_rows(spec, stored).values())
    facts = _model_facts(spec) | {"stored as": "+".join(sorted({d for row in rows for d in row.dtypes}))}
    layouts = Counter(str(matrix.layout) for matrix in checkpoint.quantized.values())
    if layouts:
        facts["quantized"] = ", ".join(f"{count} matrices as {layout}" for layout, count in layouts.most_common(3))
    facts["fingerprint"] = checkpoint.fingerprint()[:16]
    if checkpoint.unexpected:
        facts["not used"] = f"{len(checkpoint.unexpected)} tensors, such as {checkpoint.unexpected[0]}"
    files = {shard.name: shard.stat().st_size for shard in checkpoint.shards}
    return Inspection("checkpoint", str(checkpoint.path), spec, facts, files, {}, rows)


def _inspect_engines(bundle: Bundle) -> Inspection:
    """What the card says; the engines are not opened, which takes their library and a GPU."""
    manifest = bundle.manifest
    card = EngineCard.from_json((bundle.path / CARD_FILE).read_bytes(), str(bundle.path / CARD_FILE))
    kv_bytes = manifest.model.kv_bytes_per_token(manifest.kv_dtype)
    shapes = (f"{name} {one.max_batch} rows x {one.max_tokens} tokens" for name, one in card.profiles.items())
    compiled = (f"{name} {sum(kinds.values())} ({card.listed(kinds)})" for name, kinds in card.engine.items())
    facts = _model_facts(manifest.model) | {
        "target": f"{manifest.target}, tensor parallel {manifest.tensor_parallel}",
        "library": f"{card.flavour} {card.version}, no other",
        "GPUs": f"compute capability {', '.join(card.compute_capabilities)}",
        "weights": f"{manifest.precision}, in the engines, sha256 " + ", ".join(h[:16] for h in card.weights_sha256),
        "computes in": manifest.compute_dtype,
        "KV cache": f"{manifest.kv_dtype}, {format_count(kv_bytes, 'B')} a token, "
        f"{format_count(kv_bytes * manifest.max_length, 'B')} for the {manifest.max_length} tokens of a row",
        "profiles": "at most " + ", ".join(shapes),
        "compiled": ", ".join(compiled) or "unknown",
        "built by": ", ".join(f"{name} {version}" for name, version in sorted(manifest.tools.items())),
        "build again": card.rebuild_command(str(bundle.path)),
    }
    files = {name: entry.nbytes for name, entry in manifest.files.items()}
    operators = dict(Counter(card.network).most_common())
    return Inspection("bundle of engines", str(bundle.path), manifest.model, facts, files, operators, [])


def _inspect_bundle(bundle: Bundle) -> Inspection:
    import onnx  # the graph is read without its weights

    manifest = bundle.manifest
    spec = manifest.model
    try:
        graph = onnx.load_model(str(bundle.graph_file), load_external_data=False).graph
    except Exception as error:  # protobuf's DecodeError is not part of its public interface
        raise BundleError(f"{bundle.graph_file} is not an ONNX graph: {error}", fix="build the bundle again") from None
    link, schemes = manifest.checkpoint, {} if manifest.quantization is None else manifest.quantization.weights
    stored = _stored_by(graph, schemes, link.shards)
    for name in [*stored, *(_text(node.name) for node in graph.node)]:
        layer = _row_name(name)
        if layer != _OUTSIDE and int(layer) >= spec.num_layers:
            raise BundleError(
                f"{bundle.graph_file} has {show(name)} of layer {layer}, the model has {spec.num_layers} layers",
                fix="build the bundle again",
            )
    by_name = _rows(spec, stored)
    for node in graph.node:
        by_name[_row_name(_text(node.name))].num_nodes += 1
    kv_bytes = spec.kv_bytes_per_token(manifest.kv_dtype)
    if manifest.kv_dtype in KV_DTYPES.values():
        kv_bytes += spec.kv_scale_bytes_per_token
    facts = _model_facts(spec) | {
        "target": f"{_TARGET_NOTES.get(manifest.target, manifest.target)}, tensor parallel {manifest.tensor_parallel}",
        "weights": f"{manifest.precision}, {_places(stored.values(), link.path)}",
        "computes in": manifest.compute_dtype,
        "KV cache": f"{manifest.kv_dtype}, {format_count(kv_bytes, 'B')} a token, "
        f"{format_count(kv_bytes * manifest.max_length, 'B')} for {manifest.max_length} tokens"
        + (f", in blocks of {BLOCK_SIZE}" if manifest.target == "cuda" else ""),
        "built by": ", ".join(f"{name} {version}" for name, version in sorted(manifest.tools.items())),
    }
    files = {name: entry.nbytes for name, entry in manifest.files.items()}
    files |= {f"{name} (in the checkpoint)": shard.nbytes for name, shard in link.shards.items()}
    operators = dict(Counter(_text(node.op_type) for node in graph.node).most_common())
    kind = "portable graph" if manifest.target == "portable" else "bundle"
    return Inspection(kind, str(bundle.path), spec, facts, files, operators, list(by_name.values()))


@dataclass(frozen=True)
class _Stored:
    """A stored tensor: `format` names its numbers, empty for a part of a matrix that is named elsewhere."""

    format: str
    nbytes: int
    in_checkpoint: bool = False


def _stored_by(graph: Any, schemes: Mapping[str, Scheme], shards: Collection[str]) -> dict[str, _Stored]:
    """What a graph (`onnx.GraphProto`) refers to of the model, by name; bytes that have two names count once.

    Constants that the exporter makes have names that begin with "/", and are left out.
    """
    parts = {part_name(name, part): part for name, scheme in schemes.items() for part in scheme.parts((1, 2))}
    found: dict[str, _Stored] = {}
    places: set[tuple[str, str]] = set()
    for tensor in graph.initializer:
        name, place = _text(tensor.name), {entry.key: entry.value for entry in tensor.external_data}
        at = (str(place.get("location")), str(place.get("offset", "0")))
        if name.startswith("/") or (place and at in places):
            continue
        places.add(at)
        dtype = _ST_NAMES.get(tensor.data_type, f"ONNX type {tensor.data_type}")
        known = schemes[name].format if name in schemes else "" if name in parts else dtype
        nbytes = BYTES_OF_DTYPE.get(dtype, 0) * math.prod(tensor.dims)
        found[name] = _Stored(known, nbytes, at[0] in shards)
    return found


def _places(stored: Iterable[_Stored], checkpoint: str) -> str:
    """How much there is, and where: in the bundle's folder, in the checkpoint, or some in each."""
    total = [0, 0]
    for tensor in stored:
        total[tensor.in_checkpoint] += tensor.nbytes
    own, linked = (format_count(size, "B") for size in total)
    if not total[1]:
        return f"{own}, in this folder"
    return f"{linked}, in {checkpoint}" if not total[0] else f"{own} in this folder, {linked} in {checkpoint}"


def _rows(spec: ModelSpec, stored: Mapping[str, _Stored]) -> dict[str, LayerRow]:
    """Add up parameters and stored bytes, layer by layer."""
    rows = {name: LayerRow(name) for name in (_OUTSIDE, *map(str, range(spec.num_layers)))}
    parameters = spec.parameters()
    for name, tensor in stored.items():
        row = rows[_row_name(name)]
        row.nbytes += tensor.nbytes
        if name in parameters:
            row.num_parameters += math.prod(parameters[name])
        if tensor.format:
            row.dtypes.add(tensor.format)
    return rows


def _row_name(name: str) -> str:
    found = _LAYER.search(name)
    return str(int(found.group(1))) if found else _OUTSIDE


def _text(name: str | bytes) -> str:
    """A name of a graph; protobuf hands it over as bytes where it is not UTF-8."""
    return name if isinstance(name, str) else name.decode("utf-8", "replace")


def _wrap(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="  ")

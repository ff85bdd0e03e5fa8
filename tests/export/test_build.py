"""What `build` writes: every precision, layout of a checkpoint and way to link it; equal inputs give equal bytes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from qwen_rt.benchmarks.checkpoints import QWEN2_05B, write_random
from qwen_rt.bundle import GRAPH_FILE, Bundle
from qwen_rt.checkpoint import Checkpoint, to_float32
from qwen_rt.errors import BundleError, GraphError, StorageError, UnsupportedModelError, UsageError
from qwen_rt.export.build import BuildOptions, QuantizeOptions, build
from qwen_rt.runtime.llm import LLM
from qwen_rt.runtime.session import CpuSession
from qwen_rt.safetensors_header import read_header

from ..cli.kit import (
    NANO_FOLDER,
    SHARDS,
    command,
    contents,
    copy_graph_of,
    copy_nano,
    environment,
    names,
    rehash,
    shared_bundle,
    shared_graph,
)

QUIET = BuildOptions(quiet=True)
IDS = [16, 9, 300, 77, 1000, 5]


def logits(bundle: Path, **options: str) -> NDArray[np.float32]:
    """Logits after a few tokens, f32[V]."""
    session = LLM(bundle, num_threads=1, **options).session  # type: ignore[arg-type]
    ids = np.array([IDS], np.int64)
    found = session.run(session.new_cache(1, 16), 0, ids, np.zeros(1, np.int64), np.array([len(IDS) - 1]))
    return found[0].copy()


@pytest.fixture(scope="module")
def expected() -> NDArray[np.float32]:
    return logits(shared_bundle())


def options(**fields: object) -> BuildOptions:
    return BuildOptions(quiet=True, **fields)  # type: ignore[arg-type]


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("precision", "stored"), [("fp32", "F32"), ("bf16", "BF16"), ("fp16", "F16"), ("auto", "BF16")]
)
def test_every_precision_stores_the_weights_it_says(
    precision: str, stored: str, tmp_path: Path, expected: NDArray[np.float32]
) -> None:
    manifest = build(shared_graph(), tmp_path / "out", options(precision=precision))
    bundle = Bundle.open(tmp_path / "out", "full")
    checkpoint = Checkpoint.open("nano")
    assert manifest.precision == {"auto": "bf16"}.get(precision, precision)
    assert manifest.compute_dtype == manifest.kv_dtype == "float32"
    if stored == "BF16":
        assert set(manifest.checkpoint.shards) == set(SHARDS)
        assert not any(name.endswith(".safetensors") for name in manifest.files)
    else:
        assert manifest.checkpoint.shards == {}
        found = Checkpoint.open(bundle.path, list(bundle.weight_files.values()))
        for name, ref in checkpoint.tensors.items():
            original = to_float32(ref, checkpoint.read(name))
            wanted = original if stored == "F32" else original.astype(np.float16).astype(np.float32)
            assert found.tensors[name].dtype == stored
            np.testing.assert_array_equal(to_float32(found.tensors[name], found.read(name)), wanted)
    actual = logits(tmp_path / "out")
    if precision == "fp16":
        # bf16 values within float16's normal range are exact in it; smaller ones lose bits below 2^-24.
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)
    else:
        np.testing.assert_array_equal(actual, expected)


def test_fp16_refuses_what_it_cannot_hold_and_leaves_nothing(tmp_path: Path) -> None:
    checkpoint = copy_nano(tmp_path / "checkpoint")
    portable = copy_graph_of(checkpoint, tmp_path / "portable")
    shard = checkpoint / SHARDS[1]
    last = list(read_header(shard).tensors)[-1]
    data = bytearray(shard.read_bytes())
    data[-2:] = b"\x90\xc7"  # bfloat16 -73728
    shard.write_bytes(data)
    before = names(tmp_path)
    with pytest.raises(UsageError, match=f"tensor {last} holds 73728, beyond float16"):
        build(portable, tmp_path / "out", options(precision="fp16"))
    assert names(tmp_path) == before
    data[-2:] = b"\x80\x7f"  # infinity stays what it is: the checkpoint's matter
    shard.write_bytes(data)
    build(portable, tmp_path / "out", options(precision="fp16"))


def test_a_checkpoint_of_mixed_dtypes_is_stored_as_fp32(tmp_path: Path) -> None:
    checkpoint = copy_nano(tmp_path / "checkpoint")
    opened = Checkpoint.open(checkpoint)
    wide = {"model.norm.weight": np.float32, "model.layers.0.mlp.up_proj.weight": np.float16}
    header, _ = _write_mixed(opened, wide, checkpoint / "model.safetensors")
    assert header
    for name in (*SHARDS, "model.safetensors.index.json"):
        (checkpoint / name).unlink()
    manifest = build(checkpoint, tmp_path / "out", QUIET)
    assert manifest.precision == "fp32"
    kept = build(checkpoint, tmp_path / "half", options(precision="bf16"))
    assert set(kept.checkpoint.shards) == {"model.safetensors"}
    (own,) = [name for name in kept.files if name.endswith(".safetensors")]
    assert set(read_header(tmp_path / "half" / own).tensors) == set(wide), "only what was stored otherwise is converted"
    np.testing.assert_allclose(logits(tmp_path / "half"), logits(tmp_path / "out"), rtol=1e-3, atol=2e-2)


def _write_mixed(checkpoint: Checkpoint, wide: dict[str, type], path: Path) -> tuple[bytes, int]:
    from qwen_rt.safetensors_header import write_header

    names_of = {np.float32: "F32", np.float16: "F16"}
    entries, blocks = [], []
    for name, ref in checkpoint.tensors.items():
        data = checkpoint.read(name)
        if name in wide:
            data = to_float32(ref, data).astype(wide[name])
        entries.append((name, names_of.get(wide.get(name, int), "BF16"), ref.shape))
        blocks.append(np.ascontiguousarray(data).tobytes())
    header, _ = write_header(entries)
    path.write_bytes(header + b"".join(blocks))
    return header, len(blocks)


# ---------------------------------------------------------------- sources


def test_a_portable_graph_gives_the_bundle_that_its_checkpoint_gives(tmp_path: Path) -> None:
    """Linked or self-contained: the same graph to the byte, and the same logits."""
    build("nano", tmp_path / "direct", QUIET)
    build(shared_graph(), tmp_path / "linked", QUIET)
    assert contents(tmp_path / "direct") == contents(tmp_path / "linked")
    build(shared_graph(), tmp_path / "own graph", options(target="portable", self_contained=True))
    build(tmp_path / "own graph", tmp_path / "own", options(self_contained=True))
    build(tmp_path / "own graph", tmp_path / "beside", QUIET)
    wanted = logits(tmp_path / "direct")
    for name in ("own", "beside"):
        np.testing.assert_array_equal(logits(tmp_path / name), wanted)
    assert (tmp_path / "own" / "graph" / SHARDS[0]).is_file()
    beside = Bundle.open(tmp_path / "beside").weight_files
    assert beside == {name: (tmp_path / "own graph" / "graph" / name).resolve() for name in SHARDS}
    for name in ("own", "beside"):
        manifest = Bundle.open(tmp_path / name).manifest
        assert manifest.checkpoint.fingerprint == Checkpoint.open("nano").fingerprint()
        assert manifest.checkpoint.path == str(Checkpoint.open("nano").path)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_portable_graph_that_was_edited_is_refused(target: str, tmp_path: Path) -> None:
    """Whoever rewrites the manifest's hashes with it gets no bundle of another model."""
    edited = Path(shutil.copytree(shared_graph(), tmp_path / "edited"))
    model = onnx.load_model(str(edited / GRAPH_FILE), load_external_data=False)
    norm = next(node for node in model.graph.node if node.op_type == "RMSNormalization")
    next(attribute for attribute in norm.attribute if attribute.name == "epsilon").f = 1e-2
    (edited / GRAPH_FILE).write_bytes(model.SerializeToString())
    rehash(edited, GRAPH_FILE)
    with pytest.raises(GraphError, match=r"epsilon=0\.00999.*; expected 9\.99.*; export the graph with this version"):
        build(edited, tmp_path / "out", options(target=target))
    assert names(tmp_path) == {"edited"}


def test_self_contained_bundles_outlive_their_checkpoint(tmp_path: Path, expected: NDArray[np.float32]) -> None:
    checkpoint = copy_nano(tmp_path / "checkpoint")
    portable = copy_graph_of(checkpoint, tmp_path / "portable")
    build(portable, tmp_path / "linked", QUIET)
    build(portable, tmp_path / "own", options(self_contained=True))
    for shard in SHARDS:
        assert (tmp_path / "own" / "graph" / shard).read_bytes() == (checkpoint / shard).read_bytes()
    shutil.rmtree(portable)
    moved = checkpoint.rename(tmp_path / "moved")
    (tmp_path / "own").rename(tmp_path / "elsewhere")
    np.testing.assert_array_equal(logits(tmp_path / "elsewhere"), expected)
    with pytest.raises(BundleError, match="is missing"):
        LLM(tmp_path / "linked")
    np.testing.assert_array_equal(logits(tmp_path / "linked", checkpoint=str(moved)), expected)


def _hugging_face_cache(folder: Path) -> Path:
    """`models--…/blobs/HASH`, and a snapshot folder of links to them."""
    blobs, snapshot = folder / "blobs", folder / "snapshots" / "abc123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(
        sorted(path for path in NANO_FOLDER.iterdir() if path.suffix in (".json", ".safetensors"))
    ):
        blob = blobs / f"{number:064x}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


def _several_folders(folder: Path) -> Path:
    """A shard each in a folder of its own, under one name: nothing but the links tells them apart."""
    checkpoint = copy_nano(folder / "checkpoint")
    for number, shard in enumerate(SHARDS):
        (folder / f"disk{number}").mkdir()
        (checkpoint / shard).rename(folder / f"disk{number}" / "data.safetensors")
        (checkpoint / shard).symlink_to(f"../disk{number}/data.safetensors")
    return checkpoint


@pytest.mark.parametrize("layout", [_hugging_face_cache, _several_folders])
def test_checkpoints_made_of_links(
    layout: Callable[[Path], Path], tmp_path: Path, expected: NDArray[np.float32]
) -> None:
    checkpoint = layout(tmp_path / "cache")
    direct = build(checkpoint, tmp_path / "out", QUIET)
    assert {name: shard.path for name, shard in direct.checkpoint.shards.items()} == {
        name: str(checkpoint / name) for name in SHARDS
    }
    np.testing.assert_array_equal(logits(tmp_path / "out"), expected)
    build(copy_graph_of(checkpoint, tmp_path / "portable"), tmp_path / "own", options(self_contained=True))
    assert not any(path.is_symlink() for path in (tmp_path / "own").rglob("*"))
    build(copy_graph_of(checkpoint, tmp_path / "portable2"), tmp_path / "wide", options(precision="fp32"))
    shutil.rmtree(tmp_path / "cache")
    for name in ("own", "wide"):
        np.testing.assert_array_equal(logits(tmp_path / name), expected)


def test_a_bundle_that_is_itself_links(tmp_path: Path, expected: NDArray[np.float32]) -> None:
    """A bundle that was uploaded and downloaded again lies in a cache of links."""
    packed = shared_bundle(self_contained=True)
    for number, file in enumerate(path for path in packed.rglob("*") if path.is_file()):
        place = tmp_path / "snapshot" / file.relative_to(packed)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / f"blob{number}")
        place.symlink_to(tmp_path / f"blob{number}")
    np.testing.assert_array_equal(logits(tmp_path / "snapshot"), expected)


# ---------------------------------------------------------------- the folder


def test_building_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for fields in ({}, {"precision": "fp32"}, {"self_contained": True}, {"target": "portable"}, {"max_length": 64}):
        first, second = tmp_path / "one", tmp_path / "another name"
        build("nano" if not fields else shared_graph(), first, options(**fields))
        build(shared_graph(), second, options(**fields))
        assert contents(first) == contents(second), fields
        shutil.rmtree(first)
        shutil.rmtree(second)
    assert names(tmp_path) == set()


def test_force_replaces_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(shared_graph(), out, QUIET)
    linked = contents(out)
    with pytest.raises(StorageError, match="not empty"):
        build(shared_graph(), out, QUIET)
    (out / "notes").write_text("lost with the rest")
    build(shared_graph(), out, options(overwrite=True, self_contained=True))
    assert "notes" not in contents(out)
    assert f"graph/{SHARDS[0]}" in contents(out)
    build(shared_graph(), out, options(overwrite=True))
    assert contents(out) == linked
    assert names(tmp_path) == {"out"}


def test_an_output_over_its_source_is_refused(tmp_path: Path) -> None:
    portable = tmp_path / "portable"
    build(shared_graph(), portable, options(target="portable", self_contained=True))
    before = contents(portable)
    for out in (portable, tmp_path / "portable" / ".." / "portable"):
        with pytest.raises(StorageError, match="expected a folder of its own"):
            build(portable, out, options(overwrite=True))
    (tmp_path / "link").symlink_to(portable)
    with pytest.raises(StorageError, match="expected a folder of its own"):
        build(portable, tmp_path / "link", options(overwrite=True))
    old = tmp_path / "old"
    build(portable, old, options(self_contained=True))
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(NANO_FOLDER, checkpoint)
    for shard in SHARDS:  # a checkpoint whose shards are links into the bundle that would go
        (checkpoint / shard).unlink()
        (checkpoint / shard).symlink_to(old / "graph" / shard)
    with pytest.raises(StorageError, match="expected a folder of its own"):
        build(checkpoint, old, options(overwrite=True))
    assert contents(portable) == before


def test_options_files_within_the_output_are_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(shared_graph(), out, QUIET)
    (out / "choice.toml").write_text('"*" = "int8"\n')
    before = contents(out)
    for fields, what in (({"overrides": out / "choice.toml"}, "read"), ({"calibrate": out / "config.json"}, "read")):
        with pytest.raises(StorageError, match=f"which is {what}; expected a folder of its own"):
            build(shared_graph(), out, options(precision="int4", quantize=QuantizeOptions(**fields), overwrite=True))
    choice = QuantizeOptions(size_budget=10_000_000, write_overrides=tmp_path / "new" / "choice.toml")
    with pytest.raises(StorageError, match="which is written; expected a folder of its own"):
        build(shared_graph(), tmp_path / "new", options(precision="int4", quantize=choice))
    assert contents(out) == before
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize(("kv_cache", "unit"), [(None, 16), ("int8", 8)])
def test_heads_that_the_cpu_does_not_take(kv_cache: str | None, unit: int, tmp_path: Path) -> None:
    """What is refused would fail in ONNX Runtime with the first token; the next multiple of what it takes runs."""
    small = {"hidden_size": 32, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 32}
    small |= {"vocab_size": 41, "num_hidden_layers": 1, "bos_token_id": None, "eos_token_id": None}
    fields = options(quantize=QuantizeOptions(kv_cache=kv_cache), max_length=8, gate=False)
    for head_dim in (unit + 4, unit // 2, unit):
        checkpoint = tmp_path / f"heads of {head_dim}"
        checkpoint.mkdir()
        write_random(checkpoint, QWEN2_05B | small | {"head_dim": head_dim})
        if head_dim < unit or head_dim % unit:
            message = f"head_dim={head_dim} for target cpu; expected a multiple of {unit}"
            with pytest.raises(UnsupportedModelError, match=message):
                build(checkpoint, tmp_path / "out", fields)
            assert not (tmp_path / "out").exists()
    build(checkpoint, tmp_path / "out", fields)
    session = CpuSession(Bundle.open(tmp_path / "out"), 1)
    zero = np.zeros(1, np.int64)
    assert np.isfinite(session.run(session.new_cache(1, 8), 0, np.array([[1, 2, 3]]), zero, zero + 2)).all()


def test_options_that_do_not_fit(tmp_path: Path) -> None:
    for fields in ({"target": "tpu"}, {"precision": "fp6"}, {"max_length": 0}, {"max_length": 2049}):
        with pytest.raises(UsageError, match="expected"):
            build(shared_graph(), tmp_path / "out", options(**fields))
    with pytest.raises(UsageError, match="expected one of auto, float32"):
        build(shared_graph(), tmp_path / "out", options(target="portable", dtype="float8"))
    assert names(tmp_path) == set()


def test_two_builds_of_one_output(tmp_path: Path) -> None:
    """The second gets one line with the process id of the first, which is not disturbed."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    driver = (
        "import sys, qwen_rt.export.build as b\n"
        "from qwen_rt.cli import main\n"
        "original = b._Job._sweep\n"
        "def wait(job):\n"
        f"    open({str(gate)!r}).read()\n"
        "    original(job)\n"
        "b._Job._sweep = wait\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = ["build", str(shared_graph()), "-o", str(tmp_path / "out"), "--quiet"]
    first = subprocess.Popen([sys.executable, "-c", driver, *arguments], env=environment(), stderr=subprocess.PIPE)
    with first:
        deadline = time.monotonic() + 60
        while not (tmp_path / ".out.partial" / "graph").exists():
            assert time.monotonic() < deadline
            assert first.poll() is None
            time.sleep(0.05)
        with pytest.raises(StorageError, match=rf"another build of .*out is running \(pid {first.pid}\); wait"):
            build(shared_graph(), tmp_path / "out", QUIET)
        second = subprocess.run(command(*arguments), env=environment(), capture_output=True, text=True, check=False)
        assert (second.returncode, second.stderr.count("\n")) == (1, 1)
        assert second.stderr.startswith("qwen-rt: error: another build of ")
        gate.write_text("go")
        assert first.wait(60) == 0
    assert contents(tmp_path / "out") == contents(shared_bundle())
    assert names(tmp_path) == {"gate", "out"}

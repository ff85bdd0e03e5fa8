"""What is found before an engine runs: other flavours, versions, GPUs, files that were changed, engines that lie."""

from __future__ import annotations

import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto

from qwen_rt import tensors
from qwen_rt.bundle import Bundle
from qwen_rt.cli import main
from qwen_rt.engine_card import CARD_FILE, engine_file
from qwen_rt.errors import BundleError, MissingDependencyError, QwenRtError, UnsupportedModelError, UsageError
from qwen_rt.runtime.tensorrt.platform import Platform, load_flavour
from qwen_rt.spec import ModelSpec

from ...cli.kit import NANO_FOLDER, edit_manifest
from ..cuda.fake import FakeGpu
from .fake import FakeTensorRt, serialize
from .kit import CAPACITY, PROFILES, aliases, make_card, make_engine, open_session, platform_of, profile, put_engine

VERSION = "1.7.1.116"


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """A bundle to change."""
    shutil.copytree(bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


def refused(bundle: Path, platform: Platform, kind: type[QwenRtError] = BundleError) -> str:
    with pytest.raises(kind) as caught:
        open_session(bundle, platform)
    text = str(caught.value)
    assert "\n" not in text
    return text


# ---------------------------------------------------------------- the card


def test_another_flavour(copy: Path, gpu: FakeGpu) -> None:
    """The manifest says one, the card the other: an engine that was put there."""
    put_engine(copy, card=make_card("tensorrt", VERSION))
    text = refused(copy, platform_of(gpu)[0])
    assert "holds engines of tensorrt; expected engines of tensorrt-rtx" in text
    assert "qwen-rt build nano --target tensorrt-rtx" in text


def test_another_version(copy: Path, platform: Platform, trt: FakeTensorRt) -> None:
    trt.__version__ = "1.8.0.3"
    text = refused(copy, platform)
    assert f"built by tensorrt-rtx {VERSION}, and 1.8.0.3 is installed" in text
    assert f"qwen-rt build nano --target tensorrt-rtx --compute-capability 8.0 8.9 12.0 -o {copy} --force" in text


def test_another_gpu(copy: Path, platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SM", "86")
    text = refused(copy, platform)
    assert "built for compute capability 8.0, 8.9, 12.0; expected 8.6, that of this GPU" in text
    assert "--compute-capability 8.6" in text


def test_a_gpu_that_the_flavour_does_not_support(
    copy: Path, platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SM", "90")
    text = refused(copy, platform, UnsupportedModelError)
    assert "TensorRT-RTX does not support compute capability 9.0" in text
    assert "target cuda or tensorrt" in text


def test_the_full_tensorrt_is_not_held_to_those(
    bundles: dict[str, Path], gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SM", "90")
    assert "expected 9.0, that of this GPU" in refused(bundles["tensorrt"], platform_of(gpu, rtx=False)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 64}, "max_length=64; expected 320, as the manifest says"),
        ({"compute_dtype": "bfloat16"}, "compute_dtype=bfloat16; expected float32"),
        ({"precision": "int4"}, "precision=int4; expected bf16"),
        ({"weights_sha256": ("0" * 64, "1" * 64)}, "engines=2; expected 1"),
    ],
)
def test_a_card_of_another_bundle(changes: dict[str, Any], message: str, copy: Path, platform: Platform) -> None:
    put_engine(copy, card=make_card("tensorrt-rtx", VERSION, **changes))
    assert message in refused(copy, platform)


def test_profiles_that_are_not_the_card_s(
    copy: Path, platform: Platform, graph: onnx.ModelProto, spec: ModelSpec
) -> None:
    put_engine(copy, make_engine(graph, spec, ((2, 96), PROFILES[1])))
    text = refused(copy, platform)
    assert f"takes 2 rows of 96 tokens; expected 4 of 96, as {CARD_FILE} says; build: qwen-rt build nano" in text


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("name", [engine_file(0), CARD_FILE])
def test_a_file_that_was_changed(name: str, copy: Path) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(BundleError, match="was changed after the build: sha256"):
        Bundle.open(copy)


@pytest.mark.parametrize("name", [engine_file(0), CARD_FILE])
def test_a_file_that_is_gone(name: str, copy: Path) -> None:
    (copy / name).unlink()
    with pytest.raises(BundleError, match=f"{name} of .* is missing"):
        Bundle.open(copy)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other"])
def test_an_engine_that_is_damaged(damage: str, copy: Path, platform: Platform) -> None:
    """Where nothing was hashed, TensorRT's own words are handed on."""
    data = (copy / engine_file(0)).read_bytes()
    flipped = bytes([*data[:1000], data[1000] ^ 255, *data[1001:]])
    damaged = {"cut": data[: len(data) // 2], "flipped": flipped, "empty": b"", "other": b"\x7fELF" * 9}[damage]
    put_engine(copy, damaged)
    text = refused(copy, platform)
    told = "the file is empty" if damage == "empty" else "cannot load it: IRuntime::deserializeCudaEngine: Error Code 1"
    assert f"{engine_file(0)}: " in text
    assert told in text
    assert "build: qwen-rt build nano --target tensorrt-rtx" in text


def test_a_card_that_is_no_card(copy: Path, platform: Platform) -> None:
    (copy / CARD_FILE).write_text("{}")
    card = types.SimpleNamespace(to_json=lambda: b"{}")
    put_engine(copy, card=card)  # type: ignore[arg-type]
    assert "format=(missing)" in refused(copy, platform)


# ---------------------------------------------------------------- the engine's tensors


def _renamed(model: onnx.ModelProto) -> None:
    next(value for value in model.graph.output if value.name == tensors.LOGITS).name = "scores"
    next(node for node in model.graph.node if tensors.LOGITS in node.output).output[0] = "scores"


def _half_logits(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if tensors.LOGITS in node.output)
    node.output[0] = "wide"
    model.graph.node.append(onnx.helper.make_node("Cast", ["wide"], [tensors.LOGITS], to=TensorProto.FLOAT16))
    value = next(value for value in model.graph.output if value.name == tensors.LOGITS)
    value.type.tensor_type.elem_type = TensorProto.FLOAT16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_renamed, "its tensors differ from those of the model, logits first"),
        (_half_logits, "logits has dtype HALF; expected FLOAT"),
    ],
)
def test_an_engine_with_other_tensors(
    change: Callable[[onnx.ModelProto], None],
    message: str,
    copy: Path,
    platform: Platform,
    graph: onnx.ModelProto,
    spec: ModelSpec,
) -> None:
    changed = onnx.ModelProto()
    changed.CopyFrom(graph)
    change(changed)
    put_engine(copy, make_engine(changed, spec))
    assert message in refused(copy, platform)


def test_a_cache_that_is_not_updated_in_place(
    copy: Path, platform: Platform, graph: onnx.ModelProto, spec: ModelSpec
) -> None:
    put_engine(copy, make_engine(graph, spec, shared={}))
    text = refused(copy, platform)
    assert "present.0.key is aliased to nothing; expected past_key_values.0.key, updated in place" in text


def test_an_engine_of_one_profile(copy: Path, platform: Platform, graph: onnx.ModelProto, spec: ModelSpec) -> None:
    put_engine(copy, make_engine(graph, spec, PROFILES[:1]))
    assert "it has 1 optimization profiles; expected 2: prefill and decode" in refused(copy, platform)


def test_a_profile_that_begins_too_late(
    copy: Path, platform: Platform, graph: onnx.ModelProto, spec: ModelSpec
) -> None:
    late = profile(spec, *PROFILES[0])
    late[tensors.INPUT_IDS][0] = [1, 16]
    data = serialize(graph, str(NANO_FOLDER), [late, profile(spec, *PROFILES[1])], aliases(spec))
    put_engine(copy, data)
    assert "profile 0 begins at 1 rows of 16 tokens; expected 1 row of 1 token" in refused(copy, platform)


def test_a_cache_of_another_dtype_or_length(copy: Path, platform: Platform) -> None:
    edit_manifest(copy, lambda document: document.update(kv_dtype="bfloat16"))
    assert "past_key_values.0.key has dtype FLOAT; expected BF16" in refused(copy, platform)
    edit_manifest(copy, lambda document: document.update(kv_dtype="int8"))
    assert "the cache has dtype int8; expected one of float32" in refused(copy, platform)
    edit_manifest(copy, lambda document: document.update(kv_dtype="float32", max_length=CAPACITY + 1))
    put_engine(copy, card=make_card("tensorrt-rtx", VERSION, max_length=CAPACITY + 1))
    assert "has shape [-1, 2, 320, 128]; expected [B, 2, 321, 128]" in refused(copy, platform)


def test_rows_that_do_not_begin_where_tensorrt_wants_them(
    copy: Path, platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_rt.runtime.tensorrt.engine.ALIGNMENT", 3 << 20)
    assert "a row of the cache has 327680 bytes; expected a multiple of 3145728" in refused(copy, platform)


# ---------------------------------------------------------------- bundles, machines


def test_a_bundle_of_another_target(nano_bundle: Path, platform: Platform) -> None:
    assert "has target cpu; expected a bundle of target tensorrt or tensorrt-rtx" in refused(nano_bundle, platform)


def test_engines_of_several_gpus_are_not_run_yet(copy: Path, platform: Platform) -> None:
    shutil.copy(copy / engine_file(0), copy / engine_file(1))
    edit_manifest(copy, lambda document: document.update(tensor_parallel=2))
    edit_manifest(copy, lambda document: document["files"].update({engine_file(1): document["files"][engine_file(0)]}))
    assert "has engines for 2 GPUs" in refused(copy, platform)


def test_no_rows(bundle: Path, platform: Platform) -> None:
    with pytest.raises(UsageError, match="max_rows=0"):
        open_session(bundle, platform, max_rows=0)


@pytest.mark.parametrize(("flavour", "name"), [("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt_rtx")])
def test_tensorrt_that_is_absent_old_or_a_stub(flavour: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=rf"pip install '{flavour}>="):
        load_flavour(flavour)
    old = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, old)
    with pytest.raises(MissingDependencyError, match="cannot be loaded"):
        load_flavour(flavour)
    old.__version__ = "1.2.0"  # type: ignore[attr-defined]
    with pytest.raises(MissingDependencyError, match=rf"{name} 1\.2\.0 is too old"):
        load_flavour(flavour)


def test_the_command_says_it_in_one_line(
    copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    assert main(["generate", str(copy), "hello"]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "tensorrt_rtx is not installed" in line
    assert "pip install 'tensorrt-rtx>=1.7'" in line

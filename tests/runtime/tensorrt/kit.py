"""Engine bundles of nano for the fake TensorRT, and platforms for them."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx

from qwen_rt import tensors
from qwen_rt.bundle import Bundle, FileEntry, file_sha256
from qwen_rt.engine_card import CARD_FILE, EngineCard, EngineProfile, engine_file
from qwen_rt.runtime.tensorrt.engine import cache_pairs
from qwen_rt.runtime.tensorrt.platform import Platform
from qwen_rt.runtime.tensorrt.session import TensorRtSession
from qwen_rt.spec import ModelSpec

from ...cli.kit import NANO_FOLDER, edit_manifest
from ..cuda.fake import FakeGpu
from .fake import FakeTensorRt, Profile, serialize

CAPACITY = 320
PROFILES = (4, 96), (6, 1)
"""Largest calls of the engines: rows and tokens of prefill, of decode."""


def profile(spec: ModelSpec, rows: int, tokens: int, capacity: int = CAPACITY) -> Profile:
    """The shapes of a profile, as a builder sets them."""
    many = {tensors.INPUT_IDS: [[1, 1], [rows, tokens], [rows, tokens]]}
    many |= {
        name: [[1], [rows], [rows]] for name in (tensors.WRITE_INDICES, tensors.KV_LENGTHS, tensors.LOGITS_INDICES)
    }
    cache = [spec.num_kv_heads, capacity, spec.head_dim]
    return many | {past: [[1, *cache], [rows, *cache], [rows, *cache]] for past, _ in cache_pairs(spec.num_layers)}


def aliases(spec: ModelSpec) -> dict[str, str]:
    """Output → input that it shares memory with."""
    return {present: past for past, present in cache_pairs(spec.num_layers)}


def make_engine(
    model: onnx.ModelProto,
    spec: ModelSpec,
    sizes: Sequence[tuple[int, int]] = PROFILES,
    shared: dict[str, str] | None = None,
) -> bytes:
    """An engine of a lowered graph of nano, in float32."""
    shapes = [profile(spec, *size) for size in sizes]
    return serialize(model, str(NANO_FOLDER), shapes, aliases(spec) if shared is None else shared)


def make_card(target: str, version: str, **changes: Any) -> EngineCard:
    card = EngineCard(
        flavour=target,
        version=version,
        compute_capabilities=("8.0", "8.9", "12.0"),
        precision="bf16",
        compute_dtype="float32",
        max_length=CAPACITY,
        profiles={name: EngineProfile(*sizes) for name, sizes in zip(("prefill", "decode"), PROFILES, strict=True)},
        network={},
        engine={},
        weights_sha256=("0" * 64,),
        command=("qwen-rt", "build", "nano", "--target", target),
    )
    return dataclasses.replace(card, **changes)


def put_engine(folder: Path, engine: bytes | None = None, card: EngineCard | None = None) -> None:
    """Replace files of a bundle, hashes included: what is wrong with them is not that they were changed."""
    written = {engine_file(0): engine, CARD_FILE: None if card is None else card.to_json()}
    for name, data in written.items():
        if data is not None:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)

    def list_them(document: dict[str, Any]) -> None:
        for name, data in written.items():
            if data is not None:
                document["files"][name] = vars(FileEntry(len(data), file_sha256(folder / name)))

    edit_manifest(folder, list_them)


def make_bundle(cpu_bundle: Path, folder: Path, engine: bytes, target: str, version: str) -> Path:
    """A bundle of nano with an engine, beside whose files the CPU's graph stays."""
    shutil.copytree(cpu_bundle, folder)
    edit_manifest(
        folder,
        lambda document: document.update(
            target=target, max_length=CAPACITY, compute_dtype="float32", kv_dtype="float32", precision="bf16"
        ),
    )
    put_engine(folder, engine, make_card(target, version))
    return folder


def platform_of(gpu: FakeGpu, rtx: bool = True) -> tuple[Platform, FakeTensorRt]:
    trt = FakeTensorRt(gpu, rtx)
    return Platform(gpu.cuda, trt), trt


def open_session(bundle: Path, platform: Platform, **options: Any) -> TensorRtSession:
    return TensorRtSession(Bundle.open(bundle), platform=platform, **options)

"""What cannot be compiled is refused in one line that names the layer; an absent library with its install command."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from qwen_rt.checkpoint import Checkpoint
from qwen_rt.errors import GraphError, MissingDependencyError, QwenRtError, UsageError
from qwen_rt.export.build import BuildOptions, build
from qwen_rt.export.lower import lowered_graph
from qwen_rt.export.portable import checkpoint_locations
from qwen_rt.export.quantize import prepare
from qwen_rt.export.settings import QuantizeOptions
from qwen_rt.export.source import open_source
from qwen_rt.export.tensorrt import flavour, histogram
from qwen_rt.export.tensorrt.flavour import load_flavour
from qwen_rt.export.tensorrt.messages import reason_of
from qwen_rt.export.tensorrt.network import parse
from qwen_rt.export.tensorrt.options import EngineOptions
from qwen_rt.export.tensorrt.weights import MappedWeights

from ..cli.kit import names
from .kit import MAX_LENGTH, engine_build

try:
    import tensorrt_rtx
except ImportError:
    tensorrt_rtx = None
needs_library = pytest.mark.skipif(tensorrt_rtx is None, reason="TensorRT-RTX is not installed")


def _refused(error: QwenRtError, *words: str) -> None:
    text = str(error)
    assert "\n" not in text
    for word in words:
        assert word in text, text


@pytest.mark.trt
@needs_library
def test_a_dtype_without_a_kernel(nano_portable: Path, tmp_path: Path) -> None:
    """The builder's refusal: attention in float32."""
    with pytest.raises(GraphError) as caught:
        engine_build(nano_portable, tmp_path / "out", "fp32")
    _refused(caught.value, "/model/layers.0/self_attn/Attention: Attention operation was not supported", "--precision")
    assert names(tmp_path) == set()


@pytest.mark.trt
@needs_library
def test_more_rows_than_memory(nano_portable: Path, tmp_path: Path) -> None:
    """The most rows that are let through: the library says that it lacks memory, and what would need less is named."""
    with pytest.raises(GraphError) as caught:
        engine_build(nano_portable, tmp_path / "out", max_batch=2**31 // MAX_LENGTH - 1)
    _refused(caught.value, "has not the memory to build the engine", "choose a smaller --max-batch")
    assert names(tmp_path) == set()


@pytest.mark.trt
@needs_library
@pytest.mark.parametrize("capabilities", [("8.0",), ("8.6", "12.0")])
def test_a_format_that_a_gpu_lacks(capabilities: tuple[str, ...], nano_portable: Path, tmp_path: Path) -> None:
    with pytest.raises(GraphError) as caught:
        engine_build(nano_portable, tmp_path / "out", "fp8", capabilities)
    _refused(caught.value, "layer model.layers.0.self_attn.q_proj, fp8, for compute capability 8.", "8.9 or newer")
    assert names(tmp_path) == set()


@pytest.mark.trt
@needs_library
@pytest.mark.parametrize(
    ("precision", "quantize", "engine", "words"),
    [
        ("int4", {"symmetric": False}, {}, ("q_proj.weight is stored as int4 g128 asymmetric", "no zero points")),
        ("int8", {"group_size": 64}, {}, ("q_proj.weight is stored as int8 g64", "one scale for each row")),
        ("fp8", {}, {"capabilities": ("8.0",)}, ("q_proj, fp8, for compute capability 8.0", "8.9 or newer")),
        (
            "int4",
            {"group_size": 256},
            {"tensor_parallel": 2},
            ("down_proj.weight is stored as int4 g256, 384 columns for each rank", "a multiple of 256"),
        ),
    ],
)
def test_refused_before_anything_is_computed(
    precision: str,
    quantize: dict[str, Any],
    engine: dict[str, Any],
    words: tuple[str, ...],
    nano_portable: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Calibration and a search for a budget take hours on a large model."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("too early")

    monkeypatch.setattr(prepare, "calibrate", never)
    monkeypatch.setattr(prepare, "choose_mixed", never)
    text = tmp_path / "text.txt"
    text.write_text("What is 17 + 25?\n" * 50)
    for more in ({"calibrate": text}, {"size_budget": 10_000_000}):
        options = QuantizeOptions(**quantize, **more)
        with pytest.raises(QwenRtError) as caught:
            engine_build(nano_portable, tmp_path / "out", precision, quantize=options, **engine)
        _refused(caught.value, *words)
    assert names(tmp_path) == {"text.txt"}


@pytest.mark.trt
@needs_library
def test_bf16_on_a_gpu_without(nano_portable: Path, tmp_path: Path) -> None:
    """Compute capability 7.5 is taken in fp16 only."""
    with pytest.raises(GraphError) as caught:
        engine_build(nano_portable, tmp_path / "out", capabilities=("7.5", "8.9"))
    _refused(caught.value, "layer model.layers.0.self_attn, bf16, for compute capability 7.5; expected 8.0 or newer")
    assert engine_build(nano_portable, tmp_path / "out", "fp16", ("7.5",)).compute_capabilities == ("7.5",)


@pytest.mark.trt
@needs_library
def test_a_node_that_the_parser_does_not_take(nano_portable: Path, tmp_path: Path) -> None:
    """A cache of any length: what the portable graph has and KV_CACHE_UPDATE lacks."""
    model = open_source(nano_portable).load_graph()
    assert model is not None
    for name, place in checkpoint_locations(Checkpoint.open("nano")).items():
        if name in model.graph.initializers:
            model.graph.initializers[name].const_value = ir.ExternalTensor(
                str(place.file),
                place.offset,
                place.nbytes,
                ir.DataType.BFLOAT16,
                shape=ir.Shape(place.shape),
                name=name,
            )
    with MappedWeights(model, {}, tmp_path) as weights, pytest.raises(GraphError) as caught:
        parse(load_flavour("tensorrt-rtx"), model, weights, 4)
    _refused(caught.value, "TensorScatter /model/layers.0/self_attn/TensorScatter: ", "static sequence length")


def _lowered(portable: Path) -> ir.Model:
    checkpoint = Checkpoint.open("nano")
    places = checkpoint_locations(checkpoint)
    return lowered_graph(checkpoint, "tensorrt-rtx", MAX_LENGTH, places, open_source(portable).load_graph())


@pytest.mark.trt
@needs_library
def test_an_operator_of_ours_never_reaches_the_parser(nano_portable: Path, tmp_path: Path) -> None:
    model = _lowered(nano_portable)
    node = next(node for node in model.graph if node.op_type == "Attention")
    node.domain = "qwen_rt"
    with MappedWeights(model, {}, tmp_path) as weights, pytest.raises(GraphError) as caught:
        parse(load_flavour("tensorrt-rtx"), model, weights, 4)
    _refused(caught.value, "does not take Attention /model/layers.0/self_attn/Attention")


@pytest.mark.trt
@needs_library
def test_a_graph_that_falls_apart(nano_portable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the network, and in the engine; nothing of the bundle stays."""
    with monkeypatch.context() as patch:
        patch.setitem(histogram.LAYER_OF, "Sigmoid", "NORMALIZATION")
        with pytest.raises(GraphError) as caught:
            engine_build(nano_portable, tmp_path / "out")
        _refused(caught.value, "made 0 NORMALIZATION layers of the graph, which fell apart", "expected 4")
    monkeypatch.setattr(histogram, "MAX_ENGINE_LAYERS", 9)
    with pytest.raises(GraphError) as caught:
        engine_build(nano_portable, tmp_path / "out")
    _refused(caught.value, "compiled 4 decoder layers into", "for prefill", "expected at most 45")
    assert names(tmp_path) == set()


def test_histograms() -> None:
    wanted = {"ATTENTION": 2, "MATRIX_MULTIPLY": 9}
    histogram.check_network(wanted | {"SHUFFLE": 70}, wanted, "library")
    for found in ({"ATTENTION": 1, "MATRIX_MULTIPLY": 9}, wanted | {"DEQUANTIZE": 1}, {"MATRIX_MULTIPLY": 11}):
        with pytest.raises(GraphError, match="fell apart"):
            histogram.check_network(found, wanted, "library")
    lines = [
        "Name: a_myl1_0, LayerType: gemm, Inputs: [Name: b_myl7_1, LayerType: x]",
        "Name: s_myl1_1, LayerType: wait",
    ]
    lines += ["Name: [Copy 0], LayerType: ShapeHostToDevice", "Name: a [profile 1]_myl3_0, LayerType: kgen"]
    message = "Layers:\n" + "\n".join(lines)
    found = histogram.engine_layers(["Layers:\nnothing", message], ["prefill", "decode"])
    assert found == {"prefill": {"gemm": 1}, "decode": {"kgen": 1}}
    assert histogram.engine_layers([message], ["prefill"]) == {"program 0": {"gemm": 1}, "program 1": {"kgen": 1}}
    assert histogram.engine_layers([], ["prefill"]) == {}


def test_reasons() -> None:
    """Messages as the library writes them."""
    noise = (
        "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In catchCudaError at /_src/common/"
        "dispatch/checkMacros.cpp:250 (cudaError 35: CUDA driver version is insufficient for CUDA runtime version))"
    )
    scatter = (
        "ITensor::getDimensions: Error Code 3: API Usage Error (/model/layers.0/self_attn/TensorScatter: The KV cache "
        "tensor must have a static sequence length dimension. In validate at /_src/optimizer/api/layers/k.cpp:129)"
    )
    layers = ["/model/layers.0/self_attn/TensorScatter", "/model/layers.0/self_attn/Attention_AttentionInput"]
    text = reason_of([noise, scatter], layers)
    assert text.startswith("/model/layers.0/self_attn/TensorScatter: ")
    assert "static sequence length" in text
    assert "/_src/" not in text
    assert reason_of([noise]).endswith("CUDA runtime version))")
    types_ = (
        "IBuilder::buildSerializedNetworkToStream: Error Code 1: Myelin ([myelin_graph.h:1295: attachExceptionMsg] "
        "MyelinCheckException: x.cpp:9: CHECK(a) failed. Cannot compile for target(s) sm75)"
    )
    assert reason_of([noise, types_]).startswith("Cannot compile for target(s) sm75")
    assert reason_of([]) == ""


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"compute_capabilities": ("9.0",)}, ("compute-capability=9.0 with TensorRT-RTX 1.", "8.9, 12.0")),
        ({"compute_capabilities": ("8.9", "new")}, ("compute-capability=new",)),
        ({"max_batch": 0}, ("max-batch=0", "1 to ")),
        ({"max_batch": 2**31 // MAX_LENGTH}, (f"max-batch={2**31 // MAX_LENGTH}", f"1 to {2**31 // MAX_LENGTH - 1}")),
        ({"max_batch": 10**20}, (f"max-batch={10**20}", "choose another --max-batch")),
        ({"prefill_tokens": MAX_LENGTH + 1}, (f"prefill-tokens={MAX_LENGTH + 1}", f"1 to {MAX_LENGTH}")),
        ({"timing_cache": Path("x")}, ("timing-cache=x with target tensorrt-rtx, which measures nothing",)),
        ({"optimization_level": 6}, ("optimization-level=6", "0 to 5")),
        ({"tensor_parallel": 3}, ("tp=3",)),
        ({"tensor_parallel": 4}, ("tp=4 of 4 attention heads", "at least 2 heads a rank")),
    ],
)
@pytest.mark.trt
@needs_library
def test_options(engine: dict[str, Any], words: tuple[str, ...], nano_portable: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        engine_build(nano_portable, tmp_path / "out", **({"capabilities": ()} | _renamed(engine)))
    _refused(caught.value, *words)
    assert names(tmp_path) == set()


def _renamed(engine: dict[str, Any]) -> dict[str, Any]:
    return {"capabilities" if name == "compute_capabilities" else name: value for name, value in engine.items()}


def test_a_quantized_cache(nano_portable: Path, tmp_path: Path) -> None:
    options = BuildOptions(target="tensorrt-rtx", quantize=QuantizeOptions(kv_cache="int8"), quiet=True)
    with pytest.raises(UsageError, match="KV_CACHE_UPDATE takes 16 or 32 bits"):
        build(nano_portable, tmp_path / "out", options)


@pytest.mark.parametrize(("max_length", "multiple"), [(9, 8), (1, 2)])
def test_cache_rows_begin_at_multiples_of_256_bytes(max_length: int, multiple: int) -> None:
    """One key/value head of 16 (or 64) numbers of two bytes."""
    from dataclasses import replace

    from qwen_rt.export.tensorrt.options import settle_engine

    spec = replace(Checkpoint.open("nano").spec, num_kv_heads=1, head_dim=128 // multiple)
    settle_engine(spec, EngineOptions(), multiple * 6, "bfloat16")
    with pytest.raises(UsageError) as caught:
        settle_engine(spec, EngineOptions(), max_length, "bfloat16")
    _refused(caught.value, f"max-length={max_length} for an engine", f"a multiple of {multiple}", "--max-length ")


# ---------------------------------------------------------------- the library


@pytest.mark.parametrize(
    ("target", "module", "command"),
    [
        ("tensorrt", "tensorrt", "pip install 'tensorrt>=10.15'"),
        ("tensorrt-rtx", "tensorrt_rtx", "pip install 'tensorrt-rtx>=1.7'"),
    ],
)
def test_an_absent_flavour(
    target: str, module: str, command: str, nano_portable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(flavour.importlib, "import_module", find)
    with pytest.raises(MissingDependencyError) as caught:
        build(nano_portable, tmp_path / "out", BuildOptions(target=target, quiet=True))
    _refused(caught.value, "is not installed", command, f"--target {target}")
    assert names(tmp_path) == set()
    assert module


@pytest.mark.parametrize("trouble", [OSError("libcuda.so.1: cannot open"), ImportError("bad wheel")])
def test_a_flavour_that_does_not_import(trouble: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise trouble

    monkeypatch.setattr(flavour.importlib, "import_module", fail)
    with pytest.raises(MissingDependencyError, match="TensorRT does not import: ") as caught:
        load_flavour("tensorrt")
    _refused(caught.value, str(trouble), "pip install")


def test_stubs_and_old_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = types.ModuleType("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", stub)
    with pytest.raises(MissingDependencyError, match="TensorRT has no builder here"):
        load_flavour("tensorrt")
    stub.Builder, stub.__version__ = object, "10.9.0.34"  # type: ignore[attr-defined]
    with pytest.raises(MissingDependencyError, match=r"TensorRT 10\.9\.0\.34 is too old; expected 10\.15 or newer"):
        load_flavour("tensorrt")
    stub.__version__ = "10.15.1"
    found = load_flavour("tensorrt")
    assert (found.title, found.known_capabilities) == ("TensorRT 10.15.1", ())
    assert found.choose_capabilities((), lambda: "9.0") == ("9.0",)
    assert found.choose_capabilities(("9.0",), lambda: "9.0") == ("9.0",)
    with pytest.raises(UsageError, match=r"compute-capability=8\.9 with TensorRT 10\.15\.1; expected 9\.0"):
        found.choose_capabilities(("8.9",), lambda: "9.0")
    with pytest.raises(MissingDependencyError, match=r"this one has none; .* --target tensorrt-rtx"):
        found.choose_capabilities((), lambda: None)

"""Children, bandwidth, shared arithmetic, and the checkpoints that benchmarks make."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import ml_dtypes
import numpy as np
import pytest

from qwen_rt.benchmarks import bench_cpu_05b, bench_cpu_decode, bench_cpu_start, bench_export_72b
from qwen_rt.benchmarks.bench_export_72b import check_references
from qwen_rt.benchmarks.checkpoints import (
    QWEN2_05B,
    QWEN2_72B,
    split_shards,
    write_random,
    write_repeated,
    write_sparse,
)
from qwen_rt.benchmarks.cpu_contest import agreement, step_weights
from qwen_rt.benchmarks.gpu_rates import NUM_READ_PROBES, gpu_read_bandwidth, matrix_rates_of_child
from qwen_rt.benchmarks.measure import (
    Worker,
    first_byte_seconds,
    package_python,
    process_seconds,
    read_bandwidth,
    run_child,
)
from qwen_rt.checkpoint import Checkpoint
from qwen_rt.errors import QwenRtError
from qwen_rt.spec import ModelSpec

TINY = QWEN2_05B | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
}


def test_peak_memory_is_the_childs_own() -> None:
    """The parent holds 300 MB; a child that holds nothing must not be charged for them."""
    ballast = bytearray(300 << 20)
    small = run_child(package_python("-c", "print('hi')"))
    large = run_child(package_python("-c", "x = bytearray(b'1' * (200 << 20))"))
    assert len(ballast) == 300 << 20
    assert (small.returncode, small.output) == (0, "hi\n")
    assert small.peak_rss_bytes < 100e6
    assert large.peak_rss_bytes > 200e6


def test_a_failing_child_tells() -> None:
    assert run_child(package_python("-c", "raise SystemExit(3)")).returncode == 3
    with pytest.raises(QwenRtError, match="for more than"):
        run_child(package_python("-c", "import time; time.sleep(60)"), timeout_s=0.5)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_child_that_takes_too_long_is_gone(tmp_path: Path) -> None:
    """It would go on beside whatever is measured next."""
    told = tmp_path / "pid"
    program = f"import os, pathlib, time; pathlib.Path({str(told)!r}).write_text(str(os.getpid())); time.sleep(60)"
    with pytest.raises(QwenRtError, match="for more than 3 s"):
        run_child(package_python("-c", program), timeout_s=3)
    pid, until = int(told.read_text()), time.monotonic() + 5
    while _is_alive(pid) and time.monotonic() < until:
        time.sleep(0.02)
    assert not _is_alive(pid)


def test_a_child_that_must_succeed() -> None:
    assert run_child(package_python("-c", "print('done')")).require("it").output == "done\n"
    with pytest.raises(QwenRtError, match="the build ended with 1: no room"):
        run_child(package_python("-c", "raise SystemExit('no room')")).require("the build")


def test_a_child_that_says_much_on_stderr_first_is_not_held_up() -> None:
    program = "import sys; sys.stderr.write('x' * (1 << 20)); print('a')"
    assert first_byte_seconds(package_python("-c", program))[1] == "a\n"


def test_a_worker_that_cannot_load_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    popen = subprocess.Popen

    def start(*args: Any, **options: Any) -> Any:
        started.append(popen(*args, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(QwenRtError, match="qwen-rt: "):
        Worker(sys.executable, "qwen-rt", {"model": "no-such-bundle", "threads": 1})
    (process,) = started
    assert process.returncode == 0
    assert process.stdout.closed


def test_first_byte_comes_before_the_end() -> None:
    program = "import time; print('a', end='', flush=True); time.sleep(1); print('b')"
    elapsed_s, text = first_byte_seconds(package_python("-c", program))
    assert elapsed_s < 1
    assert text == "ab\n"
    with pytest.raises(QwenRtError, match="ended with"):
        first_byte_seconds(package_python("-c", "raise SystemExit('no')"))


def test_bandwidth_is_the_fastest_reader() -> None:
    found = read_bandwidth(1 << 20, threads=1, seconds=0.01)
    assert found["gb_s"] == max(found["all"].values()) > 0


def test_agreement_stops_at_the_first_difference() -> None:
    assert agreement([[1, 2, 3], [1, 2, 3]], [[1, 2, 3], [1, 9, 3]]) == {
        "num_tokens": 6,
        "num_same": 4,
        "share_same": 0.6667,
    }


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (bench_cpu_decode, ["--rounds", "0"]),
        (bench_cpu_decode, ["--tokens", "2"]),
        (bench_cpu_decode, ["--batch", "1", "1001"]),
        (bench_cpu_05b, ["--prompt-tokens", "0"]),
        (bench_cpu_start, ["--runs", "-1"]),
        (bench_export_72b, ["--runs", "0"]),
    ],
)
def test_numbers_that_give_no_figure_are_refused_at_once(
    module: ModuleType, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        module.main(arguments)
    assert "is no whole number from " in capsys.readouterr().err


@pytest.mark.parametrize(("config", "billions"), [(QWEN2_05B, 0.494), (QWEN2_72B, 71.46)])
def test_step_weights(config: dict, billions: float) -> None:
    """Tied: the embedding is read as LM head; untied: it is not read."""
    assert step_weights(ModelSpec.from_config(config)) / 1e9 == pytest.approx(billions, rel=1e-3)


def test_72b_has_the_size_and_shards_of_the_real_one() -> None:
    tensors = list(ModelSpec.from_config(QWEN2_72B).parameters().items())
    shards = split_shards(tensors, 37)
    assert len(shards) == 37
    assert [tensor for shard in shards for tensor in shard] == tensors


def test_sparse_and_random_checkpoints_are_checkpoints(tmp_path: Path) -> None:
    for name, write in (("sparse", write_sparse), ("random", write_random)):
        folder = tmp_path / name
        folder.mkdir()
        paths = write(folder, TINY, 3)
        checkpoint = Checkpoint.open(folder)
        assert sorted(path.name for path in checkpoint.shards) == [path.name for path in paths]
        assert set(checkpoint.tensors) == set(checkpoint.spec.parameters())
        if name == "sparse":
            assert sum(path.stat().st_blocks * 512 for path in paths) < 100_000
    again = tmp_path / "again"
    again.mkdir()
    paths = write_random(again, TINY, 3)
    assert all(path.read_bytes() == (tmp_path / "random" / path.name).read_bytes() for path in paths)


def test_the_export_check_finds_a_moved_weight(tmp_path: Path) -> None:
    import onnx

    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write_sparse(folder, TINY, 2)
    stored = Checkpoint.open(folder).tensors
    model = onnx.ModelProto()
    for name, ref in stored.items():
        tensor = model.graph.initializer.add(name=name, data_type=onnx.TensorProto.BFLOAT16, dims=ref.shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", ref.path.name), ("offset", ref.offset), ("length", ref.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
    graph = tmp_path / "graph.onnx"
    graph.write_bytes(model.SerializeToString())
    assert check_references(graph, stored)["passed"]
    model.graph.initializer[3].external_data[1].value = "0"
    graph.write_bytes(model.SerializeToString())
    assert check_references(graph, stored)["num_wrong"] == 1
    del model.graph.initializer[3]
    graph.write_bytes(model.SerializeToString())
    found = check_references(graph, stored)
    assert (found["passed"], found["num_missing"]) == (False, 1)


def test_without_a_gpu_there_is_no_matrix_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that cannot see a GPU, dies, or hangs gives no rate, and no trouble."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert matrix_rates_of_child() == {}
    for program in (
        "import os; os.abort()",
        "print('[0]')",
        'print(\'{"bf16": "fast"}\')',
        "import time; time.sleep(60)",
    ):
        monkeypatch.setattr("qwen_rt.benchmarks.gpu_rates._CHILD", program)
        assert matrix_rates_of_child(timeout_s=2.0 if "sleep" in program else 60.0) == {}
    program = "print('noise'); print('{\"bf16\": 7.9e14, \"fp8\": null}')"
    monkeypatch.setattr("qwen_rt.benchmarks.gpu_rates._CHILD", program)
    assert matrix_rates_of_child() == {"bf16": 7.9e14}


def test_a_process_knows_its_age() -> None:
    assert 0 < process_seconds() < 86400


class FakeCuda:
    """Device memory is host memory; event times are those that the probes set."""

    def __init__(self, free: int) -> None:
        self.free_bytes, self.elapsed = free, 0.0
        self.taken: dict[int, Any] = {}

    def memory_info(self) -> tuple[int, int]:
        return self.free_bytes, 2 * self.free_bytes

    def malloc(self, nbytes: int) -> int:
        buffer = ctypes.create_string_buffer(nbytes)
        self.taken[ctypes.addressof(buffer)] = buffer
        return ctypes.addressof(buffer)

    host_alloc = malloc

    def free(self, pointer: int) -> None:
        del self.taken[pointer]

    host_free = stream_destroy = event_destroy = free

    def host_device_pointer(self, pointer: int) -> int:
        return pointer

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        ctypes.memmove(target, source, nbytes)

    def stream_create(self) -> int:
        return self.malloc(8)

    def event_create(self, *, timing: bool) -> int:
        assert timing
        return self.malloc(8)

    def event_record(self, event: int, stream: int) -> None: ...

    event_synchronize = stream_synchronize = lambda self, handle: None

    def elapsed_ms(self, start: int, end: int) -> float:
        return self.elapsed


class FakeLibrary:
    """A reader whose third variant is the fastest, 4 TB/s."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.nbytes = cuda, 0
        self.variants: list[int] = []

    def read_probe(self, data: int, nbytes: int, sink: int, variant: int, stream: int) -> None:
        content = ctypes.string_at(data, nbytes)
        assert len(set(content[:: max(1, nbytes // 4096)])) > 100  # not constant
        self.variants.append(variant)
        self.nbytes = nbytes
        self.cuda.elapsed = nbytes / (4e12 - abs(variant - 3) * 1e11) * 1e3


def test_the_fastest_reader_of_a_gpu_counts() -> None:
    cuda = FakeCuda(free=100 << 20)
    library = FakeLibrary(cuda)
    rate = gpu_read_bandwidth(cast(Any, cuda), cast(Any, library), repeats=3)
    assert rate == pytest.approx(4e12)
    assert library.nbytes == 48 << 20  # half of what is free, in whole chunks
    assert library.variants == [variant for variant in range(NUM_READ_PROBES) for _ in range(5)]
    assert not cuda.taken  # all given back


def test_repeated_weights_may_be_scaled(tmp_path: Path) -> None:
    """By powers of two, some matrices, bit for bit; the others stay as they were."""
    plain, scaled = tmp_path / "plain", tmp_path / "scaled"
    for folder, factors in ((plain, None), (scaled, {"o_proj.weight": 0.125, "embed_tokens.weight": 64.0})):
        folder.mkdir()
        write_repeated(folder, TINY, factors=factors)
    first, second = (Checkpoint.open(folder).tensors for folder in (plain, scaled))

    def read(tensor: Any) -> Any:
        data = tensor.path.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
        return np.frombuffer(data, ml_dtypes.bfloat16).astype(np.float32)

    for name, tensor in first.items():
        factor = 0.125 if "o_proj.weight" in name else 64.0 if "embed_tokens" in name else 1.0
        assert np.array_equal(read(second[name]), factor * read(tensor)), name

"""CUPTI through ctypes: records read from a buffer, what is refused is one line; the library is made of Python."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qwen_rt.benchmarks.profile import cupti
from qwen_rt.benchmarks.profile.cupti import Activity, Cupti, CuptiError, find_cupti, parse_buffer

KERNEL_BYTES, COPY_BYTES, FILL_BYTES = 216, 96, 88  # of CUDA 13.0: Kernel10, Memcpy6, Memset4
ADMINISTRATORS = 35


class FakeCupti:
    """Calls that give and take buffers as CUPTI does, from the thread that flushes."""

    def __init__(self, records: list[bytes] | None = None, refuse: dict[str, int] | None = None, lost: int = 0) -> None:
        self.records, self.refuse, self.lost = records or [], refuse or {}, lost
        self.enabled: list[int] = []
        self.calls: list[str] = []
        self.request: Any = None
        self.complete: Any = None
        self.ends: dict[int, int] = {}

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            return self.refuse.get(name) or int(getattr(self, f"_{name}")(*arguments) or 0)

        if name.startswith("cupti"):
            return call
        raise AttributeError(name)

    def _cuptiActivityRegisterCallbacks(self, request: Any, complete: Any) -> None:
        self.request, self.complete = request, complete

    def _cuptiActivityEnable(self, kind: int) -> None:
        self.enabled.append(kind)

    def _cuptiActivityDisable(self, kind: int) -> None:
        self.enabled.remove(kind)

    def _cuptiActivityFlushAll(self, flag: int) -> None:
        for record in self.records:
            buffer, size, most = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
            self.request(ctypes.byref(buffer), ctypes.byref(size), ctypes.byref(most))
            address = buffer.value or 0
            assert address % 8 == 0
            assert size.value >= len(record)
            ctypes.memmove(address, record, len(record))
            self.complete(None, 0, address, size.value, len(record))
        self.records = []

    def _cuptiActivityGetNumDroppedRecords(self, context: Any, stream: int, out: Any) -> None:
        out._obj.value = self.lost

    def _cuptiActivityGetNextRecord(self, address: Any, nbytes: Any, record: Any) -> int:
        sizes = {cupti.KERNEL: KERNEL_BYTES, cupti.MEMCPY: COPY_BYTES, cupti.MEMSET: FILL_BYTES, 99: 64}
        at = address.value
        if record._obj.value:
            at = record._obj.value + sizes[ctypes.c_uint32.from_address(record._obj.value).value]
        if at >= address.value + nbytes.value:
            return 12
        record._obj.value = at
        return 0

    def _cuptiGetResultString(self, status: int, out: Any) -> None:
        out._obj.value = b"CUPTI_ERROR_INSUFFICIENT_PRIVILEGES" if status == ADMINISTRATORS else b"CUPTI_ERROR_UNKNOWN"

    def _cuptiGetVersion(self, out: Any) -> None:
        out._obj.value = 130001

    def _cuptiGetTimestamp(self, out: Any) -> None:
        out._obj.value = 123


NAMES = [ctypes.create_string_buffer(b"embed"), ctypes.create_string_buffer(b"gemm")]


def kernel(number: int, start: int, end: int) -> bytes:
    data = bytearray(KERNEL_BYTES)
    record = cupti._Kernel.from_buffer(data)
    record.kind, record.start, record.end, record.stream, record.correlation = cupti.KERNEL, start, end, 7, 3
    record.grid[:], record.block[:] = (132, 1, 1), (256, 1, 1)
    record.static_shared_bytes, record.dynamic_shared_bytes, record.registers = 1024, 2048, 64
    record.graph_node, record.name = 11 + number, ctypes.addressof(NAMES[number])
    return bytes(data)


def memory(kind: int, start: int, end: int) -> bytes:
    data = bytearray(COPY_BYTES if kind == cupti.MEMCPY else FILL_BYTES)
    record = cupti._Memory.from_buffer(data)
    record.kind, record.start, record.end, record.stream, record.correlation = kind, start, end, 13, 5
    return bytes(data)


def test_layouts() -> None:
    """As gcc lays out cupti_activity.h of CUDA 13.0."""
    offsets = {
        "registers": 6,
        "start": 16,
        "end": 24,
        "completed": 32,
        "stream": 48,
        "grid": 52,
        "block": 64,
        "static_shared_bytes": 76,
        "correlation": 92,
        "grid_id": 96,
        "name": 104,
        "queued": 120,
        "launch_type": 136,
        "graph_node": 144,
        "graph": 156,
    }
    assert {name: getattr(cupti._Kernel, name).offset for name in offsets} == offsets
    of_memory = {"nbytes": 8, "start": 16, "end": 24, "stream": 40, "correlation": 44}
    assert {name: getattr(cupti._Memory, name).offset for name in of_memory} == of_memory


def header_folder() -> Path | None:
    places = [*Path("/usr/local").glob("cuda*/include"), *Path("/usr/local").glob("cuda*/extras/CUPTI/include")]
    return next((folder for folder in places if (folder / "cupti_activity.h").is_file()), None)


@pytest.mark.skipif(header_folder() is None or shutil.which("g++") is None, reason="no CUPTI headers or no g++")
def test_layouts_are_those_of_the_header(tmp_path: Path) -> None:
    names = {"start": "start", "end": "end", "stream": "streamId", "correlation": "correlationId", "name": "name"}
    names |= {"graph_node": "graphNodeId", "graph": "graphId", "grid": "gridX", "block": "blockX"}
    text = (header_folder() / "cupti_activity.h").read_text(encoding="utf-8", errors="replace")  # type: ignore[operator]
    newest = max(int(part.split(";")[0]) for part in text.split("} CUpti_ActivityKernel")[1:])
    prints = "".join(f'printf("%zu\\n", offsetof(CUpti_ActivityKernel{newest}, {field}));' for field in names.values())
    source = tmp_path / "offsets.cpp"
    source.write_text(f"#include <cupti.h>\n#include <cstdio>\n#include <cstddef>\nint main() {{ {prints} }}\n")
    folder = header_folder()
    command = ["g++", f"-I{folder}", str(source), "-o", str(tmp_path / "offsets")]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode:
        pytest.skip("the headers do not compile alone")
    shown = subprocess.run([str(tmp_path / "offsets")], capture_output=True, text=True, check=True).stdout.split()
    assert [int(value) for value in shown] == [getattr(cupti._Kernel, name).offset for name in names]


def test_records_come_in_order_of_their_start() -> None:
    buffers = [kernel(1, 500, 900) + memory(cupti.MEMCPY, 10, 20), memory(cupti.MEMSET, 30, 40) + kernel(0, 100, 450)]
    library = FakeCupti()
    recorder = Cupti(library)  # type: ignore[arg-type]
    assert library.enabled == []
    recorder.start()
    assert sorted(library.enabled) == [cupti.MEMCPY, cupti.MEMSET, cupti.KERNEL]
    library.records = buffers
    found = recorder.stop()
    assert library.enabled == []
    assert [(one.name, one.start_ns, one.end_ns) for one in found] == [
        ("copy", 10, 20),
        ("fill", 30, 40),
        ("embed", 100, 450),
        ("gemm", 500, 900),
    ]
    assert found[2] == Activity("embed", 100, 450, 7, 3, 11, (132, 1, 1), (256, 1, 1), 3072, 64)
    assert (found[0].stream, found[0].launch) == (13, 5)
    assert (recorder.timestamp_ns(), recorder.version) == (123, 130001)


def test_buffers_are_used_again() -> None:
    library = FakeCupti()
    recorder = Cupti(library)  # type: ignore[arg-type]
    for turn in range(3):
        recorder.start()
        library.records = [kernel(0, turn, turn + 1), kernel(1, turn, turn + 2)]
        assert len(recorder.stop()) == 2
    assert len(recorder._free) == 2
    assert recorder._given == {}


def test_kinds_that_nobody_asked_for_are_passed_over() -> None:
    data = (99).to_bytes(4, "little") + bytes(60) + kernel(0, 1, 2)
    memory_of = ctypes.create_string_buffer(data, len(data))
    found = parse_buffer(FakeCupti(), ctypes.addressof(memory_of), len(data))  # type: ignore[arg-type]
    assert [one.name for one in found] == ["embed"]
    assert parse_buffer(FakeCupti(), ctypes.addressof(memory_of), 0) == []  # type: ignore[arg-type]


def test_what_is_refused_is_one_line() -> None:
    with pytest.raises(
        CuptiError, match=r"refuses cuptiActivityEnable: CUPTI_ERROR_INSUFFICIENT_PRIVILEGES \(35\)"
    ) as e:
        Cupti(FakeCupti(refuse={"cuptiActivityEnable": ADMINISTRATORS}))  # type: ignore[arg-type]
    assert "NVreg_RestrictProfilingToAdminUsers=0" in str(e.value)
    assert "\n" not in str(e.value)
    with pytest.raises(CuptiError, match=r"cuptiActivityGetNextRecord: CUPTI_ERROR_UNKNOWN"):
        parse_buffer(FakeCupti(refuse={"cuptiActivityGetNextRecord": 999}), 8, 8)  # type: ignore[arg-type]


def test_lost_records_are_told() -> None:
    with pytest.raises(CuptiError, match="lost 5 records"):
        Cupti(FakeCupti(lost=5))  # type: ignore[arg-type]


def test_where_it_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [str(tmp_path / "site")])
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    wheel = tmp_path / "site" / "nvidia" / "cuda_cupti" / "lib"
    toolkit = tmp_path / "cuda" / "extras" / "CUPTI" / "lib64"
    for folder in (wheel, toolkit):
        folder.mkdir(parents=True)
        (folder / "libcupti.so.13").touch()
    places = list(cupti._places())
    assert places[0] == str(wheel / "libcupti.so.13")
    assert str(toolkit / "libcupti.so.13") in places


def test_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cupti, "_places", lambda: iter(["libno-such-cupti.so.13"]))
    with pytest.raises(CuptiError, match=r"was not found; pip install nvidia-cuda-cupti"):
        find_cupti()

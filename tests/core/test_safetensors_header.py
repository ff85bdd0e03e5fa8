"""Safetensors headers: what is read, what is refused, and that the library agrees with what is written."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_rt.errors import CheckpointError, StorageError
from qwen_rt.safetensors_header import ShardHeader, TensorRef, read_header, write_header


def shard_bytes(document: object, data: bytes = b"") -> bytes:
    """A safetensors file with any header: an object, or its text."""
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return struct.pack("<Q", len(text)) + text + data


def read_bytes(tmp_path: Path, content: bytes) -> ShardHeader:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    return read_header(path)


def entry(dtype: object = "U8", shape: object = (4,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


class TestReadHeader:
    def test_fields(self, tmp_path: Path) -> None:
        document = {
            "b": entry("BF16", [2, 3], [4, 16]),
            "a": entry(),
            "empty": entry("F32", [0, 7], [4, 4]),
            "scalar": entry("I8", [], [16, 17]),
            "__metadata__": {"format": "pt"},
        }
        content = shard_bytes(document, bytes(17))
        header = read_bytes(tmp_path, content)
        start = len(content) - 17
        assert list(header.tensors) == ["a", "empty", "b", "scalar"]
        assert header.tensors["b"] == TensorRef("b", "BF16", (2, 3), header.path, start + 4, 12)
        assert (header.header_nbytes, header.nbytes, header.metadata) == (start, len(content), {"format": "pt"})
        assert header.sha256 == hashlib.sha256(content[:start]).hexdigest()

    def test_no_tensors(self, tmp_path: Path) -> None:
        assert read_bytes(tmp_path, shard_bytes({})).tensors == {}
        assert read_bytes(tmp_path, shard_bytes(b"{}   ")).tensors == {}

    @pytest.mark.parametrize(
        ("content", "fragment"),
        [
            (b"", "is cut short"),
            (b"\x01\x02", "is cut short"),
            (struct.pack("<Q", 100) + b"{}", "its header says 100 bytes, the file has 10"),
            (struct.pack("<Q", 2**64 - 1) + b"{}", "is cut short"),
            (struct.pack("<Q", 0) + b"{}", "has a header of 0 bytes"),
            (shard_bytes(b"  {}"), "begins with b' '; expected '{'"),
            (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
            (shard_bytes(b'{"a":'), "is not valid JSON"),
            (shard_bytes(b"{}x"), "is not valid JSON"),
            (shard_bytes(b'{"\xff":1}'), "is not UTF-8 at byte 2"),
            (shard_bytes(b'{"\\ud800":{}}'), "is not valid JSON"),
            (shard_bytes(b'{"a":' + b"[" * 50_000), "is nested too deeply"),
            (shard_bytes(b'{"a":' + b"1" * 50_000 + b"}"), "integer of 50000 digits"),
            (shard_bytes(b'{"a":{},"a":{}}'), 'key "a" is given twice'),
            (shard_bytes({"a": 3}), 'tensor "a" in '),
            (shard_bytes({"a": {"dtype": "U8", "shape": [4]}}), "expected an object of dtype, shape and data_offsets"),
            (shard_bytes({"a": {**entry(), "strides": [1]}}), "expected an object of dtype, shape and data_offsets"),
            (shard_bytes({"a": entry(dtype="F8_E9")}), 'dtype="F8_E9"; expected one of F64'),
            (shard_bytes({"a": entry(dtype=["U8"])}), "dtype=a list of 1"),
            (shard_bytes({"a": entry(shape=[-4])}), "shape=[-4]; expected at most 16 integers of 0 or more"),
            (shard_bytes({"a": entry(shape=[True, 4])}), "shape=[true, 4]"),
            (shard_bytes({"a": entry(shape=[4.0])}), "shape=[4.0]"),
            (shard_bytes({"a": entry(shape="4")}), 'shape="4"'),
            (shard_bytes({"a": entry(shape=[1] * 17)}), "shape=a list of 17"),
            (shard_bytes({"a": entry(shape=[2**32, 2**32])}), "expected fewer than 2^63 bytes"),
            (shard_bytes({"a": entry(shape=[2**62, 4, 0], offsets=[0, 0])}), "expected fewer than 2^63 bytes"),
            (shard_bytes({"a": entry(shape=[10**25])}), "integer of 26 digits"),
            (shard_bytes({"a": entry(offsets=[0, 3])}), "data_offsets=[0, 3]; expected 4 bytes for U8 [4]"),
            (shard_bytes({"a": entry(offsets=[4, 0])}), "data_offsets=[4, 0]; expected 4 bytes"),
            (shard_bytes({"a": entry(offsets=[-4, 0])}), "data_offsets=[-4, 0]; expected two integers"),
            (shard_bytes({"a": entry(offsets=[0, 4.0])}), "data_offsets=[0, 4.0]"),
            (shard_bytes({"a": entry(offsets=[False, 4])}), "data_offsets=[false, 4]"),
            (shard_bytes({"a": entry(offsets=[0])}), "data_offsets=[0]"),
            (shard_bytes({"a": entry(offsets=None)}), "data_offsets=null"),
            (shard_bytes({"a": entry(offsets=[1, 5])}, bytes(5)), "begins at byte"),
            (shard_bytes({"a": entry(), "b": entry(offsets=[3, 7])}, bytes(7)), 'tensor "b"'),
            (shard_bytes({"a": entry(), "b": entry()}, bytes(4)), 'tensor "b"'),
            (shard_bytes({"a": entry()}, bytes(3)), "is cut short"),
            (shard_bytes({"a": entry()}, bytes(5)), "has bytes behind its last tensor"),
            (shard_bytes({"__metadata__": {"step": 3}}), "__metadata__ in "),
            (shard_bytes({"__metadata__": ["pt"]}), "expected an object of strings"),
        ],
    )
    def test_refused(self, tmp_path: Path, content: bytes, fragment: str) -> None:
        with pytest.raises(CheckpointError) as caught:
            read_bytes(tmp_path, content)
        assert fragment in str(caught.value)
        assert str(caught.value).isprintable()

    def test_header_over_the_limit(self, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        path.write_bytes(struct.pack("<Q", 100_000_001) + b"{")
        os.truncate(path, 1 << 30)
        with pytest.raises(CheckpointError, match="header of 100000001 bytes; expected between 2 and 100000000"):
            read_header(path)

    def test_sparse_file_of_a_terabyte(self, tmp_path: Path) -> None:
        content, _ = write_header([("a", "BF16", (1 << 19, 1 << 20))])
        (tmp_path / "x").write_bytes(content)
        os.truncate(tmp_path / "x", len(content) + (1 << 40))
        tracemalloc.start()
        header = read_header(tmp_path / "x")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert header.nbytes == (1 << 40) + header.header_nbytes
        assert peak < 1 << 20

    def test_what_is_not_a_file(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
            with pytest.raises(StorageError, match=r"is not a regular file|Is a directory"):
                read_header(path)
        with pytest.raises(CheckpointError, match="does not exist"):
            read_header(tmp_path / "absent")
        with pytest.raises(StorageError, match="cannot be read"):
            read_header("nul\0byte")


class TestWriteHeader:
    def test_layout(self, tmp_path: Path) -> None:
        tensors = [("z", "BF16", (3, 5)), ("a", "U8", ()), ("empty", "F32", (0,)), ("ü", "I64", [2])]
        header, ranges = write_header(tensors, {"format": "pt"})
        assert len(header) % 64 == 0
        assert [(name, part.offset - len(header), part.nbytes) for name, part in ranges.items()] == [
            ("z", 0, 30),
            ("a", 30, 1),
            ("empty", 31, 0),
            ("ü", 31, 16),
        ]
        parsed = read_bytes(tmp_path, header + bytes(47))
        assert parsed.metadata == {"format": "pt"}
        assert {name: (ref.offset, ref.nbytes) for name, ref in parsed.tensors.items()} == ranges

    def test_library_reads_it(self, tmp_path: Path) -> None:
        import safetensors
        import safetensors.numpy as numpy_io

        header, ranges = write_header([("b", "F32", (2, 3)), ("a", "I8", (5,))], {"made": "by qwen-rt"})
        b, a = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(5, dtype=np.int8)
        path = tmp_path / "model.safetensors"
        path.write_bytes(header + b.tobytes() + a.tobytes())
        loaded = numpy_io.load_file(path)
        np.testing.assert_array_equal(loaded["b"], b)
        np.testing.assert_array_equal(loaded["a"], a)
        with safetensors.safe_open(path, "np") as file:
            assert file.metadata() == {"made": "by qwen-rt"}
        assert ranges["a"].offset == len(header) + 24

    def test_reads_what_the_library_writes(self, tmp_path: Path) -> None:
        import safetensors.numpy as numpy_io

        arrays = {"w": np.ones((3, 4), np.float16), "s": np.array(2.0), "e": np.zeros((0, 2), np.uint8)}
        path = tmp_path / "model.safetensors"
        numpy_io.save_file(arrays, path, {"format": "np"})
        header = read_header(path)
        assert header.metadata == {"format": "np"}
        assert {name: ref.shape for name, ref in header.tensors.items()} == {"w": (3, 4), "s": (), "e": (0, 2)}
        ref = header.tensors["w"]
        assert path.read_bytes()[ref.offset : ref.offset + ref.nbytes] == arrays["w"].tobytes()

    def test_without_tensors_or_metadata(self, tmp_path: Path) -> None:
        header, ranges = write_header([])
        assert ranges == {}
        assert read_bytes(tmp_path, header).metadata == {}

    @pytest.mark.parametrize(
        ("tensors", "fragment"),
        [
            ([("a", "U8", (1,)), ("a", "U8", (1,))], 'tensor name "a" is taken'),
            ([("__metadata__", "U8", (1,))], 'tensor name "__metadata__" is taken'),
            ([("a", "BFLOAT16", (1,))], 'dtype="BFLOAT16"'),
            ([("a", "U8", (-1,))], "shape=[-1]"),
            ([("a", "F64", (2**61,))], "fewer than 2^63 bytes"),
        ],
    )
    def test_refused(self, tensors: Any, fragment: str) -> None:
        with pytest.raises(CheckpointError) as caught:
            write_header(tensors)
        assert fragment in str(caught.value)

    def test_metadata_must_be_text(self) -> None:
        with pytest.raises(CheckpointError, match="expected an object of strings"):
            write_header([], {"step": 3})  # type: ignore[dict-item]

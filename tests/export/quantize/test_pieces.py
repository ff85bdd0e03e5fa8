"""Edited parameters, and quantized matrices as bytes of a weight file."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from qwen_rt.errors import CheckpointError
from qwen_rt.export import weights as weight_files
from qwen_rt.export.quantize.pieces import EditedRows, MatrixEdit, quantized_piece, stored_piece, vector_piece
from qwen_rt.export.quantize.rounding import quantize_rows
from qwen_rt.export.weights import Piece
from qwen_rt.quantization import Scheme

from .models import ArrayRows

SCHEMES = [Scheme("fp8"), Scheme("int8", 16), Scheme("int4", 16), Scheme("int4", 16, symmetric=False)]


def _source() -> ArrayRows:
    rng = np.random.default_rng(0)
    return ArrayRows({"w.weight": rng.standard_normal((37, 48), np.float32), "n": rng.standard_normal(48, np.float32)})


def _bytes(piece: Piece) -> bytes:
    with ThreadPoolExecutor(2) as pool:
        return b"".join(piece.blocks(pool))


def test_edits_scale_rows_and_columns_and_replace_vectors() -> None:
    source = _source()
    before = source.arrays["w.weight"].copy()
    rows = np.ldexp(np.float32(1), np.arange(37, dtype=np.int32) % 5 - 2)
    columns = np.ldexp(np.float32(1), np.arange(48, dtype=np.int32) % 3 - 1)
    both = EditedRows(source, {"w.weight": MatrixEdit(rows, columns)}, {"n": np.ones(48, np.float32)})
    expected = before * rows[:, None] * columns
    assert both.shape("w.weight") == (37, 48)
    assert both.shape("n") == (48,)
    assert np.array_equal(both.rows("w.weight", 0, 37), expected)
    assert np.array_equal(both.rows("w.weight", 5, 11), expected[5:11])
    assert np.array_equal(both.rows("w.weight", 30, 99), expected[30:])
    assert both.rows("n", 3, 7).tolist() == [1, 1, 1, 1]
    only = EditedRows(source, {"w.weight": MatrixEdit(columns=columns, importance=rows)}, {})
    assert np.array_equal(only.rows("w.weight", 0, 37), before * columns)
    assert np.array_equal(only.rows("n", 0, 48), source.arrays["n"])
    assert np.array_equal(source.arrays["w.weight"], before)


def test_the_array_of_a_vector_does_not_leave() -> None:
    vector = np.ones(48, np.float32)
    edited = EditedRows(_source(), {}, {"n": vector})
    edited.rows("n", 0, 48)[:] = 0
    assert vector.all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_quantized_matrix_is_its_parts_behind_each_other(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many blocks of rows it is made of."""
    source = _source()
    whole = quantize_rows("w.weight", source.rows("w.weight", 0, 37), scheme)
    expected = b"".join(array.tobytes() for array in whole.parts().values())
    for stop in (37, 5):
        monkeypatch.setattr(weight_files, "BLOCK_BYTES", stop * 48 * 4)
        assert len(weight_files.row_blocks((37, 48))) == -(-37 // stop)
        piece = quantized_piece(source, "w.weight", scheme)
        assert _bytes(piece) == expected
    sizes = {"F8_E4M3": 1, "I8": 1, "U8": 1, "F16": 2, "F32": 4}
    assert sum(sizes[dtype] * int(np.prod(shape)) for _, dtype, shape in piece.tensors) == len(expected)
    names = [name for name, _, _ in piece.tensors]
    assert names[:2] == ["w.weight", "w.weight_scale"]
    renamed = quantized_piece(source, "w.weight", scheme, "head.weight")
    assert [name for name, _, _ in renamed.tensors] == [name.replace("w.", "head.", 1) for name in names]
    assert _bytes(stored_piece("w.weight", scheme, (37, 48), lambda: whole)) == expected


def test_importance_reaches_the_rounding() -> None:
    source, scheme = _source(), Scheme("int4", 16)
    importance = np.where(np.arange(48) % 4 == 0, 1, 1e-3).astype(np.float32)
    expected = quantize_rows("w.weight", source.rows("w.weight", 0, 37), scheme, importance=importance)
    found = _bytes(quantized_piece(source, "w.weight", scheme, importance=importance))
    assert found == b"".join(array.tobytes() for array in expected.parts().values())
    assert found != _bytes(quantized_piece(source, "w.weight", scheme))


def test_errors_name_the_row_of_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    source: Any = _source()
    source.arrays["w.weight"][33, 2] = np.nan
    monkeypatch.setattr(weight_files, "BLOCK_BYTES", 5 * 48 * 4)
    with pytest.raises(CheckpointError, match=r"tensor w.weight holds nan in row 33, column 2"):
        _bytes(quantized_piece(source, "w.weight", Scheme("int8")))


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_vectors_are_stored_as_asked(dtype: str) -> None:
    values = np.array([1, -0.5, 1.0009765625], np.float32)
    piece = vector_piece("n", values, dtype)
    assert piece.tensors == (("n", dtype, (3,)),)
    assert _bytes(piece) == values.astype(weight_files.NUMPY_DTYPES[dtype]).tobytes()

"""Every public layout is read; every row that cannot be is told of with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwen_rt.benchmarks.eval.datasets import LAYOUTS, load_dataset, load_datasets
from qwen_rt.errors import UsageError

from .kit import GSM8K, MATH, MATH_500, OWN, QWEN25, write_rows


@pytest.mark.parametrize(
    ("row", "layout", "identity", "answer", "categories", "style"),
    [
        (GSM8K, "gsm8k", "1", "7", {}, "words"),
        (MATH, "math", "1", "\\frac{3}{4}", {"level": "2", "subject": "Prealgebra"}, "math"),
        (MATH_500, "math-500", "test/algebra/7.json", "2", {"level": "1", "subject": "Algebra"}, "math"),
        (QWEN25, "qwen2.5-math", "3", "2", {}, "words"),
        (
            MATH | {"answer": 0.75, "idx": 0},
            "qwen2.5-math",
            "0",
            "0.75",
            {"level": "2", "subject": "Prealgebra"},
            "math",
        ),
        (GSM8K | {"idx": 9}, "gsm8k", "9", "7", {}, "words"),
        (MATH | {"idx": 5}, "math", "5", "\\frac{3}{4}", {"level": "2", "subject": "Prealgebra"}, "math"),
        (OWN, "qwen-rt", "nano-1", "3", {"kind": "addition"}, "words"),
    ],
)
def test_layouts(
    row: dict[str, Any], layout: str, identity: str, answer: str, categories: Any, style: str, tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "some.jsonl", [row])
    for forced in (None, layout):
        dataset = load_dataset(str(file), forced)
        assert (dataset.name, dataset.layout, dataset.style) == ("some", layout, style)
        (problem,) = dataset.problems
        assert (problem.id, problem.answer, problem.categories) == (identity, answer, categories)
        assert problem.question == row.get("question", row.get("problem"))


def test_a_layout_may_be_forced(tmp_path: Path) -> None:
    both = {"question": "q", "problem": "p", "answer": "1 #### 2", "solution": "\\boxed{3}"}
    file = str(write_rows(tmp_path / "a.jsonl", [both]))
    found = {name: load_dataset(file, name).problems[0] for name in LAYOUTS}
    assert {name: p.answer for name, p in found.items()} == {
        "qwen-rt": "2",
        "gsm8k": "2",
        "math": "3",
        "math-500": "2",
        "qwen2.5-math": "2",
    }
    assert found["math"].question == "p"
    with pytest.raises(UsageError, match="layout=gsm; expected one of qwen-rt, gsm8k"):
        load_dataset(file, "gsm")


def test_the_shipped_problems() -> None:
    dataset = load_dataset("nano")
    assert (dataset.name, dataset.layout, len(dataset.problems)) == ("nano", "qwen-rt", 1000)
    assert dataset.problems[0].id == "nano-0000"
    assert load_dataset("other=nano").sha256 == dataset.sha256
    (few,) = load_datasets(["nano"], limit=3)
    assert few.problems == dataset.problems[:3]


def test_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('\ufeff{"question": "a\u2028b", "answer": "1"}\r\n\n  \n{"question": "c", "answer": 2}', "utf-8")
    problems = load_dataset(str(file)).problems
    assert [(p.id, p.question, p.answer) for p in problems] == [("1", "a\u2028b", "1"), ("4", "c", "2")]


@pytest.mark.parametrize(
    ("rows", "layout", "words"),
    [
        ([GSM8K, "{broken"], None, r"a.jsonl:2 is not JSON: Expecting property name"),
        (["[1, 2]"], None, r"a.jsonl:1 holds list; expected one JSON object a line"),
        (["[" * 100_000], None, "a.jsonl:1 is not JSON"),
        (["1" * 5000], None, "a.jsonl:1 is not JSON"),
        ([], None, "a.jsonl holds no problem"),
        (["", " "], "gsm8k", "a.jsonl holds no problem"),
        (
            [{"text": "x"}],
            None,
            r"a.jsonl:1: no known layout has the keys text; expected qwen-rt: question, answer; gsm8k",
        ),
        ([GSM8K, {"question": "q"}], None, "a.jsonl:2: no key answer; expected layout gsm8k"),
        ([GSM8K, {"question": "q", "answer": "5"}], None, 'a.jsonl:2: answer holds no answer; .*after "####"'),
        ([GSM8K, {"answer": "#### 5"}], None, "a.jsonl:2: no text question"),
        ([GSM8K, {"question": 5, "answer": "#### 5"}], None, "a.jsonl:2: no text question"),
        ([MATH, MATH | {"solution": "none"}], None, r"a.jsonl:2: solution holds no answer; .*in \\boxed"),
        ([QWEN25 | {"answer": None}], None, "a.jsonl:1: answer holds no answer"),
        ([QWEN25 | {"answer": True}], None, "a.jsonl:1: answer holds no answer"),
        ([QWEN25 | {"idx": [1]}], None, "a.jsonl:1: an id of type list"),
        ([QWEN25, QWEN25], None, "a.jsonl:2: id 3 is that of line 1"),
        ([GSM8K], "math", "a.jsonl:1: no text problem; expected layout math; see --layout"),
    ],
)
def test_bad_rows_are_told_of_with_their_line(rows: list[Any], layout: str | None, words: str, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(UsageError, match=words) as found:
        load_dataset(str(file), layout)
    assert str(found.value).isprintable()


def test_what_is_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9", "answer": 1}')
    for given, words in (
        ("nanno", "dataset nanno is neither a file nor a dataset that ships; .*did you mean nano"),
        (str(tmp_path / "none.jsonl"), "is neither a file"),
        (str(tmp_path), "is a folder"),
        (str(tmp_path / "latin.jsonl"), "cannot be read: .*UTF-8"),
        ("a/b=nano", "dataset name 'a/b'"),
        ("x=nowhere", "dataset nowhere is neither"),
    ):
        with pytest.raises(UsageError, match=words):
            load_dataset(given)


def test_names_differ(tmp_path: Path) -> None:
    for folder in ("gsm8k", "math"):
        (tmp_path / folder).mkdir()
    first = write_rows(tmp_path / "gsm8k" / "test.jsonl", [GSM8K])
    second = write_rows(tmp_path / "math" / "test.jsonl", [MATH])
    with pytest.raises(
        UsageError, match="two datasets called test; expected different names; write --dataset NAME=FILE"
    ):
        load_datasets([str(first), str(second)])
    assert [d.name for d in load_datasets([f"gsm8k={first}", f"math={second}"])] == ["gsm8k", "math"]
    odd = write_rows(tmp_path / "a=b c.jsonl", [GSM8K])
    assert load_dataset(str(odd)).name == "a_b_c"
    with pytest.raises(UsageError, match="limit=0"):
        load_datasets([str(first)], limit=0)

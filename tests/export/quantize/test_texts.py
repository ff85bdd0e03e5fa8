"""Calibration texts: cut, chosen, padded."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qwen_rt.errors import UsageError
from qwen_rt.export.quantize.forward import Forward
from qwen_rt.export.quantize.texts import Texts, cut_texts, evenly

from ...cases import Zoo
from ...compare import assert_close
from .models import ArrayRows


def _rows(texts: Texts) -> list[list[int]]:
    return [row[mask].tolist() for row, mask in zip(texts.ids, texts.mask.numpy(), strict=True)]


def test_short_texts_are_taken_whole() -> None:
    texts = cut_texts([[1, 2, 3], [], [4], [5, 6]], 100)
    assert _rows(texts) == [[1, 2, 3], [4], [5, 6]]
    assert texts.ids.tolist() == [[1, 2, 3], [4, 0, 0], [5, 6, 0]]
    assert texts.num_tokens == 6


def test_long_texts_are_cut_and_windows_chosen_over_all_of_them() -> None:
    text = list(range(1000))
    assert _rows(cut_texts([text], 1000, 400)) == [text[:400], text[400:800], text[800:]]
    chosen = _rows(cut_texts([text], 300, 100))
    assert [row[0] for row in chosen] == [0, 400, 900]
    assert _rows(cut_texts([text], 150, 100)) == [text[:100], text[900:950]]
    assert cut_texts([text], 7, 100).num_tokens == 7
    for count in (1, 10, 99, 100, 555, 1000, 5000):
        texts = cut_texts([text[:333], text[:5], text], count, 64)
        assert texts.num_tokens <= count
        assert texts.num_tokens >= min(count, 1338) - 64 * 3  # short windows may be among the chosen


def test_take_and_put_are_inverse() -> None:
    texts = cut_texts([[1, 2, 3], [4]], 100)
    x = torch.arange(24, dtype=torch.float32).view(2, 3, 4)
    rows = texts.take(x)
    assert rows.tolist() == [x[0, 0].tolist(), x[0, 1].tolist(), x[0, 2].tolist(), x[1, 0].tolist()]
    spread = texts.put(rows)
    assert torch.equal(texts.take(spread), rows)
    assert not spread[1, 1:].any()
    whole = cut_texts([[1, 2, 3], [4, 5, 6]], 100)
    assert torch.equal(whole.put(whole.take(x)), x)


def test_padding_changes_nothing_in_a_text(zoo: Zoo) -> None:
    from qwen_rt.checkpoint import Checkpoint

    case = zoo.case("heads-1.5b")
    spec, rows = Checkpoint.open(case.checkpoint).spec, ArrayRows(case.weights)
    lengths = (17, 40, 1)
    texts = cut_texts([case.ids[:length].tolist() for length in lengths], 100)
    forward = Forward(spec, rows)
    hidden = forward.embed(texts.ids)
    for layer in range(spec.num_layers):
        step = forward.layer(layer, hidden)
        while step.unit:
            step.advance(texts.multiply(rows, step.names, texts.take(step.x)))
        hidden = step.hidden
    logits = forward.logits(texts.take(hidden))
    expected = torch.cat([forward.run(case.ids[:length]) for length in lengths])
    assert_close(logits.numpy(), expected.numpy(), relative=1e-5)


def test_evenly() -> None:
    assert evenly(3, 5).tolist() == [0, 1, 2]
    assert evenly(11, 3).tolist() == [0, 5, 10]
    assert evenly(11, 1).tolist() == [0]
    assert len(np.unique(evenly(1000, 256))) == 256


@pytest.mark.parametrize("token_ids", [[], [[]], [[], []]])
def test_no_tokens(token_ids: list[list[int]]) -> None:
    with pytest.raises(UsageError, match="the calibration text has no tokens; expected some text; name another file"):
        cut_texts(token_ids, 100)


def test_no_tokens_wanted() -> None:
    with pytest.raises(UsageError, match="max_tokens=0, window=512; expected at least 1"):
        cut_texts([[1]], 0)

"""Packing: every document whole, in one row, and few places empty."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from jaxpeft.data.batches.training import Batches
from jaxpeft.data.chat.supervise import IGNORED
from jaxpeft.data.examples.make import make_examples
from jaxpeft.data.rows.read import read_rows
from jaxpeft.data.tokens.encode import encode
from jaxpeft.data.tokens.packing import SHORTEST, fill, first_fit, pack, pour
from jaxpeft.data.tokens.token_arrays import Encoded


def slow_first_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """The definition."""
    bins: list[tuple[int, list[int]]] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for n, (room, items) in enumerate(bins):
            if room >= lengths[item]:
                bins[n] = (room - lengths[item], [*items, item])
                break
        else:
            bins.append((capacity - lengths[item], [item]))
    return [sorted(items) for _, items in bins]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_it_is_first_fit_decreasing(lengths: list[int]) -> None:
    assert first_fit(np.array(lengths), 20) == slow_first_fit(lengths, 20)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=60))
def test_cut_texts_hold_every_token_once_in_no_more_rows_and_no_stump(lengths: list[int]) -> None:
    bins = first_fit(np.array(lengths), 300)
    rows = pour(bins, np.array(lengths), 300)
    assert len(rows) <= len(bins)
    assert max(sum(stop - start for _, start, stop in row) for row in rows) <= 300
    pieces = sorted(piece for row in rows for piece in row)
    for i, length in enumerate(lengths):
        own = [(start, stop) for sequence, start, stop in pieces if sequence == i]
        assert [start for start, _ in own] == [0, *(stop for _, stop in own[:-1])]
        assert own[-1][1] == length
        assert len(own) == 1 or min(stop - start for start, stop in own) >= SHORTEST


def test_texts_of_two_thirds_of_a_row_are_cut_to_fill_the_rest() -> None:
    lengths = np.full(300, 200)
    rows = pour(first_fit(lengths, 300), lengths, 300)
    assert len(rows) == 200  # 300 * 200 / 300, where whole texts would take 300


def documents(lengths: list[int], **changes: Any) -> Encoded:
    tokens = np.arange(1, sum(lengths) + 1, dtype=np.int32)
    labels = np.where(tokens % 3 == 0, IGNORED, tokens).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    values: dict[str, Any] = {
        "kind": "messages",
        "problem": None,
        "tokens": tokens,
        "offsets": offsets,
        "labels": labels,
        "type_ids": None,
        "source": np.arange(len(lengths), dtype=np.int32),
        "label_names": (),
        "counts": {"rows": len(lengths)},
        "max_length": 10,
        "fingerprint": "f",
    }
    return Encoded(**values | changes)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 10), min_size=1, max_size=40))
def test_every_document_is_in_one_row_whole_and_its_first_token_is_not_predicted(
    lengths: list[int],
) -> None:
    plain = documents(lengths)
    packed = pack(plain, 10)
    assert packed.segments is not None
    assert packed.lengths.max() <= 10
    found: list[tuple[list[int], list[int]]] = []
    for row in range(len(packed)):
        at = slice(*packed.offsets[row : row + 2])
        segments = packed.segments[at]
        assert np.array_equal(np.unique(segments), np.arange(1, segments.max() + 1))
        assert (np.diff(segments) >= 0).all()
        for number in range(1, segments.max() + 1):
            inside = segments == number
            found.append((packed.tokens[at][inside].tolist(), packed.labels[at][inside].tolist()))
    wanted = [
        (plain.tokens[a:b].tolist(), [IGNORED, *plain.labels[a + 1 : b].tolist()])
        for a, b in zip(plain.offsets[:-1], plain.offsets[1:], strict=True)
    ]
    assert sorted(found) == sorted(wanted)
    assert fill(packed, 10) == sum(lengths) / (len(packed) * 10)


def test_a_batch_has_segments_and_padding_is_none_of_them() -> None:
    packed = pack(documents([6, 4, 7, 2]), 10)
    batch = Batches(packed, 2, (10,), shuffle=False).batch(0)
    np.testing.assert_array_equal(
        batch["segment_ids"], [[1] * 7 + [2] * 2 + [0], [1] * 6 + [2] * 4]
    )
    np.testing.assert_array_equal(batch["attention_mask"], batch["segment_ids"] > 0)


def test_another_capacity_is_another_fingerprint() -> None:
    plain = documents([3, 4])
    assert len({plain.fingerprint, pack(plain, 10).fingerprint, pack(plain, 8).fingerprint}) == 3


@pytest.mark.parametrize(
    ("name", "kind", "least"),
    [
        ("gsm8k/train.jsonl", "prompt_completion", 0.97),
        ("tinystories-2mb/train.jsonl", "text", 0.98),
        ("dolly-150/test.jsonl", "instruction", 0.97),
    ],
)
@pytest.mark.representatives("tinystories-*")
def test_real_rows_fill_most_of_1024(asset: Any, name: str, kind: Any, least: float) -> None:
    examples = make_examples(read_rows(asset(name)), kind=kind)
    tokenizer = AutoTokenizer.from_pretrained(asset("stories260K/hf"))
    encoded = encode(
        examples,
        tokenizer,
        max_length=1024,
        vocab_size=512,
        add_eos=True,
        most_dropped=1.0,
        use_cache=False,
    )
    assert fill(pack(encoded, 1024), 1024) > least


@pytest.mark.slow
def test_a_hundred_thousand_documents_are_packed_in_seconds() -> None:
    lengths = np.random.default_rng(0).integers(20, 900, 100_000)
    started = time.perf_counter()
    rows = first_fit(lengths, 1024)
    assert time.perf_counter() - started < 20
    assert lengths.sum() / (len(rows) * 1024) > 0.97

"""The data set inside the package: enough rows, no near-duplicates, the same labels in every
split.
"""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from jaxpeft.data import make_examples, read_rows

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def rows() -> dict[str, list[tuple[str, str]]]:
    read = {split: read_rows(f"package:support_tickets/{split}") for split in SPLITS}
    return {split: [(r["text"], r["label"]) for r in part.records] for split, part in read.items()}


def words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9]+", text.lower()))


def grams(text: str) -> frozenset[str]:
    plain = re.sub(r"[^a-z0-9 ]", "", text.lower())
    return frozenset(plain[i : i + 5] for i in range(max(1, len(plain) - 4)))


def test_there_are_a_thousand_rows_of_twelve_labels_in_three_splits(
    rows: dict[str, list[tuple[str, str]]],
) -> None:
    assert sum(map(len, rows.values())) >= 1000
    labels = {split: Counter(label for _, label in part) for split, part in rows.items()}
    assert len(labels["train"]) == 12
    for split in SPLITS:
        assert labels[split].keys() == labels["train"].keys()
        assert min(labels[split].values()) >= 5


@pytest.mark.slow
def test_no_two_rows_are_nearly_the_same(rows: dict[str, list[tuple[str, str]]]) -> None:
    texts = [text for split in SPLITS for text, _ in rows[split]]
    for shared, most in ((words, 0.6), (grams, 0.5)):
        parts = [shared(text) for text in texts]
        place = {part: i for i, part in enumerate(sorted(frozenset().union(*parts)))}
        there = np.zeros((len(parts), len(place)), np.float32)
        for row, part in zip(there, parts, strict=True):
            row[[place[each] for each in part]] = 1
        both, sizes = there @ there.T, there.sum(1)
        near = np.triu(both >= most * (sizes[:, None] + sizes - both), 1)
        assert not [(texts[i], texts[j]) for i, j in np.argwhere(near)]


def test_the_rows_are_plain_text_without_addresses(rows: dict[str, list[tuple[str, str]]]) -> None:
    for part in rows.values():
        for text, _ in part:
            assert text == " ".join(text.split())
            assert "@" not in text
            assert 2 <= len(text.split()) <= 80


def test_the_labels_get_the_same_ids_in_every_split() -> None:
    train = make_examples(read_rows("package:support_tickets/train"), kind="classification")
    test = make_examples(
        read_rows("package:support_tickets/test"), kind="classification", like=train
    )
    assert train.num_labels == 12
    assert train.label_names == test.label_names

"""Entities of tag sequences, against the real `seqeval`."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
from seqeval.metrics import f1_score, precision_score, recall_score
from seqeval.metrics.sequence_labeling import get_entities
from seqeval.scheme import BILOU

from jaxpeft.errors import DataError
from jaxpeft.evaluation.entities import find_entities, has_entities
from jaxpeft.evaluation.metrics import classification_metrics

SCHEMES = {
    "IOB": ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-with-dash", "I-with-dash"],
    "IOBES": ["O", *(f"{letter}-{kind}" for letter in "BIES" for kind in ("PER", "LOC"))],
    "no types": ["I", "B", "O", "E", "S"],
    "no O": ["B-PER", "I-PER"],
}
Rows = list[list[str]]


def as_arrays(rows: Rows, tags: list[str]) -> tuple[np.ndarray, np.ndarray]:
    ids = [tags.index(tag) for row in rows for tag in row]
    return np.array(ids, int), np.repeat(np.arange(len(rows)), [len(row) for row in rows])


def draw(seed: int, tags: list[str], lengths: list[int]) -> Rows:
    """Draw any sequences, most of them malformed."""
    drawn = random.Random(seed)
    return [drawn.choices(tags, k=length) for length in lengths]


def draw_entities(seed: int, letters: str, lengths: list[int]) -> Rows:
    """Draw well-formed sequences; `letters` are those of the first, the middle and the last word,
    and of the only one.
    """
    drawn, (first, middle, last, only) = random.Random(seed), letters
    rows: Rows = []
    for length in lengths:
        row: list[str] = []
        while len(row) < length:
            kind, size = drawn.choice(["PER", "LOC"]), min(drawn.randint(0, 3), length - len(row))
            own = [only] if size == 1 else [first, *middle * (size - 2), last][:size]
            row += [f"{letter}-{kind}" for letter in own] or ["O"]
        rows.append(row)
    return rows


@pytest.mark.parametrize("tags", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("seed", range(10))
def test_any_sequences_agree_with_seqeval(tags: list[str], seed: int) -> None:
    lengths = random.Random(seed).choices(range(1, 12), k=60)
    wanted, made = draw(seed, tags, lengths), draw(seed + 100, tags, lengths)
    made = [
        [random.Random(i).choice([a, b, b]) for i, (a, b) in enumerate(zip(*rows, strict=True))]
        for rows in zip(made, wanted, strict=True)
    ]
    ids, rows = as_arrays(wanted, tags)
    # seqeval counts an O behind each row
    found = {
        (at + rows[at], last + rows[at], kind or "_")
        for at, last, kind in find_entities(ids, rows, tags)
    }
    assert found == {(first, last, kind) for kind, first, last in get_entities(wanted)}
    metrics = classification_metrics(as_arrays(made, tags)[0], ids, "token", tags=tags, rows=rows)
    assert metrics["f1"] == pytest.approx(f1_score(wanted, made))
    assert metrics["precision"] == pytest.approx(precision_score(wanted, made))
    assert metrics["recall"] == pytest.approx(recall_score(wanted, made))


@pytest.mark.parametrize(
    "letters", ["IIII", "BIIB", "BIES", "BILU"], ids=["IOB1", "IOB2", "IOBES", "BILOU"]
)
def test_well_formed_sequences_agree_with_seqeval(letters: str) -> None:
    lengths = random.Random(0).choices(range(1, 20), k=200)
    wanted, other = draw_entities(1, letters, lengths), draw_entities(2, letters, lengths)
    # of each row the one or the other, so that a part is right
    made = [
        pair[random.Random(i).randrange(2)]
        for i, pair in enumerate(zip(wanted, other, strict=True))
    ]
    tags = sorted({tag for row in wanted + other for tag in row})
    (ids, rows), found = as_arrays(wanted, tags), as_arrays(made, tags)[0]
    strict = {"mode": "strict", "scheme": BILOU} if letters == "BILU" else {}
    metrics = classification_metrics(found, ids, "token", tags=tags, rows=rows)
    assert metrics["f1"] == pytest.approx(f1_score(wanted, made, **strict))
    assert metrics["precision"] == pytest.approx(precision_score(wanted, made, **strict))
    assert metrics["recall"] == pytest.approx(recall_score(wanted, made, **strict))
    assert 0.3 < metrics["f1"] < 0.9


def test_bilou_is_read_as_iobes() -> None:
    tags = [f"{letter}-{kind}" for letter in "BIES" for kind in ("PER", "LOC")] + ["O"]
    ids, rows = as_arrays(draw(3, tags, [8] * 100), tags)
    other = [tag.replace("E-", "L-").replace("S-", "U-") for tag in tags]
    assert find_entities(ids, rows, other) == find_entities(ids, rows, tags)


@pytest.mark.parametrize(
    ("tags", "known"),
    [
        (("B-PER", "I-PER", "O"), True),
        (("I-PER", "O"), True),
        (("B", "I", "O"), True),
        (("B-PER", "L-PER", "U-PER"), True),
        (("NOUN", "VERB", "O"), False),
        (("B", "S", "O"), False),
        (("I-PER", "O", "X"), False),
        (("S-PER", "O"), False),
        (("B-", "O"), False),
        (("O",), False),
        ((), False),
    ],
)
def test_entities_are_told_by_the_names_of_all_tags(tags: tuple[str, ...], known: bool) -> None:
    assert has_entities(tags) is known


def test_entities_without_a_tag_to_find_have_figures_of_0() -> None:
    none = np.zeros((2, 3), int)
    metrics = classification_metrics(none, none, "token", tags=["O", "B-X", "I-X"])
    assert metrics == {
        "accuracy": 1.0,
        "tag_f1": 0.0,
        "tag_f1_macro": 1.0,
        "f1": 0.0,
        "precision": 0.0,
        "recall": 0.0,
    }


def test_each_row_of_an_array_is_a_sequence_and_unlabeled_positions_lie_in_none() -> None:
    tags = ["O", "B-X", "I-X"]
    # one entity of two words, of which the first is two sub-tokens; then one that a row's end parts
    # in two
    labels = np.array([[1, -100, 2, 0], [0, 0, 1, 2], [2, 0, 0, -100]])
    assert classification_metrics(labels, labels, "token", tags=tags)["f1"] == 1.0
    made = labels.copy()
    made[0, 1] = 0
    assert classification_metrics(made, labels, "token", tags=tags)["f1"] == 1.0
    made[2, 0] = 0  # of three entities two are found
    metrics = classification_metrics(np.eye(3)[np.maximum(made, 0)], labels, "token", tags=tags)
    assert (metrics["precision"], metrics["recall"]) == (1.0, pytest.approx(2 / 3))
    flat = {"tags": tags, "rows": np.repeat([0, 1, 2], 4)}
    assert classification_metrics(made.reshape(-1), labels.reshape(-1), "token", **flat) == metrics


def test_a_class_without_a_name_is_refused() -> None:
    with pytest.raises(DataError, match="class 3 has no name among the 2 tags"):
        classification_metrics(np.array([[3, 0]]), np.array([[0, 0]]), "token", tags=["O", "B-X"])


def test_seqeval_itself_joins_entities_of_one_word_without_its_strict_mode() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert get_entities(["U-PER", "U-PER"]) == [("PER", 0, 1)]
    assert find_entities(np.array([0, 0]), np.zeros(2, int), ["U-PER"]) == {
        (0, 0, "PER"),
        (1, 1, "PER"),
    }

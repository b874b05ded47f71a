"""Streamed rows: the same batches for the same seed, from every position, whoever makes them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxpeft.config import defaults
from jaxpeft.config.files import parse_config
from jaxpeft.config.schema import Config
from jaxpeft.data.batches.stream import Stream
from jaxpeft.data.pipeline import read_splits
from jaxpeft.errors import ConfigError, DataError
from jaxpeft.hub import sources
from tests.train.runs import WORDS, tiny_models

__all__ = ["tiny_models"]
MakeStream = Callable[..., Stream]


def write_texts(path: Path, rows: int, start: int = 0) -> Path:
    """Write texts of one to nine words, of which the first tells the row."""
    rng = np.random.default_rng(0)
    texts = [
        " ".join([WORDS[(start + i) % 60], *rng.choice(WORDS, rng.integers(0, 9))])
        for i in range(rows)
    ]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def make_stream(tiny_models: Mapping[str, Path], tmp_path: Path) -> MakeStream:
    """Make a stream of 23 texts, 7 at a time; options of the sections `data` and `train`."""
    train = write_texts(tmp_path / "train.jsonl", 23)

    def make(**options: Any) -> Stream:
        values = defaults("lora").to_dict()
        task = options.pop("task", "causal_lm")
        model = tiny_models["llama" if task == "causal_lm" else "bert"]
        values["model"] |= {"path": str(model), "task": task}
        values["data"] |= {
            "train": str(train),
            "validation": str(train),
            "streaming": True,
            "buffer_rows": 7,
            "max_length": 16,
        }
        values["train"] |= {"steps": 10, "batch_size": 4}
        for name, value in options.items():
            values["train" if name in values["train"] else "data"][name] = value
        config, problems = parse_config(values)
        assert isinstance(config, Config), problems
        splits = read_splits(config, sources.resolve(str(model)), lambda what: nullcontext())
        assert splits.stream is not None
        return splits.stream

    return make


def fed(
    stream: Stream,
    count: int,
    position: Mapping[str, int] | None = None,
    own: tuple[int, ...] | None = None,
) -> list[tuple[dict[str, Any], dict[str, int]]]:
    """Return so many batches from a position on, with the position behind each."""
    feed = stream.feed(dict(position or {}), 0, own=own)
    try:
        return list(itertools.islice(feed, count))
    finally:
        feed.close()


def same(ours: list[Any], theirs: list[Any]) -> bool:
    """Return whether two lists of batches are bit-equal, with their positions."""
    return len(ours) == len(theirs) and all(
        a[1] == b[1]
        and a[0].keys() == b[0].keys()
        and all(np.array_equal(a[0][k], b[0][k]) for k in a[0])
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_it_goes_on_from_every_position_bit_equal_over_two_epochs(
    make_stream: MakeStream, packing: bool, accumulation: int
) -> None:
    options = {"packing": packing, "accumulation": accumulation}
    whole = fed(make_stream(**options), 14)
    assert whole[-1][1]["epoch"] >= 1
    stream = make_stream(**options)
    for done, (_, position) in enumerate(whole[:-1], 1):
        assert same(fed(stream, 14 - done, position), whole[done:]), position


def test_each_row_stands_once_in_an_epoch_and_in_another_place_in_the_next(
    make_stream: MakeStream,
) -> None:
    made = fed(make_stream(), 16)
    epochs = [[batch for batch, position in made if position["epoch"] == epoch] for epoch in (0, 1)]
    rows = [
        [tuple(row[row > 0]) for b in epoch for row in b["input_ids"][b["weights"] > 0]]
        for epoch in epochs
    ]
    assert sorted(rows[0]) == sorted(rows[1])
    assert len(rows[0]) == 23
    assert rows[0] != rows[1]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_make_the_same_batches(make_stream: MakeStream, workers: int) -> None:
    assert same(fed(make_stream(workers=workers), 10), fed(make_stream(), 10))


def test_sources_are_mixed_by_weight_until_one_ends(
    make_stream: MakeStream, tmp_path: Path
) -> None:
    first, second = (
        write_texts(tmp_path / "first.jsonl", 9),
        write_texts(tmp_path / "second.jsonl", 40, start=30),
    )
    stream = make_stream(
        train=(str(first), str(second)), weights=(1.0, 3.0), buffer_rows=8, batch_size=8
    )
    made = [batch for batch, position in fed(stream, 8) if position["epoch"] == 0]
    heads = [[row[1] - 5 for row in batch["input_ids"][batch["weights"] > 0]] for batch in made]
    counts = [sum(head < 30 for head in of) for of in heads]
    assert counts[:4] == [2, 2, 2, 2]
    assert [len(of) for of in heads[:4]] == [8, 8, 8, 8]


def test_a_broken_row_further_on_is_told_with_its_place(
    make_stream: MakeStream, tmp_path: Path
) -> None:
    path = write_texts(tmp_path / "broken.jsonl", 20)
    lines = path.read_text().splitlines()
    lines[16] = '{"text": '
    path.write_text("\n".join(lines) + "\n")
    stream = make_stream(train=str(path))
    with pytest.raises(DataError, match=rf"{path}:17:\d+: not JSON"):
        fed(stream, 12)


def test_processes_get_parts_of_the_same_batches(make_stream: MakeStream) -> None:
    stream = make_stream()
    whole = fed(stream, 6)
    rows = len(whole[0][0]["input_ids"])
    halves = tuple(range(rows // 2)), tuple(range(rows // 2, rows))
    parts = [fed(stream, 6, own=own) for own in halves]
    for (batch, _), (first, _), (second, _) in zip(whole, *parts, strict=True):
        assert np.array_equal(
            batch["input_ids"], np.concatenate([first["input_ids"], second["input_ids"]])
        )


def write_chats(path: Path, rows: int) -> Path:
    """Write chats of two turns."""
    turns = [
        [{"role": "user", "content": WORDS[i]}, {"role": "assistant", "content": WORDS[i + 1]}]
        for i in range(rows)
    ]
    path.write_text("".join(json.dumps({"messages": of}) + "\n" for of in turns))
    return path


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_chats_are_streamed_by_a_thread_and_by_processes(
    make_stream: MakeStream, tmp_path: Path, workers: int
) -> None:
    path = write_chats(tmp_path / "chats.jsonl", 23)
    stream = make_stream(
        train=str(path),
        validation=str(path),
        chat_template="chatml",
        max_length=32,
        workers=workers,
    )
    made = [batch for batch, position in fed(stream, 8) if position["epoch"] == 0]
    assert sum(int((batch["labels"] != -100).any(-1).sum()) for batch in made) == 23


def write_labeled(path: Path, kind: str, rows: int, labels: list[Any]) -> Path:
    """Write rows of a classification, or of a token classification."""
    tokens = kind == "token_classification"
    made = [
        (
            {"tokens": [WORDS[i], WORDS[i + 1]], "tags": ["O", labels[i % len(labels)]]}
            if tokens
            else {"text": WORDS[i], "label": labels[i % len(labels)]}
        )
        for i in range(rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


@pytest.mark.parametrize(
    ("task", "labels", "names"),
    [
        ("sequence_classification", ["b", "a", "c"], ("a", "b", "c")),
        ("sequence_classification", [["b"], ["a", "c"], []], ("a", "b", "c")),
        ("sequence_classification", [0.5, 1.5, 2.0], ()),
        ("token_classification", ["X", "Y"], ("O", "X", "Y")),
    ],
    ids=["one", "several", "numbers", "tokens"],
)
def test_labels_of_a_stream_are_those_of_the_validation_rows(
    make_stream: MakeStream, tmp_path: Path, task: str, labels: list[Any], names: tuple[str, ...]
) -> None:
    train = write_labeled(tmp_path / "labeled.jsonl", task, 23, labels)
    held = write_labeled(tmp_path / "held.jsonl", task, 6, labels)
    stream = make_stream(task=task, train=str(train), validation=str(held))
    assert stream.first[0].label_names == names
    made = [batch for batch, position in fed(stream, 9) if position["epoch"] == 0]
    kept = {
        int(ids[1]): label.tolist()
        for b in made
        for ids, label, weight in zip(b["input_ids"], b["labels"], b["weights"], strict=True)
        if weight
    }
    assert len(kept) == 23
    for i in range(23):
        wanted = labels[i % len(labels)]
        got = kept[5 + i]
        if task == "token_classification":
            assert got[1:3] == [names.index("O"), names.index(wanted)]
        elif names and isinstance(wanted, list):
            assert got == [float(name in wanted) for name in names]
        else:
            assert got == (names.index(wanted) if names else wanted)


def test_rows_of_a_stream_that_have_no_label_are_left_out(
    make_stream: MakeStream, tmp_path: Path
) -> None:
    files = {
        split: str(
            write_labeled(
                tmp_path / f"{split}.jsonl", "sequence_classification", rows, ["b", "a", -100, "-"]
            )
        )
        for split, rows in (("train", 24), ("validation", 8))
    }
    stream = make_stream(task="sequence_classification", **files, unlabeled=("-",))
    assert stream.first[0].label_names == ("a", "b")
    made = [batch for batch, position in fed(stream, 9) if position["epoch"] == 0]
    kept = {
        int(ids[1]) - 5
        for b in made
        for ids, weight in zip(b["input_ids"], b["weights"], strict=True)
        if weight
    }
    assert kept == {i for i in range(24) if i % 4 < 2}


def test_a_label_that_the_validation_rows_have_not_is_told_and_may_be_named(
    make_stream: MakeStream, tmp_path: Path
) -> None:
    train = write_labeled(
        tmp_path / "labeled.jsonl", "sequence_classification", 20, list("aaaabbbbc")
    )
    held = write_labeled(tmp_path / "held.jsonl", "sequence_classification", 8, list("aaaabbbb"))
    options = {"task": "sequence_classification", "train": str(train), "validation": str(held)}
    with pytest.raises(
        DataError,
        match=r"labeled.jsonl:9:1 \(row 9\): field 'label' contains 'c', which is not one of the 2",
    ):
        fed(make_stream(**options), 9)
    named = make_stream(**options, labels=("c", "b", "a"))
    assert named.first[0].label_names == ("c", "b", "a")
    assert len(fed(named, 9)) == 9


def test_a_share_of_no_row_in_a_buffer_is_refused(make_stream: MakeStream, tmp_path: Path) -> None:
    paths = tuple(str(write_texts(tmp_path / f"{name}.jsonl", 40)) for name in "ab")
    with pytest.raises(
        ConfigError,
        match=r"data.weights: a share of 0.99% gives no row of .*b.jsonl in a buffer of 12; increase",
    ):
        make_stream(train=paths, weights=(100.0, 1.0), buffer_rows=12)
    assert make_stream(train=paths, weights=(100.0, 1.0), buffer_rows=52).first[0].rows.records


def write_rows_of(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("first", [True, False], ids=["in the first rows", "later"])
def test_a_column_that_may_be_missing_may_be_missing_in_a_buffer(
    make_stream: MakeStream, tmp_path: Path, first: bool
) -> None:
    rows = [
        {"instruction": WORDS[i], "output": WORDS[i + 1]}
        | ({"input": WORDS[50]} if (i < 7) == first else {})
        for i in range(20)
    ]
    path = write_rows_of(tmp_path / "alpaca.jsonl", rows)
    stream = make_stream(
        train=str(path), validation=str(path), chat_template="alpaca", max_length=64
    )
    made = [batch for batch, position in fed(stream, 8) if position["epoch"] == 0]
    with_input = sum(int((batch["input_ids"] == 55).any(-1).sum()) for batch in made)
    assert with_input == (7 if first else 13)


def test_a_long_row_among_the_few_at_the_end_is_dropped(
    make_stream: MakeStream, tmp_path: Path
) -> None:
    def write(at: int) -> str:
        rows = [
            {"prompt": " ".join(WORDS[: 20 if i == at else 2]), "completion": f" {WORDS[9]}"}
            for i in range(30)
        ]
        return str(write_rows_of(tmp_path / "prompts.jsonl", rows))

    options = {"buffer_rows": 28, "max_length": 16}
    path = write(29)
    assert len(fed(make_stream(train=path, validation=path, **options), 9)) == 9
    path = write(3)
    assert len(fed(make_stream(train=path, validation=path, **options), 9)) == 9
    with pytest.raises(DataError, match=r"1 of 28 rows \(3.6%\) have no token in the loss"):
        make_stream(
            train=path,
            validation=str(write_texts(tmp_path / "v.jsonl", 9)),
            most_dropped=0.03,
            **options,
        )

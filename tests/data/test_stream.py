"""Streamed rows: the same batches for the same seed, from every position, whoever makes them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxpeft.config import defaults
from jaxpeft.config.files import parse_config
from jaxpeft.config.schema import Config
from jaxpeft.data.encoding import Encoding
from jaxpeft.data.pipeline import load_tokenizer
from jaxpeft.data.stream import Stream
from jaxpeft.errors import DataError
from jaxpeft.hub import sources
from tests.training.runs import WORDS, tiny_models

__all__ = ["tiny_models"]
MakeStream = Callable[..., Stream]


def write_texts(path: Path, rows: int, start: int = 0) -> Path:
    """Writes texts of one to nine words, of which the first tells the row."""
    rng = np.random.default_rng(0)
    texts = [" ".join([WORDS[(start + i) % 60], *rng.choice(WORDS, rng.integers(0, 9))]) for i in range(rows)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def make_stream(tiny_models: Mapping[str, Path], tmp_path: Path) -> MakeStream:
    """Makes a stream of 23 texts, 7 at a time; options of the sections `data` and `train`."""
    train = write_texts(tmp_path / "train.jsonl", 23)

    def make(**options: Any) -> Stream:
        values = defaults("lora").to_dict()
        values["model"] |= {"path": str(tiny_models["llama"]), "task": "causal_lm"}
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
        tokenizer = load_tokenizer(sources.resolve(str(tiny_models["llama"])))
        return Stream(config, Encoding(config.data, tokenizer, 99, use_cache=False))

    return make


def fed(
    stream: Stream, count: int, position: Mapping[str, int] | None = None
) -> list[tuple[dict[str, Any], dict[str, int]]]:
    """Gives so many batches from a position on, with the position behind each."""
    feed = stream.feed(dict(position or {}), 0)
    try:
        return list(itertools.islice(feed, count))
    finally:
        feed.close()


def same(ours: list[Any], theirs: list[Any]) -> bool:
    """Says whether two lists of batches are bit-equal, with their positions."""
    return len(ours) == len(theirs) and all(
        a[1] == b[1] and a[0].keys() == b[0].keys() and all(np.array_equal(a[0][k], b[0][k]) for k in a[0])
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


def test_each_row_stands_once_in_an_epoch_and_in_another_place_in_the_next(make_stream: MakeStream) -> None:
    made = fed(make_stream(), 16)
    epochs = [[batch for batch, position in made if position["epoch"] == epoch] for epoch in (0, 1)]
    rows = [[tuple(row[row > 0]) for b in epoch for row in b["input_ids"][b["weights"] > 0]] for epoch in epochs]
    assert sorted(rows[0]) == sorted(rows[1])
    assert len(rows[0]) == 23
    assert rows[0] != rows[1]


@pytest.mark.slow
def test_worker_processes_make_the_same_batches(make_stream: MakeStream) -> None:
    alone = fed(make_stream(), 10)
    for workers in (1, 2):
        assert same(fed(make_stream(workers=workers), 10), alone)


def test_sources_are_mixed_by_weight_until_one_ends(make_stream: MakeStream, tmp_path: Path) -> None:
    first, second = write_texts(tmp_path / "first.jsonl", 9), write_texts(tmp_path / "second.jsonl", 40, start=30)
    stream = make_stream(train=(str(first), str(second)), weights=(1.0, 3.0), buffer_rows=8, batch_size=8)
    made = [batch for batch, position in fed(stream, 8) if position["epoch"] == 0]
    heads = [[row[1] - 5 for row in batch["input_ids"][batch["weights"] > 0]] for batch in made]
    counts = [sum(head < 30 for head in of) for of in heads]
    assert counts[:4] == [2, 2, 2, 2]
    assert [len(of) for of in heads[:4]] == [8, 8, 8, 8]


def test_a_broken_row_further_on_is_told_with_its_place(make_stream: MakeStream, tmp_path: Path) -> None:
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
    parts = []
    for process in (0, 1):
        stream._shard = (process, 2)
        parts.append(fed(stream, 6))
    for (batch, _), (first, _), (second, _) in zip(whole, *parts, strict=True):
        assert np.array_equal(batch["input_ids"], np.concatenate([first["input_ids"], second["input_ids"]]))

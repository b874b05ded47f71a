"""Batches: properties over random data, the arrays, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jaxpeft.data.batches.training import Batches, batch_like, eval_batches
from jaxpeft.errors import ConfigError

CASES = [(n, size, seed) for n in (1, 7, 32, 101, 500) for size in (1, 4, 32) for seed in (0, 1)]


@pytest.fixture
def data(encoded_of):
    """Return `n` sequences of random lengths up to 100, most of them short."""

    def make(n, seed=0, **options):
        lengths = np.minimum(np.random.default_rng(seed).geometric(0.06, n), 100)
        return encoded_of(lengths.tolist(), **options)

    return make


def epoch_rows(batches, epoch=0):
    steps = batches.steps_per_epoch
    return [batches.rows(epoch * steps + i) for i in range(steps)]


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("n", "size", "seed"), CASES)
def test_every_row_stands_exactly_once_in_every_epoch(data, n, size, seed):
    batches = Batches(data(n, seed), size, (16, 32, 64, 100), seed=seed)
    assert batches.steps_per_epoch == -(-n // size)
    for epoch in (0, 1, 5):
        rows = np.concatenate(epoch_rows(batches, epoch))
        assert np.array_equal(np.sort(rows[rows >= 0]), np.arange(n))


@pytest.mark.parametrize(("n", "size", "seed"), CASES)
def test_only_the_last_batch_has_fillers_and_they_weigh_nothing(data, n, size, seed):
    batches = Batches(data(n, seed), size, seed=seed)
    for i, rows in enumerate(epoch_rows(batches)):
        assert (rows >= 0).all() or i == batches.steps_per_epoch - 1
        assert np.array_equal(batches.batch(i)["weights"], (rows >= 0).astype(np.float32))


@pytest.mark.parametrize(("n", "size", "seed"), CASES)
def test_lengths_are_of_the_buckets_and_hold_their_rows_whole(data, n, size, seed):
    encoded, buckets = data(n, seed), (16, 32, 100)
    batches = Batches(encoded, size, buckets, seed=seed)
    for step in range(batches.steps_per_epoch):
        batch, rows = batches.batch(step), batches.rows(step)
        length = batch["input_ids"].shape[1]
        assert length in batches.lengths
        assert set(batches.lengths) <= set(buckets)
        for row, ids, mask in zip(rows, batch["input_ids"], batch["attention_mask"], strict=True):
            own = (
                encoded.tokens[encoded.offsets[row] : encoded.offsets[row + 1]] if row >= 0 else []
            )
            assert ids.tolist() == [*own, *[0] * (length - len(own))]
            assert mask.tolist() == [1] * max(len(own), 1) + [0] * (length - max(len(own), 1))


def test_the_lengths_of_the_batches_are_the_same_in_every_epoch(data):
    batches = Batches(data(300), 8, (16, 32, 100))
    seen = [
        sorted(batches.batch(e * 38 + i)["input_ids"].shape[1] for i in range(38)) for e in range(3)
    ]
    assert batches.steps_per_epoch == 38
    assert seen[0] == seen[1] == seen[2]
    assert set(seen[0]) == set(batches.lengths)


def test_the_same_seed_gives_the_same_batches_in_any_order_of_calls(data):
    encoded = data(100)
    forward, backward = Batches(encoded, 8, seed=3), Batches(encoded, 8, seed=3)
    steps = list(range(40))
    one = [forward.batch(step) for step in steps]
    two = {
        step: backward.batch(step) for step in np.random.default_rng(0).permutation(steps).tolist()
    }
    assert all(equal(one[step], two[step]) for step in steps)
    assert all(equal(Batches(encoded, 8, seed=3).batch(step), one[step]) for step in (0, 13, 39))


def test_another_seed_or_epoch_gives_other_batches(data):
    encoded = data(100)
    first = np.concatenate(epoch_rows(Batches(encoded, 8, seed=0)))
    assert not np.array_equal(first, np.concatenate(epoch_rows(Batches(encoded, 8, seed=1))))
    assert not np.array_equal(first, np.concatenate(epoch_rows(Batches(encoded, 8, seed=0), 1)))


def test_neighbors_change_from_epoch_to_epoch_and_lengths_are_mixed(data):
    batches = Batches(data(500), 4, (16, 32, 100))
    groups = [{frozenset(rows.tolist()) for rows in epoch_rows(batches, e)} for e in (0, 1)]
    assert len(groups[0] & groups[1]) < 5
    order = [batches.batch(i)["input_ids"].shape[1] for i in range(batches.steps_per_epoch)]
    assert order != sorted(order)
    assert order != sorted(order, reverse=True)


def test_without_shuffling_the_order_is_that_of_the_rows(encoded_of):
    batches = Batches(encoded_of([3, 20, 3, 20, 3]), 2, (8, 32), shuffle=False)
    assert [rows.tolist() for rows in epoch_rows(batches)] == [[0, 2], [4, 1], [3, -1]]
    assert [rows.tolist() for rows in epoch_rows(batches, 1)] == [[0, 2], [4, 1], [3, -1]]


def test_dropping_the_remainder(data):
    batches = Batches(data(101), 8, drop_remainder=True)
    rows = np.concatenate(epoch_rows(batches))
    assert batches.steps_per_epoch == 12
    assert (rows >= 0).all()
    assert len(set(rows.tolist())) == 96


@pytest.mark.parametrize("k", [2, 4])
def test_accumulation_splits_the_same_batch(data, k):
    encoded = data(50, types=True)
    whole, split = Batches(encoded, 8, seed=1), Batches(encoded, 8, seed=1, accumulation=k)
    for step in range(7):
        a, b = whole.batch(step), split.batch(step)
        assert b["input_ids"].shape[:2] == (k, 8 // k)
        assert b["weights"].shape == (k, 8 // k)
        assert equal(a, {name: array.reshape(8, *array.shape[2:]) for name, array in b.items()})


@pytest.mark.parametrize(
    ("labels", "shape", "dtype"),
    [
        (np.arange(3, dtype=np.int32), (4,), np.int32),
        (np.arange(3, dtype=np.float32), (4,), np.float32),
        (np.eye(3, 5, dtype=np.float32), (4, 5), np.float32),
    ],
    ids=["single_label", "regression", "multi_label"],
)
def test_labels_of_sequences(encoded_of, labels, shape, dtype):
    batches = Batches(encoded_of([3, 4, 5], labels=labels), 4, (8,))
    batch, rows = batches.batch(0), batches.rows(0)
    assert (batch["labels"].shape, batch["labels"].dtype) == (shape, dtype)
    assert np.array_equal(batch["labels"][rows >= 0], labels[rows[rows >= 0]])
    assert "token_type_ids" not in batch


def test_labels_and_types_of_tokens(encoded_of):
    batch = Batches(
        encoded_of([2, 3], kind="text", types=True), 3, (4,), pad_id=9, shuffle=False
    ).batch(0)
    assert batch["labels"].tolist() == [[1, 2, -100, -100], [1001, 1002, 1003, -100], [-100] * 4]
    assert batch["input_ids"].tolist() == [[1, 2, 9, 9], [1001, 1002, 1003, 9], [9] * 4]
    assert batch["token_type_ids"].tolist() == [[1, 0, 0, 0], [1, 0, 1, 0], [0] * 4]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]]
    kinds = {name: array.dtype for name, array in batch.items()}
    assert kinds.pop("weights") == np.float32
    assert set(kinds.values()) == {np.dtype(np.int32)}


def test_a_last_row_that_is_shorter_than_its_batch_reads_nothing_beyond(encoded_of):
    batch = Batches(encoded_of([5, 1]), 2, (8,), shuffle=False).batch(0)
    assert batch["input_ids"][1].tolist() == [1001] + [0] * 7


def test_buckets_pad_less_than_one_length(data):
    encoded = data(500)
    assert Batches(encoded, 8).padding_share < 0.4 < 0.7 < Batches(encoded, 8, (100,)).padding_share
    assert Batches(encoded, 8, (100,)).padding_share == pytest.approx(
        1 - len(encoded.tokens) / (504 * 100)
    )


@pytest.mark.parametrize("n", [1, 8, 33])
def test_evaluation_sees_every_row_once_and_restores_the_order(data, n):
    encoded = data(n)
    seen = np.full(n, -1)
    for batch, rows in eval_batches(encoded, 8):
        kept = rows >= 0
        assert np.array_equal(kept, batch["weights"] > 0)
        assert (seen[rows[kept]] == -1).all()
        seen[rows[kept]] = batch["labels"][kept]
    assert np.array_equal(seen, encoded.labels)


def test_bad_numbers_are_refused_at_once(data):
    with pytest.raises(ConfigError) as caught:
        Batches(data(10), 0, seed=-1, pad_id=-1, accumulation=0)
    assert str(caught.value).splitlines() == [
        "batch_size=0 must be 1 or more",
        "seed=-1 must be 0 or more",
        "pad_id=-1 must be 0 or more",
        "accumulation=0 must be 1 or more",
    ]
    with pytest.raises(ConfigError) as caught:
        Batches(data(10), 10, accumulation=4)
    assert str(caught.value) == "batch_size=10 is not divisible by accumulation=4; use 8 or 12"
    with pytest.raises(
        ConfigError, match="drop_remainder=True drops the only batch: 10 sequences, batch_size=16"
    ):
        Batches(data(10), 16, drop_remainder=True)
    with pytest.raises(
        ConfigError, match=r"lengths=\(16, 32\) are too short for a sequence of \d+ tokens"
    ):
        Batches(data(100), 8, (16, 32))
    with pytest.raises(ConfigError, match="step=-1 must be 0 or more"):
        Batches(data(10), 4).batch(-1)


def test_no_sequence_is_refused(data):
    empty = dataclasses.replace(
        data(1), tokens=np.zeros(0, np.int32), offsets=np.zeros(1, np.int64)
    )
    with pytest.raises(ConfigError, match="there are no sequences to build batches from"):
        Batches(empty, 4)


def test_one_length_for_all_batches_changes_no_batch(data):
    encoded = data(101)
    several, one = (
        Batches(encoded, 8, (16, 32, 100)),
        Batches(encoded, 8, (16, 32, 100), pad_to=128),
    )
    assert len(several.lengths) > 1
    assert one.lengths == (128,)
    assert one.padding_share > several.padding_share
    for step in range(several.steps_per_epoch):
        short, long = several.batch(step), one.batch(step)
        assert np.array_equal(several.rows(step), one.rows(step))
        assert long["input_ids"].shape == (8, 128)
        assert np.array_equal(
            short["input_ids"], long["input_ids"][:, : short["input_ids"].shape[1]]
        )
        assert short["attention_mask"].sum() == long["attention_mask"].sum()
    (batch, _), *_ = eval_batches(encoded, 8, (16, 32, 100), pad_to=128)
    assert batch["input_ids"].shape == (8, 128)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    ("problem", "labels"),
    [
        (None, None),
        ("single_label", np.arange(3, dtype=np.int32)),
        ("regression", np.arange(3, dtype=np.float32)),
        ("multi_label", np.eye(3, 5, dtype=np.float32)),
    ],
)
def test_a_batch_of_no_rows_has_the_shapes_of_one_of_rows(encoded_of, problem, labels, parts):
    kind = "text" if problem is None else "classification"
    real = Batches(
        encoded_of([3, 4, 5], kind=kind, labels=labels, types=True), 4, (8,), accumulation=parts
    ).batch(0)
    made = batch_like(problem, 5, 4, 8, parts, types=True)
    assert {name: (a.shape, a.dtype) for name, a in made.items()} == {
        name: (a.shape, a.dtype) for name, a in real.items()
    }
    assert (
        made.keys() | {"segment_ids"}
        == batch_like(problem, 5, 4, 8, types=True, packed=True).keys()
    )

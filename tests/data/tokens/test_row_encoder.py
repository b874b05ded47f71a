"""Which lengths a run pads to, and what its evaluations pad to."""

from __future__ import annotations

import numpy as np
import pytest

from jaxpeft.config import defaults
from jaxpeft.config.files import parse_config
from jaxpeft.data.tokens.row_encoder import evaluated_lengths, padded_lengths

LENGTHS = [*range(8, 72), *range(8, 40), *range(8, 30)]


def config(**options):
    made = defaults("lora").to_dict()
    made["model"] |= {"path": "m", "task": "sequence_classification"}
    made["data"]["train"] = "t.csv"
    made["train"] |= {"epochs": None, "steps": None}
    for name, value in options.items():
        section, option = name.split("__")
        made[section][option] = value
    parsed, problems = parse_config(made)
    assert parsed is not None, problems
    return parsed


@pytest.mark.parametrize(
    "budget", [{"train__epochs": 40.0}, {"train__steps": 590, "train__batch_size": 8}]
)
def test_each_length_spares_more_places_than_its_program_costs(encoded_of, budget):
    train = encoded_of(LENGTHS)
    chosen, passes = padded_lengths(config(**budget), train), 40.0
    sizes = np.asarray(LENGTHS)

    def places(lengths):
        return passes * np.asarray(lengths)[np.searchsorted(lengths, sizes)].sum()

    assert len(chosen) > 1
    for length in chosen[:-1]:
        without = [other for other in chosen if other != length]
        assert places(without) - places(chosen) > 1 << 14


def test_a_long_run_has_more_lengths_than_a_short_one(encoded_of):
    train = encoded_of(LENGTHS)
    counts = [
        len(padded_lengths(config(train__epochs=epochs), train))
        for epochs in (1.0, 20.0, 60.0, 1000.0)
    ]
    assert counts == sorted(counts) and counts[0] == 1 and counts[-1] == 4


def test_evaluations_pad_to_the_lengths_of_training(encoded_of):
    train, run = encoded_of(LENGTHS), config(train__epochs=1000.0)
    trained = padded_lengths(run, train)
    assert evaluated_lengths(run, train, encoded_of([3, 9, 20])) == trained
    assert evaluated_lengths(run, train, encoded_of([3, trained[-1]])) == trained
    assert evaluated_lengths(run, train, encoded_of([3, 97, 128])) == (*trained, 128)


def test_lengths_that_are_told_hold_for_all(encoded_of):
    run = config(train__epochs=1.0, data__lengths=(32, 128))
    assert padded_lengths(run, encoded_of(LENGTHS)) == (32, 128)
    assert evaluated_lengths(run, encoded_of(LENGTHS), encoded_of([128])) == (32, 128)

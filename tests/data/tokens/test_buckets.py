"""The lengths to pad to."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from jaxpeft.data.tokens.buckets import assign, choose_lengths, padding_share
from jaxpeft.errors import ConfigError, DataError


def slots(lengths, buckets) -> int:
    return sum(next(b for b in buckets if b >= n) for n in lengths)


@pytest.mark.parametrize("seed", range(5))
def test_no_other_choice_pads_less(seed):
    lengths = np.random.default_rng(seed).integers(1, 97, 200)
    chosen = choose_lengths(lengths, 128)
    steps = [8, 16, 24, 32, 40, 48, 56, 64]
    others = [(*c, 96) for n in range(4) for c in itertools.combinations(steps, n)]
    assert len(chosen) <= 4
    assert chosen[-1] == 96
    assert slots(lengths, chosen) == min(slots(lengths, other) for other in others)


def test_lengths_that_save_nothing_are_not_chosen():
    assert choose_lengths(np.array([16, 16, 128]), 512) == (16, 128)
    assert choose_lengths(np.array([5]), 512) == (8,)


def test_a_length_that_spares_too_little_is_not_chosen():
    lengths = np.array([16] * 10 + [32] * 10 + [128] * 10)
    assert choose_lengths(lengths, 128, worth=159) == (
        16,
        32,
        128,
    )  # 16 spares 160 places beside 32
    assert choose_lengths(lengths, 128, worth=160) == (32, 128)
    assert choose_lengths(lengths, 128, worth=1921) == (128,)


def test_max_length_is_never_passed():
    assert choose_lengths(np.array([3, 97]), 100) == (8, 100)
    assert choose_lengths(np.array([5]), 6) == (6,)
    assert choose_lengths(np.full(9, 3000), 4096) == (3072,)
    assert len(choose_lengths(np.arange(1, 100_000), 131_072, most=3)) == 3


def test_sequences_go_to_the_smallest_length_that_holds_them():
    assert assign(np.array([1, 16, 17, 32]), (16, 32)).tolist() == [0, 0, 1, 1]


def test_bad_lengths_are_refused():
    with pytest.raises(
        DataError, match="the longest sequence has 9 tokens; it must be from 1 to max_length=8"
    ):
        choose_lengths(np.array([9]), 8)
    with pytest.raises(DataError, match="the longest sequence has 0 tokens"):
        choose_lengths(np.array([], np.int64), 8)
    for lengths in ((), (16, 16), (0, 16), (32, 16)):
        with pytest.raises(ConfigError, match=r"must be positive and ascend"):
            assign(np.array([1]), lengths)
    with pytest.raises(ConfigError) as caught:
        assign(np.array([33]), (16, 32))
    assert (
        str(caught.value)
        == "lengths=(16, 32) are too short for a sequence of 33 tokens; add 33 or more"
    )


def test_padding_share():
    assert padding_share(np.array([6, 2]), 16) == 0.5
    assert padding_share(np.array([]), 0) == 0.0

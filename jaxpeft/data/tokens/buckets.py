"""Choose the few fixed lengths that sequences are padded to, so that few programs are compiled."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from jaxpeft.errors import ConfigError, DataError

_STEPS = (8, 16, 24, 32, 40, 48, 56, 64)


def choose_lengths(
    lengths: np.ndarray, max_length: int, most: int = 4, worth: float = 0.0
) -> tuple[int, ...]:
    """Choose the lengths with the least padding out of 8, 16, 24, ..., 64, 96, 128, 192, 256, ...

    Args:
        lengths: the length of each sequence, int [n].
        max_length: the maximum length of a sequence; chosen if no step fits the longest sequence.
        most: the maximum number of lengths.
        worth: number of padding tokens that each further length must save, since it compiles one
            more program.

    Raises:
        DataError: there are no sequences, or one is longer than `max_length`.
    """
    longest = int(lengths.max(initial=0))
    if not 0 < longest <= max_length:
        raise DataError(
            f"the longest sequence has {longest} tokens; it must be from 1 to"
            f" max_length={max_length}"
        )
    steps = [step for step in _steps(max_length) if step < longest]
    top = min((step for step in _steps(max_length) if step >= longest), default=max_length)
    within = {step: int((lengths <= step).sum()) for step in (*steps, top)}
    choices = (c for n in range(most) for c in itertools.combinations(steps, min(n, len(steps))))
    # Choices with fewer lengths come first, and min returns the first of equals, so a length that
    # saves nothing is never chosen.
    return min(
        ((*choice, top) for choice in choices),
        key=lambda chosen: _slots(within, chosen) + worth * len(chosen),
    )


def padding_share(lengths: np.ndarray, slots: int) -> float:
    """Return the share of padding if sequences of `lengths`, int [n], fill `slots` positions."""
    return 1 - int(lengths.sum()) / slots if slots else 0.0


def assign(lengths: np.ndarray, buckets: Sequence[int]) -> np.ndarray:
    """Return the index of the smallest bucket that fits each sequence.

    Args:
        lengths: int [n].
        buckets: ascending lengths.

    Returns:
        int64 [n].

    Raises:
        ConfigError: the buckets do not ascend, or the longest sequence does not fit.
    """
    if not buckets or any(a >= b for a, b in itertools.pairwise([0, *buckets])):
        raise ConfigError(f"lengths={tuple(buckets)} must be positive and ascend")
    longest = int(lengths.max(initial=0))
    if longest > buckets[-1]:
        raise ConfigError(
            f"lengths={tuple(buckets)} are too short for a sequence of {longest} tokens; add"
            f" {longest} or more"
        )
    return np.searchsorted(np.asarray(buckets), lengths)


def _steps(max_length: int) -> list[int]:
    doubled = (step << i for i in range(max_length.bit_length()) for step in (64, 96))
    return sorted({step for step in (*_STEPS, *doubled) if step <= max_length})


def _slots(within: dict[int, int], chosen: Sequence[int]) -> int:
    """Return the total padded length, if `within[step]` sequences have at most `step` tokens."""
    return sum(b * (within[b] - within.get(a, 0)) for a, b in itertools.pairwise((0, *chosen)))

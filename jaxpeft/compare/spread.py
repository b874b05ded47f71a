"""A metric over seeds: mean, standard deviation, interval, and the difference of two methods."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LEVEL = 0.95
"""Confidence level of the intervals."""


@dataclass(frozen=True)
class Spread:
    """A metric over seeds.

    Attributes:
        values: one value per seed.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation, None for a single value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The interval of the mean, by Student's t; None for a single value."""
        if self.deviation is None:
            return None
        from scipy.special import stdtrit

        count = len(self.values)
        around = float(stdtrit(count - 1, (1 + LEVEL) / 2)) * self.deviation / count**0.5
        return self.mean - around, self.mean + around

    def format(self, pattern: str = "{:.4f}") -> str:
        """Format as `mean ± deviation`."""
        around = (
            ""
            if self.deviation is None
            else f" ± {pattern.replace('+', '').format(self.deviation)}"
        )
        return pattern.format(self.mean) + around

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "mean": self.mean,
            "deviation": self.deviation,
            "interval": None if self.interval is None else list(self.interval),
            "values": list(self.values),
        }


def spread_of(plain: Mapping[str, Any]) -> Spread:
    """Return the inverse of `Spread.as_dict`."""
    return Spread(tuple(plain["values"]))


def difference(own: Mapping[int, float], other: Mapping[int, float]) -> Spread | None:
    """Return the difference of two methods, paired by seed: their rows and batches are the same.

    Args:
        own: metric by seed.
        other: metric of the other method by seed.

    Returns:
        `own - other` over the seeds that both have; None if they share none.
    """
    shared = [seed for seed in own if seed in other]
    return Spread(tuple(own[seed] - other[seed] for seed in shared)) if shared else None

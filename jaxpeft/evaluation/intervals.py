"""Confidence intervals of metrics: the bootstrap over rows, alone and of the difference of two
models on the same rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxpeft.errors import ConfigError, DataError

Statistic = Callable[[np.ndarray], Mapping[str, float]]
"""Computes metrics from row numbers, int [n], which may repeat: those of a resample."""
_BATCH = 64
"""Resamples drawn at a time, which bounds memory."""


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are computed (Efron and Tibshirani 1993, chapters 13 and 14).

    Attributes:
        resamples: number of resamples.
        level: confidence level.
        seed: seed of the resamples.
        kind: `percentile`, or `bca` (bias-corrected and accelerated), which also computes the
            metrics once without each row. An interval that BCa does not define, such as that of a
            metric that is equal in all resamples, is the percentile one.

    Raises:
        ConfigError: An option is out of range; it lists all of them.
    """

    resamples: int = 1000
    level: float = 0.95
    seed: int = 0
    kind: Literal["percentile", "bca"] = "percentile"

    def __post_init__(self) -> None:
        problems = [
            f"{name}: must be {must}, is {value!r}"
            for name, value, good, must in (
                ("resamples", self.resamples, self.resamples >= 1, "at least 1"),
                ("level", self.level, 0 < self.level < 1, "above 0 and below 1"),
                ("seed", self.seed, self.seed >= 0, "at least 0"),
            )
            if not good
        ]
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True)
class Estimate:
    """A metric with its confidence interval.

    Attributes:
        value: the metric on all rows.
        low: lower end of the interval; None for a single row, which has no interval.
        high: upper end.
    """

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Contrast:
    """A metric of two models on the same rows.

    Attributes:
        own: the metric of the first model.
        other: that of the second model.
        difference: first minus second, resampled in pairs.
        p: two-sided p-value that the difference is 0: twice the share of resamples on the other
            side of 0, at least 2 / (resamples + 1); None for a single row.
    """

    own: Estimate
    other: Estimate
    difference: Estimate
    p: float | None


def estimate(statistic: Statistic, rows: int, options: Bootstrap) -> dict[str, Estimate]:
    """Return metrics with their intervals.

    Args:
        statistic: computes the metrics.
        rows: number of rows.
        options: how intervals are computed.

    Raises:
        DataError: There are no rows.
    """
    names = tuple(statistic(_all(rows)))
    estimates, _ = _estimates(lambda chosen: _vector(statistic(chosen), names), rows, options)
    return dict(zip(names, estimates, strict=True))


def contrast(
    own: Statistic, other: Statistic, rows: int, options: Bootstrap
) -> dict[str, Contrast]:
    """Compare the metrics of two models; both see the same rows in each resample.

    Args:
        own: computes the metrics of the first model.
        other: computes the metrics of the second model.
        rows: number of rows.
        options: how intervals are computed.

    Returns:
        The metrics that both have.

    Raises:
        DataError: There are no rows.
    """
    known = other(_all(rows))
    names = tuple(name for name in own(_all(rows)) if name in known)

    def both(chosen: np.ndarray) -> np.ndarray:
        first, second = _vector(own(chosen), names), _vector(other(chosen), names)
        return np.concatenate([first, second, first - second])

    estimates, draws = _estimates(both, rows, options)
    count = len(names)
    found: dict[str, Contrast] = {}
    for i, name in enumerate(names):
        p = None if draws is None else _two_sided(draws[2 * count + i])
        found[name] = Contrast(estimates[i], estimates[count + i], estimates[2 * count + i], p)
    return found


def mean_of(scores: Mapping[str, np.ndarray]) -> Statistic:
    """Return the statistic of the means of scores of rows, each float [n]."""
    return lambda chosen: {name: float(score[chosen].mean()) for name, score in scores.items()}


def _all(rows: int) -> np.ndarray:
    if rows < 1:
        raise DataError("there are no rows to evaluate; check the file and its columns")
    return np.arange(rows)


def _vector(metrics: Mapping[str, float], names: Sequence[str]) -> np.ndarray:
    return np.array([metrics[name] for name in names])


def _estimates(
    compute: Callable[[np.ndarray], np.ndarray], rows: int, options: Bootstrap
) -> tuple[list[Estimate], np.ndarray | None]:
    """Return the estimate of each metric, and its values on the resamples, [metrics, resamples];
    None for a single row.
    """
    from scipy.stats import DegenerateDataWarning, bootstrap

    values = compute(_all(rows))
    if rows == 1:
        return [Estimate(float(value), None, None) for value in values], None
    run: Any = bootstrap
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore", DegenerateDataWarning)
        result = run(
            (np.arange(rows),),
            compute,
            n_resamples=options.resamples,
            batch=_BATCH,
            vectorized=False,
            confidence_level=options.level,
            method={"percentile": "percentile", "bca": "BCa"}[options.kind],
            rng=np.random.default_rng(options.seed),
        )
    draws = np.atleast_2d(result.bootstrap_distribution)
    outside = (1 - options.level) / 2
    plain = np.quantile(draws, (outside, 1 - outside), axis=1)
    found = np.reshape([result.confidence_interval.low, result.confidence_interval.high], (2, -1))
    lows, highs = np.where(np.isfinite(found).all(0), found, plain).tolist()
    return list(map(Estimate, values.tolist(), lows, highs)), draws


def _two_sided(differences: np.ndarray) -> float:
    """Return the p-value from the differences of the resamples (Efron and Tibshirani 1993, section
    15.4), with one added to both counts so that it is never 0.
    """
    less = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return min(1.0, 2 * (less + 1) / (len(differences) + 1))

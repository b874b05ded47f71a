"""Compare two models on the same rows: wins and losses, McNemar's test, and the rows to look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxpeft.errors import DataError


@dataclass(frozen=True)
class Wins:
    """How often a model is better than another.

    Attributes:
        wins: rows on which it has the better score.
        losses: rows on which it has the worse one.
        ties: rows with equal scores.
        p: two-sided p-value of the sign test, which ignores ties.
    """

    wins: int
    losses: int
    ties: int
    p: float


@dataclass(frozen=True)
class McNemar:
    """The exact McNemar test, for a model's and another's correctness.

    Attributes:
        both: rows that both answer correctly.
        only_own: rows that only the model answers correctly.
        only_other: rows that only the other one answers correctly.
        neither: rows that neither answers correctly.
        p: two-sided p-value that both are correct equally often (McNemar 1947; exact, from the
            binomial distribution of the rows with one correct answer).
    """

    both: int
    only_own: int
    only_other: int
    neither: int
    p: float


def count_wins(own: np.ndarray, other: np.ndarray, *, lower_is_better: bool = False) -> Wins:
    """Compare the scores of two models.

    Args:
        own: score of each row, [n].
        other: score of each row by the other model, [n].
        lower_is_better: whether a smaller score is better, such as a loss.

    Raises:
        DataError: The numbers of scores differ.
    """
    _check(own, other)
    ahead = np.sign(own - other) * (-1 if lower_is_better else 1)
    wins, losses = int((ahead > 0).sum()), int((ahead < 0).sum())
    return Wins(wins, losses, len(own) - wins - losses, _binomial(wins, losses))


def mcnemar(own: np.ndarray, other: np.ndarray) -> McNemar:
    """Test whether two models are correct equally often.

    Args:
        own: whether the model is correct on each row, bool [n].
        other: whether the other model is, bool [n].

    Raises:
        DataError: The numbers of rows differ.
    """
    _check(own, other)
    only_own, only_other = int((own & ~other).sum()), int((~own & other).sum())
    return McNemar(
        int((own & other).sum()),
        only_own,
        only_other,
        int((~own & ~other).sum()),
        _binomial(only_own, only_other),
    )


def worst_rows(scores: np.ndarray, count: int, *, lower_is_better: bool = False) -> list[int]:
    """Return the rows with the worst scores, the worst first; rows with equal scores in order."""
    keys = -scores if lower_is_better else scores
    return np.argsort(keys, kind="stable")[:count].tolist()


def _binomial(wins: int, losses: int) -> float:
    from scipy.stats import binomtest

    test: Any = binomtest
    return float(test(wins, wins + losses).pvalue) if wins + losses else 1.0


def _check(own: np.ndarray, other: np.ndarray) -> None:
    if own.shape != other.shape:
        raise DataError(
            f"the two models have {own.shape[0]} and {other.shape[0]} rows; compare them on the"
            " same rows"
        )

"""Classification by class: scores of each class, the confusion matrix, and thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxpeft.errors import DataError


@dataclass(frozen=True)
class ClassScore:
    """Scores of a class.

    Attributes:
        label: its name.
        precision: share of its predictions that are correct; 0 without predictions.
        recall: share of its rows that are found; 0 without rows.
        f1: their harmonic mean.
        support: number of its rows.
    """

    label: str
    precision: float
    recall: float
    f1: float
    support: int


def class_scores(
    predicted: np.ndarray, true: np.ndarray, labels: Sequence[str]
) -> tuple[ClassScore, ...]:
    """Return the scores of each class.

    Args:
        predicted: class ids, int [n], or for several labels per row, 0 or 1, [n, classes].
        true: the same of the rows.
        labels: class names.
    """
    from sklearn.metrics import precision_recall_fscore_support

    score: Any = precision_recall_fscore_support
    if true.ndim == 2 and true.shape[1] == 1:
        # scikit-learn treats a single column as a class of its own value
        true, predicted, which = true[:, 0], predicted[:, 0], [1]
    else:
        which = list(range(len(labels)))
    columns = score(true, predicted, labels=which, zero_division=0)
    return tuple(
        ClassScore(label, float(p), float(r), float(f), int(n))
        for label, p, r, f, n in zip(labels, *columns, strict=True)
    )


def lowest_first(classes: Sequence[ClassScore]) -> list[ClassScore]:
    """Return the classes by F1, the lowest first; those without rows are last."""
    return sorted(classes, key=lambda one: (not one.support, one.f1))


def confusion(predicted: np.ndarray, true: np.ndarray, classes: int) -> np.ndarray:
    """Return the confusion matrix, int [classes, classes]; a row is a true class.

    Args:
        predicted: class ids, int [n].
        true: class ids, int [n].
        classes: number of classes.
    """
    from sklearn.metrics import confusion_matrix

    matrix: Any = confusion_matrix
    return matrix(true, predicted, labels=list(range(classes)))


def choose_thresholds(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the threshold of each label with the best F1 on these rows, float [labels].

    A label is predicted if its probability is above the threshold, which is halfway between two
    probabilities of the rows. It is 0.5 for a label without rows. Choose thresholds on other rows
    than those that are evaluated.

    Args:
        probabilities: probability of each label, [n, labels].
        labels: 0 or 1, [n, labels].

    Raises:
        DataError: The shapes differ.
    """
    if probabilities.shape != labels.shape:
        raise DataError(
            f"probabilities of shape {probabilities.shape} do not match labels of shape"
            f" {labels.shape}"
        )
    return np.array(
        [
            _threshold(column, true)
            for column, true in zip(probabilities.T, labels.T.astype(int), strict=True)
        ]
    )


def _threshold(probabilities: np.ndarray, true: np.ndarray) -> float:
    from sklearn.metrics import precision_recall_curve

    if not true.any():
        return 0.5
    curve: Any = precision_recall_curve
    precision, recall, cuts = curve(true, probabilities)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = int(np.argmax(f1[: len(cuts)]))
    # the curve predicts from a cut on; a threshold lies between it and the next smaller one
    below = cuts[best - 1] if best else 0.0
    return float((cuts[best] + below) / 2)

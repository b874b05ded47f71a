"""Scores by class equal scikit-learn's; thresholds are the best ones."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import classification_report, confusion_matrix, f1_score

from jaxpeft.errors import DataError
from jaxpeft.evaluation.by_class import (
    choose_thresholds,
    class_scores,
    confusion,
    lowest_first,
)

NAMES = ("a", "b", "c", "d")


def check(found, report):
    for one in found:
        theirs = report[one.label]
        assert [one.precision, one.recall, one.f1, one.support] == pytest.approx(
            [theirs[name] for name in ("precision", "recall", "f1-score", "support")]
        )


def test_single_label_scores_equal_scikit_learns_report():
    rng = np.random.default_rng(0)
    true, predicted = rng.integers(0, 3, 60), rng.integers(0, 3, 60)
    report = classification_report(
        true, predicted, labels=range(4), target_names=NAMES, output_dict=True, zero_division=0
    )
    found = class_scores(predicted, true, NAMES)
    assert [one.label for one in found] == list(NAMES)
    check(found, report)
    assert found[3].support == 0 and found[3].f1 == 0.0  # a class without rows
    assert (
        confusion(predicted, true, 4) == confusion_matrix(true, predicted, labels=range(4))
    ).all()


@pytest.mark.parametrize("count", [1, 4])
def test_multi_label_scores_equal_scikit_learns_f1(count):
    rng = np.random.default_rng(1)
    true, predicted = (rng.integers(0, 2, (50, count)) for _ in range(2))
    found = class_scores(predicted, true, NAMES[:count])
    theirs = [f1_score(true[:, i], predicted[:, i]) for i in range(count)]
    assert [one.f1 for one in found] == pytest.approx(theirs)
    assert [one.support for one in found] == true.sum(0).tolist()


def test_no_other_threshold_has_a_better_f1():
    rng = np.random.default_rng(2)
    true = rng.integers(0, 2, (80, 3))
    probabilities = np.clip(0.3 * true + rng.uniform(0, 0.6, (80, 3)), 0, 1)
    chosen = choose_thresholds(probabilities, true)
    for i in range(3):
        scores = {
            cut: f1_score(true[:, i], probabilities[:, i] > cut, zero_division=0)
            for cut in [*np.linspace(0, 1, 101), chosen[i]]
        }
        assert scores[chosen[i]] == max(scores.values())


def test_a_label_without_rows_keeps_one_half():
    assert choose_thresholds(np.full((3, 1), 0.2), np.zeros((3, 1))).tolist() == [0.5]


def test_thresholds_of_other_shapes_are_refused():
    with pytest.raises(DataError, match=r"shape \(3, 2\) do not match labels of shape \(3, 1\)"):
        choose_thresholds(np.zeros((3, 2)), np.zeros((3, 1)))


def test_classes_without_rows_are_not_the_lowest():
    found = class_scores(np.array([0, 1, 1]), np.array([0, 0, 1]), ("good", "low", "absent"))
    assert [one.label for one in lowest_first(found)] == ["good", "low", "absent"]
    found = class_scores(np.array([0, 0]), np.array([0, 2]), ("good", "absent", "low"))
    assert [one.label for one in lowest_first(found)] == ["low", "good", "absent"]

"""Metrics against scikit-learn and SciPy, and on degenerate input."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jaxpeft.errors import ConfigError, DataError
from jaxpeft.evaluation.metrics import classification_metrics, figures_of, lm_metrics


def test_single_label_agrees_with_scikit_learn():
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(200, 5)).astype(np.float32), random.integers(0, 5, 200)
    made = logits.argmax(1)
    metrics = classification_metrics(logits, labels, "single_label")
    assert metrics == pytest.approx(
        {
            "accuracy": accuracy_score(labels, made),
            "f1_macro": f1_score(labels, made, average="macro"),
            "f1_weighted": f1_score(labels, made, average="weighted"),
            "mcc": matthews_corrcoef(labels, made),
        }
    )
    assert classification_metrics(made, labels, "single_label") == metrics


def test_two_classes_have_the_f1_of_the_second():
    logits = np.array([[0, 1], [0, 1], [1, 0], [1, 0]], np.float32)
    metrics = classification_metrics(logits, np.array([1, 0, 0, 1]), "single_label")
    assert metrics == pytest.approx(
        {"accuracy": 0.5, "f1_macro": 0.5, "f1_weighted": 0.5, "mcc": 0.0, "f1": 0.5}
    )


@pytest.mark.parametrize("label", [0, 1])
def test_constant_predictions_and_labels(label):
    logits = np.tile(np.array([[1.0, 0.0]], np.float32), (4, 1))
    metrics = classification_metrics(logits, np.full(4, label), "single_label")
    assert metrics["accuracy"] == 1 - label
    assert metrics["mcc"] == 0.0
    assert metrics["f1"] == 0.0
    assert all(math.isfinite(value) for value in metrics.values())


def test_multi_label_agrees_with_scikit_learn():
    from sklearn.metrics import f1_score

    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(50, 4)), random.integers(0, 2, (50, 4)).astype(np.float32)
    made = 1 / (1 + np.exp(-logits)) > 0.5
    metrics = classification_metrics(logits, labels, "multi_label")
    assert metrics["f1_micro"] == pytest.approx(f1_score(labels, made, average="micro"))
    assert metrics["f1_macro"] == pytest.approx(f1_score(labels, made, average="macro"))
    assert metrics["accuracy"] == pytest.approx((made == labels).all(1).mean())


@pytest.mark.parametrize("shape", [(3, 4), (3, 1)])
def test_multi_label_without_a_positive(shape):
    metrics = classification_metrics(np.full(shape, -1.0), np.zeros(shape), "multi_label")
    assert metrics == {"accuracy": 1.0, "f1_micro": 0.0, "f1_macro": 0.0}


def test_regression_agrees_with_scipy():
    from scipy.stats import pearsonr, spearmanr

    random = np.random.default_rng(0)
    labels = random.normal(size=60)
    made = labels + random.normal(size=60)
    metrics = classification_metrics(made[:, None], labels, "regression")
    assert metrics["pearson"] == pytest.approx(pearsonr(made, labels)[0])
    assert metrics["spearman"] == pytest.approx(spearmanr(made, labels)[0])
    assert metrics["mse"] == pytest.approx(((made - labels) ** 2).mean())


def test_constant_regression():
    metrics = classification_metrics(np.full(5, 0.1, np.float32), np.arange(5.0), "regression")
    assert metrics["pearson"] == metrics["spearman"] == 0.0
    assert math.isfinite(metrics["mse"])


@pytest.mark.parametrize(
    "made",
    [
        [1.0, 1 + 2**-52, 1 + 2**-51],
        [1e8, 1e8 + 2**-26, 1e8],
        [5e-324, 1e-323, 0.0],
        [1e30, -1e30, 1e-30],
        [0.0, 0.0, 1.0],
    ],
)
def test_a_regression_that_is_constant_but_for_rounding(made):
    metrics = classification_metrics(np.array(made), np.array([1.0, 2.0, 4.0]), "regression")
    assert all(math.isfinite(value) for value in metrics.values())
    assert -1 <= metrics["pearson"] <= 1
    assert metrics["spearman"] == pytest.approx(
        {1 + 2**-51: 1.0, 1e8: 0.0, 0.0: -0.5, 1e-30: -0.5, 1.0: 3**0.5 / 2}[made[2]]
    )


def test_one_row_of_regression():
    metrics = classification_metrics(np.array([1.5]), np.array([1.0]), "regression")
    assert metrics == {"pearson": 0.0, "spearman": 0.0, "mse": 0.25}


def test_token_labels_of_minus_100_are_ignored():
    labels = np.array([[-100, 0, 1, 2, -100], [-100, 0, 0, -100, -100]])
    made = np.array([[9, 0, 1, 1, 9], [9, 1, 0, 9, 9]])
    logits = np.eye(10, dtype=np.float32)[made]
    # tag 0: two right of two made and three wanted; tag 1: one of three and one; tag 2: none
    macro = (2 * 2 / (2 + 3) + 2 * 1 / (3 + 1) + 0) / 3
    figures = {"accuracy": 3 / 5, "tag_f1": 3 / 5, "tag_f1_macro": macro}
    assert classification_metrics(logits, labels, "token") == pytest.approx(figures)
    # Without the tag 0: one of three found is right, and there are two to find.
    tags = ["O", *map(str, range(9))]
    assert classification_metrics(made, labels, "token", tags=tags)["tag_f1"] == pytest.approx(
        2 * 1 / (3 + 2)
    )
    nothing = np.zeros((1, 2), int)
    assert classification_metrics(nothing, nothing, "token", tags=tags)["tag_f1"] == 0.0


@pytest.mark.parametrize(
    ("problem", "labels", "figures"),
    [
        ("single_label", ("a", "b", "c"), "accuracy f1_macro f1_weighted mcc"),
        ("single_label", ("a", "b"), "accuracy f1_macro f1_weighted mcc f1"),
        ("multi_label", ("a", "b"), "f1_micro f1_macro accuracy"),
        ("regression", (), "pearson spearman mse"),
        ("token", ("NOUN", "VERB"), "accuracy tag_f1 tag_f1_macro"),
        ("token", ("B-X", "O"), "accuracy tag_f1 tag_f1_macro f1 precision recall"),
        ("lm", (), "perplexity"),
    ],
)
def test_the_figures_of_a_problem_are_those_that_are_computed(problem, labels, figures):
    assert " ".join(figures_of(problem, labels)) == figures
    if problem != "lm":
        wanted = np.array([[0, 1], [1, 0]])
        wanted = wanted[0] if problem in ("single_label", "regression") else wanted
        computed = classification_metrics(wanted, wanted, problem, tags=labels)
        assert computed.keys() - (set() if len(labels) == 2 else {"f1"}) == set(figures.split())


@pytest.mark.parametrize(
    ("made", "labels", "problem", "said"),
    [
        (
            [[1.0, np.nan]],
            [0],
            "single_label",
            "1 of 2 predictions are not finite: the model has diverged",
        ),
        (
            [[1.0, 0.0]],
            [0, 1],
            "single_label",
            r"predictions of shape \(1,\) do not match labels of shape \(2,\)",
        ),
        ([], [], "single_label", "there are no labels to compare with"),
        ([[0, 0]], [[-100, -100]], "token", "there are no labels to compare with"),
        ([1.0], [1.0], "multi_label", r"multi_label needs labels of shape \[n, labels\]"),
    ],
)
def test_bad_arrays_are_refused(made, labels, problem, said):
    with pytest.raises(DataError, match=said):
        classification_metrics(np.array(made), np.array(labels), problem)


def test_an_unknown_problem_is_refused():
    with pytest.raises(
        ConfigError,
        match="problem='single' is not one of single_label, multi_label, regression, token",
    ):
        classification_metrics(np.zeros(1), np.zeros(1), "single")  # type: ignore[arg-type]


def test_language_models():
    assert lm_metrics(6.0, 3) == {"loss": 2.0, "perplexity": pytest.approx(math.exp(2))}
    assert math.isfinite(lm_metrics(1e9, 2)["perplexity"])
    with pytest.raises(DataError, match="no token is in the loss"):
        lm_metrics(0.0, 0)

"""Metrics as Python floats, finite and without warnings for any finite predictions."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from jaxpeft.errors import ConfigError, DataError
from jaxpeft.evaluation.entities import OUTSIDE, find_entities, has_entities

TaskKind = Literal["single_label", "multi_label", "regression", "token"]
Metrics = dict[str, float]

FIGURES: dict[str, tuple[str, ...]] = {
    "single_label": ("accuracy", "f1_macro", "f1_weighted", "mcc"),
    "multi_label": ("f1_micro", "f1_macro", "accuracy"),
    "regression": ("pearson", "spearman", "mse"),
    "token": ("accuracy", "tag_f1", "tag_f1_macro"),
    "lm": ("perplexity",),
}
"""The metrics of each problem type, in addition to `loss`; `figures_of` may add more."""

LOWER_IS_BETTER = frozenset({"loss", "perplexity", "mse"})

IGNORED = -100
# exp(700) is about 1e304. With a larger loss, perplexity could be infinite, which is invalid in
# JSON.
_MAX_EXPONENT = 700.0


def figures_of(problem: str, labels: Sequence[str]) -> tuple[str, ...]:
    """Return the metric names of a problem type with these labels, without `loss`."""
    if problem == "single_label" and len(labels) == 2:
        return (*FIGURES[problem], "f1")
    if problem == "token" and has_entities(labels):
        return (*FIGURES[problem], "f1", "precision", "recall")
    return FIGURES[problem]


def classification_metrics(
    predictions: np.ndarray,
    labels: np.ndarray,
    problem: TaskKind,
    *,
    tags: Sequence[str] = (),
    rows: np.ndarray | None = None,
) -> Metrics:
    """Compute classification or regression metrics.

    Undefined metrics (a single class, constant predictions) are 0.

    Args:
        predictions: single_label: logits [n, classes] or ids [n]; multi_label: logits [n, labels],
            positive if above 0; regression: [n] or [n, 1]; token: logits [..., classes] or ids of
            the shape of `labels`.
        labels: single_label: int [n]; multi_label: 0 or 1 [n, labels]; regression: float [n];
            token: int [...], -100 for ignored positions.
        problem: `single_label`, `multi_label`, `regression` or `token`.
        tags: for token, the names of the classes.
        rows: for token, int of the shape of `labels`, the sequence of each position; None if the
            last axis is the sequence.

    Returns:
        single_label: accuracy, f1_macro, f1_weighted (weighted by the number of rows of each
            class), mcc, and for two classes f1 of class 1.
        multi_label: accuracy (all labels of a row correct), f1_micro, f1_macro.
        regression: pearson, spearman, mse.
        token: accuracy, tag_f1 (micro-averaged over all tags but `O`) and tag_f1_macro (over all
            true or predicted tags), by position. For entity tags (`B-PER`), also f1, precision and
            recall (micro-averaged) of complete entities.

    Raises:
        ConfigError: the problem type is unknown.
        DataError: the shapes do not match, there are no labels, or a prediction is not finite.
    """
    functions = {"single_label": _single, "multi_label": _multi, "regression": _regression}
    if problem != "token" and problem not in functions:
        raise ConfigError(f"problem={problem!r} is not one of {', '.join(functions)}, token")
    predicted, true = np.asarray(predictions), np.asarray(labels)
    if predicted.dtype.kind == "f" and not np.isfinite(predicted).all():
        bad = int((~np.isfinite(predicted)).sum())
        raise DataError(
            f"{bad} of {predicted.size} predictions are not finite: the model has diverged"
        )
    if problem == "token":
        return _token(predicted, true, tags, rows)
    return functions[problem](predicted, true)


def lm_metrics(total_loss: float, total_tokens: float) -> Metrics:
    """Compute the mean token loss and the perplexity of a language model.

    Args:
        total_loss: the sum of the token losses, in nats.
        total_tokens: number of tokens in the loss.

    Returns:
        loss: the mean; perplexity: its exponential, at most about 1e304.

    Raises:
        DataError: no token is in the loss.
    """
    if total_tokens <= 0:
        raise DataError("no token is in the loss, so it has no mean; check the data and its labels")
    loss = float(total_loss) / float(total_tokens)
    return {"loss": loss, "perplexity": math.exp(min(loss, _MAX_EXPONENT))}


def _single(predictions: np.ndarray, labels: np.ndarray) -> Metrics:
    from sklearn.metrics import matthews_corrcoef, precision_recall_fscore_support

    predicted = _ids(predictions, labels)
    classes = (
        predictions.shape[-1]
        if predictions.ndim == labels.ndim + 1
        else int(max(predicted.max(), labels.max())) + 1
    )
    score: Any = precision_recall_fscore_support
    _, _, f1, support = score(labels, predicted, zero_division=0)
    metrics = {
        "accuracy": float((predicted == labels).mean()),
        "f1_macro": float(f1.mean()),
        "f1_weighted": float(f1 @ support / support.sum()),
        # scikit-learn warns if there is a single class; the correlation is 0 then.
        "mcc": (
            float(matthews_corrcoef(labels, predicted))
            if len(np.union1d(predicted, labels)) > 1
            else 0.0
        ),
    }
    if classes == 2:
        true_positives = int(((predicted == 1) & (labels == 1)).sum())
        metrics["f1"] = _f1(true_positives, int((predicted == 1).sum()), int((labels == 1).sum()))[
            "f1"
        ]
    return metrics


def _multi(predictions: np.ndarray, labels: np.ndarray) -> Metrics:
    from sklearn.metrics import f1_score

    _same_shape(predictions, labels)
    if labels.ndim != 2:
        raise DataError(
            f"multi_label needs labels of shape [n, labels], but the shape is {labels.shape}"
        )
    predicted, true = (predictions > 0).astype(np.int64), labels.astype(np.int64)
    score: Any = f1_score
    # scikit-learn treats a single column as binary labels, so both averages are of the positive
    # class.
    is_single = labels.shape[1] == 1
    args = (true[:, 0], predicted[:, 0]) if is_single else (true, predicted)
    micro, macro = (
        score(*args, average="binary" if is_single else kind, zero_division=0)
        for kind in ("micro", "macro")
    )
    return {
        "accuracy": float((predicted == true).all(1).mean()),
        "f1_micro": float(micro),
        "f1_macro": float(macro),
    }


def _regression(predictions: np.ndarray, labels: np.ndarray) -> Metrics:
    from scipy.stats import NearConstantInputWarning, pearsonr, spearmanr

    predicted = predictions[..., 0] if predictions.ndim == labels.ndim + 1 else predictions
    _same_shape(predicted, labels)
    predicted, true = predicted.astype(np.float64), labels.astype(np.float64)
    pearson = spearman = 0.0
    if predicted.min() < predicted.max() and true.min() < true.max():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NearConstantInputWarning)
            results: Any = pearsonr(predicted, true), spearmanr(predicted, true)
        pearson, spearman = (result.statistic for result in results)
    return {
        "pearson": float(pearson),
        "spearman": float(spearman),
        "mse": float(((predicted - true) ** 2).mean()),
    }


def _token(
    predictions: np.ndarray, labels: np.ndarray, tags: Sequence[str], rows: np.ndarray | None
) -> Metrics:
    predicted, labeled = _ids(predictions, labels), labels != IGNORED
    if rows is None:
        rows = np.broadcast_to(
            np.arange(labels.size // labels.shape[-1]).reshape(*labels.shape[:-1], 1), labels.shape
        )
    predicted, true, rows = predicted[labeled], labels[labeled], rows[labeled]
    _same_shape(predicted, true)
    outside = tags.index(OUTSIDE) if OUTSIDE in tags else None
    predicted_inside, true_inside = predicted != outside, true != outside
    correct = predicted == true
    counts = (correct & true_inside, predicted_inside, true_inside)
    metrics = {
        "accuracy": float(correct.mean()),
        "tag_f1": _f1(*(int(mask.sum()) for mask in counts))["f1"],
        "tag_f1_macro": _macro_f1(predicted, true),
    }
    if not has_entities(tags):
        return metrics
    if max(predicted.max(), true.max()) >= len(tags):
        raise DataError(
            f"class {max(predicted.max(), true.max())} has no name among the {len(tags)} tags"
        )
    predicted_entities = find_entities(predicted, rows, tags)
    true_entities = find_entities(true, rows, tags)
    return metrics | _f1(
        len(predicted_entities & true_entities), len(predicted_entities), len(true_entities)
    )


def _f1(correct: int, predicted: int, true: int) -> Metrics:
    """Return F1, precision and recall from counts; 0 if the denominator is 0."""
    return {
        "f1": 2 * correct / max(predicted + true, 1),
        "precision": correct / max(predicted, 1),
        "recall": correct / max(true, 1),
    }


def _macro_f1(predicted: np.ndarray, true: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    score: Any = f1_score
    return float(score(true, predicted, average="macro", zero_division=0))


def _ids(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return class ids of the shape of the labels, from logits or ids."""
    predicted = predictions.argmax(-1) if predictions.ndim == labels.ndim + 1 else predictions
    _same_shape(predicted, labels)
    return predicted


def _same_shape(predicted: np.ndarray, labels: np.ndarray) -> None:
    if predicted.shape != labels.shape:
        raise DataError(
            f"predictions of shape {predicted.shape} do not match labels of shape {labels.shape}"
        )
    if not labels.size:
        raise DataError("there are no labels to compare with; check that the split has rows")

"""Results of one model on each row, from which metrics, intervals and comparisons are computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxpeft.data.tokens.token_arrays import Encoded
from jaxpeft.errors import DataError
from jaxpeft.evaluate.prepared_rows import PreparedRows
from jaxpeft.evaluate.row_outputs import by_row, loss_bytes, loss_tokens, token_positions
from jaxpeft.evaluation.by_class import ClassScore, class_scores, confusion
from jaxpeft.evaluation.calibration import Calibration, calibrate, sigmoid, softmax
from jaxpeft.evaluation.intervals import Statistic
from jaxpeft.evaluation.language import RowLosses, lm_statistic
from jaxpeft.evaluation.metrics import classification_metrics
from jaxpeft.evaluation.tag_counts import count_tags, tag_statistic


@dataclass(frozen=True)
class Scored:
    """Results of a model on rows.

    Attributes:
        statistic: computes its metrics from row numbers.
        scores: score of each row by name, float64 [n]; the first ranks the worst rows.
        correct: whether each row is answered correctly, by metric, bool [n].
        predictions: prediction of each row, as plain JSON values; empty for token losses alone.
        truth: label or reference of each row, as plain JSON values; empty if there is none.
        classes: scores of each class.
        confusion: confusion matrix, int [classes, classes]; None for other problems.
        calibration: reliability of the probabilities; None for other problems.
        notes: what a reader must know about the metrics.
        cut: whether the generated answer of each row was cut; empty for others.
    """

    statistic: Statistic
    scores: Mapping[str, np.ndarray]
    correct: Mapping[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])
    predictions: Sequence[Any] = ()
    truth: Sequence[Any] = ()
    classes: tuple[ClassScore, ...] = ()
    confusion: np.ndarray | None = None
    calibration: Calibration | None = None
    notes: tuple[str, ...] = ()
    cut: Sequence[bool] = ()

    def __len__(self) -> int:
        return len(next(iter(self.scores.values())))


def score_losses(totals: np.ndarray, rows: PreparedRows) -> tuple[RowLosses, Scored]:
    """Return the results of a language model from the losses of its sequences."""
    encoded = rows.encoded
    losses = RowLosses(
        by_row(totals, encoded, rows.kept),
        by_row(loss_tokens(encoded), encoded, rows.kept),
        by_row(loss_bytes(encoded, rows.encoder.tokenizer), encoded, rows.kept),
    )
    return losses, Scored(lm_statistic(losses), {"loss": losses.mean})


def score_logits(
    logits: Sequence[np.ndarray], rows: PreparedRows, thresholds: np.ndarray | None = None
) -> Scored:
    """Return the results of a classifier from the logits of its sequences.

    Args:
        logits: logits of each sequence.
        rows: the rows.
        thresholds: of a multi-label classification, the probability above which each label is
            predicted; None for 0.5.

    Raises:
        DataError: A logit is not finite.
    """
    if not all(np.isfinite(each).all() for each in logits):
        raise DataError("logits are not finite: the model has diverged")
    if rows.problem == "token":
        return _score_tags(logits, rows.encoded, rows)
    matrix = np.stack(logits).astype(np.float64)
    labels: Any = rows.examples.labels
    if rows.problem == "single_label":
        return _score_single(matrix, labels, rows.labels)
    if rows.problem == "multi_label":
        return _score_multi(matrix, labels, rows.labels, thresholds)
    return _score_regression(matrix[:, 0], labels)


def _score_single(logits: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Scored:
    probabilities = softmax(logits)
    rows = np.arange(len(labels))
    predicted, confidence = logits.argmax(-1), probabilities.max(-1)
    correct = predicted == labels
    peak = logits.max(-1)
    losses = np.log(np.exp(logits - peak[:, None]).sum(-1)) + peak - logits[rows, labels]

    def compute(chosen: np.ndarray) -> Mapping[str, float]:
        found = classification_metrics(logits[chosen], labels[chosen], "single_label")
        return {
            **found,
            "loss": float(losses[chosen].mean()),
            "ece": calibrate(confidence[chosen], correct[chosen]).ece,
        }

    return Scored(
        compute,
        {"loss": losses, "probability": probabilities[rows, labels]},
        {"accuracy": correct},
        [names[i] for i in predicted.tolist()],
        [names[i] for i in labels.tolist()],
        class_scores(predicted, labels, names),
        confusion(predicted, labels, len(names)),
        calibrate(confidence, correct),
    )


def _score_multi(
    logits: np.ndarray, labels: np.ndarray, names: Sequence[str], thresholds: np.ndarray | None
) -> Scored:
    cut = np.full(len(names), 0.5) if thresholds is None else thresholds
    # a logit above that of the threshold counts as positive
    shifted = logits - np.log(np.clip(cut, 1e-12, 1.0) / np.clip(1 - cut, 1e-12, 1.0))
    predicted, true = (shifted > 0).astype(np.int64), labels.astype(np.int64)
    probabilities = sigmoid(logits)
    confidence = np.maximum(probabilities, 1 - probabilities)
    right = (probabilities > 0.5) == (true == 1)
    losses = (np.logaddexp(0, logits) - logits * true).mean(-1)

    def compute(chosen: np.ndarray) -> Mapping[str, float]:
        found = classification_metrics(shifted[chosen], labels[chosen], "multi_label")
        ece = calibrate(confidence[chosen].ravel(), right[chosen].ravel()).ece
        return {**found, "loss": float(losses[chosen].mean()), "ece": ece}

    def named(table: np.ndarray) -> list[list[str]]:
        return [[names[i] for i in np.flatnonzero(row).tolist()] for row in table]

    return Scored(
        compute,
        {"loss": losses},
        {"accuracy": (predicted == true).all(1)},
        named(predicted),
        named(true),
        class_scores(predicted, true, names),
        None,
        calibrate(confidence.ravel(), right.ravel()),
    )


def _score_regression(values: np.ndarray, targets: np.ndarray) -> Scored:
    targets = targets.astype(np.float64)

    def compute(chosen: np.ndarray) -> Mapping[str, float]:
        return classification_metrics(values[chosen], targets[chosen], "regression")

    return Scored(
        compute, {"squared_error": (values - targets) ** 2}, {}, values.tolist(), targets.tolist()
    )


def _score_tags(logits: Sequence[np.ndarray], encoded: Encoded, rows: PreparedRows) -> Scored:
    flat, true, source = token_positions(list(logits), encoded)
    where = np.searchsorted(rows.kept, source)
    probabilities = softmax(flat)
    predicted, confidence = flat.argmax(-1), probabilities.max(-1)
    counts = count_tags(predicted, true, where, len(rows.kept), rows.labels)
    losses = -np.log(np.maximum(probabilities[np.arange(len(true)), true], 1e-300))
    total = np.bincount(where, losses, len(rows.kept))
    sizes = np.bincount(where, minlength=len(rows.kept))
    by_tag = tag_statistic(counts)

    def compute(chosen: np.ndarray) -> Mapping[str, float]:
        loss = float(total[chosen].sum() / sizes[chosen].sum())
        return {**by_tag(chosen), "loss": loss}

    def named(ids: np.ndarray) -> list[list[str]]:
        parts = np.split(ids, np.cumsum(sizes)[:-1])
        return [[rows.labels[i] for i in part.tolist()] for part in parts]

    return Scored(
        compute,
        {"loss": total / sizes, "tag_accuracy": counts.accuracy},
        {"all_tags": counts.accuracy == 1.0},
        named(predicted),
        named(true),
        class_scores(predicted, true, rows.labels),
        confusion(predicted, true, len(rows.labels)),
        calibrate(confidence, predicted == true),
    )


def constant_logits(rows: PreparedRows) -> list[np.ndarray]:
    """Return the logits of the best constant prediction: the frequencies of the classes, or the
    mean target, of these rows, for each sequence.
    """
    labels: Any = rows.examples.labels
    count = len(rows.labels)
    if rows.problem == "regression":
        return [np.array([float(np.mean(labels))])] * len(rows.encoded)
    if rows.problem == "multi_label":
        share = np.clip(labels.mean(0), 1e-6, 1 - 1e-6)
        return [np.log(share / (1 - share))] * len(rows.encoded)
    ids = labels if rows.problem == "single_label" else np.concatenate(labels)
    found = np.bincount(ids[ids >= 0], minlength=count)
    constant = np.log(np.maximum(found, 1e-6) / found.sum())
    if rows.problem == "single_label":
        return [constant] * len(rows.encoded)
    return [np.tile(constant, (int(size), 1)) for size in rows.encoded.lengths]

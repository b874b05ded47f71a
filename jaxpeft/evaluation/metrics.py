"""Metrics as plain numbers, finite and free of warnings for any finite predictions."""

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
    "single_label": ("accuracy", "f1_macro", "mcc"),
    "multi_label": ("f1_micro", "f1_macro", "accuracy"),
    "regression": ("pearson", "spearman", "mse"),
    "token": ("accuracy", "tag_f1", "tag_f1_macro"),
    "lm": ("perplexity",),
}
"""The metrics of each kind of problem, beside `loss` and those of `figures_of`."""

LOWER_IS_BETTER = frozenset({"loss", "perplexity", "mse"})

IGNORED = -100
# exp(700) is about 1e304: the loss beyond which a perplexity would be infinite, which JSON cannot
# hold.
_LARGEST_EXPONENT = 700.0


def figures_of(problem: str, labels: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the metrics of a problem with these labels, without `loss`."""
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
    """Compute the metrics of one problem.

    Where a metric is undefined (one class only, constant predictions), it is 0.

    Args:
        predictions: single_label: logits [n, classes] or ids [n]; multi_label: logits [n, labels],
            0 being a probability of 0.5; regression: [n] or [n, 1]; token: logits [..., classes] or
            ids of the shape of `labels`.
        labels: single_label: int [n]; multi_label: 0 or 1 [n, labels]; regression: float [n];
            token: int [...], -100 where there is no label.
        problem: `single_label`, `multi_label`, `regression` or `token`.
        tags: for token, the names of the classes.
        rows: for token, int of the shape of `labels`: the sequence that each position belongs to;
            None where the last axis is the sequence.

    Returns:
        single_label: accuracy, f1_macro, mcc, and f1 of class 1 where there are two classes.
        multi_label: accuracy (all labels of a row right), f1_micro, f1_macro.
        regression: pearson, spearman, mse.
        token: accuracy, tag_f1 (micro, of all tags but `O`) and tag_f1_macro (of all that are there
            or predicted), by position. Where the tags are those of entities (`B-PER`): f1,
            precision and recall (micro) of whole entities as well.

    Raises:
        ConfigError: there is no such problem.
        DataError: the shapes do not fit, there is no label, or a prediction is not finite.
    """
    known = {"single_label": _single, "multi_label": _multi, "regression": _regression}
    if problem != "token" and problem not in known:
        raise ConfigError(f"problem={problem!r} is not one of {', '.join(known)}, token")
    made, wanted = np.asarray(predictions), np.asarray(labels)
    if made.dtype.kind == "f" and not np.isfinite(made).all():
        bad = int((~np.isfinite(made)).sum())
        raise DataError(f"{bad} of {made.size} predictions are not finite: the model has diverged")
    return _token(made, wanted, tags, rows) if problem == "token" else known[problem](made, wanted)


def lm_metrics(total_loss: float, total_tokens: float) -> Metrics:
    """Compute loss and perplexity of a language model, weighted by tokens.

    Args:
        total_loss: the sum of the losses of all tokens, in nats.
        total_tokens: how many tokens have a loss.

    Returns:
        loss: the mean; perplexity: its exponential, at most about 1e304.

    Raises:
        DataError: there is no token.
    """
    if total_tokens <= 0:
        raise DataError(
            "no token has a label, so there is no loss to average; check the data and its labels"
        )
    loss = float(total_loss) / float(total_tokens)
    return {"loss": loss, "perplexity": math.exp(min(loss, _LARGEST_EXPONENT))}


def _single(predictions: np.ndarray, labels: np.ndarray) -> Metrics:
    from sklearn.metrics import f1_score, matthews_corrcoef

    made = _ids(predictions, labels)
    classes = (
        predictions.shape[-1]
        if predictions.ndim == labels.ndim + 1
        else int(max(made.max(), labels.max())) + 1
    )
    score: Any = f1_score
    metrics = {
        "accuracy": float((made == labels).mean()),
        "f1_macro": float(score(labels, made, average="macro", zero_division=0)),
        # scikit-learn warns where one class is all there is; the correlation is 0 then.
        "mcc": float(matthews_corrcoef(labels, made)) if len(np.union1d(made, labels)) > 1 else 0.0,
    }
    if classes == 2:
        metrics["f1"] = float(score(labels == 1, made == 1, average="binary", zero_division=0))
    return metrics


def _multi(predictions: np.ndarray, labels: np.ndarray) -> Metrics:
    from sklearn.metrics import f1_score

    _same_shape(predictions, labels)
    if labels.ndim != 2:
        raise DataError(
            f"multi_label takes labels [n, labels], these have the shape {labels.shape}"
        )
    made, wanted = (predictions > 0).astype(np.int64), labels.astype(np.int64)
    score: Any = f1_score
    # A single column would be read as binary labels of one output, so both averages are the
    # positive class's.
    one = labels.shape[1] == 1
    args = (wanted[:, 0], made[:, 0]) if one else (wanted, made)
    micro, macro = (
        score(*args, average="binary" if one else kind, zero_division=0)
        for kind in ("micro", "macro")
    )
    return {
        "accuracy": float((made == wanted).all(1).mean()),
        "f1_micro": float(micro),
        "f1_macro": float(macro),
    }


def _regression(predictions: np.ndarray, labels: np.ndarray) -> Metrics:
    from scipy.stats import NearConstantInputWarning, pearsonr, spearmanr

    made = predictions[..., 0] if predictions.ndim == labels.ndim + 1 else predictions
    _same_shape(made, labels)
    made, wanted = made.astype(np.float64), labels.astype(np.float64)
    pearson = spearman = 0.0
    if made.min() < made.max() and wanted.min() < wanted.max():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NearConstantInputWarning)
            results: Any = pearsonr(made, wanted), spearmanr(made, wanted)
        pearson, spearman = (result.statistic for result in results)
    return {
        "pearson": float(pearson),
        "spearman": float(spearman),
        "mse": float(((made - wanted) ** 2).mean()),
    }


def _token(
    predictions: np.ndarray, labels: np.ndarray, tags: Sequence[str], rows: np.ndarray | None
) -> Metrics:
    made, kept = _ids(predictions, labels), labels != IGNORED
    if rows is None:
        rows = np.broadcast_to(
            np.arange(labels.size // labels.shape[-1]).reshape(*labels.shape[:-1], 1), labels.shape
        )
    made, wanted, rows = made[kept], labels[kept], rows[kept]
    _same_shape(made, wanted)
    outside = tags.index(OUTSIDE) if OUTSIDE in tags else None
    found, there = made != outside, wanted != outside
    right = made == wanted
    metrics = {
        "accuracy": float(right.mean()),
        "tag_f1": _f1(int((right & there).sum()), int(found.sum()), int(there.sum()))["f1"],
        "tag_f1_macro": _macro(made, wanted),
    }
    if not has_entities(tags):
        return metrics
    if max(made.max(), wanted.max()) >= len(tags):
        raise DataError(
            f"class {max(made.max(), wanted.max())} has no name among the {len(tags)} tags"
        )
    entities, true = find_entities(made, rows, tags), find_entities(wanted, rows, tags)
    return metrics | _f1(len(entities & true), len(entities), len(true))


def _f1(right: int, found: int, there: int) -> Metrics:
    """Return F1, precision and recall of counts; 0 where there is nothing to divide by."""
    return {
        "f1": 2 * right / max(found + there, 1),
        "precision": right / max(found, 1),
        "recall": right / max(there, 1),
    }


def _macro(made: np.ndarray, wanted: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    score: Any = f1_score
    return float(score(wanted, made, average="macro", zero_division=0))


def _ids(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return class ids in the shape of the labels, from logits or from ids."""
    made = predictions.argmax(-1) if predictions.ndim == labels.ndim + 1 else predictions
    _same_shape(made, labels)
    return made


def _same_shape(made: np.ndarray, labels: np.ndarray) -> None:
    if made.shape != labels.shape:
        raise DataError(
            f"predictions of the shape {made.shape} do not fit labels of the shape {labels.shape}"
        )
    if not labels.size:
        raise DataError("there is no label to compare with; check that the split has rows")

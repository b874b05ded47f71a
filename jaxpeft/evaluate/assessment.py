"""Evaluate a model on rows, alone or against another one on the same rows."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxpeft.core.paths import Tree
from jaxpeft.errors import ConfigError, DataError, show
from jaxpeft.evaluate.evaluation_request import BASE, EvaluationRequest, shown_metrics
from jaxpeft.evaluate.general_text import Forgetting, measure_forgetting
from jaxpeft.evaluate.generated import require_answers, score_texts
from jaxpeft.evaluate.prepared_rows import PROBLEMS, PreparedRows, prepare_rows
from jaxpeft.evaluate.row_outputs import Runner
from jaxpeft.evaluate.scored import Scored, constant_logits, score_logits, score_losses
from jaxpeft.evaluation.by_class import choose_thresholds
from jaxpeft.evaluation.calibration import sigmoid
from jaxpeft.evaluation.intervals import Contrast, Estimate, contrast, estimate
from jaxpeft.evaluation.wording import CONSTANT
from jaxpeft.hub.adapters.adapter_folder import read_adapter, request_of
from jaxpeft.hub.base_head import read_head
from jaxpeft.inference.adapted_model import AdaptedModel, load_adapted, task_of
from jaxpeft.logs import log_time

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Assessment:
    """The result of an evaluation.

    Attributes:
        request: what was evaluated.
        title: name of the model.
        other_title: name of the model that it is compared with; empty without one.
        rows: the rows, as the model reads them.
        own: results of the model.
        other: results of the other model; None without one.
        metrics: metrics with intervals, and differences if there is another model, in order.
        thresholds: chosen threshold of each label; None without.
        forgetting: change on general text; None without.
        notes: what a reader must know.
    """

    request: EvaluationRequest
    title: str
    other_title: str
    rows: PreparedRows
    own: Scored
    other: Scored | None
    metrics: Mapping[str, Estimate | Contrast]
    thresholds: np.ndarray | None = None
    forgetting: Forgetting | None = None
    notes: tuple[str, ...] = ()

    @property
    def against_constant(self) -> bool:
        """Whether the model is compared with a constant answer."""
        return self.other_title == CONSTANT


def assess(request: EvaluationRequest) -> Assessment:
    """Evaluate a model.

    Args:
        request: what to evaluate.

    Raises:
        JaxpeftError: An input is invalid.
    """
    if request.against not in (None, BASE) and request.adapter is not None:
        _require_one_task(request.adapter, Path(str(request.against)))
    _require_metrics(request)
    loaded = _load(request, request.adapter)
    rows = _rows(request, loaded)
    names = shown_metrics(request, rows.problem, rows.labels)
    if request.text_metrics:
        require_answers(rows, request.generating)
    thresholds = _thresholds(request, loaded, rows)
    own = _score(request, loaded, loaded.params, rows, thresholds)
    title = str(loaded.adapter or loaded.model.source.name)
    other_title, other, notes = _other(request, loaded, rows)
    forgetting = None
    if request.general is not None:
        forgetting = measure_forgetting(loaded, request, request.general)
    with log_time("resampling rows"):
        found: Mapping[str, Estimate | Contrast] = (
            estimate(own.statistic, len(own), request.bootstrap)
            if other is None
            else contrast(own.statistic, other.statistic, len(own), request.bootstrap)
        )
    return Assessment(
        request,
        title,
        other_title,
        rows,
        own,
        other,
        {name: _alone(name, found[name], other_title) for name in names if name in found},
        thresholds,
        forgetting,
        notes,
    )


def _alone(name: str, one: Estimate | Contrast, other_title: str) -> Estimate | Contrast:
    """Return a metric; without the other model's if the comparison says nothing: the frequencies
    of the evaluated rows themselves are calibrated.
    """
    constant = name == "ece" and other_title == CONSTANT
    return one.own if constant and isinstance(one, Contrast) else one


def _require_metrics(request: EvaluationRequest) -> None:
    """Refuse what does not exist for the adapter's task, before its base is read.

    Raises:
        ConfigError: A metric, or another part of the request, does not exist for the task.
    """
    if request.adapter is None:
        task = request.load.get("task") or task_of(str(request.model))
        labels, problem = (), None
    else:
        folder = read_adapter(request.adapter)
        task = request_of(folder, task=request.load.get("task")).task
        labels = folder.settings.labels
        problem = PROBLEMS.get(str(folder.settings.problem_type))
    if task == "causal_lm":
        shown_metrics(request, "lm", ())
    elif labels and task == "token_classification":
        shown_metrics(request, "token", labels)
    elif problem is not None and (labels or problem == "regression"):
        shown_metrics(request, problem, labels)


def _load(request: EvaluationRequest, adapter: Path | None) -> AdaptedModel:
    return load_adapted(request.model, adapter, **request.load)


def _rows(
    request: EvaluationRequest, loaded: AdaptedModel, path: str | None = None
) -> PreparedRows:
    rows = prepare_rows(
        path or request.data,
        loaded,
        request.data_options,
        limit=None if path else request.limit,
        seed=request.bootstrap.seed,
    )
    if not len(rows.kept):
        raise DataError(f"{rows.examples.rows.name}: no row can be evaluated; check its labels")
    return rows


def _score(
    request: EvaluationRequest,
    loaded: AdaptedModel,
    params: Tree,
    rows: PreparedRows,
    thresholds: np.ndarray | None = None,
) -> Scored:
    """Return the results of a model on each row."""
    runner = Runner(loaded, request.generating.batch_size, rows.encoder.pad_id)
    with log_time(f"evaluating {len(rows.kept)} rows"):
        if rows.problem != "lm":
            return score_logits(runner.logits(params, rows.encoded), rows, thresholds)
        _, scored = score_losses(runner.losses(params, rows.encoded), rows)
    if not request.text_metrics:
        return scored
    with log_time(f"generating {len(rows.kept)} answers"):
        return score_texts(scored, loaded, params, rows, request.text_metrics, request.generating)


def _other(
    request: EvaluationRequest, loaded: AdaptedModel, rows: PreparedRows
) -> tuple[str, Scored | None, tuple[str, ...]]:
    """Return the title and the results of the model to compare with, and notes."""
    if request.against is None:
        return "", None, ()
    if request.against != BASE:
        second = _load(request, Path(request.against))
        theirs = _rows(request, second)
        _require_same(rows, theirs)
        return str(second.adapter), _score(request, second, second.params, theirs), ()
    if rows.problem != "lm" and not _has_head(loaded):
        note = (
            f"the base {loaded.model.source.name} has no trained head for this task, so its answers"
            " would be random; the adapter is compared with the best constant answer instead, the"
            " class frequencies, or the mean, of these rows"
        )
        return CONSTANT, score_logits(constant_logits(rows), rows), (note,)
    return f"base {loaded.model.source.name}", _score(request, loaded, loaded.base, rows), ()


def _has_head(loaded: AdaptedModel) -> bool:
    """Return whether the base's files have the head that is loaded."""
    head = read_head(loaded.model.source, loaded.model.options.task)
    return head is not None and head.size == loaded.model.options.num_labels


def _require_one_task(own: Path, other: Path) -> None:
    """Refuse adapters of different tasks, before their bases are read.

    Raises:
        ConfigError: They differ in their task, their problem or their labels.
    """
    first, second = (read_adapter(path).settings for path in (own, other))
    for name in ("task", "problem_type", "labels"):
        mine, theirs = getattr(first, name), getattr(second, name)
        if name == "labels":
            mine, theirs = sorted(mine), sorted(theirs)
        if mine and theirs and mine != theirs:
            raise ConfigError(
                f"--against: {other} was trained with {name} {show(theirs)}, but {own} with"
                f" {show(mine)}; compare adapters of one task"
            )


def _require_same(own: PreparedRows, other: PreparedRows) -> None:
    if not np.array_equal(own.kept, other.kept):
        raise DataError(
            f"{own.examples.rows.name}: the two adapters tokenize rows differently, and"
            f" {len(own.kept)} and {len(other.kept)} rows have tokens in the loss; set"
            " --max-length for both"
        )


def _thresholds(
    request: EvaluationRequest, loaded: AdaptedModel, rows: PreparedRows
) -> np.ndarray | None:
    if request.thresholds is None:
        return None
    if rows.problem != "multi_label":
        raise ConfigError(
            f"--thresholds: is for multi-label classification, but the problem is {rows.problem};"
            " omit it"
        )
    chosen = _rows(request, loaded, request.thresholds)
    runner = Runner(loaded, request.generating.batch_size, chosen.encoder.pad_id)
    logits = np.stack(runner.logits(loaded.params, chosen.encoded))
    labels: Any = chosen.examples.labels
    return choose_thresholds(sigmoid(logits), labels)

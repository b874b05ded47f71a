"""The section of an evaluation on the page of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxpeft.evaluation.by_class import ClassScore, lowest_first
from jaxpeft.evaluation.wording import (
    is_lower_better,
    model_name,
    p_value,
    smallest_p,
    verdict,
)
from jaxpeft.report import class_charts
from jaxpeft.report.class_charts import Matrix, Reliability
from jaxpeft.report.evaluation_file import Estimate, Evaluation, Measure
from jaxpeft.report.run_folder import RunFolder
from jaxpeft.report.same_run import find_other
from jaxpeft.report.svg_charts import Axis, interval_axis, is_drawable

_MOST_CLASSES = 10
"""Classes up to which their table is open."""


@dataclass(frozen=True)
class DrawnMeasure:
    """A metric with the axis of its intervals, and what its difference says.

    Attributes:
        measure: the metric.
        axis: axis of the intervals.
        lower_is_better: whether a smaller value is better.
        verdict: `better`, `worse`, `unclear`, `equal` or empty.
        p: p-value as text; empty without one.
    """

    measure: Measure
    axis: Axis
    lower_is_better: bool
    verdict: str
    p: str

    @property
    def marks(self) -> list[tuple[int, float, float | None, float | None]]:
        """The color, value and interval of each model, that of the run first; without what cannot
        be drawn.
        """
        both = [(0, self.measure.own), (1, self.measure.other)]
        return [
            (color, one.value, low, high)
            for color, one in both
            if one is not None and is_drawable(one.value)
            for low, high in [_ends(one) or (None, None)]
        ]


@dataclass(frozen=True)
class EvaluationSection:
    """An evaluation as a page shows it.

    Attributes:
        found: the evaluation.
        other_run: why it is not of the run's adapter; empty if it is.
        own: short name of the model.
        against: short name of the model that it is compared with; empty without one.
        measures: metrics.
        forgotten: metrics on general text.
        classes: scores of the classes, the lowest F1 first.
        is_long: whether there are too many classes for an open table.
        reliability: chart of the reliability; None for other problems.
        matrix: chart of the confusion matrix; None without one, or with too many classes.
        confused: the most frequent confusions.
    """

    found: Evaluation
    other_run: str
    own: str
    against: str
    measures: Sequence[DrawnMeasure]
    forgotten: Sequence[DrawnMeasure]
    classes: Sequence[ClassScore]
    is_long: bool
    reliability: Reliability | None
    matrix: Matrix | None
    confused: Sequence[tuple[str, str, int]]


def section_of(run: RunFolder, found: Evaluation) -> EvaluationSection:
    """Return the section of an evaluation.

    Args:
        run: the run whose page it is.
        found: the evaluation.

    Raises:
        ConfigError: The evaluation is of another task than the run.
    """
    other_run, parts = find_other(run, found), found.by_class
    confusion, smallest = parts.confusion, smallest_p(found.resamples)
    return EvaluationSection(
        found,
        other_run,
        model_name(found.model) if other_run else "tuned",
        model_name(found.against) if found.against else "",
        [_draw(measure, smallest) for measure in found.measures],
        [_draw(one, smallest) for one in (found.forgotten.measures if found.forgotten else ())],
        lowest_first(parts.classes),
        len(parts.classes) > _MOST_CLASSES,
        class_charts.draw_reliability(parts.calibration) if parts.calibration else None,
        class_charts.draw_confusion(confusion) if confusion else None,
        class_charts.most_confused(confusion) if confusion else [],
    )


def _ends(one: Estimate) -> tuple[float, float] | None:
    """Return the interval of an estimate; None without one, or if it cannot be drawn."""
    if one.low is None or one.high is None or not is_drawable(max(abs(one.low), abs(one.high))):
        return None
    return one.low, one.high


def _draw(measure: Measure, smallest: float) -> DrawnMeasure:
    both = [one for one in (measure.own, measure.other) if one is not None]
    ends = [end for one in both for end in (one.value, *(_ends(one) or ())) if is_drawable(end)]
    difference = measure.difference
    return DrawnMeasure(
        measure,
        interval_axis(ends or [0.0]),
        is_lower_better(measure.name),
        verdict(measure.name, difference.low, difference.high) if difference else "",
        "" if measure.p is None else p_value(measure.p, smallest),
    )

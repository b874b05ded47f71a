"""Read the file of an evaluation for a page: `python -m jaxpeft.evaluate --json FILE`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from jaxpeft.errors import ConfigError, DataError, show
from jaxpeft.evaluation.by_class import ClassScore
from jaxpeft.evaluation.calibration import Calibration
from jaxpeft.json_files import read_json
from jaxpeft.names import short_path
from jaxpeft.report.typed_json import instance_of

VERSION = 1
"""Version of the file's form."""
_MOST_ROWS = 8
"""Number of changed rows to show."""


@dataclass(frozen=True)
class Estimate:
    """A number with its interval; `low` and `high` are None without one."""

    value: float
    low: float | None = None
    high: float | None = None

    def problems(self) -> list[str]:
        """Return the problems across the fields."""
        if (self.low is None) != (self.high is None):
            return [f"high: must be a number if low is one, is {show(self.high)}"]
        return []


@dataclass(frozen=True)
class _Bootstrap:
    """The confidence level of the intervals, and the number of resamples."""

    level: float
    resamples: int

    def problems(self) -> list[str]:
        """Return the problems of the values."""
        found = [] if 0 < self.level < 1 else [f"level: must be in (0, 1), is {show(self.level)}"]
        if self.resamples < 1:
            found.append(f"resamples: must be at least 1, is {show(self.resamples)}")
        return found


@dataclass(frozen=True)
class _Metric(Estimate):
    """A metric; with a comparison also of the other model, and their difference."""

    against: Estimate | None = None
    difference: Estimate | None = None
    p: float | None = None

    def problems(self) -> list[str]:
        """Return the problems of the values."""
        return super().problems() + ([] if self.p is None else _share_problems("p", self.p))


@dataclass(frozen=True)
class Measure:
    """A metric of the model, and of the one that it is compared with.

    Attributes:
        name: its name.
        own: metric of the model.
        other: metric of the other model; None without a comparison.
        difference: first minus second, in pairs of rows.
        p: two-sided p-value of no difference.
    """

    name: str
    own: Estimate
    other: Estimate | None
    difference: Estimate | None
    p: float | None


@dataclass(frozen=True)
class Wins:
    """Rows on which the model scores better, worse and equally, with the p-value of a sign test."""

    wins: int
    losses: int
    ties: int
    p: float

    def problems(self) -> list[str]:
        """Return the problems of the values."""
        return _share_problems("p", self.p)


@dataclass(frozen=True)
class ChangedRow:
    """A row whose predictions differ: its text, its truth, and both predictions."""

    text: str
    truth: str
    own: str
    other: str


@dataclass(frozen=True)
class Confusion:
    """The confusion matrix: class names, and rows of each true class by predicted class."""

    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    def problems(self) -> list[str]:
        """Return the problems across the fields."""
        if {len(self.labels)} == {len(self.counts), *map(len, self.counts)}:
            return []
        return ["counts: must have a row and a column for each label"]


@dataclass(frozen=True)
class _Bins(Calibration):
    """The reliability of a file."""

    def problems(self) -> list[str]:
        """Return the problems across the fields."""
        columns = (self.counts, self.confidence, self.accuracy)
        if {len(one) for one in columns} == {len(self.edges) - 1}:
            return []
        return ["counts: must be one less than the edges, as confidence and accuracy must"]


@dataclass(frozen=True)
class ByClass:
    """Results of a classifier by class; empty or None for other problems."""

    classes: tuple[ClassScore, ...] = ()
    confusion: Confusion | None = None
    calibration: _Bins | None = None


@dataclass(frozen=True)
class Adapter:
    """The adapter that was evaluated: its folder, and the SHA-256 of its files of weights."""

    path: str
    sha256: dict[str, str]


@dataclass(frozen=True)
class RowsOf:
    """What was evaluated: a file, and the number of its rows.

    Attributes:
        path: the file.
        rows: number of rows.
        problem: as in `Evaluation`; empty if the file does not say it.
    """

    path: str
    rows: int
    problem: str = ""

    @property
    def text(self) -> str:
        """The number of rows and the last two components of the path."""
        return f"{self.rows} rows of {short_path(self.path)}"


@dataclass(frozen=True)
class Forgotten:
    """The change on general text.

    Attributes:
        title: its file.
        measures: metrics, of the model and of the base.
        kl: divergence of the next token from the base's, in nats.
        changed_answers: share of greedy answers that changed; None if none were generated.
    """

    title: RowsOf
    measures: Sequence[Measure]
    kl: Estimate | None
    changed_answers: Estimate | None


@dataclass(frozen=True)
class _Paired:
    """Results of pairs of rows."""

    wins: dict[str, Wins]


@dataclass(frozen=True)
class _Forgetting:
    """The change on general text, as in the file."""

    path: str
    rows: int
    metrics: dict[str, _Metric]
    kl: Estimate | None = None
    changed_answers: Estimate | None = None


@dataclass(frozen=True)
class _File:
    """The fields of the file, of which `Evaluation` is made; the rows are read separately."""

    data: RowsOf
    bootstrap: _Bootstrap
    metrics: dict[str, _Metric]
    model: str = ""
    adapter: Adapter | None = None
    against: str | None = None
    notes: tuple[str, ...] = ()
    paired: _Paired | None = None
    forgetting: _Forgetting | None = None


@dataclass(frozen=True)
class Evaluation:
    """An evaluation.

    Attributes:
        file: its file.
        title: the rows.
        model: name of the model.
        adapter: its adapter; None for a base alone, and in files of earlier versions.
        problem: `single_label`, `multi_label`, `regression`, `token` or `lm`.
        against: the other model; empty without a comparison.
        notes: what a reader must know.
        level: confidence level of the intervals.
        resamples: number of resamples of an interval.
        measures: metrics.
        wins: wins by score.
        changed: some of the rows whose predictions differ.
        by_class: results by class.
        forgotten: the change on general text; None if it was not measured.
    """

    file: Path
    title: RowsOf
    model: str
    adapter: Adapter | None
    problem: str
    against: str
    notes: Sequence[str]
    level: float
    resamples: int
    measures: Sequence[Measure]
    wins: Mapping[str, Wins]
    changed: Sequence[ChangedRow]
    by_class: ByClass = field(default_factory=ByClass)
    forgotten: Forgotten | None = None


def read(file: Path) -> Evaluation:
    """Read the file of an evaluation.

    Raises:
        ConfigError: there is no such file, or it has another version.
        DataError: a field is missing or has another type.
        WeightsError: the file is not a JSON object.
    """
    if not file.is_file():
        raise ConfigError(
            f"--evaluation {file}: no such file; write it with `python -m jaxpeft.evaluate --json"
            f" {file}`"
        )
    values = read_json(file)
    if values.get("version") != VERSION:
        raise ConfigError(
            f"--evaluation {file}: version must be {VERSION}, is {show(values.get('version'))};"
            " write the file again with `python -m jaxpeft.evaluate --json`"
        )
    found, forgotten = instance_of(_File, values, file), None
    if found.forgetting:
        of = found.forgetting
        title, measures = RowsOf(of.path, of.rows), _measures(of.metrics)
        forgotten = Forgotten(title, measures, of.kl, of.changed_answers)
    return Evaluation(
        file=file,
        title=found.data,
        model=found.model,
        adapter=found.adapter,
        problem=found.data.problem,
        against=found.against or "",
        notes=found.notes,
        level=found.bootstrap.level,
        resamples=found.bootstrap.resamples,
        measures=_measures(found.metrics),
        wins=found.paired.wins if found.paired else {},
        changed=_changed(values, file),
        by_class=instance_of(ByClass, values, file),
        forgotten=forgotten,
    )


def _share_problems(name: str, value: float) -> list[str]:
    """Return the problem of a field that must be a share or a probability, if there is one."""
    return [] if 0 <= value <= 1 else [f"{name}: must be from 0 to 1, is {show(value)}"]


def _measures(metrics: Mapping[str, _Metric]) -> list[Measure]:
    return [
        Measure(name, Estimate(one.value, one.low, one.high), one.against, one.difference, one.p)
        for name, one in metrics.items()
    ]


def _changed(values: Mapping[str, Any], file: Path) -> list[ChangedRow]:
    """Return the first of the rows whose predictions differ."""
    rows, changed, found = values.get("rows"), values.get("changed"), list[ChangedRow]()
    for at in changed[:_MOST_ROWS] if isinstance(changed, list) else ():
        try:
            row: Any = cast("list[Any]", rows)[at]
            texts = (row["input"], row.get("truth", ""), _answer(row), _answer(row["against"]))
        except (LookupError, TypeError, AttributeError):
            raise DataError(
                f"{file}: changed: {show(at)} is not the index of a row with both predictions"
            ) from None
        found.append(ChangedRow(*map(str, texts)))
    return found


def _answer(result: Mapping[str, Any]) -> str:
    """Return a prediction as text, with an ellipsis if it was cut at the maximum of tokens."""
    return f"{result['prediction']}{'…' if result.get('cut') else ''}"

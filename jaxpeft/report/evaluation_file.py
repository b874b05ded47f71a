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


@dataclass(frozen=True)
class _Bootstrap:
    """The confidence level of the intervals, and the number of resamples."""

    level: float
    resamples: int


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


@dataclass(frozen=True)
class ByClass:
    """Results of a classifier by class; empty or None for other problems."""

    classes: tuple[ClassScore, ...] = ()
    confusion: Confusion | None = None
    calibration: Calibration | None = None


@dataclass(frozen=True)
class Adapter:
    """The adapter that was evaluated: its folder, and the SHA-256 of its files of weights."""

    path: str
    sha256: dict[str, str]


@dataclass(frozen=True)
class RowsOf:
    """What was evaluated: a file, and the number of its rows."""

    path: str
    rows: str

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
    data = _section(values, "data", file)
    bootstrap = instance_of(_Bootstrap, _section(values, "bootstrap", file), file)
    notes = values.get("notes")
    paired = _section(values, "paired", file) if values.get("paired") else {}
    wins = _section(paired, "wins", file) if paired else {}
    return Evaluation(
        file=file,
        title=_rows_of(data),
        model=str(values.get("model") or ""),
        adapter=(
            instance_of(Adapter, _section(values, "adapter", file), file)
            if values.get("adapter")
            else None
        ),
        problem=str(data.get("problem") or ""),
        against=str(values.get("against") or ""),
        notes=list(map(str, cast("list[Any]", notes))) if isinstance(notes, list) else [],
        level=bootstrap.level,
        resamples=bootstrap.resamples,
        measures=_measures(values, file),
        wins={name: instance_of(Wins, _section(wins, name, file), file) for name in wins},
        changed=_changed(values, file),
        by_class=_by_class(values, file),
        forgotten=(
            _forgotten(_section(values, "forgetting", file), file)
            if values.get("forgetting")
            else None
        ),
    )


def _rows_of(data: Mapping[str, Any]) -> RowsOf:
    return RowsOf(str(data.get("path")), f"{data.get('rows')}")


def _by_class(values: Mapping[str, Any], file: Path) -> ByClass:
    found = instance_of(ByClass, values, file)
    matrix, bins = found.confusion, found.calibration
    if matrix and {len(matrix.labels)} != {len(matrix.counts), *map(len, matrix.counts)}:
        raise DataError(f"{file}: confusion: counts must have a row and a column for each label")
    if bins:
        sizes = {len(one) for one in (bins.counts, bins.confidence, bins.accuracy)}
        if sizes != {len(bins.edges) - 1}:
            raise DataError(f"{file}: calibration: counts must be one less than the edges")
    return found


def _forgotten(values: Mapping[str, Any], file: Path) -> Forgotten:
    kl, changed = (
        instance_of(Estimate, _section(values, name, file), file) if values.get(name) else None
        for name in ("kl", "changed_answers")
    )
    return Forgotten(_rows_of(values), _measures(values, file), kl, changed)


def _section(values: Mapping[str, Any], name: str, file: Path) -> dict[str, Any]:
    found = values.get(name)
    if not isinstance(found, dict):
        raise DataError(f"{file}: {name}: must be an object, is {show(found)}")
    return cast("dict[str, Any]", found)


def _measures(values: Mapping[str, Any], file: Path) -> list[Measure]:
    metrics = _section(values, "metrics", file)
    found: list[Measure] = []
    for name in metrics:
        one = _section(metrics, name, file)
        other, difference = (
            instance_of(Estimate, _section(one, part, file), file) if part in one else None
            for part in ("against", "difference")
        )
        found.append(
            Measure(name, instance_of(Estimate, one, file), other, difference, one.get("p"))
        )
    return found


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

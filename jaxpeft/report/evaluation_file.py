"""Read the file of an evaluation for a page: `python -m jaxpeft.evaluate --json FILE`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from jaxpeft.errors import ConfigError, DataError, show
from jaxpeft.json_files import read_json
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
    """The confidence level of the intervals."""

    level: float


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
class Evaluation:
    """An evaluation.

    Attributes:
        title: what was evaluated.
        against: the other model; empty without a comparison.
        level: confidence level of the intervals.
        measures: metrics.
        wins: wins by score.
        changed: some of the rows whose predictions differ.
        other_rows: name of the rows on which forgetting was measured; empty if it was not.
        forgotten: metrics on these rows, of the model and of the base.
    """

    title: str
    against: str
    level: float
    measures: Sequence[Measure]
    wins: Mapping[str, Wins]
    changed: Sequence[ChangedRow]
    other_rows: str
    forgotten: Sequence[Measure]


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
    forgetting = _section(values, "forgetting", file) if values.get("forgetting") else {}
    paired = _section(values, "paired", file) if values.get("paired") else {}
    wins = _section(paired, "wins", file) if paired else {}
    return Evaluation(
        title=f"{data.get('rows')} rows of {data.get('path')}",
        against=str(values.get("against") or ""),
        level=instance_of(_Bootstrap, _section(values, "bootstrap", file), file).level,
        measures=_measures(values, file),
        wins={name: instance_of(Wins, _section(wins, name, file), file) for name in wins},
        changed=_changed(values, file),
        other_rows=f"{forgetting.get('rows')} rows of {forgetting.get('path')}"
        if forgetting
        else "",
        forgotten=_measures(forgetting, file) if forgetting else [],
    )


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
            other = row["against"]["prediction"]
            texts = (row["input"], row.get("truth", ""), row["prediction"], other)
        except (LookupError, TypeError, AttributeError):
            raise DataError(
                f"{file}: changed: {show(at)} is not the index of a row with both predictions"
            ) from None
        found.append(ChangedRow(*map(str, texts)))
    return found

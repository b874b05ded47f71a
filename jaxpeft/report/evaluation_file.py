"""Read the metrics of an evaluation for a page: `python -m jaxpeft.evaluate --json FILE`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxpeft.errors import ConfigError, DataError
from jaxpeft.json_files import read_json
from jaxpeft.report.typed_json import instance_of


@dataclass(frozen=True)
class Estimate:
    """A metric with its interval.

    Attributes:
        name: name of the metric.
        value: the metric.
        low: lower end of the interval; None without one.
        high: upper end.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """An evaluation of a tuned model.

    Attributes:
        title: what was evaluated.
        tuned: metrics of the tuned model.
        base: metrics of the model that it is compared with, by name; empty without one.
    """

    title: str
    tuned: Sequence[Estimate]
    base: Mapping[str, Estimate]


def read(file: Path) -> Evaluation:
    """Read `{"tuned": [{"name", "value", "low", "high"}, ...], "base": [...], "data": "..."}`.

    `base`, `data`, `low` and `high` may be missing.

    Raises:
        ConfigError: there is no such file.
        DataError: a field is missing or has another type.
        WeightsError: the file is not a JSON object.
    """
    if not file.is_file():
        raise ConfigError(
            f"--evaluation {file}: no such file; write it with `python -m jaxpeft.evaluate --json"
            f" {file}`"
        )
    values = read_json(file)
    base = _estimates(values.get("base", []), "base", file)
    return Evaluation(
        str(values.get("data") or file.name),
        _estimates(values.get("tuned"), "tuned", file),
        {one.name: one for one in base},
    )


def _estimates(rows: Any, name: str, file: Path) -> list[Estimate]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(
            f"{file}: {name}: must be a list of metrics, each with name, value, low and high"
        )
    return [instance_of(Estimate, row, file) for row in rows]

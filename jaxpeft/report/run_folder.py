"""Read the folder of a run, finished or not. Its files are data: each field is checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxpeft.config.files import parse_config
from jaxpeft.config.schema import Config
from jaxpeft.errors import ConfigError, shorten, show
from jaxpeft.json_files import read_json
from jaxpeft.report.typed_json import instance_of
from jaxpeft.train import records, sample_answers
from jaxpeft.train.sample_answers import Sample


@dataclass(frozen=True)
class Counts:
    """The rows, tokens and truncated rows of a split."""

    rows: int
    tokens: int | None = None
    truncated: int | None = None


@dataclass(frozen=True)
class Start:
    """What was known when a run started (`run.json`); empty for a run of an earlier version.

    Attributes:
        steps: planned number of steps, 0 if unknown.
        metric: metric that selects the best step.
        problem: `single_label`, `multi_label`, `regression`, `token` or `lm`.
        labels: class names.
        trainable_parameters: number of trainable parameters.
        total_parameters: number of parameters, including the adapter.
        base_sha256: SHA-256 of the base's weights.
        rows: numbers of rows and tokens, by split.
        data: SHA-256 of rows (`sources`, by split) and tokenizer.
        environment: versions and devices.
    """

    steps: int = 0
    metric: str = ""
    problem: str = ""
    labels: tuple[str, ...] = ()
    trainable_parameters: int = 0
    total_parameters: int = 0
    base_sha256: str = ""
    rows: dict[str, Counts] = field(default_factory=dict[str, Counts])
    data: dict[str, dict[str, str] | str] = field(default_factory=dict[str, dict[str, str] | str])
    environment: dict[str, str | int] = field(default_factory=dict[str, str | int])

    @property
    def sources(self) -> Mapping[str, str]:
        """SHA-256 of the rows, by split."""
        found = self.data.get("sources")
        return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Forgetting:
    """A measure on rows of another task, of the base and of the tuned model."""

    measure: str
    before: float
    after: float


@dataclass(frozen=True)
class Result:
    """The result of a finished run.

    Attributes:
        metric: metric that selected the best step.
        split: split of the final metrics.
        after: final metrics, of the best step.
        steps: number of steps done.
        best_step: step with the best metric.
        seconds: training time.
        trainable_parameters: number of trainable parameters.
        total_parameters: number of parameters, including the adapter.
        before: metrics before training; None if they were not measured.
        validation: validation metrics of the best step.
        forgetting: a measure on other rows; None if it was not measured.
        prediction: Python code that uses the adapter.
    """

    metric: str
    split: str
    after: dict[str, float]
    steps: int
    best_step: int
    seconds: float
    trainable_parameters: int
    total_parameters: int
    before: dict[str, float] | None = None
    validation: dict[str, float] = field(default_factory=dict[str, float])
    forgetting: Forgetting | None = None
    prediction: str = ""

    def problems(self) -> list[str]:
        """Return the problems across the fields."""
        if self.metric in self.after:
            return []
        known = shorten(", ".join(self.after) or "none")
        return [
            f"metric: must be one of the {self.split} metrics ({known}), is {show(self.metric)}"
        ]


@dataclass(frozen=True)
class _Before:
    """The content of `before.json`."""

    figures: dict[str, float]


@dataclass(frozen=True)
class RunFolder:
    """A run.

    Attributes:
        folder: its folder.
        config: its config.
        start: what was known when it started.
        result: its result; None if it has not finished.
        before: metrics before training; empty if they were not measured.
        lines: metrics by step.
        samples: test rows with the answers of the base and of the tuned model.
    """

    folder: Path
    config: Config
    start: Start
    result: Result | None
    before: Mapping[str, float]
    lines: Sequence[Mapping[str, Any]]
    samples: Sequence[Sample]

    @property
    def damaged(self) -> Path | None:
        """The file to which damaged lines of `metrics.jsonl` were moved, if there is one."""
        file = self.folder / f"{records.METRICS}.damaged"
        return file if file.is_file() else None


def find(folder: Path) -> Path:
    """Return the folder of a run, from that folder or from that of its adapter."""
    if (folder / records.RUN).is_file() or not (folder.parent / records.RUN).is_file():
        return folder
    return folder.parent


def read(folder: Path) -> RunFolder:
    """Read the folder of a run.

    Raises:
        ConfigError: it is not the folder of a run, or its config is invalid.
        DataError: a field of its files is missing or has another type.
        WeightsError: a file is not a JSON object.
    """
    file = folder / records.CONFIG
    if not file.is_file() or (folder / "comparison.json").is_file():
        raise ConfigError(f"--run {folder}: {_why_no_run(folder)}")
    config, problems = parse_config(read_json(file))
    if config is None:
        raise ConfigError([f"{file}: {problem}" for problem in problems])
    start, before = folder / records.RUN, folder / records.BEFORE
    result = _result(folder)
    measured = result.before if result else None
    if measured is None and before.is_file():
        measured = instance_of(_Before, read_json(before), before).figures
    return RunFolder(
        folder,
        config,
        instance_of(Start, read_json(start), start) if start.is_file() else Start(),
        result,
        measured or {},
        records.read_lines(folder / records.METRICS),
        sample_answers.read(folder),
    )


def _why_no_run(folder: Path) -> str:
    give = "give the folder of a run, the --workdir of `python -m jaxpeft.train`"
    if not folder.is_dir():
        return f"no such folder; {give}"
    if (folder / "comparison.json").is_file():
        return (
            "is the folder of a comparison, whose page is comparison.html; for the page of one of"
            " its runs, give NAME/seed-N in it"
        )
    return f"has no {records.CONFIG}, so no run has started in it; {give}"


def _result(folder: Path) -> Result | None:
    """Return the result of a run, or of a run of a comparison, which has other files."""
    file = folder / records.SUMMARY
    if file.is_file():
        values = read_json(file)
        methods = values.get("methods")
        own = next(iter(methods.values()), None) if isinstance(methods, dict) else None
        own = own if isinstance(own, dict) else {}
        split = "test" if "test" in own else "validation"
        return instance_of(Result, {**own, **values, "split": split, "after": own.get(split)}, file)
    file = folder / records.RESULT
    if file.is_file():
        values = read_json(file)
        return instance_of(Result, {**values, "after": values.get("test")}, file)
    return None

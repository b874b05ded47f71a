"""Metric writers of a run: metrics.jsonl, TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from jaxpeft import atomic
from jaxpeft.config.train_config import LogConfig
from jaxpeft.errors import ConfigError

Figures = Mapping[str, float]
_log = logging.getLogger(__name__)
_MAX_LISTED = 5
_LARGEST = 2**63
"""Integers of a metrics.jsonl are smaller, also if they are negative."""
CONFIG, RUN, BEFORE = "config.json", "run.json", "before.json"
"""Files of a run at its start: its config, what else is known then, the metrics before training."""
METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
"""Metrics by step, and answers to test rows."""
SUMMARY, RESULT = "summary.json", "result.json"
"""The result of a run, and of a run of a comparison."""


class Writer(Protocol):
    """Writes metrics of steps."""

    def write(self, step: int, figures: Figures) -> None:
        """Write the metrics of a step."""
        ...

    def close(self) -> None:
        """Flush and close."""
        ...


FINAL = {"test": "test", "validation": "best_validation"}
"""Prefix of the best step's metrics, by split; `validation` is the prefix during training."""


class JsonLines:
    """Writes `metrics.jsonl`: one JSON object per line, with `step` and metrics.

    Args:
        path: path of the file.
        resume_at: step to resume from, 0 for a new run. Lines of later steps are dropped, and
            damaged lines are moved to another file.
    """

    def __init__(self, path: Path, resume_at: int) -> None:
        lines, damaged = _parse(path.read_bytes() if resume_at and path.is_file() else b"")
        if damaged:
            aside = path.with_name(f"{path.name}.damaged")
            with aside.open("ab") as file:
                file.writelines(line + b"\n" for line in damaged.values())
            numbers = ", ".join(map(str, list(damaged)[:_MAX_LISTED])) + (
                ", ..." if len(damaged) > _MAX_LISTED else ""
            )
            _log.warning(
                "%s: moved damaged lines (%s) to %s and kept the other lines",
                path,
                numbers,
                aside.name,
            )
        # the final metrics are written again at the end
        earlier = [line for line in lines if line["step"] <= resume_at and not _is_final(line)]
        atomic.write_text(path, "".join(json.dumps(line) + "\n" for line in earlier))
        self._file = path.open("a")

    def write(self, step: int, figures: Figures) -> None:
        """Append a line."""
        self._file.write(json.dumps({"step": step, **figures}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _is_final(line: Mapping[str, Any]) -> bool:
    return any(name.startswith(tuple(f"{prefix}/" for prefix in FINAL.values())) for name in line)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a metrics.jsonl; skip lines that are damaged or cut off by a crash."""
    return _parse(path.read_bytes() if path.is_file() else b"")[0]


def _parse(text: bytes) -> tuple[list[dict[str, Any]], dict[int, bytes]]:
    """Return the lines of a metrics.jsonl, only the last of duplicates, and damaged lines by
    number.
    """
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    damaged: dict[int, bytes] = {}
    for number, raw in enumerate(text.split(b"\n"), 1):
        try:
            line: Any = json.loads(raw or b"null")
        except (ValueError, RecursionError):  # not JSON, not UTF-8, or nested too deeply
            line = None
        if _is_line(line):
            lines[line["step"], *sorted(line)] = line
        elif raw:
            damaged[number] = raw
    return list(lines.values()), damaged


def _is_line(value: Any) -> bool:
    """Return whether a JSON value contains the metrics of a step."""
    if not isinstance(value, dict):
        return False
    line = cast("dict[str, Any]", value)
    figures = all(
        isinstance(figure, float) or (isinstance(figure, int) and abs(figure) < _LARGEST)
        for figure in line.values()
    )
    return figures and type(line.get("step")) is int


def validation_of(path: Path, step: int) -> dict[str, float]:
    """Return the validation metrics of a step in a metrics.jsonl; empty if it was not evaluated."""
    lines = (line for line in read_lines(path) if line.get("step") == step)
    named = (
        (name, value)
        for line in lines
        for name, value in line.items()
        if name.startswith("validation/")
    )
    return {name.removeprefix("validation/"): value for name, value in named}


class TensorBoard:
    """Writes TensorBoard event files.

    Args:
        folder: folder of the files.
        resume_at: step to resume from, 0 for a new run; TensorBoard drops later steps.
    """

    def __init__(self, folder: Path, resume_at: int) -> None:
        from tensorboardX import SummaryWriter

        self._writer: Any = SummaryWriter(
            str(folder), purge_step=resume_at + 1 if resume_at else None
        )

    def write(self, step: int, figures: Figures) -> None:
        """Write a scalar per metric."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the files."""
        self._writer.close()


class WeightsAndBiases:
    """Writes to a Weights & Biases run; credentials come from the environment.

    Args:
        project: name of the project.
        folder: folder of the run; its name is the name and id of the W&B run, which is resumed if
            it exists.
    """

    def __init__(self, project: str, folder: Path) -> None:
        wandb: Any = importlib.import_module("wandb")
        self._run: Any = wandb.init(
            project=project, name=folder.name, id=folder.name, dir=str(folder), resume="allow"
        )

    def write(self, step: int, figures: Figures) -> None:
        """Log the metrics."""
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


def check(log: LogConfig) -> None:
    """Check early that `open_writers` will work.

    Raises:
        ConfigError: Weights & Biases is configured but not installed.
    """
    if log.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"log.wandb: project {log.wandb!r} requires the package wandb; run `pip install wandb`"
        )


def open_writers(log: LogConfig, folder: Path, resume_at: int) -> list[Writer]:
    """Open the configured writers.

    Args:
        log: log options.
        folder: folder of the run.
        resume_at: step to resume from, 0 for a new run.
    """
    writers: list[Writer] = [JsonLines(folder / METRICS, resume_at)]
    if log.tensorboard:
        writers.append(TensorBoard(folder / "tensorboard", resume_at))
    if log.wandb is not None:
        writers.append(WeightsAndBiases(log.wandb, folder))
    return writers

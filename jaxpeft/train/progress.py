"""Progress of a run: a bar on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_log = logging.getLogger(__name__)


@contextmanager
def row_progress(kind: str, what: str) -> Generator[Callable[[int, int], None] | None]:
    """Yield a function `(rows done, total rows)` that updates a bar, or None if no bar is shown.

    Args:
        kind: `auto`, `bar`, `plain` or `off`.
        what: label of the bar.
    """
    if _resolve(kind) != "bar":
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} rows"),
    )
    with Progress(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _resolve(kind: str) -> str:
    if kind != "auto":
        return kind
    return "bar" if sys.stderr.isatty() else "plain"


def memory_gb() -> float:
    """Return the peak memory in GB, of the device if it reports it, else of this process."""
    stats: Any = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class StepProgress:
    """Shows the steps of a run.

    Args:
        kind: `auto`, `bar`, `plain` or `off`.
        name: name of the method.
        total: total number of steps.
        done: number of steps already done.
    """

    def __init__(self, kind: str, name: str, total: int, done: int) -> None:
        kind = _resolve(kind)
        self._kind, self._name, self._total = kind, name, total
        self._started, self._first = time.perf_counter(), done
        self._bar: Progress | None = None
        if kind == "bar":
            columns = (
                TextColumn("{task.description}"),
                BarColumn(12),
                TextColumn("{task.completed}/{task.total}"),
            )
            self._bar = Progress(
                *columns,
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(name, total=total, completed=done, figures="")
            self._bar.start()

    def update(self, step: int, figures: str) -> None:
        """Show a step with its metrics."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=figures)
        elif self._kind == "plain":
            remaining = (
                (time.perf_counter() - self._started)
                / max(1, step - self._first)
                * (self._total - step)
            )
            _log.info(
                "%s step %d/%d  %s  %s left",
                self._name,
                step,
                self._total,
                figures,
                _clock(remaining),
            )

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

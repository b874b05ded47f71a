"""Logging to the current `sys.stderr`, which a progress bar may replace."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from jaxpeft.errors import printable


class StderrHandler(logging.Handler):
    """Writes each record as a line to the current `sys.stderr`, without control characters."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        sys.stderr.write(printable(self.format(record)) + "\n")


class _Fallback(StderrHandler):
    """Writes records that no user handler writes."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, unless a user handler exists."""
        if not logging.getLogger().handlers:
            super().emit(record)


@contextmanager
def log_time(what: str) -> Generator[Callable[[str], None]]:
    """Log the start of an operation, and its duration on success.

    Yields:
        A function that adds a note to the final log line.
    """
    log, notes = logging.getLogger("jaxpeft"), list[str]()
    log.info("%s ...", what)
    started = time.perf_counter()
    yield notes.append
    log.info("%s: %s", what, ", ".join([*notes, f"{time.perf_counter() - started:.1f} s"]))


def show() -> None:
    """Show jaxpeft's log on standard error, unless the user has configured logging or a level."""
    logger = logging.getLogger("jaxpeft")
    if logger.handlers or logger.level != logging.NOTSET or logging.getLogger().handlers:
        return
    logger.addHandler(_Fallback())
    logger.setLevel(logging.INFO)

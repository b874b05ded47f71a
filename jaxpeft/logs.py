"""Where log lines go: to standard error, as it is when the line is written (a progress bar puts
itself in its place).
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager


class StderrHandler(logging.Handler):
    """Writes each record as a line to the present `sys.stderr`."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        sys.stderr.write(self.format(record) + "\n")


class _Fallback(StderrHandler):
    """Writes what no handler of the user's would."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, unless the user's own handlers do."""
        if not logging.getLogger().handlers:
            super().emit(record)


@contextmanager
def log_time(what: str) -> Generator[Callable[[str], None]]:
    """Log what is being done, and then how long it took; a step that fails says so itself.

    Gives a function that takes what came of it, to be said with the time.
    """
    log, told = logging.getLogger("jaxpeft"), list[str]()
    log.info("%s ...", what)
    started = time.perf_counter()
    yield told.append
    log.info("%s: %s", what, ", ".join([*told, f"{time.perf_counter() - started:.1f} s"]))


def show() -> None:
    """Let what is loaded be seen on standard error; a user who has set up logging, or a level, has
    the say.
    """
    logger = logging.getLogger("jaxpeft")
    if logger.handlers or logger.level != logging.NOTSET or logging.getLogger().handlers:
        return
    logger.addHandler(_Fallback())
    logger.setLevel(logging.INFO)

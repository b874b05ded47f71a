"""Where log lines go: to standard error, as it is when the line is written (a progress bar puts itself in its place)."""

from __future__ import annotations

import logging
import sys


class StderrHandler(logging.Handler):
    """Writes each record as a line to the present `sys.stderr`."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a record."""
        sys.stderr.write(self.format(record) + "\n")


class _Fallback(StderrHandler):
    """Writes what no handler of the user's would."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a record, unless the user's own handlers do."""
        if not logging.getLogger().handlers:
            super().emit(record)


def show() -> None:
    """Lets what is loaded be seen on standard error; a user who has set up logging, or a level, has the say."""
    logger = logging.getLogger("jaxpeft")
    if logger.handlers or logger.level != logging.NOTSET or logging.getLogger().handlers:
        return
    logger.addHandler(_Fallback())
    logger.setLevel(logging.INFO)

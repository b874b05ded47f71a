"""What a library call says where its user has set up no logging: on standard error, as Python does with warnings."""

from __future__ import annotations

import logging
import sys


class _Fallback(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes what no handler of the user's would."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a record, unless the user's own handlers do."""
        if not logging.getLogger().handlers:
            self.setStream(sys.stderr)
            super().emit(record)


def show() -> None:
    """Lets what is loaded be seen on standard error; a user who has set up logging, or a level, has the say."""
    logger = logging.getLogger("jaxpeft")
    if logger.handlers or logger.level != logging.NOTSET or logging.getLogger().handlers:
        return
    logger.addHandler(_Fallback())
    logger.setLevel(logging.INFO)

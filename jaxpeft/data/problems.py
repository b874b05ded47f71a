"""Collect problems in data, so that one error lists the first twenty."""

from __future__ import annotations

from typing import Any

from jaxpeft.errors import DataError

Record = dict[str, Any]

SHOWN = 20
EXCERPT = 80


class RowError(Exception):
    """A problem in one row. Internal to `jaxpeft.data`: users see a `DataError`.

    Args:
        fault: description of the problem.
        fix: how to fix it.
        column: the 1-based character column of the problem.
    """

    def __init__(self, fault: str, fix: str, column: int = 1) -> None:
        super().__init__(fault)
        self.fault, self.fix, self.column = fault, fix, column


class Problems:
    """Counts problems, stores the text of the first twenty, and raises them as one error."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self.total = 0

    def add(self, where: str, fault: str, text: str, fix: str) -> None:
        """Add one problem.

        Args:
            where: the location, `file:line:column` if possible.
            fault: description of the problem.
            text: the offending text, shortened by `excerpt`, or empty.
            fix: how to fix it.
        """
        self.total += 1
        if self.total <= SHOWN:
            shown = f": {text!r}" if text else ""
            self._lines.append(f"{where}: {fault}{shown}; {fix}")

    def raise_if_any(self) -> None:
        """Raise the problems that were added, if any.

        Raises:
            DataError: at least one problem was added.
        """
        if not self.total:
            return
        more = self.total - len(self._lines)
        raise DataError([*self._lines, f"... and {more} more problems"] if more else self._lines)


def excerpt(line: str, column: int = 1) -> str:
    """Return at most 80 characters of a line: its start, or the part around `column` if that is
    further right.
    """
    start = 0 if column <= EXCERPT else column - 1 - EXCERPT // 2
    return line[start : start + EXCERPT]

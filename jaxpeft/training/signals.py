"""Stopping on request: SIGTERM and SIGINT set a flag, and the loop saves at the next step."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

_REPEATED = 1.0
"""Signals of one kind that come within so many seconds are one request: `timeout` and job managers send theirs to a process and to
its group, which it is in."""


class Stopped(Exception):  # noqa: N818 - not an error
    """The run was asked to stop, and has saved what it did.

    Args:
        signum: the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum


class StopRequest:
    """A context in which SIGTERM and SIGINT are noted; a second one of the same kind, a second or more later, acts as usual."""

    def __init__(self) -> None:
        self._signum: int | None = None
        self._noted: dict[int, float] = {}
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for signum in (signal.SIGTERM, signal.SIGINT):
            self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        del frame
        now = time.monotonic()
        first = self._noted.setdefault(signum, now)
        if first == now or now - first < _REPEATED:
            self._signum = signum
            return
        signal.signal(signum, self._before[signum])
        os.kill(os.getpid(), signum)

    @property
    def requested(self) -> bool:
        """Whether the run should stop."""
        return self._signum is not None

    def raise_if_requested(self) -> None:
        """Raises `Stopped` if the run should stop.

        Raises:
            Stopped: with the exit code that the signal stands for.
        """
        if self._signum is not None:
            raise Stopped(self._signum)

"""Stop on request: SIGTERM and SIGINT set a flag, and the training loop saves at the next step (the
same step in all processes).
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_REPEATED = 1.0
"""Equal signals within this many seconds are one request: `timeout` and job managers signal both a
process and its group.
"""


NOTHING_NEW = "stopped on request; there was nothing new to save, the same command resumes the run"
_JUST_OVER = 0.5


def exit_code(signum: int) -> int:
    """Return the exit code of a command stopped by a signal."""
    return 128 + signum


@contextmanager
def listen_while_waiting(
    seconds: float, late: Callable[[], None], stop: Callable[[int], None]
) -> Generator[None]:
    """Handle signals in a thread while this thread waits in native code, where Python's handlers do
    not run.

    Args:
        seconds: timeout of the wait.
        late: called on timeout.
        stop: called with the number of a SIGTERM or SIGINT; a signal at the end of the wait is left
            to the normal handlers.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    over, first = threading.Event(), threading.current_thread() is threading.main_thread()
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False) if first else -1

    def listen() -> None:
        end = time.monotonic() + seconds
        while True:
            ready = select.select([reader], [], [], max(0.0, end - time.monotonic()))[0]
            if over.is_set():
                return None
            if not ready:
                return late()
            for signum in reader.recv(64):
                if signum in (signal.SIGTERM, signal.SIGINT) and not over.wait(_JUST_OVER):
                    return stop(signum)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        yield
    finally:
        over.set()
        if first:
            signal.set_wakeup_fd(before)
        writer.send(b"\0")
        listener.join()
        reader.close()
        writer.close()


class Stopped(Exception):  # noqa: N818 - not an error
    """The run was stopped on request, after saving.

    Args:
        signum: signal that requested the stop.

    Attributes:
        exit_code: exit code of the command.
        saved: whether a step was saved and logged.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = exit_code(signum)
        self.saved = False


class StopRequest:
    """Context in which SIGTERM and SIGINT request a stop; a repeated signal, at least a second
    later, acts as usual.

    In a multi-process run JAX handles SIGTERM (see `agree`): whichever process gets it, all stop at
    the same call of `raise_if_requested`, which all must call equally often.
    """

    def __init__(self) -> None:
        self._signum: int | None = None
        self._reached: Callable[[int], bool] | None = None
        self._calls = 0
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
            if self._reached is not None and self._signum is None:
                os.kill(os.getpid(), signal.SIGTERM)  # which JAX passes on to the others
            self._signum = signum
            return
        signal.signal(signum, self._before[signum])
        os.kill(os.getpid(), signum)

    def agree(self, reached: Callable[[int], bool]) -> None:
        """Make all processes stop at the same call, after JAX has installed its SIGTERM handler.

        Args:
            reached: returns whether to stop at a numbered call; it is cheap, and sees a signal of
                another process within about a second.
        """
        self._reached = reached
        if self._signum is not None:  # it arrived while the processes were connecting
            os.kill(os.getpid(), signal.SIGTERM)

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self._signum is not None

    def raise_if_requested(self) -> None:
        """Raise `Stopped` if the run should stop; all processes must call it equally often.

        Raises:
            Stopped: with the exit code of the signal.
        """
        if self._reached is not None:
            self._calls += 1
            if self._reached(self._calls):
                raise Stopped(signal.SIGTERM if self._signum is None else self._signum)
        elif self._signum is not None:
            raise Stopped(self._signum)

    def raise_while_waiting(self) -> None:
        """Raise `Stopped` during a wait, in a single-process run only, since other processes may
        not be waiting.

        Raises:
            Stopped: as above.
        """
        if self._reached is None:
            self.raise_if_requested()

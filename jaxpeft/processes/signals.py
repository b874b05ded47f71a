"""Stopping on request: SIGTERM and SIGINT set a flag, and the loop saves at the next step; of
several processes, all at the same.
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
"""Signals of one kind that come within so many seconds are one request: `timeout` and job managers
send theirs to a process and to its group, which it is in.
"""


NOTHING_NEW = "stopped on request; there was nothing new to save, the same command resumes the run"
_JUST_OVER = 0.5


def exit_code(signum: int) -> int:
    """Return what a command ends with that a signal has stopped."""
    return 128 + signum


@contextmanager
def listen_while_waiting(
    seconds: float, late: Callable[[], None], stop: Callable[[int], None]
) -> Generator[None]:
    """Let a thread hear signals while this one waits in code that is not Python's, which no handler
    interrupts.

    Args:
        seconds: that the waiting may take.
        late: is called when it has taken longer.
        stop: is called with the number of a SIGTERM or SIGINT; one that comes as the waiting ends
            is left to the handlers.
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
    """The run was asked to stop, and has saved what it did.

    Args:
        signum: the signal.

    Attributes:
        exit_code: what the command ends with.
        saved: whether a step was saved for it, and said.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = exit_code(signum)
        self.saved = False


class StopRequest:
    """A context in which SIGTERM and SIGINT are noted; a second one of the same kind, a second or
    more later, acts as usual.

    Among several processes SIGTERM is JAX's to notice (`agree`): whichever gets it, all stop at the
    same call of `raise_if_requested`, which they make equally often.
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
                os.kill(os.getpid(), signal.SIGTERM)  # which JAX tells the others
            self._signum = signum
            return
        signal.signal(signum, self._before[signum])
        os.kill(os.getpid(), signum)

    def agree(self, reached: Callable[[int], bool]) -> None:
        """Let all processes of a run stop at the same call, once JAX has its own handler of
        SIGTERM.

        Args:
            reached: says whether a numbered call is the one; it costs a look at a variable, and
                hears of a signal of another process within about a second.
        """
        self._reached = reached
        if self._signum is not None:  # it came while the processes were joining
            os.kill(os.getpid(), signal.SIGTERM)

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self._signum is not None

    def raise_if_requested(self) -> None:
        """Raise `Stopped` if the run should stop; called where all processes come by equally often.

        Raises:
            Stopped: with the exit code that the signal stands for.
        """
        if self._reached is not None:
            self._calls += 1
            if self._reached(self._calls):
                raise Stopped(signal.SIGTERM if self._signum is None else self._signum)
        elif self._signum is not None:
            raise Stopped(self._signum)

    def raise_while_waiting(self) -> None:
        """Raise `Stopped` while something is waited for; not among several processes, of which the
        others may not wait.

        Raises:
            Stopped: as above.
        """
        if self._reached is None:
            self.raise_if_requested()

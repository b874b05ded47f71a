"""Items made ahead: their order, what goes wrong in a thread or a worker process, and that nothing
is left behind.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxpeft.data.batches.prefetch import AHEAD, prefetch
from jaxpeft.errors import DataError, WorkerError
from tests.conftest import ROOT
from tests.data.sources import Fails

ENDED = (
    "^data.workers: a worker process ended with exit code 9; set data.workers=0 to see the cause$"
)
KILLED = (
    r"ended with exit code -9 \(killed, possibly because the system is out of memory\); set"
    r" data.workers=0"
)
HANGS = (
    "from the worker processes for 5 s; increase data.worker_timeout, reduce data.buffer_rows, or set"
    " data.workers=0"
)
PROGRAM = """
from jaxpeft.data.batches.prefetch import prefetch
from tests.data.sources import Fails
import multiprocessing, os, signal, time

items = prefetch(Fails(size=10_000_000), 1)
next(items)
print(multiprocessing.active_children()[0].pid, flush=True)
if {killed}:
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def nothing_is_left(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """No process, no thread, and no word of a dying process on the terminal."""
    yield
    assert multiprocessing.active_children() == []
    assert "data" not in [thread.name for thread in threading.enumerate()]
    assert capfd.readouterr().err == ""


def taken(source: Fails, workers: int, timeout: float = 60.0) -> Iterator[int]:
    return (number for number, _ in prefetch(source, workers, timeout=timeout))


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("length", [0, 5])
@pytest.mark.representatives("*-0", "5-2")
def test_items_come_in_their_order(workers: int, length: int) -> None:
    assert list(taken(Fails(length=length), workers)) == [i * i for i in range(length)]


def test_the_next_items_are_made_while_one_is_used() -> None:
    made: list[int] = []

    class Noting(Fails):
        def __getitem__(self, i: int) -> tuple[int, bytes]:
            made.append(i)
            return super().__getitem__(i)

    items = prefetch(Noting(length=99))
    next(items)
    until = time.monotonic() + 5
    while len(made) < 1 + AHEAD and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.05)
    assert made == list(range(1 + AHEAD))
    items.close()
    assert made == list(range(1 + AHEAD)), "the thread went on behind the end"


@pytest.mark.parametrize(
    ("how", "workers", "kind", "text"),
    [
        ("told", 0, DataError, "^rows.jsonl:3:1: broken; fix it\nrows.jsonl:4:1: broken; fix it$"),
        ("told", 2, DataError, "^rows.jsonl:3:1: broken; fix it\nrows.jsonl:4:1: broken; fix it$"),
        ("other", 0, FileNotFoundError, r"^\[Errno 2\] gone: 'rows.jsonl'$"),
        ("other", 2, FileNotFoundError, r"^\[Errno 2\] gone: 'rows.jsonl'$"),
        ("timeout", 0, TimeoutError, "^the disk is slow$"),
        ("timeout", 1, TimeoutError, "^the disk is slow$"),
        ("exits", 2, WorkerError, ENDED),
        ("killed", 1, WorkerError, KILLED),
        ("hangs", 2, WorkerError, HANGS),
    ],
)
@pytest.mark.representatives("other-0-*", "timeout-1-*")
def test_what_goes_wrong_is_told_behind_the_items_before_it(
    how: str, workers: int, kind: type[Exception], text: str
) -> None:
    seen: list[int] = []
    with pytest.raises(kind) as caught:
        seen.extend(taken(Fails(how), workers, timeout=5 if how == "hangs" else 60))
    assert re.search(text, str(caught.value))
    assert seen == [0, 1, 4]
    if workers and kind is not WorkerError:
        assert "sources.py" in caught.value.__notes__[0], "the worker's own traceback"
    if isinstance(caught.value, DataError):
        assert len(caught.value.problems) == 2


def test_a_worker_that_is_killed_halfway_through_an_item_is_told() -> None:
    items = prefetch(Fails(size=10_000_000, length=99), 1, timeout=30)
    next(items)
    time.sleep(0.5)  # by now the next items fill the pipe, and one of them is written in part
    (process,) = multiprocessing.active_children()
    os.kill(process.pid or 0, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(WorkerError, match=KILLED):
        list(items)
    assert time.monotonic() - began < 10


def test_closing_early_ends_the_workers_at_once() -> None:
    items = prefetch(Fails("hangs", size=10_000_000, length=99), 2)
    next(items)
    began = time.monotonic()
    items.close()
    assert time.monotonic() - began < 10, "the workers hang for a minute"
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("at", [0, 1], ids=["while the processes start", "later"])
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.representatives("0-*", "1-while*")
def test_waiting_may_raise_to_stop(workers: int, at: int) -> None:
    free = threading.Event()

    class Waits(Fails):
        def __getitem__(self, i: int) -> tuple[int, bytes]:
            if i == at:
                free.wait(60)
            return super().__getitem__(i)

    def waiting() -> None:
        if len(seen) == at:
            free.set()
            raise KeyboardInterrupt("stop")

    seen: list[int] = []
    source = Fails("hangs", at=at) if workers else Waits()
    with pytest.raises(KeyboardInterrupt, match="stop"):
        seen.extend(number for number, _ in prefetch(source, workers, waiting=waiting))
    assert seen == [0][:at]


def test_a_thread_that_hangs_does_not_keep_its_owner() -> None:
    free = threading.Event()

    class Waits(Fails):
        def __getitem__(self, i: int) -> tuple[int, bytes]:
            free.wait(60)
            return super().__getitem__(i)

    def waiting() -> None:
        raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        next(prefetch(Waits(), waiting=waiting))
    assert time.monotonic() - began < 5
    free.set()
    for thread in [thread for thread in threading.enumerate() if thread.name == "data"]:
        thread.join(10)


@pytest.mark.parametrize("killed", [False, True], ids=["ends", "is killed"])
@pytest.mark.representatives("ends")
def test_a_program_that_ends_with_items_open_takes_its_workers_with_it(killed: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(killed=killed)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (-signal.SIGKILL if killed else 0, "")
    worker, until = Path(f"/proc/{int(done.stdout)}/stat"), time.monotonic() + 10
    while worker.exists() and worker.read_text().split()[2] != "Z" and time.monotonic() < until:
        time.sleep(0.05)
    assert not worker.exists() or worker.read_text().split()[2] == "Z"

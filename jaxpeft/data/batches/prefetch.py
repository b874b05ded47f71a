"""Items of a Grain dataset, made ahead of their use, in their order, by a thread or by worker
processes.

Grain says which items there are and which of them a worker makes. The processes are ours: Grain
0.2.18's own leave a thread and a block of shared memory behind at every end, take 25 s to close
where items are large, and a reader of half an item, whose writer was killed, waits forever.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import Empty, Queue
from typing import Any, Generic, Protocol, TypeVar, cast

from jaxpeft.errors import WorkerError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
_END: Any = object()
_POLL = 0.2
_GRACE = 2.0
_KILLED = " (killed, as a system does that is out of memory)"
_LOOK = "set data.workers=0 to see what happens"
AHEAD = 2


class Items(Protocol[T_co]):
    """Anything with numbered items."""

    def __len__(self) -> int:
        """Return how many items there are."""
        ...

    def __getitem__(self, i: int) -> T_co:
        """Make an item; the same one each time."""
        ...


def prefetch(
    source: Items[T],
    workers: int = 0,
    *,
    timeout: float = 60.0,
    waiting: Callable[[], None] = lambda: None,
) -> Generator[T]:
    """Yield the items of a source in order; the next ones are made while one is used.

    Args:
        source: of the items; with workers it is sent to each of them, and item `i` is made by
            worker `i % workers`.
        workers: how many processes make items; 0 for a thread of this one, which may still make one
            when this is closed.
        timeout: seconds that an item may take, once the workers have given the first.
        waiting: called several times a second while an item is waited for; may raise to stop.

    Raises:
        WorkerError: a worker has ended, or gives nothing within `timeout`.
        Exception: an item cannot be made: what the source raised.
    """
    processes = _Processes(source, workers)
    taker = _Taker(processes.items() if workers else _open(_dataset(source, 0, 1)))
    # the first item waits for the processes to start, however slow the machine
    limit = timeout + 60
    try:
        while True:
            future, began = taker.next(), time.monotonic()
            while not wait([future], _POLL).done:
                waiting()
                if workers and time.monotonic() - began > limit:
                    raise WorkerError(
                        f"data.workers: the worker processes have given nothing for {limit:.0f} s;"
                        f" raise data.worker_timeout, lower data.buffer_rows, or {_LOOK}"
                    )
            item, limit = future.result(), timeout
            if item is _END:
                return
            yield item
    finally:
        processes.end()
        taker.close()


class _Taker(Generic[T]):
    """A thread that takes items of a generator ahead of their use; a daemon, since a source may
    hang.
    """

    def __init__(self, items: Generator[T]) -> None:
        self._items, self._closed = items, threading.Event()
        self._futures: Queue[Future[T]] = Queue(AHEAD)
        self._thread = threading.Thread(target=self._run, daemon=True, name="data")
        self._thread.start()

    def next(self) -> Future[T]:
        """Return the next item, or `_END`, made or not."""
        return self._futures.get()

    def close(self) -> None:
        """End the thread, if it does so in time."""
        self._closed.set()
        try:
            while True:
                self._futures.get_nowait()
        except Empty:
            self._thread.join(_GRACE)

    def _run(self) -> None:
        while True:
            future = Future[T]()
            self._futures.put(future)
            if self._closed.is_set():
                return self._items.close()
            try:
                future.set_result(next(self._items, _END))
            except BaseException as error:  # noqa: BLE001 - raised where the item is asked for
                future.set_exception(error)


@dataclass(frozen=True)
class _Sealed(Generic[T]):
    """An item, or what was raised instead of it."""

    item: T | None = None
    error: Exception | None = None


@dataclass(frozen=True)
class _Sealing(Generic[T]):
    """The items of a source, sealed: Grain would leave out None, and write another message around
    an error.
    """

    source: Items[T]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> _Sealed[T]:
        try:
            return _Sealed(self.source[i])
        except Exception as error:  # noqa: BLE001 - raised where the item is asked for
            return _Sealed(error=error)


def _dataset(source: Items[T], first: int, step: int) -> Iterator[_Sealed[T]]:
    """Iterate over every `step`-th item from the first on."""
    # here, not at the top: whoever only reads rows need not wait for it
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():
        # Grain reads flags of its own, and jaxpeft's commands keep theirs to themselves
        flags.FLAGS.mark_as_parsed()
    items = grain.MapDataset.source(cast(Any, _Sealing(source)))[first::step]
    return iter(items.to_iter_dataset(grain.ReadOptions(num_threads=0)))


def _open(items: Iterable[_Sealed[T]]) -> Generator[T]:
    for sealed in items:
        if sealed.error is not None:
            raise sealed.error
        yield cast(T, sealed.item)


class _Processes(Generic[T]):
    """Worker processes, each of which makes every n-th item of a source.

    Each writes to a pipe of its own, whose other end nothing else holds: its death ends the pipe,
    half a message or not.
    """

    def __init__(self, source: Items[T], n: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._source = source
        self._pipes: list[tuple[Connection, Connection]] = [
            context.Pipe(duplex=False) for _ in range(n)
        ]
        self._all = [
            context.Process(target=_work, args=(source, i, n, pipe), daemon=True)
            for i, (_, pipe) in enumerate(self._pipes)
        ]

    def items(self) -> Generator[T]:
        """Start them and yields what they make.

        Raises:
            WorkerError: one has ended.
        """
        try:
            self._start()
            yield from _open(self._receive(i % len(self._all)) for i in range(len(self._source)))
        finally:
            self.end()

    def end(self) -> None:
        """Kill those that have not ended by themselves: they hold nothing that could be lost."""
        for process in self._all:
            if process.pid is not None:
                process.kill()
                process.join(_GRACE)
        atexit.unregister(self.end)

    def _start(self) -> None:
        try:
            with ThreadPoolExecutor(len(self._all)) as pool:
                list(pool.map(lambda process: process.start(), self._all))
        except OSError as error:
            raise WorkerError(
                f"data.workers: a worker process cannot be started ({error}); {_LOOK}"
            ) from error
        atexit.register(self.end)  # before multiprocessing's own, which waits for them
        for _, theirs in self._pipes:
            theirs.close()

    def _receive(self, number: int) -> _Sealed[T]:
        try:
            return self._pipes[number][0].recv()
        except (EOFError, OSError):
            process = self._all[number]
            process.join(_GRACE)
            code = process.exitcode
            killed = _KILLED if code == -signal.SIGKILL else ""
            raise WorkerError(
                f"data.workers: a worker process ended with exit code {code}{killed}; {_LOOK}"
            ) from None


def _work(source: Items[Any], first: int, step: int, pipe: Connection) -> None:
    """Make items in a worker process; signals are left to the main process, without which the pipe
    breaks.
    """
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    try:
        for sealed in _dataset(source, first, step):
            if sealed.error is not None:
                told = "".join(traceback.format_exception(sealed.error))
                sealed.error.add_note(f"in a worker process:\n{told}")
            pipe.send(sealed)
    except BrokenPipeError:
        return

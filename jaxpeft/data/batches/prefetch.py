"""Prefetch the items of a Grain dataset in order, with a thread or worker processes.

Grain distributes the items over the workers. The processes are managed here: those of Grain 0.2.18
leak a thread and a block of shared memory, take 25 s to close if items are large, and hang if a
worker is killed while it sends an item.
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
_KILLED = " (killed, possibly because the system is out of memory)"
_DEBUG_HINT = "set data.workers=0 to see the cause"
AHEAD = 2


class Items(Protocol[T_co]):
    """Anything with numbered items."""

    def __len__(self) -> int:
        """Return the number of items."""
        ...

    def __getitem__(self, i: int) -> T_co:
        """Return item `i`; deterministic."""
        ...


def prefetch(
    source: Items[T],
    workers: int = 0,
    *,
    timeout: float = 60.0,
    waiting: Callable[[], None] = lambda: None,
) -> Generator[T]:
    """Yield the items of a source in order, and prepare the next ones in the background.

    Args:
        source: the items; with workers, each receives a copy, and worker `i % workers` builds item
            `i`.
        workers: number of worker processes; 0 for a thread, which may still be building an item
            when the generator is closed.
        timeout: maximum seconds per item, after the first one.
        waiting: called several times a second while waiting for an item; may raise to stop.

    Raises:
        WorkerError: a worker has ended, or does not return an item within `timeout`.
        Exception: the source raised it for an item.
    """
    processes = _Processes(source, workers)
    taker = _Taker(processes.items() if workers else _open(_dataset(source, 0, 1)))
    # allow extra time for the processes to start
    limit = timeout + 60
    try:
        while True:
            future, began = taker.next(), time.monotonic()
            while not wait([future], _POLL).done:
                waiting()
                if workers and time.monotonic() - began > limit:
                    raise WorkerError(
                        f"data.workers: no item from the worker processes for {limit:.0f} s;"
                        f" increase data.worker_timeout, reduce data.buffer_rows, or {_DEBUG_HINT}"
                    )
            item, limit = future.result(), timeout
            if item is _END:
                return
            yield item
    finally:
        processes.end()
        taker.close()


class _Taker(Generic[T]):
    """A thread that prefetches items of a generator; a daemon, since a source may hang."""

    def __init__(self, items: Generator[T]) -> None:
        self._items, self._closed = items, threading.Event()
        self._futures: Queue[Future[T]] = Queue(AHEAD)
        self._thread = threading.Thread(target=self._run, daemon=True, name="data")
        self._thread.start()

    def next(self) -> Future[T]:
        """Return the future of the next item, or of `_END`."""
        return self._futures.get()

    def close(self) -> None:
        """Stop the thread, and wait for it briefly."""
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
class _Result(Generic[T]):
    """An item, or the error raised instead."""

    item: T | None = None
    error: Exception | None = None


@dataclass(frozen=True)
class _Results(Generic[T]):
    """The items of a source as `_Result`s: Grain would skip None and change error messages."""

    source: Items[T]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> _Result[T]:
        try:
            return _Result(self.source[i])
        except Exception as error:  # noqa: BLE001 - raised where the item is asked for
            return _Result(error=error)


def _dataset(source: Items[T], first: int, step: int) -> Iterator[_Result[T]]:
    """Iterate over every `step`-th item from the first on."""
    # import here, since reading rows does not need it
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():
        # Grain reads absl flags, which jaxpeft's commands do not parse
        flags.FLAGS.mark_as_parsed()
    items = grain.MapDataset.source(cast(Any, _Results(source)))[first::step]
    return iter(items.to_iter_dataset(grain.ReadOptions(num_threads=0)))


def _open(items: Iterable[_Result[T]]) -> Generator[T]:
    for result in items:
        if result.error is not None:
            raise result.error
        yield cast(T, result.item)


class _Processes(Generic[T]):
    """Worker processes, each of which builds every n-th item of a source.

    Each worker has the only write end of its pipe, so the pipe closes when the worker dies, even in
    the middle of a message.
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
        """Start the workers and yield their items.

        Raises:
            WorkerError: a worker has ended.
        """
        try:
            self._start()
            yield from _open(self._receive(i % len(self._all)) for i in range(len(self._source)))
        finally:
            self.end()

    def end(self) -> None:
        """Kill the workers that are still running: they have no state to lose."""
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
                f"data.workers: a worker process cannot be started ({error}); {_DEBUG_HINT}"
            ) from error
        atexit.register(self.end)  # runs before multiprocessing's handler, which would wait
        for _, writer in self._pipes:
            writer.close()

    def _receive(self, number: int) -> _Result[T]:
        try:
            return self._pipes[number][0].recv()
        except (EOFError, OSError):
            process = self._all[number]
            process.join(_GRACE)
            code = process.exitcode
            killed = _KILLED if code == -signal.SIGKILL else ""
            raise WorkerError(
                f"data.workers: a worker process ended with exit code {code}{killed}; {_DEBUG_HINT}"
            ) from None


def _work(source: Items[Any], first: int, step: int, pipe: Connection) -> None:
    """Build items in a worker process; it ignores signals, and ends when the pipe breaks."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    try:
        for result in _dataset(source, first, step):
            if result.error is not None:
                text = "".join(traceback.format_exception(result.error))
                result.error.add_note(f"in a worker process:\n{text}")
            pipe.send(result)
    except BrokenPipeError:
        return

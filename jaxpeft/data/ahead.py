"""Items made ahead of their use, in their order, by a thread or by worker processes of Grain."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, cast

from jaxpeft.errors import JaxpeftError, WorkerError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
_END = object()
_POLL = 0.2
_KILLED = " (killed, as a system does that is out of memory)"
AHEAD = 2


class Source(Protocol[T_co]):
    """Anything with numbered items."""

    def __len__(self) -> int:
        """Gives how many items there are."""
        ...

    def __getitem__(self, i: int) -> T_co:
        """Makes an item; the same one each time."""
        ...


@dataclass(frozen=True)
class _Sealed(Generic[T]):
    """An item that Grain passes on as it is: what it does not know as an array it does not put into shared memory."""

    item: T


@dataclass(frozen=True)
class _Sealing(Generic[T]):
    source: Source[T]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> _Sealed[T | JaxpeftError]:
        try:
            return _Sealed(self.source[i])
        except JaxpeftError as error:
            # passed on whole: Grain would write another message around it
            return _Sealed(error)


def ahead(
    source: Source[T], workers: int = 0, *, timeout: float = 60.0, waiting: Callable[[], None] = lambda: None
) -> Generator[T]:
    """Yields the items of a source in order; the next ones are made while one is used.

    Args:
        source: of the items; with workers it is sent to each of them, and item `i` is made by worker `i % workers`.
        workers: how many processes make items; 0 for a thread of this one.
        timeout: seconds that an item may take, once the workers have given the first.
        waiting: called several times a second while an item is waited for; may raise to stop.

    Raises:
        WorkerError: a worker has ended, or gives nothing within `timeout`.
        JaxpeftError: an item cannot be made.
    """
    others = set(multiprocessing.active_children())
    iterator = _iterator(source, workers)
    pool = ThreadPoolExecutor(1, thread_name_prefix="data")
    stuck = False
    try:
        began = False
        while True:
            future = pool.submit(next, iterator, _END)
            stuck = True
            # the first item waits for the processes to start, however slow the machine
            sealed = _wait(future, timeout if began or not workers else timeout + 60, workers, waiting)
            stuck, began = False, True
            if sealed is _END:
                return
            item = cast(_Sealed[T], sealed).item
            if isinstance(item, JaxpeftError):
                raise item
            yield item
    finally:
        if stuck:
            # one that hangs would not end by itself
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
        pool.shutdown(wait=True)
        iterator.close()


def _iterator(source: Source[T], workers: int) -> Any:
    # here, not at the top: whoever only reads rows need not wait for it
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads a flag of its own, and jaxpeft's commands keep theirs to themselves
    items = grain.MapDataset.source(cast(Any, _Sealing(source)))
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)
    made = items.to_iter_dataset(options)
    if workers:
        processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=AHEAD)
        made = made.mp_prefetch(processes, worker_init_fn=_begin)
    return iter(made)


def _begin(number: int, of: int) -> None:
    """Leaves signals to the main process, which ends its workers itself."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)


def _wait(future: Future[Any], timeout: float, workers: int, waiting: Callable[[], None]) -> Any:
    began = time.monotonic()
    while True:
        try:
            return future.result(_POLL)
        except NotYet:
            waiting()
            if workers and time.monotonic() - began > timeout:
                raise WorkerError(
                    f"data.workers: the worker processes have given nothing for {timeout:.0f} s; raise data.worker_timeout, "
                    "lower data.buffer_rows, or set data.workers=0 to see what happens"
                ) from None
        except RuntimeError as error:
            if "exit code" not in str(error):
                raise
            code = str(error).partition("exit code ")[2].partition(".")[0]
            raise WorkerError(
                f"data.workers: a worker process ended with exit code {code}{_KILLED if code == '-9' else ''}; set data.workers=0 "
                "to see what happens"
            ) from error

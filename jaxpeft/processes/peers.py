"""Barriers, broadcasts and comparisons between processes, by JAX's coordination service.

No computation on devices is involved: a value or barrier costs one call to the coordinator, well
under a millisecond.
"""

from __future__ import annotations

import itertools
import json
import platform
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import jax

from jaxpeft.core import paths
from jaxpeft.errors import ConfigError, PeersError

T = TypeVar("T")
SEEN = 30.0
"""Maximum delay, in seconds, until a host sees a file on a shared filesystem."""
_POLL = 0.2
_SHOWN = 5


@dataclass(frozen=True)
class Peers:
    """The processes of a run; all must call the same methods in the same order.

    Attributes:
        process: index of this process.
        processes: number of processes.
        timeout: seconds to wait for the others.
        client: client of JAX's coordination service; None in a single-process run.
        numbers: counter of the calls.
    """

    process: int = 0
    processes: int = 1
    timeout: int = 600
    client: Any = None
    numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def first(self) -> bool:
        """Whether this is process 0, which logs and writes."""
        return self.process == 0

    @property
    def many(self) -> bool:
        """Whether there are several processes."""
        return self.processes > 1

    def wait(self, what: str) -> None:
        """Wait until all processes have called this (a barrier).

        Args:
            what: name of the barrier, for messages.

        Raises:
            PeersError: a process did not arrive in time.
        """
        if not self.many:
            return
        try:
            self.client.wait_at_barrier(self._key(what), self.timeout * 1000)
        except jax.errors.JaxRuntimeError as error:
            raise self._lost(what, error) from None

    def agree(self, what: str, make: Callable[[], T]) -> T:
        """Broadcast a value from process 0 to all processes.

        Args:
            what: name of the value, for messages.
            make: returns a plain JSON value; called in process 0 only.

        Raises:
            PeersError: process 0 did not provide it in time.
        """
        if not self.many:
            return make()
        key = self._key(what)
        if self.first:
            value = make()
            self.client.key_value_set(key, json.dumps(value))
            return value
        try:
            return json.loads(self.client.blocking_key_value_get(key, self.timeout * 1000))
        except jax.errors.JaxRuntimeError as error:
            raise self._lost(what, error) from None

    def all_gather(self, what: str, value: T) -> list[T]:
        """Gather the values of all processes, in order.

        Args:
            what: name of the value, for messages.
            value: value of this process, a plain JSON value.

        Raises:
            PeersError: a process did not provide it in time.
        """
        if not self.many:
            return [value]
        key = self._key(what)
        self.client.key_value_set(f"{key}/{self.process}", json.dumps(value))
        try:
            found = [
                self.client.blocking_key_value_get(f"{key}/{i}", self.timeout * 1000)
                for i in range(self.processes)
            ]
        except jax.errors.JaxRuntimeError as error:
            raise self._lost(what, error) from None
        return [json.loads(text) for text in found]

    def same(self, what: str, values: Mapping[str, Any]) -> None:
        """Check that values equal those of process 0.

        Args:
            what: name of the values, for messages.
            values: nested plain JSON values.

        Raises:
            ConfigError: lists values that differ, up to a limit.
        """
        if not self.many:
            return
        plain = json.loads(json.dumps(values))  # tuples become lists, as in the other processes
        theirs, mine = paths.flatten(self.agree(what, lambda: plain)), paths.flatten(plain)
        names = [name for name in {**theirs, **mine} if theirs.get(name) != mine.get(name)]
        if names:
            rows = [
                f"\n  {name}: {mine.get(name)!r} here, {theirs.get(name)!r} in process 0"
                for name in names[:_SHOWN]
            ]
            rows += [f"\n  and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
            raise ConfigError(
                f"process {self.process} on {platform.node()} has a different {what} than process"
                f" 0; start all processes with the same command, files and versions:{''.join(rows)}"
            )
        self.wait(f"the same {what}")

    def require_shared(self, folder: Path) -> None:
        """Check that a folder is shared by all processes.

        Args:
            folder: folder that process 0 can write.

        Raises:
            ConfigError: a file written by process 0 is not visible here.
        """
        if not self.many:
            return
        mark = folder / f".peers-{self.agree('a mark', lambda: secrets.token_hex(8))}"
        if self.first:
            mark.touch()
        self.wait("a mark in the folder of the run")
        if not wait_until_seen(mark):
            raise ConfigError(
                f"--workdir {folder}: is not shared: process {self.process} on {platform.node()}"
                f" does not see a file of process 0 after {SEEN:.0f} s; give a folder that all"
                " hosts share"
            )
        self.wait("a check of the folder of the run")
        if self.first:
            mark.unlink(missing_ok=True)

    def _key(self, what: str) -> str:
        return f"jaxpeft/{next(self.numbers)}/{what.replace(' ', '_')}"

    def _lost(self, what: str, error: Exception) -> PeersError:
        late = "DEADLINE_EXCEEDED" in str(error)
        why = (
            f"not all arrived within {self.timeout} s (JAXPEFT_BARRIER_TIMEOUT)"
            if late
            else _short(error)
        )
        who = f"process {self.process} of {self.processes} waited for the others at {what!r}"
        named = (
            f"; missing: process {', '.join(_find_missing(error))}"
            if late and _find_missing(error)
            else ""
        )
        return PeersError(f"{who}: {why}{named}; check their logs, and start all processes again")


ALONE = Peers()


def wait_until_seen(path: Path) -> bool:
    """Wait until a file that another host has written is visible; return whether it is."""
    end = time.monotonic() + SEEN
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(_POLL)
    return True


def _find_missing(error: Exception) -> list[str]:
    """Return the processes missing at a barrier, which JAX's message lists one per line."""
    return [line.strip() for line in str(error).splitlines() if line.strip().isdecimal()]


def _short(error: Exception) -> str:
    return str(error).splitlines()[0][:200]

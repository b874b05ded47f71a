"""The processes of a run, of which this is one: what they wait for, agree on and compare, by JAX's
coordination service.

Nothing here computes on a device: a value or a barrier costs one call to the coordinator, well
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
"""Seconds that a host's view of a shared folder may be behind."""
_POLL = 0.2
_SHOWN = 5


@dataclass(frozen=True)
class Peers:
    """The processes of a run. All of them call the same methods in the same order.

    Attributes:
        process: the number of this one.
        processes: how many there are.
        timeout: seconds that the others are waited for.
        client: of JAX's coordination service; None for a process by itself.
        numbers: of the calls.
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
        """Whether there are others."""
        return self.processes > 1

    def wait(self, what: str) -> None:
        """Wait until all processes are here.

        Args:
            what: they come to, for a message.

        Raises:
            PeersError: one has not come in time.
        """
        if not self.many:
            return
        try:
            self.client.wait_at_barrier(self._key(what), self.timeout * 1000)
        except jax.errors.JaxRuntimeError as error:
            raise self._lost(what, error) from None

    def agree(self, what: str, make: Callable[[], T]) -> T:
        """Return what process 0 makes, to all processes.

        Args:
            what: it is, for a message.
            make: gives a plain JSON value; called in process 0 alone.

        Raises:
            PeersError: process 0 has not made it in time.
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
        """Return what each process has, to all of them, in their order.

        Args:
            what: it is, for a message.
            value: of this process, a plain JSON value.

        Raises:
            PeersError: one has not come in time.
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
        """Refuse values that differ from those of process 0.

        Args:
            what: they are.
            values: nested plain JSON values.

        Raises:
            ConfigError: naming each that differs, up to a few.
        """
        if not self.many:
            return
        plain = json.loads(json.dumps(values))  # as the others get it, tuples as lists
        theirs, mine = paths.flatten(self.agree(what, lambda: plain)), paths.flatten(plain)
        names = [name for name in {**theirs, **mine} if theirs.get(name) != mine.get(name)]
        if names:
            rows = [
                f"\n  {name}: {mine.get(name)!r} here, {theirs.get(name)!r} there"
                for name in names[:_SHOWN]
            ]
            rows += [f"\n  and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
            raise ConfigError(
                f"process {self.process} on {platform.node()} has another {what} than process 0;"
                f" start all of them with the same command, files and versions:{''.join(rows)}"
            )
        self.wait(f"the same {what}")

    def require_shared(self, folder: Path) -> None:
        """Refuse a folder that is not one and the same for all processes.

        Args:
            folder: that process 0 can write.

        Raises:
            ConfigError: what process 0 writes there is not seen here.
        """
        if not self.many:
            return
        mark = folder / f".peers-{self.agree('a mark', lambda: secrets.token_hex(8))}"
        if self.first:
            mark.touch()
        self.wait("a mark in the folder of the run")
        if not wait_until_seen(mark):
            raise ConfigError(
                f"--workdir {folder}: is not the same folder for process {self.process} on"
                f" {platform.node()} as for process 0: a file written there is not seen after"
                f" {SEEN:.0f} s; give a folder that all hosts share"
            )
        self.wait("a check of the folder of the run")
        if self.first:
            mark.unlink(missing_ok=True)

    def _key(self, what: str) -> str:
        return f"jaxpeft/{next(self.numbers)}/{what.replace(' ', '_')}"

    def _lost(self, what: str, error: Exception) -> PeersError:
        late = "DEADLINE_EXCEEDED" in str(error)
        why = (
            f"not all of them arrived within {self.timeout} s (JAXPEFT_BARRIER_TIMEOUT)"
            if late
            else _short(error)
        )
        who = f"process {self.process} of {self.processes} waited for the others at {what!r}"
        named = (
            f"; missing: process {', '.join(_find_missing(error))}"
            if late and _find_missing(error)
            else ""
        )
        return PeersError(f"{who}: {why}{named}; look at their logs, and start all of them again")


ALONE = Peers()


def wait_until_seen(path: Path) -> bool:
    """Return whether a file that another host has written is seen here, after a while if need
    be.
    """
    end = time.monotonic() + SEEN
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(_POLL)
    return True


def _find_missing(error: Exception) -> list[str]:
    """Return the processes that a barrier has waited for in vain: they stand alone on lines of what
    JAX says.
    """
    return [line.strip() for line in str(error).splitlines() if line.strip().isdecimal()]


def _short(error: Exception) -> str:
    return str(error).splitlines()[0][:200]

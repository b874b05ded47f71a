"""A run of several processes on this machine: each forked from the fault tests' server, with
devices of its own.

What a process is given beside its arguments is a `Member`: a fault (see `entry`), a pause before
each step, so that a step is still to come when a signal has been heard of everywhere, and a view of
the checkpoints that is behind.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.conftest import PROGRAMS, Done, Job, _context, run

HEARTBEAT = 10
"""Seconds of the runs that lose a process. Others wait as long as users' do: a busy machine is no
dead process.
"""


@dataclass(frozen=True)
class Member:
    """What is special about one process.

    Attributes:
        fault: at a named point, see `entry`.
        pause: seconds before each step.
        hidden: a checkpoint that is not seen.
        hidden_for: seconds that it is not, from the first look on.
        arguments: more of them.
        workdir: another folder than the others'.
    """

    fault: str | None = None
    pause: float = 0.0
    hidden: int | None = None
    hidden_for: float = 1e9
    arguments: tuple[str, ...] = ()
    workdir: Path | None = None


@dataclass(frozen=True)
class Team:
    """A job in several processes.

    Attributes:
        job: what each of them runs.
        processes: how many.
        devices: of each.
        heartbeat: seconds without a sign of life until a process counts as dead.
    """

    job: Job
    processes: int
    devices: int = 2
    heartbeat: int = 100

    def __call__(
        self, *arguments: str, members: Mapping[int, Member] | None = None, pause: float = 0.0
    ) -> list[Done]:
        """Run it to the end; return how each process has ended."""
        said = [
            self.job.config.parent / f"said-{os.getpid()}-{i}.txt" for i in range(self.processes)
        ]
        port, started = free_port(), []
        began = time.perf_counter()
        for i in reversed(range(self.processes)):
            member = (members or {}).get(i, Member(pause=pause))
            given = [
                "--config",
                str(self.job.config),
                "--workdir",
                str(member.workdir or self.job.workdir),
                "--coordinator",
                f"127.0.0.1:{port}",
                "--processes",
                str(self.processes),
                "--process",
                str(i),
                "--heartbeat-timeout",
                str(self.heartbeat),
                *arguments,
                *member.arguments,
            ]
            told = said[i], PROGRAMS, self.batches(i)
            process = _context().Process(
                target=take_part, args=(given, member, self.devices, *told)
            )
            process.start()
            started.append(process)
        ended: dict[int, tuple[int, float]] = {}
        while len(ended) < self.processes:
            assert time.perf_counter() - began < 600, [path.read_text() for path in said]
            for i, process in enumerate(reversed(started)):
                if i not in ended and process.exitcode is not None:
                    ended[i] = process.exitcode, time.perf_counter()
            time.sleep(0.05)
        # from the first that ended on: what the others took to notice
        first = min(at for _, at in ended.values())
        lines = [path.read_text() for path in said]
        return [Done(ended[i][0], lines[i], ended[i][1] - first) for i in range(self.processes)]

    def batches(self, process: int) -> Path:
        """The file in which a process notes the rows that it makes."""
        return (
            self.job.config.parent
            / f"batches-{self.job.workdir.name}-{self.processes}-{process}.jsonl"
        )

    def rows(self) -> list[list[str]]:
        """Return the hashes of the rows of each batch, over all processes."""
        parts = [
            [json.loads(line) for line in self.batches(i).read_text().splitlines()]
            for i in range(self.processes)
        ]
        # of each micro-batch one process after the other
        return [
            [row for micro in zip(*step, strict=True) for part in micro for row in part]
            for step in zip(*parts, strict=True)
        ]


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def take_part(
    arguments: list[str], member: Member, devices: int, said: Path, cache: Path, batches: Path
) -> None:
    """Run one process of a team, in a process forked for it."""
    import jax

    from jaxpeft.train import loop

    logging.getLogger().handlers.clear()  # those of what the server has imported
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    batches.write_text("")
    put_batch = loop.put_batch

    def placed(mesh: Any, batch: Mapping[str, Any], axis: int) -> Any:
        with batches.open("a") as file:
            file.write(json.dumps(hashes(batch["input_ids"])) + "\n")
        time.sleep(member.pause)
        return put_batch(mesh, batch, axis)

    loop.put_batch = placed
    if member.hidden is not None:
        hide(member.hidden, member.hidden_for)
    run(arguments, member.fault, str(said), str(cache))


def hashes(ids: Any) -> list[list[str]]:
    """Return a short hash of each row of tokens, by micro-batch."""
    micro = ids if ids.ndim == 3 else ids[None]
    return [[hashlib.sha256(row.tobytes()).hexdigest()[:12] for row in rows] for rows in micro]


def hide(step: int, seconds: float) -> None:
    """Let this process not see a checkpoint for a while, as on a host whose view of a shared folder
    is behind.
    """
    from jaxpeft.checkpoint import manager
    from jaxpeft.processes import peers

    exists, looked = Path.exists, list[float]()

    def seen(path: Path) -> bool:
        if path.parent.name != str(step):
            return exists(path)
        looked.append(time.monotonic())
        return exists(path) and looked[-1] - looked[0] > seconds

    peers.SEEN = manager.SEEN = 3.0
    Path.exists = seen  # pyright: ignore[reportAttributeAccessIssue]

"""Connect the processes of a run, and end them together.

`jax.distributed` connects them and detects lost processes; its preemption service chooses the step
at which a SIGTERM stops all of them. This module makes an error of one process end all of them at
once, with its exit code, so that the others do not wait for a timeout.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import jax

# for its client: JAX has no public barrier with a timeout
from jax._src import (
    distributed as jax_distributed,
)

from jaxpeft import logs
from jaxpeft.errors import ConfigError, PeersError, printable
from jaxpeft.processes import clusters, signals
from jaxpeft.processes.clusters import Place, Waits
from jaxpeft.processes.exit_codes import run_guarded
from jaxpeft.processes.peers import ALONE, Peers

_log = logging.getLogger(__name__)
_FAILED, _ALIVE, _ENDED = "jaxpeft/failed", "jaxpeft/alive", "jaxpeft/ended"
ORDERLY = (0, 128 + 2, 128 + 15)
"""Exit codes with which all processes end together."""
_LEAVE, _LAST, _OWN_WORDS = 10, 0.5, 2.0
_BEATS = 5
_DETECTION = {"Open MPI": "ompi", "Kubernetes": "k8s"}
"""`cluster_detection_method` of `jax.distributed`, for clusters with a fixed one."""


def start(place: Place | None, waits: Waits) -> Peers:
    """Connect to the other processes of a run, before JAX is used.

    Args:
        place: place of this process; None for a single-process run, except on a TPU VM.
        waits: timeouts.

    Raises:
        ConfigError: JAX cannot find the others in this cluster.
        PeersError: they do not connect in time.
    """
    place = place or clusters.find_tpu_vm(os.environ)
    if place is None:
        return ALONE
    if place.process is not None:
        silence_other_processes(place.process, place.processes)
    if place.by == "Kubernetes" and find_spec("kubernetes") is None:
        raise ConfigError(
            f"JOB_COMPLETION_INDEX: this is pod {place.process} of an indexed job, and JAX needs"
            " the package kubernetes to find the others; run `pip install 'jax[k8s]'`, or set"
            " JAXPEFT_COORDINATOR and JAXPEFT_PROCESSES, or set JAXPEFT_DISTRIBUTED=off if each pod"
            " is a separate run"
        )
    began = time.perf_counter()
    try:
        _initialize(place, waits)
    except PeersError as error:
        if place.by != "TPU VM" or jax.process_count() > 1:
            raise
        # a notebook's single-host TPU, which has no metadata server
        _log.warning(
            "this TPU VM reports no other hosts (%s); running a single process", error.__cause__
        )
        return ALONE
    state = jax_distributed.global_state
    peers = Peers(state.process_id, state.num_processes, waits.barrier, state.client)
    silence_other_processes(peers.process, peers.processes)
    _log.info(
        "connected %d process(es) by %s at %s: %.1f s; all exit if one sends no heartbeat for %d s",
        peers.processes,
        place.by,
        state.coordinator_address,
        time.perf_counter() - began,
        waits.heartbeat,
    )
    return peers


def _initialize(place: Place, waits: Waits) -> None:
    options: dict[str, Any] = {
        "initialization_timeout": waits.start + _LEAVE,
        "heartbeat_timeout_seconds": waits.heartbeat,
    }
    if place.coordinator:
        _log.info("waiting for %s processes at %s ...", place.processes, place.coordinator)
    # if the others do not connect, JAX ends the process without a fix, and ignores signals until
    # then
    late = _join_failure(place, f"not all connected within {waits.start} s", waits)
    try:
        with signals.listen_while_waiting(waits.start, lambda: _give_up(late), _stop):
            if place.found_by_jax:
                method = _DETECTION.get(place.by)
                # an empty tuple means all GPUs; for None JAX chooses
                jax.distributed.initialize(None, None, None, place.devices or (), method, **options)
                return
            # a single process needs no port that other hosts can reach
            at = place.coordinator or f"127.0.0.1:{_free_port()}"
            options |= {} if place.coordinator else {"coordinator_bind_address": at}
            jax.distributed.initialize(
                at, place.processes, place.process, place.devices, "deactivate", **options
            )
    except (RuntimeError, ValueError, OSError) as error:
        raise PeersError(_join_failure(place, _short(error), waits)) from error


def _join_failure(place: Place, why: str, waits: Waits) -> str:
    who = (
        "" if place.process is None else f"process {place.process} of {place.processes or 'all'}: "
    )
    where = f" at {place.coordinator}" if place.coordinator else ""
    return (
        f"{who}could not connect to the others{where} ({why}; found by {place.by}); start all"
        f" processes within {waits.start} s (JAXPEFT_START_TIMEOUT), with an address of process 0"
        " that every host can reach, or set JAXPEFT_DISTRIBUTED=off to run a single process"
    )


def _give_up(why: str) -> None:
    sys.stderr.write(f"jaxpeft: {why}\n")
    sys.stderr.flush()
    os._exit(1)


def _stop(signum: int) -> None:
    _log.info(signals.NOTHING_NEW)
    sys.stderr.flush()
    os._exit(signals.exit_code(signum))


def _short(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def silence_other_processes(process: int, processes: int | None) -> None:
    """Log progress in process 0 only; the others log only warnings, with their index.

    Args:
        process: index of this process.
        processes: number of processes; None if not known yet.
    """
    if processes == 1:
        return
    if process:
        logging.getLogger("jaxpeft").setLevel(logging.WARNING)
        # step metrics are the same in all processes
        logging.getLogger("jaxpeft.train.watch").setLevel(logging.ERROR)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logs.StderrHandler):
            handler.setFormatter(
                logging.Formatter(f"[process {process}] %(message)s" if process else "%(message)s")
            )


def end_together(
    peers: Peers, waits: Waits, body: Callable[[], int], *, show_traceback: bool
) -> int:
    """Run the work of this process, so that all processes end together.

    Does not return if one of several processes has failed, since Python's normal exit would wait
    for the others.

    Args:
        peers: processes of the run.
        waits: timeouts.
        body: does the work, and returns the exit code.
        show_traceback: whether to print the traceback of an error.
    """
    if not peers.many:
        return run_guarded(body, show_traceback=show_traceback)
    watcher = _Watcher(peers, waits.heartbeat)
    watcher.start()
    try:
        code = run_guarded(body, show_traceback=show_traceback, report=watcher.report)
    except KeyboardInterrupt:  # a second interrupt: stop immediately
        code = 1
        watcher.report(
            "interrupted; start all processes again: they resume from the newest checkpoint", code
        )
    if code not in ORDERLY:
        watcher.leave(code)
    watcher.over.set()
    jax.distributed.shutdown()
    return code


@dataclass(frozen=True)
class _Watcher:
    """Ends this process when another reports an error; process 0 warns of missing heartbeats.

    Attributes:
        peers: processes of the run.
        heartbeat: seconds without a heartbeat after which JAX ends all processes.
        over: set when the work has ended normally.
    """

    peers: Peers
    heartbeat: int
    over: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Start watching, in a daemon thread."""
        threading.Thread(target=self._run, daemon=True, name="peers").start()

    def report(self, text: str, code: int) -> None:
        """Report an error of this process, also to the others; only process 0 repeats an error that
        another process has reported.
        """
        host, shown = platform.node(), True
        mine = json.dumps({"process": self.peers.process, "host": host, "code": code, "text": text})
        try:
            self.peers.client.key_value_set(_FAILED, mine)
        except jax.errors.JaxRuntimeError as error:  # another was first, or process 0 has exited
            known = self._failure() if "ALREADY_EXISTS" in str(error) else None
            shown = self.peers.first or known is None or known["text"] != text
        if shown:
            sys.stderr.write(f"{self._name(self.peers.process)}jaxpeft: {printable(text)}\n")

    def leave(self, code: int) -> None:
        """End this process now; process 0 last, since it hosts the coordination service."""
        try:
            self.peers.client.wait_at_barrier(_ENDED, _LEAVE * 1000)
        except jax.errors.JaxRuntimeError:
            _log.debug("not all processes exited within %d s", _LEAVE)
        if self.peers.first:
            time.sleep(_LAST)
        sys.stderr.flush()
        os._exit(code)

    def _run(self) -> None:
        beat, beats, warned = (
            max(1, self.heartbeat // _BEATS),
            dict[str, tuple[str, float]](),
            set[str](),
        )
        while not self.over.is_set():
            try:
                self._send_heartbeat()
                self.peers.client.blocking_key_value_get(_FAILED, beat * 1000)
                self._end_with(self._failure())
                return
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    self._exit_without_first(error)
                    return
            if self.peers.first:
                self._check_heartbeats(beats, warned)

    def _send_heartbeat(self) -> None:
        beat = json.dumps([time.time(), platform.node(), os.getpid()])
        self.peers.client.key_value_set(
            f"{_ALIVE}/{self.peers.process}", beat, allow_overwrite=True
        )

    def _failure(self) -> dict[str, Any]:
        return json.loads(
            self.peers.client.blocking_key_value_get(_FAILED, self.peers.timeout * 1000)
        )

    def _end_with(self, failure: dict[str, Any]) -> None:
        if failure["process"] == self.peers.process:
            return
        time.sleep(_OWN_WORDS)  # this process may be about to report the same error itself
        first, *more = failure["text"].splitlines()
        _log.error(
            "process %d on %s failed, all processes exit: %s%s",
            failure["process"],
            failure["host"],
            first,
            " ..." if more else "",
        )
        self.leave(failure["code"])

    def _exit_without_first(self, error: Exception) -> None:
        if self.over.wait(_LAST) or self.peers.first:
            return
        _log.error(
            "process 0 has exited (%s); check its log, and start all processes again: they resume"
            " from the newest checkpoint",
            _short(error),
        )
        sys.stderr.flush()
        os._exit(1)

    def _check_heartbeats(self, beats: dict[str, tuple[str, float]], warned: set[str]) -> None:
        """Warn of a process without heartbeats, well before JAX ends the run."""
        now = time.monotonic()
        for key, beat in self.peers.client.key_value_dir_get(_ALIVE):
            if beats.get(key, ("", 0.0))[0] != beat:
                beats[key] = (beat, now)
                warned.discard(key)
            elif now - beats[key][1] > self.heartbeat / 3 and key not in warned:
                warned.add(key)
                _, host, pid = json.loads(beat)
                _log.warning(
                    "process %s (%s, pid %d) has sent no heartbeat for %.0f s; if it has died, all"
                    " processes exit after %d s with SIGABRT (exit code 134): start them again,"
                    " they resume from the newest checkpoint",
                    key.rsplit("/", 1)[-1],
                    host,
                    pid,
                    now - beats[key][1],
                    self.heartbeat,
                )

    def _name(self, process: int) -> str:
        return f"[process {process}] " if process else ""

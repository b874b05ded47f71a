"""Joining the processes of a run, and ending them together.

JAX does the work: `jax.distributed` joins them and takes notice of a process that is gone, its
preemption service agrees on the step at which a SIGTERM stops all of them. What is added here is
that an error of one process ends all of them at once, with its exit code, instead of leaving the
others to wait until they are given up.
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
from jax._src import (
    distributed as jax_distributed,
)  # its client: JAX gives no other way to a barrier with a time-out

from jaxpeft import logs
from jaxpeft.errors import ConfigError, PeersError
from jaxpeft.processes import clusters, signals
from jaxpeft.processes.clusters import Place, Waits
from jaxpeft.processes.exit_codes import run_guarded
from jaxpeft.processes.peers import ALONE, Peers

_log = logging.getLogger(__name__)
_FAILED, _ALIVE, _ENDED = "jaxpeft/failed", "jaxpeft/alive", "jaxpeft/ended"
ORDERLY = (0, 128 + 2, 128 + 15)
"""Exit codes that all processes come to together."""
_LEAVE, _LAST, _OWN_WORDS = 10, 0.5, 2.0
_BEATS = 5
_DETECTION = {"Open MPI": "ompi", "Kubernetes": "k8s"}
"""What `jax.distributed` calls the cluster that was found, where one way to ask it holds for all of
its kind.
"""


def start(place: Place | None, waits: Waits) -> Peers:
    """Join the processes of a run, before JAX is used.

    Args:
        place: which of them this is; None for a process by itself, if this is no TPU VM.
        waits: how long is waited.

    Raises:
        ConfigError: JAX cannot find the others in this cluster.
        PeersError: they do not come in time.
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
            " JAXPEFT_COORDINATOR and JAXPEFT_PROCESSES; for pods that are runs by themselves set"
            " JAXPEFT_DISTRIBUTED=off"
        )
    began = time.perf_counter()
    try:
        _initialize(place, waits)
    except PeersError as error:
        if place.by != "TPU VM" or jax.process_count() > 1:
            raise
        # a notebook's TPU, which has no metadata to ask, and is one host
        _log.warning("this TPU VM reports no other hosts (%s): a single process", error.__cause__)
        return ALONE
    state = jax_distributed.global_state
    peers = Peers(state.process_id, state.num_processes, waits.barrier, state.client)
    silence_other_processes(peers.process, peers.processes)
    _log.info(
        "joined %d process(es) by %s at %s: %.1f s; a process without a heartbeat for %d s ends"
        " them all",
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
    # JAX ends the process where the others do not come, and does not say what to do; nor does it
    # hear a signal until then
    late = _join_failure(place, f"not all joined within {waits.start} s", waits)
    try:
        with signals.listen_while_waiting(waits.start, lambda: _give_up(late), _stop):
            if place.found_by_jax:
                method = _DETECTION.get(place.by)
                # an empty tuple stands for all GPUs; for None JAX chooses
                jax.distributed.initialize(None, None, None, place.devices or (), method, **options)
                return
            # by itself, a process needs no port that anybody else can reach
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
        f"{who}could not join the others{where} ({why}; found by {place.by}); start all of them"
        f" within {waits.start} s (JAXPEFT_START_TIMEOUT), with an address of process 0 that each"
        " host reaches, or set JAXPEFT_DISTRIBUTED=off to run one process by itself"
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
    """Let process 0 alone say what goes on; the others say warnings, with their number.

    Args:
        process: the number of this one.
        processes: how many there are; None where that is not known yet.
    """
    if processes == 1:
        return
    if process:
        logging.getLogger("jaxpeft").setLevel(logging.WARNING)
        # the figures of a step are the same everywhere
        logging.getLogger("jaxpeft.train.watch").setLevel(logging.ERROR)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logs.StderrHandler):
            handler.setFormatter(
                logging.Formatter(f"[process {process}] %(message)s" if process else "%(message)s")
            )


def end_together(
    peers: Peers, waits: Waits, body: Callable[[], int], *, show_traceback: bool
) -> int:
    """Run the work of this process, so that all of them end together.

    Does not return where one of several processes has failed: Python's own end would wait for the
    others.

    Args:
        peers: the processes.
        waits: how long is waited.
        body: gives the exit code.
        show_traceback: whether to write Python's traceback of an error.
    """
    if not peers.many:
        return run_guarded(body, show_traceback=show_traceback)
    watcher = _Watcher(peers, waits.heartbeat)
    watcher.start()
    try:
        code = run_guarded(body, show_traceback=show_traceback, tell=watcher.tell)
    except KeyboardInterrupt:  # asked a second time: what is going on is not waited for
        code = 1
        watcher.tell(
            "interrupted; start all processes again: they resume from the newest checkpoint", code
        )
    if code not in ORDERLY:
        watcher.leave(code)
    watcher.over.set()
    jax.distributed.shutdown()
    return code


@dataclass(frozen=True)
class _Watcher:
    """Learns of an error of another process and ends this one; process 0 says which of them is not
    heard of.

    Attributes:
        peers: the processes.
        heartbeat: seconds without a sign of life after which JAX ends them all.
        over: set when the work has ended as it should.
    """

    peers: Peers
    heartbeat: int
    over: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Begin to watch, in a thread that ends with the process."""
        threading.Thread(target=self._run, daemon=True, name="peers").start()

    def tell(self, text: str, code: int) -> None:
        """Report an error of this process, to the others too; what another has said already,
        process 0 alone repeats.
        """
        host, told = platform.node(), True
        mine = json.dumps({"process": self.peers.process, "host": host, "code": code, "text": text})
        try:
            self.peers.client.key_value_set(_FAILED, mine)
        except jax.errors.JaxRuntimeError as error:  # another was first, or process 0 is gone
            known = self._failure() if "ALREADY_EXISTS" in str(error) else None
            told = self.peers.first or known is None or known["text"] != text
        if told:
            sys.stderr.write(f"{self._name(self.peers.process)}jaxpeft: {text}\n")

    def leave(self, code: int) -> None:
        """End this process now, process 0 last: it holds what the others hear of each other by."""
        try:
            self.peers.client.wait_at_barrier(_ENDED, _LEAVE * 1000)
        except jax.errors.JaxRuntimeError:
            _log.debug("not all processes have ended within %d s", _LEAVE)
        if self.peers.first:
            time.sleep(_LAST)
        sys.stderr.flush()
        os._exit(code)

    def _run(self) -> None:
        beat, heard, warned = (
            max(1, self.heartbeat // _BEATS),
            dict[str, tuple[str, float]](),
            set[str](),
        )
        while not self.over.is_set():
            try:
                self._show_life()
                self.peers.client.blocking_key_value_get(_FAILED, beat * 1000)
                self._end_with(self._failure())
                return
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    self._lose_first(error)
                    return
            if self.peers.first:
                self._look(heard, warned)

    def _show_life(self) -> None:
        told = json.dumps([time.time(), platform.node(), os.getpid()])
        self.peers.client.key_value_set(
            f"{_ALIVE}/{self.peers.process}", told, allow_overwrite=True
        )

    def _failure(self) -> dict[str, Any]:
        return json.loads(
            self.peers.client.blocking_key_value_get(_FAILED, self.peers.timeout * 1000)
        )

    def _end_with(self, failure: dict[str, Any]) -> None:
        if failure["process"] == self.peers.process:
            return
        time.sleep(_OWN_WORDS)  # the same may be wrong here: then it is said here, once
        first, *more = failure["text"].splitlines()
        _log.error(
            "process %d on %s has failed, and ends all: %s%s",
            failure["process"],
            failure["host"],
            first,
            " ..." if more else "",
        )
        self.leave(failure["code"])

    def _lose_first(self, error: Exception) -> None:
        if self.over.wait(_LAST) or self.peers.first:
            return
        _log.error(
            "process 0 is gone (%s); look at its log, and start all of them again: they resume from"
            " the newest checkpoint",
            _short(error),
        )
        sys.stderr.flush()
        os._exit(1)

    def _look(self, heard: dict[str, tuple[str, float]], warned: set[str]) -> None:
        """Warn, well before JAX ends the run, of a process that has given no sign of life."""
        now = time.monotonic()
        for key, told in self.peers.client.key_value_dir_get(_ALIVE):
            if heard.get(key, ("", 0.0))[0] != told:
                heard[key] = (told, now)
                warned.discard(key)
            elif now - heard[key][1] > self.heartbeat / 3 and key not in warned:
                warned.add(key)
                _, host, pid = json.loads(told)
                _log.warning(
                    "process %s (%s, pid %d) has sent no heartbeat for %.0f s; if it has died, all"
                    " end after %d s with SIGABRT (exit code 134): start all of them again, they"
                    " resume from the newest checkpoint",
                    key.rsplit("/", 1)[-1],
                    host,
                    pid,
                    now - heard[key][1],
                    self.heartbeat,
                )

    def _name(self, process: int) -> str:
        return f"[process {process}] " if process else ""

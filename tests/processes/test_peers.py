"""What the processes of a run agree on, with threads in place of processes and a coordination
service of a few lines.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxpeft import logs
from jaxpeft.errors import ConfigError, PeersError
from jaxpeft.processes import distributed, peers
from jaxpeft.processes.clusters import Place, Waits
from jaxpeft.processes.peers import ALONE, Peers


class Service:
    """The coordination service's values and barriers, for threads."""

    def __init__(self, processes: int) -> None:
        self.processes, self.values, self.there = (
            processes,
            dict[str, str](),
            dict[str, threading.Barrier](),
        )
        self.changed = threading.Condition()

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        with self.changed:
            if key in self.values and not allow_overwrite:
                raise jax.errors.JaxRuntimeError(f"ALREADY_EXISTS: key {key} already exists.")
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key: str, timeout: int) -> str:
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, timeout / 1000):
                raise jax.errors.JaxRuntimeError(
                    f"DEADLINE_EXCEEDED: GetKeyValue() timed out with key: {key}"
                )
            return self.values[key]

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        with self.changed:
            return [
                (name, value) for name, value in self.values.items() if name.startswith(f"{key}/")
            ]

    def wait_at_barrier(self, name: str, timeout: int) -> None:
        with self.changed:
            barrier = self.there.setdefault(name, threading.Barrier(self.processes))
        try:
            barrier.wait(timeout / 1000)
        except threading.BrokenBarrierError:
            said = (
                f"DEADLINE_EXCEEDED: Barrier timed out. Id: {name}.\nSome timed out task"
                " names:\n1\n\n"
            )
            raise jax.errors.JaxRuntimeError(said) from None


Run = Callable[[Callable[[Peers], Any]], list[Any]]


@pytest.fixture
def run() -> Generator[Run]:
    """Run a function as two processes; return what came of each, errors too."""
    service, pool = Service(2), ThreadPoolExecutor(2)

    def both(body: Callable[[Peers], Any]) -> list[Any]:
        futures = [pool.submit(body, Peers(i, 2, 1, service)) for i in range(2)]
        return [future.exception() or future.result() for future in futures]

    yield both
    pool.shutdown()


def test_a_process_by_itself_asks_nobody(tmp_path: Path) -> None:
    assert ALONE.first and not ALONE.many
    assert ALONE.agree("a number", lambda: 3) == 3
    ALONE.wait("nothing")
    ALONE.same("options", {"a": 1})
    ALONE.require_shared(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_process_0_makes_is_what_all_have(run: Run) -> None:
    def twice(one: Peers) -> list[Any]:
        return [
            one.agree("a list", lambda: [one.process, None]),
            one.agree("a list", lambda: {"of": one.process}),
        ]

    assert run(twice) == [[[0, None], {"of": 0}]] * 2


def test_what_each_process_has_is_given_to_all_in_their_order(run: Run) -> None:
    assert run(lambda peers: peers.all_gather("numbers", [peers.process])) == [
        [[0], [1]],
        [[0], [1]],
    ]
    assert ALONE.all_gather("numbers", 3) == [3]


def test_values_that_differ_are_refused_by_name(run: Run) -> None:
    def compare(one: Peers) -> None:
        own = {"only": 1} if one.first else {}
        one.same("config", {"train": {"seed": one.process, "steps": (1, 2)}} | own)

    first, second = run(compare)
    assert isinstance(second, ConfigError)
    assert "process 1 on " in str(
        second
    ) and "has a different config than process 0; start all processes" in str(second)
    assert str(second).splitlines()[1:] == [
        "  train.seed: 1 here, 0 in process 0",
        "  only: None here, 1 in process 0",
    ]
    assert isinstance(first, PeersError)


def test_who_is_missing_at_a_barrier_is_said(run: Run) -> None:
    first, _ = run(lambda one: one.wait("the end") if one.first else None)
    assert isinstance(first, PeersError)
    assert "process 0 of 2 waited for the others at 'the end': not all arrived within 1 s" in str(
        first
    )
    assert "missing: process 1; check their logs" in str(first)


def test_a_value_that_never_comes_is_an_error(run: Run) -> None:
    _, second = run(lambda one: None if one.first else one.agree("the step", lambda: 1))
    assert isinstance(second, PeersError)
    assert "process 1 of 2 waited for the others at 'the step'" in str(second)


def test_a_folder_that_all_share_is_left_as_it_was_and_another_is_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "SEEN", 0.3)
    assert run(lambda one: one.require_shared(tmp_path)) == [None, None]
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    _, second = run(
        lambda one: Peers(one.process, 2, 1, one.client, iter(range(9, 99))).require_shared(
            folders[one.process]
        )
    )
    assert isinstance(second, ConfigError)
    assert f"--workdir {folders[1]}: is not shared: process 1 on " in str(second)


def test_without_a_place_nothing_is_started() -> None:
    assert distributed.start(None, Waits()) is ALONE


def test_an_indexed_job_without_the_package_that_finds_the_others_is_refused(
    monkeypatch: pytest.MonkeyPatch, quiet_logs: None
) -> None:
    monkeypatch.setattr(distributed, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError,
        match=r"JOB_COMPLETION_INDEX: this is pod 1 of an indexed job.*pip install 'jax\[k8s\]'",
    ):
        distributed.start(Place("Kubernetes", process=1), Waits())


def test_a_tpu_that_knows_no_other_hosts_is_one_process(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, quiet_logs: None
) -> None:
    def initialize(*_: Any, **__: Any) -> None:
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setenv("TPU_ML_PLATFORM", "JAX")
    for name in ("TPU_SKIP_MDS_QUERY", "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.start(None, Waits()) is ALONE
    assert caplog.messages == [
        (
            "this TPU VM reports no other hosts (coordinator_address should be defined.); running"
            " a single process"
        )
    ]
    with pytest.raises(
        PeersError,
        match=r"process 1 of 4: could not connect to the others \(coordinator_address .*found by TPU\)",
    ):
        distributed.start(Place("TPU", None, 4, 1), Waits())


@pytest.fixture
def quiet_logs() -> Generator[None]:
    """Put the levels of the loggers back."""
    names = ("jaxpeft", "jaxpeft.train.watch")
    before = {name: logging.getLogger(name).level for name in names}
    yield
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


def test_other_processes_say_warnings_alone_with_their_number(
    quiet_logs: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = logs.StderrHandler()
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    distributed.silence_other_processes(3, 4)
    log = logging.getLogger("jaxpeft.train.loop")
    log.info("a step")
    log.warning("something is wrong")
    logging.getLogger("jaxpeft.train.watch").warning("what all of them say")
    assert capsys.readouterr().err == "[process 3] something is wrong\n"


def test_the_error_of_a_process_by_itself_is_its_exit_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def body() -> int:
        raise ConfigError("a.b: is wrong")

    assert distributed.end_together(ALONE, Waits(), body, show_traceback=False) == 2
    assert capsys.readouterr().err == "jaxpeft: a.b: is wrong\n"
    assert distributed.end_together(ALONE, Waits(), lambda: 143, show_traceback=False) == 143


def test_a_process_that_is_not_heard_of_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    service, heard, warned = Service(2), dict[str, tuple[str, float]](), set[str]()
    watcher = distributed._Watcher(Peers(0, 2, 1, service), heartbeat=1)
    service.key_value_set("jaxpeft/alive/0", '[1, "here", 7]')
    service.key_value_set("jaxpeft/alive/1", '[1, "there", 8]')
    for beat in range(4):
        service.key_value_set("jaxpeft/alive/0", f'[{beat}, "here", 7]', allow_overwrite=True)
        watcher._check_heartbeats(heard, warned)
        time.sleep(0.3)
    (said,) = caplog.messages
    assert said.startswith("process 1 (there, pid 8) has sent no heartbeat for ")
    assert "all processes exit after 1 s with SIGABRT (exit code 134): start them again" in said

"""Run a comparison: every candidate with every seed, one at a time, each in its own process.

This module does not import JAX, so that only the current run uses the device and its peak memory is
its own. A finished run writes `result.json` and is not repeated; a stopped one resumes from its
checkpoints.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from jaxpeft import names
from jaxpeft.checkpoint.identity import differences
from jaxpeft.compare import table
from jaxpeft.config.schema import Config, as_dict
from jaxpeft.data.examples.make import Examples, make_examples
from jaxpeft.data.examples.reading import file_options_of, read_examples
from jaxpeft.data.rows.columns import Columns, find_format
from jaxpeft.data.rows.read import is_hub_id, read_rows
from jaxpeft.errors import ConfigError
from jaxpeft.hub import sources
from jaxpeft.processes.lock import lock_folder
from jaxpeft.processes.signals import StopRequest
from jaxpeft.train.records import RESULT

LOG = "log.txt"
PROGRAM = ("-m", "jaxpeft.compare.worker")
"""Arguments for Python that start the worker of one run."""
_TAIL, _POLL = 10_000, 0.1
"""Number of characters at the end of a run's log to search for an error, and seconds between polls.
"""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """One run of a comparison, compared by identity.

    Attributes:
        name: name of the candidate.
        seed: seed of the run.
        config: config of the candidate, with the seed.
        folder: folder of the run.
    """

    name: str
    seed: int
    config: Config
    folder: Path

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"


def run(
    config: Config,
    workdir: Path,
    stop: StopRequest,
    allowed: Sequence[str] = (),
    *,
    traceback: bool = False,
) -> dict[PlannedRun, str]:
    """Run the remaining runs of a comparison, and write its table and plot.

    Writes to `workdir`: `comparison.md`, `comparison.json`, `comparison.png` and a folder
    `NAME/seed-N` per run.

    Args:
        config: a checked config with candidates.
        workdir: folder of the comparison; resumes an earlier call in it.
        stop: stop request.
        allowed: config fields that may differ from those of existing runs.
        traceback: whether failing runs show a traceback.

    Returns:
        The error of each failed run.

    Raises:
        ConfigError: an existing run has a different config.
        DataError: the rows are invalid.
        WeightsError: the model was not found.
        Stopped: on request, after the current run has saved.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with lock_folder(workdir):
        runs = plan_runs(config, workdir)
        results = read_finished(runs, allowed)
        if len(results) < len(runs):
            check_inputs(config)
        failed: dict[PlannedRun, str] = {}
        began = time.perf_counter()
        remaining = [one for one in runs if one not in results]
        _log.info(
            "%d runs: %d candidates, %d seeds; %d done",
            len(runs),
            len(config.compare.candidates),
            len(config.compare.seeds),
            len(results),
        )
        first = _reference_candidate(config)
        options = {"allowed": list(allowed), "traceback": traceback}
        processes = _start_ahead(remaining)
        try:
            for i, (one, process) in enumerate(processes):
                stop.raise_if_requested()
                _log.info(
                    "\n%s: run %d of %d%s",
                    one,
                    i + 1,
                    len(remaining),
                    _estimate_remaining(began, i, len(remaining)),
                )
                why = _complete(process, one, stop, {**options, "before": one.name == first})
                result = read_result(one)
                if result is not None:
                    results[one] = result
                    metric = result["metric"]
                    _log.info(
                        "%s: %s %s %.4f",
                        one,
                        result.get("split", "test"),
                        metric,
                        result["test"][metric],
                    )
                    continue
                stop.raise_if_requested()
                failed[one] = why
                _log.error("%s failed: %s", one, why)
        finally:
            processes.close()
            if results:
                by_name = {
                    one: [results[r] for r in runs if r.name == one and r in results]
                    for one in config.compare.titles
                }
                summary = table.write(
                    config, by_name, {str(one): why for one, why in failed.items()}, workdir
                )
                _log.info("\n%s", table.closing_text(summary, by_name, workdir))
    return failed


def _reference_candidate(config: Config) -> str:
    """Return the candidate whose runs also evaluate before training: the first whose new adapter
    leaves the base's outputs unchanged, else the first.
    """
    plain = (
        candidate.title for candidate in config.compare.candidates if candidate.method.fresh_is_base
    )
    return next(plain, config.compare.titles[0])


def plan_runs(config: Config, workdir: Path) -> list[PlannedRun]:
    """List the runs of a comparison: all candidates with the first seed, then with the next.

    Raises:
        ConfigError: a folder is a link to another place.
    """
    return [
        PlannedRun(
            candidate.title,
            seed,
            config.run_of(candidate, seed),
            names.folder_named(names.folder_named(workdir, candidate.title), f"seed-{seed}"),
        )
        for seed in config.compare.seeds
        for candidate in config.compare.candidates
    ]


def read_finished(
    runs: Sequence[PlannedRun], allowed: Sequence[str] = ()
) -> dict[PlannedRun, dict[str, Any]]:
    """Return the results of finished runs.

    Args:
        runs: runs of the comparison.
        allowed: config fields that may differ.

    Raises:
        ConfigError: a result belongs to a different config.
    """
    found = {one: result for one in runs if (result := read_result(one)) is not None}
    problems: list[str] = []
    for one, result in found.items():
        here = as_dict(one.config)
        changed, _ = differences({"config": result["config"]}, {"config": here}, allowed)
        before, now = (values["compare"]["forgetting"] for values in (result["config"], here))
        if before != now:
            changed.append(f"config.compare.forgetting: was {before!r}, is {now!r}")
        problems += [
            f"{one.folder}: {why}; give another --workdir, or delete this folder" for why in changed
        ]
    if problems:
        raise ConfigError(problems)
    return found


def read_result(one: PlannedRun) -> dict[str, Any] | None:
    """Read the result of a run, or None if it has not finished."""
    with suppress(FileNotFoundError, ValueError):
        return json.loads((one.folder / RESULT).read_text())
    return None


def check_inputs(config: Config) -> None:
    """Check the rows and the model before any run starts.

    Raises:
        JaxpeftError: they are invalid.
    """
    source = sources.resolve(config.model.path, config.model.revision)
    if not config.data.streaming:
        read_examples(config, source)
    other_rows(config)


def other_rows(config: Config) -> Examples | None:
    """Read the rows on which forgetting is measured; None if not configured.

    Raises:
        DataError: the rows cannot be read, or have no labels.
    """
    path = config.compare.forgetting
    if not path:
        return None
    rows = read_rows(
        path, split="test" if is_hub_id(path) else None, file_options=file_options_of(config)
    )
    if config.model.task == "causal_lm":
        return make_examples(rows, kind=find_format(rows.columns(), Columns(), rows.name))
    return make_examples(rows, kind="classification", problem="single_label")


def _estimate_remaining(began: float, done: int, count: int) -> str:
    if not done:
        return ""
    minutes = (time.perf_counter() - began) / done * (count - done) / 60
    return f", about {minutes:.0f} minutes left"


@dataclass(frozen=True, eq=False)
class _Process:
    """Worker process of a run, which imports its modules and then waits for its job.

    Attributes:
        process: the Python process.
        log: its standard error.
    """

    process: subprocess.Popen[str]
    log: IO[str]

    def end(self) -> None:
        """Close its standard input, which makes it save and exit, and wait for its exit."""
        with suppress(BrokenPipeError):
            cast(IO[str], self.process.stdin).close()
        self.process.wait()
        self.log.close()


def _start_ahead(runs: Sequence[PlannedRun]) -> Generator[tuple[PlannedRun, _Process]]:
    """Yield each run with its process; the next process is started early, so that it imports while
    this run computes.
    """
    started: list[_Process] = []
    try:
        for i, one in enumerate(runs):
            started += [_start(other) for other in runs[i + len(started) : i + 2]]
            yield one, started[0]
            started.pop(0).end()
    finally:
        for process in started:
            process.end()


def _start(one: PlannedRun) -> _Process:
    one.folder.mkdir(parents=True, exist_ok=True)
    with (one.folder / LOG).open("a") as stderr:
        log = (one.folder / LOG).open(errors="replace")
        log.seek(0, os.SEEK_END)
        # it writes to a file, so that it can finish without this process, and has its own session,
        # so that this process passes on Ctrl-C
        process = subprocess.Popen(  # noqa: S603 - this Python, and a module of jaxpeft
            [sys.executable, *PROGRAM],
            stdin=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
    return _Process(process, log)


def _complete(run: _Process, one: PlannedRun, stop: StopRequest, options: Mapping[str, Any]) -> str:
    """Send a run to its worker process and wait for its exit; return the reason if it failed.

    Args:
        run: worker process.
        one: the run.
        stop: stop request, passed on to the process.
        options: more options of the job.
    """
    job = {"config": as_dict(one.config), "folder": str(one.folder), **options}
    stdin = cast(IO[str], run.process.stdin)
    with suppress(BrokenPipeError):
        stdin.write(json.dumps(job) + "\n")
        stdin.flush()
    tail = _follow(run.process, run.log, stop)
    _, prefix, why = tail.rpartition("jaxpeft: ")
    if prefix:
        return why.strip()
    code = run.process.returncode
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


def _follow(process: subprocess.Popen[str], log: IO[str], stop: StopRequest) -> str:
    """Show the log of a process until it exits; pass on a stop request. Return the log's tail."""
    tail, terminated, exited = "", False, False
    while not exited:
        exited = process.poll() is not None
        text = log.read()
        sys.stderr.write(text)
        tail = (tail + text)[-_TAIL:]
        if stop.requested and not terminated and not exited:
            process.terminate()
            terminated = True
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_POLL)
    return tail


def describe_failures(failed: Mapping[PlannedRun, str], workdir: Path) -> str:
    """Return a message that lists the failed runs and the fix."""
    rows = [f"  {one}: {why}" for one, why in failed.items()]
    fix = f"the same command tries them again; their logs are {workdir}/NAME/seed-N/{LOG}"
    return "\n".join([f"{len(failed)} runs failed:", *rows, fix])

"""A comparison: every candidate with every seed, one after the other, each in a process of its own.

Nothing here imports JAX: the device, and the peak of memory, are those of the run that is going on.
A run that has ended leaves `result.json` and is not done again; one that was stopped goes on from
its checkpoints.
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
from jaxpeft.data.examples.reading import layout_of, read_examples
from jaxpeft.data.rows.columns import Columns, find_format
from jaxpeft.data.rows.read import is_hub_id, read_rows
from jaxpeft.errors import ConfigError
from jaxpeft.hub import sources
from jaxpeft.processes.lock import lock_folder
from jaxpeft.processes.signals import StopRequest

RESULT = "result.json"
LOG = "log.txt"
PROGRAM = ("-m", "jaxpeft.compare.worker")
"""What does one run, for this Python."""
_LAST, _EVERY = 10_000, 0.1
"""How many characters of what a run has said are searched for a reason, and how often, in seconds,
it is looked at.
"""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Planned:
    """One run of a comparison, equal to itself alone.

    Attributes:
        name: of the candidate.
        seed: of the run.
        config: the candidate's, with the seed.
        folder: where it leaves its files.
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
) -> dict[Planned, str]:
    """Run what is left of a comparison, and write its table and plot.

    Leaves in `workdir`: `comparison.md`, `comparison.json`, `comparison.png` and a folder
    `NAME/seed-N` of each run.

    Args:
        config: a checked config with candidates.
        workdir: the comparison's folder; what an earlier call left there is gone on from.
        stop: a request to stop.
        allowed: fields that may differ from those of the runs that are there already.
        traceback: whether a run that fails shows Python's traceback.

    Returns:
        Why runs have failed; empty if none has.

    Raises:
        ConfigError: a run that is there already is another than the config's.
        DataError: rows cannot be used.
        WeightsError: there is no such model.
        Stopped: on request, after the run that was going on has saved.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with lock_folder(workdir):
        runs = plan_runs(config, workdir)
        results = read_finished(runs, allowed)
        if len(results) < len(runs):
            check_inputs(config)
        failed: dict[Planned, str] = {}
        began = time.perf_counter()
        left = [one for one in runs if one not in results]
        _log.info(
            "%d runs: %d candidates, %d seeds; %d of them are done",
            len(runs),
            len(config.compare.candidates),
            len(config.compare.seeds),
            len(results),
        )
        first, asked = _measured_before(config), {"allowed": list(allowed), "traceback": traceback}
        processes = _start_ahead(left)
        try:
            for i, (one, process) in enumerate(processes):
                stop.raise_if_requested()
                _log.info(
                    "\n%s: run %d of %d%s",
                    one,
                    i + 1,
                    len(left),
                    _estimate_remaining(began, i, len(left)),
                )
                why = _complete(process, one, stop, {**asked, "before": one.name == first})
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
                _log.error("%s has failed: %s", one, why)
        finally:
            processes.close()
            if results:
                by_name = {
                    one: [results[r] for r in runs if r.name == one and r in results]
                    for one in config.compare.titles
                }
                made = table.write(
                    config, by_name, {str(one): why for one, why in failed.items()}, workdir
                )
                _log.info("\n%s", table.closing_text(made, by_name, workdir))
    return failed


def _measured_before(config: Config) -> str:
    """Return the candidate whose runs measure what is there before training: one that begins as the
    base, or the first.
    """
    plain = (
        candidate.title for candidate in config.compare.candidates if candidate.method.fresh_is_base
    )
    return next(plain, config.compare.titles[0])


def plan_runs(config: Config, workdir: Path) -> list[Planned]:
    """List the runs of a comparison: all candidates with the first seed, then with the next.

    Raises:
        ConfigError: a folder in the way leads elsewhere.
    """
    return [
        Planned(
            candidate.title,
            seed,
            config.run_of(candidate, seed),
            names.folder_named(names.folder_named(workdir, candidate.title), f"seed-{seed}"),
        )
        for seed in config.compare.seeds
        for candidate in config.compare.candidates
    ]


def read_finished(
    runs: Sequence[Planned], allowed: Sequence[str] = ()
) -> dict[Planned, dict[str, Any]]:
    """Return the results that are there already.

    Args:
        runs: of the comparison.
        allowed: fields that may differ.

    Raises:
        ConfigError: a result is that of another config.
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


def read_result(one: Planned) -> dict[str, Any] | None:
    """Read what a run has left, None where it has not ended."""
    with suppress(FileNotFoundError, ValueError):
        return json.loads((one.folder / RESULT).read_text())
    return None


def check_inputs(config: Config) -> None:
    """Refuse, before any run, rows or a model that no run could use.

    Raises:
        JaxpeftError: naming them.
    """
    source = sources.resolve(config.model.path, config.model.revision)
    if not config.data.streaming:
        read_examples(config, source)
    other_rows(config)


def other_rows(config: Config) -> Examples | None:
    """Read the rows that forgetting is measured on, None where there are none.

    Raises:
        DataError: they cannot be read, or are not labeled.
    """
    path = config.compare.forgetting
    if not path:
        return None
    rows = read_rows(path, split="test" if is_hub_id(path) else None, layout=layout_of(config))
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
    """The process of a run, which imports what it needs and then waits to be told what to do.

    Attributes:
        process: of this Python.
        said: what it writes to standard error, from its start.
    """

    process: subprocess.Popen[str]
    said: IO[str]

    def end(self) -> None:
        """Close its standard input, which makes it save and end if it has not, and wait for
        that.
        """
        with suppress(BrokenPipeError):
            cast(IO[str], self.process.stdin).close()
        self.process.wait()
        self.said.close()


def _start_ahead(runs: Sequence[Planned]) -> Generator[tuple[Planned, _Process]]:
    """Yield each run with its process; that of the next is started by then, so that it imports
    while this one computes.
    """
    there: list[_Process] = []
    try:
        for i, one in enumerate(runs):
            there += [_start(other) for other in runs[i + len(there) : i + 2]]
            yield one, there[0]
            there.pop(0).end()
    finally:
        for process in there:
            process.end()


def _start(one: Planned) -> _Process:
    one.folder.mkdir(parents=True, exist_ok=True)
    with (one.folder / LOG).open("a") as log:
        said = (one.folder / LOG).open(errors="replace")
        said.seek(0, os.SEEK_END)
        # it writes to a file, which is there whatever becomes of us; and in a session of its own,
        # as Ctrl-C is ours to pass on
        process = subprocess.Popen(  # noqa: S603 - this Python, and a module of jaxpeft
            [sys.executable, *PROGRAM],
            stdin=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    return _Process(process, said)


def _complete(run: _Process, one: Planned, stop: StopRequest, asked: Mapping[str, Any]) -> str:
    """Tell a process which run it does, and wait for its end; return why it has failed, if it has.

    Args:
        run: the process.
        one: the run.
        stop: a request to stop, which is passed on.
        asked: more to tell it.
    """
    told = {"config": as_dict(one.config), "folder": str(one.folder), **asked}
    to = cast(IO[str], run.process.stdin)
    with suppress(BrokenPipeError):
        to.write(json.dumps(told) + "\n")
        to.flush()
    last = _follow(run.process, run.said, stop)
    _, complains, why = last.rpartition("jaxpeft: ")
    if complains:
        return why.strip()
    code = run.process.returncode
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _follow(process: subprocess.Popen[str], said: IO[str], stop: StopRequest) -> str:
    """Wait for the end of a run, which a request to stop is passed on to; shows what it says, and
    return the last of it.
    """
    last, asked, ended = "", False, False
    while not ended:
        ended = process.poll() is not None
        text = said.read()
        sys.stderr.write(text)
        last = (last + text)[-_LAST:]
        if stop.requested and not asked and not ended:
            process.terminate()
            asked = True
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_EVERY)
    return last


def describe_failures(failed: Mapping[Planned, str], workdir: Path) -> str:
    """Return which runs have failed, and what to do."""
    rows = [f"  {one}: {why}" for one, why in failed.items()]
    fix = f"the same command tries them again; what they said is in {workdir}/NAME/seed-N/{LOG}"
    return "\n".join([f"{len(failed)} runs have failed:", *rows, fix])

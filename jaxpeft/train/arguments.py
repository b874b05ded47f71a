"""The command line of what trains: its arguments, the config that it names, and running a command
with them. No JAX is imported.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from jaxpeft import names
from jaxpeft.command.parser import ConfigArguments, Overrides
from jaxpeft.command.running import load_config, run_command
from jaxpeft.config import Config
from jaxpeft.core.options import option
from jaxpeft.errors import ConfigError, shorten
from jaxpeft.processes import clusters


@dataclass(frozen=True, kw_only=True)
class RunArguments(ConfigArguments):
    """The arguments of a command that trains."""

    workdir: str | None = option(None, "folder of the run; runs/NAME_OF_THE_CONFIG by default")
    name: str | None = option(
        None, "name of the run, in place of --workdir: its folder is runs/NAME"
    )
    allow_change: tuple[str, ...] = option(
        (), "resume although this field of the config has changed"
    )
    allow_base: bool = option(False, "resume although the base has changed")
    coordinator: str | None = option(None, "host:port of process 0, of a run of several processes")
    processes: int | None = option(None, "how many processes the run has")
    process: int | None = option(None, "which of them this is, from 0")
    heartbeat_timeout: int | None = option(
        None, "seconds without a heartbeat of a process until all end; 100 by default"
    )
    validate: bool = option(False, "check the config and stop")


@dataclass(frozen=True)
class Job:
    """What a command line asks for.

    Attributes:
        arguments: of the command.
        config: checked, the overrides applied.
        workdir: folder of the run.
    """

    arguments: RunArguments
    config: Config
    workdir: Path

    @property
    def allowed(self) -> list[str]:
        """Fields that may have changed since the run began."""
        return [*self.arguments.allow_change, *(["base"] if self.arguments.allow_base else [])]


def job_of(given: RunArguments, overrides: Overrides = (), *, compares: bool = False) -> Job:
    """Read the config that a command line names, without importing JAX.

    Args:
        given: the arguments.
        overrides: of the config.
        compares: whether the config must be that of a comparison; if not, its method is trained
            alone, and must be a candidate where there are any.

    Raises:
        ConfigError: listing every problem.
    """
    problems: list[str] = []
    config, workdir = None, Path("runs") / Path(given.config or "").stem
    try:
        config = load_config(given, overrides)
    except ConfigError as error:
        problems += error.problems
    if given.config is not None:
        try:
            workdir = _workdir(given, workdir)
        except ConfigError as error:
            problems += error.problems
    if config is not None:
        count = len(config.compare.candidates)
        if bool(count) != compares and not config.compares_method:
            problems.append(_OTHER_VERB[compares].format(count=count, path=given.config))
        if compares and config.log.wandb is not None:
            problems.append(
                "config.log.wandb: the runs of a comparison would all have one name there;"
                " remove it"
            )
        if count and not compares:
            config = replace(config, compare=replace(config.compare, candidates=()))
    if problems or config is None:
        raise ConfigError(problems)
    return Job(given, config, workdir)


_OTHER_VERB = {
    False: (
        "config.compare.candidates: {count} methods to compare; run `python -m jaxpeft.compare"
        " --config {path}`, or set --config.compare.candidates=() to train config.method alone"
    ),
    True: (
        "config.compare.candidates: is empty; list the methods to compare, or run `python -m"
        " jaxpeft.train --config {path}`"
    ),
}


def _workdir(given: RunArguments, default: Path) -> Path:
    """Return the folder of the run.

    Raises:
        ConfigError: it cannot be written, or made, or the name is none.
    """
    if given.name is not None and given.workdir is not None:
        raise ConfigError("--name: goes without --workdir; give one of them")
    workdir = Path(given.workdir or default)
    if given.name is not None:
        workdir = names.folder_named(default.parent, given.name)
    if given.validate:
        return workdir
    try:
        with suppress(FileNotFoundError):
            workdir.stat()
        there = next(
            (folder for folder in (workdir, *workdir.absolute().parents) if folder.exists()),
            workdir,
        )
        with tempfile.TemporaryFile(dir=there):
            names.require_no_way_out(workdir)
            return workdir
    except (OSError, ValueError) as error:  # a ValueError of a path with a NUL
        if isinstance(error, ConfigError):
            raise
        why = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"--workdir {shorten(str(workdir), 200)}: cannot be written ({why}); give another"
            " folder"
        ) from None


def run_job(
    argv: list[str], about: str | None, run: Callable[[Job], int], *, compares: bool = False
) -> int:
    """Run a command that trains; return the exit code.

    Args:
        argv: the arguments, without the program's name.
        about: what `--help` says first.
        run: does the work.
        compares: whether the config must be that of a comparison.
    """

    def body(given: RunArguments, overrides: Overrides) -> int:
        job = job_of(given, overrides, compares=compares)
        if given.validate:
            logging.getLogger("jaxpeft").info("%s is valid", given.config)
            return 0
        return run(job)

    return run_command(RunArguments, argv, about, body)


def find_process(given: RunArguments) -> tuple[clusters.Place | None, clusters.Waits]:
    """Tell from arguments and environment which process of how many this is, and how long it waits
    for the others.

    Raises:
        ConfigError: they are half set, or contradict each other.
    """
    flags = clusters.Flags(
        given.coordinator, given.processes, given.process, given.heartbeat_timeout
    )
    return clusters.find(os.environ, flags), clusters.waits(os.environ, flags)

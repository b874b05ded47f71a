"""The command line of the training commands: arguments, config and entry point. Does not import
JAX.
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

    workdir: str | None = option(None, "folder of the run; default runs/NAME_OF_THE_CONFIG")
    name: str | None = option(
        None, "name of the run, instead of --workdir; the folder is runs/NAME"
    )
    allow_change: tuple[str, ...] = option((), "resume even if this config field has changed")
    allow_base: bool = option(False, "resume even if the base has changed")
    coordinator: str | None = option(None, "host:port of process 0 in a multi-process run")
    processes: int | None = option(None, "number of processes in the run")
    process: int | None = option(None, "index of this process, from 0")
    heartbeat_timeout: int | None = option(
        None, "seconds without a heartbeat from a process before all exit; default 100"
    )
    validate: bool = option(False, "check the config and exit")


@dataclass(frozen=True)
class Job:
    """A parsed command line.

    Attributes:
        arguments: command-line arguments.
        config: checked config with overrides applied.
        workdir: folder of the run.
    """

    arguments: RunArguments
    config: Config
    workdir: Path

    @property
    def allowed(self) -> list[str]:
        """Config fields that may differ from the checkpoint's."""
        return [*self.arguments.allow_change, *(["base"] if self.arguments.allow_base else [])]


def job_of(arguments: RunArguments, overrides: Overrides = (), *, compares: bool = False) -> Job:
    """Read the config named on the command line, without importing JAX.

    Args:
        arguments: command-line arguments.
        overrides: config overrides.
        compares: whether the config must be a comparison. Otherwise only its method is trained,
            which must be one of the candidates, if there are any.

    Raises:
        ConfigError: lists every problem.
    """
    problems: list[str] = []
    config, workdir = None, Path("runs") / Path(arguments.config or "").stem
    try:
        config = load_config(arguments, overrides)
    except ConfigError as error:
        problems += error.problems
    if arguments.config is not None:
        try:
            workdir = _workdir(arguments, workdir)
        except ConfigError as error:
            problems += error.problems
    if config is not None:
        count = len(config.compare.candidates)
        if bool(count) != compares and not config.compares_method:
            problems.append(_OTHER_VERB[compares].format(count=count, path=arguments.config))
        if compares and config.log.wandb is not None:
            problems.append(
                "config.log.wandb: all runs of a comparison would have the same name there;"
                " remove it"
            )
        if count and not compares:
            config = replace(config, compare=replace(config.compare, candidates=()))
    if problems or config is None:
        raise ConfigError(problems)
    return Job(arguments, config, workdir)


_OTHER_VERB = {
    False: (
        "config.compare.candidates: lists {count} methods to compare; run `python -m"
        " jaxpeft.compare --config {path}`, or set --config.compare.candidates=() to train only"
        " config.method"
    ),
    True: (
        "config.compare.candidates: is empty; list the methods to compare, or run `python -m"
        " jaxpeft.train --config {path}`"
    ),
}


def _workdir(arguments: RunArguments, default: Path) -> Path:
    """Return the folder of the run.

    Raises:
        ConfigError: the folder cannot be created or written, or the name is invalid.
    """
    if arguments.name is not None and arguments.workdir is not None:
        raise ConfigError("--name: cannot be combined with --workdir; give only one of them")
    workdir = Path(arguments.workdir or default)
    if arguments.name is not None:
        workdir = names.folder_named(default.parent, arguments.name)
    if arguments.validate:
        return workdir
    try:
        with suppress(FileNotFoundError):
            workdir.stat()
        existing = next(
            (folder for folder in (workdir, *workdir.absolute().parents) if folder.exists()),
            workdir,
        )
        with tempfile.TemporaryFile(dir=existing):
            names.require_no_way_out(workdir)
            return workdir
    except (OSError, ValueError) as error:  # a path with a NUL byte raises ValueError
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
    """Run a training command; return the exit code.

    Args:
        argv: arguments, without the program name.
        about: introduction of `--help`.
        run: function that does the work.
        compares: whether the config must be a comparison.
    """

    def body(arguments: RunArguments, overrides: Overrides) -> int:
        job = job_of(arguments, overrides, compares=compares)
        if arguments.validate:
            logging.getLogger("jaxpeft").info("%s is valid", arguments.config)
            return 0
        return run(job)

    return run_command(RunArguments, argv, about, body)


def find_process(arguments: RunArguments) -> tuple[clusters.Place | None, clusters.Waits]:
    """Return the index and number of processes, and timeouts, from arguments and environment.

    Raises:
        ConfigError: the settings are incomplete or contradict each other.
    """
    flags = clusters.Flags(
        arguments.coordinator, arguments.processes, arguments.process, arguments.heartbeat_timeout
    )
    return clusters.find(os.environ, flags), clusters.waits(os.environ, flags)

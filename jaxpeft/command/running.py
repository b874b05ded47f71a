"""Run a command: help, logging and readable errors."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from typing import TypeVar

from jaxpeft import config as configs
from jaxpeft import logs
from jaxpeft.command.help import help_text, requested_section
from jaxpeft.command.parser import Arguments, ConfigArguments, Overrides, read_arguments
from jaxpeft.config import Config
from jaxpeft.config.json_schema import schema_text
from jaxpeft.errors import ConfigError, printable
from jaxpeft.processes.exit_codes import run_guarded

A = TypeVar("A", bound=Arguments)


def run_command(
    cls: type[A],
    argv: list[str],
    about: str | None,
    body: Callable[[A, Overrides], int],
    *,
    level: int = logging.INFO,
) -> int:
    """Run a command from its command line.

    Args:
        cls: class of its arguments.
        argv: arguments, without the program name.
        about: introduction of `--help`.
        body: does the work, called with the arguments and config overrides; returns the exit code.
        level: log level.

    Returns:
        The exit code.
    """
    show_traceback = "--traceback" in argv
    set_up_logging(hushed=not show_traceback, level=level)

    def run() -> int:
        section = requested_section(argv)
        if section is not None:
            sys.stdout.write(help_text(cls, about or "", section))
            return 0
        arguments, overrides = read_arguments(cls, argv)
        if isinstance(arguments, ConfigArguments) and arguments.schema:
            sys.stdout.write(schema_text())
            return 0
        return body(arguments, overrides)

    return run_guarded(run, show_traceback=show_traceback)


def write_lines(*lines: str) -> None:
    """Write lines to standard output, without control characters, which may come from files."""
    sys.stdout.write("".join(f"{printable(line)}\n" for line in lines))


def load_config(
    arguments: ConfigArguments, overrides: Overrides, example: str = "configs/quickstart.py"
) -> Config:
    """Read and check the config of a command line.

    Raises:
        ConfigError: no config is given, or it is invalid.
    """
    if arguments.config is None:
        raise ConfigError(f"--config: is not given; try --config {example}")
    return configs.load(arguments.config, overrides)


def set_up_logging(*, hushed: bool, level: int = logging.INFO) -> None:
    """Log to standard error.

    Args:
        hushed: whether to silence messages from the threads of a failed save, whose error is
            reported once.
        level: log level of jaxpeft.
    """
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[logs.StderrHandler()]
    )
    logging.getLogger("jaxpeft").setLevel(level)
    if not hushed:
        return
    for name in ("asyncio", "absl"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    usual = sys.unraisablehook

    def unraisable(what: sys.UnraisableHookArgs) -> None:
        # TensorStore's threads outlive the event loop that waited for them
        if str(what.exc_value) != "Event loop is closed":
            usual(what)

    sys.unraisablehook = unraisable
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)

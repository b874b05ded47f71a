"""Run a command: its help, its log lines, and errors as a person at a terminal reads them."""

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
from jaxpeft.errors import ConfigError
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
        cls: its arguments.
        argv: the arguments, without the program's name.
        about: what `--help` says first.
        body: does the work, given the arguments and the overrides of the config; returns the exit
            code.
        level: of the log lines that are shown.

    Returns:
        The exit code.
    """
    show_traceback = "--traceback" in argv
    set_up_logging(hushed=not show_traceback, level=level)

    def whole() -> int:
        section = requested_section(argv)
        if section is not None:
            sys.stdout.write(help_text(cls, about or "", section))
            return 0
        given, overrides = read_arguments(cls, argv)
        if isinstance(given, ConfigArguments) and given.schema:
            sys.stdout.write(schema_text())
            return 0
        return body(given, overrides)

    return run_guarded(whole, show_traceback=show_traceback)


def load_config(
    given: ConfigArguments, overrides: Overrides, example: str = "configs/quickstart.py"
) -> Config:
    """Read and check the config that a command line names.

    Raises:
        ConfigError: none is named, or what is wrong with it.
    """
    if given.config is None:
        raise ConfigError(f"--config: is not given; try --config {example}")
    return configs.load(given.config, overrides)


def set_up_logging(*, hushed: bool, level: int = logging.INFO) -> None:
    """Show on standard error what jaxpeft logs.

    Args:
        hushed: whether to silence what the threads of a failed save say: the error itself is
            reported once.
        level: of jaxpeft's own lines.
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
        # TensorStore's threads end after the loop that waited for them
        if str(what.exc_value) != "Event loop is closed":
            usual(what)

    sys.unraisablehook = unraisable
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)

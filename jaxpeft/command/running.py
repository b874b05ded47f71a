"""Run a command: its help, its log lines, and errors as a person at a terminal reads them."""

from __future__ import annotations

import logging
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import TypeVar

from jaxpeft import config as configs
from jaxpeft import logs
from jaxpeft.command.arguments import Arguments, ConfigArguments, Overrides, read_arguments
from jaxpeft.command.help import help_asked, help_text
from jaxpeft.config import Config
from jaxpeft.config.json_schema import schema_text
from jaxpeft.errors import ConfigError, JaxpeftError

A = TypeVar("A", bound=Arguments)
_LONGEST = 400


def run_command(
    cls: type[A], argv: list[str], about: str | None, body: Callable[[A, Overrides], int], *, level: int = logging.INFO
) -> int:
    """Run a command from its command line.

    Args:
        cls: its arguments.
        argv: the arguments, without the program's name.
        about: what `--help` says first.
        body: does the work, given the arguments and the overrides of the config; returns the exit code.
        level: of the log lines that are shown.

    Returns:
        The exit code.
    """
    show_traceback = "--traceback" in argv
    set_up_logging(hushed=not show_traceback, level=level)

    def whole() -> int:
        section = help_asked(argv)
        if section is not None:
            sys.stdout.write(help_text(cls, about or "", section))
            return 0
        given, overrides = read_arguments(cls, argv)
        if isinstance(given, ConfigArguments) and given.schema:
            sys.stdout.write(schema_text())
            return 0
        return body(given, overrides)

    return guarded(whole, show_traceback=show_traceback)


def load_config(given: ConfigArguments, overrides: Overrides, example: str = "configs/quickstart.py") -> Config:
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
        hushed: whether to silence what the threads of a failed save say: the error itself is reported once.
        level: of jaxpeft's own lines.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[logs.StderrHandler()])
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


def say(text: str, code: int) -> None:
    """Write an error to standard error."""
    del code
    sys.stderr.write(f"jaxpeft: {text}\n")


def guarded(body: Callable[[], int], *, show_traceback: bool, tell: Callable[[str, int], None] = say) -> int:
    """Run a function, and report its error in a few lines, without Python's traceback unless it is asked for.

    Args:
        body: returns the exit code.
        show_traceback: whether to write Python's traceback first.
        tell: reports the error, given its text and the exit code.

    Returns:
        The exit code: of `body`, 2 for bad input, 1 for any other failure.
    """
    try:
        return body()
    except JaxpeftError as error:
        if show_traceback:
            traceback.print_exc()
        many = f"{len(error.problems)} problems:\n" if len(error.problems) > 1 else ""
        code = 2 if isinstance(error, ValueError) else 1
        tell(f"{many}{error}", code)
        return code
    except Exception as error:  # noqa: BLE001 - the end of the command: told, and not gone on from
        if show_traceback:
            traceback.print_exc()
        tell(unexpected(error), 1)
        return 1


def unexpected(error: Exception) -> str:
    """Return in one line what an error is that no check has foreseen, and where it comes from."""
    said = " ".join(str(error).split())
    said = said if len(said) <= _LONGEST else f"{said[:_LONGEST]}..."
    if "RESOURCE_EXHAUSTED" in said or isinstance(error, MemoryError):
        fix = "lower train.batch_size or data.max_length, raise train.accumulation, or set model.remat"
        return f"out of memory: {said}; {fix}"
    return f"{type(error).__name__}: {said or 'no reason given'} ({_place(error)}); run it with --traceback to see more"


def _place(error: Exception) -> str:
    """Return the file and line that raised an error; of a worker process's, those in its note."""
    noted = re.findall(r'File "(.+?)", line (\d+)', "\n".join(getattr(error, "__notes__", ())))
    frames = traceback.extract_tb(error.__traceback__)
    return ":".join(noted[-1]) if noted else f"{frames[-1].filename}:{frames[-1].lineno}"

"""What the commands share: overrides on the command line, and errors told to the person at the terminal."""

from __future__ import annotations

import logging
import re
import sys
import traceback
import warnings
from collections.abc import Callable

from jaxpeft import logs
from jaxpeft.errors import JaxpeftError

_LONGEST = 400


def set_up_logging(*, hushed: bool) -> None:
    """Lets what jaxpeft logs be seen on standard error.

    Args:
        hushed: whether to silence what the threads of a failed save say: the error comes back to us, and is told once.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[logs.StderrHandler()])
    logging.getLogger("jaxpeft").setLevel(logging.INFO)
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


def split_overrides(argv: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Takes the `--config.x.y=value` and `--config.x.y value` out of the arguments.

    Returns:
        `(dotted option, text)` pairs, and the other arguments.
    """
    overrides: list[tuple[str, str]] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        name = word.lstrip("-")
        if word.startswith("-") and name.startswith("config."):
            option, equals, value = name.removeprefix("config.").partition("=")
            overrides.append((option, value if equals else next(words, "")))
        else:
            rest.append(word)
    return overrides, rest


def say(text: str, code: int) -> None:
    """Says an error on standard error."""
    del code
    sys.stderr.write(f"jaxpeft: {text}\n")


def guarded(body: Callable[[], int], *, show_traceback: bool, tell: Callable[[str, int], None] = say) -> int:
    """Runs a command; an error is told in a few lines, without Python's traceback unless it is asked for.

    Args:
        body: gives the exit code.
        show_traceback: whether to write Python's traceback first.
        tell: says what is wrong, given the text and the exit code.

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
    """Says in one line what an error is that no check has foreseen, and where it comes from."""
    said = " ".join(str(error).split())
    said = said if len(said) <= _LONGEST else f"{said[:_LONGEST]}..."
    if "RESOURCE_EXHAUSTED" in said or isinstance(error, MemoryError):
        fix = "lower train.batch_size or data.max_length, raise train.accumulation, or set model.remat"
        return f"out of memory: {said}; {fix}"
    return f"{type(error).__name__}: {said or 'no reason given'} ({_place(error)}); run it with --traceback to see more"


def _place(error: Exception) -> str:
    """Gives file and line that raised an error; of a worker process's, those in its note."""
    noted = re.findall(r'File "(.+?)", line (\d+)', "\n".join(getattr(error, "__notes__", ())))
    frames = traceback.extract_tb(error.__traceback__)
    return ":".join(noted[-1]) if noted else f"{frames[-1].filename}:{frames[-1].lineno}"

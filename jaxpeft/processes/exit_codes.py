"""Report errors in a few readable lines, and return exit codes."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable

from jaxpeft.errors import JaxpeftError, printable

_LONGEST = 400


def write_error(text: str, code: int) -> None:
    """Write an error to standard error."""
    del code
    sys.stderr.write(f"jaxpeft: {printable(text)}\n")


def run_guarded(
    body: Callable[[], int],
    *,
    show_traceback: bool,
    report: Callable[[str, int], None] = write_error,
) -> int:
    """Run a function and report its error in a few lines.

    Args:
        body: does the work, and returns the exit code.
        show_traceback: whether to print Python's traceback first.
        report: reports an error, called with its text and the exit code.

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
        report(f"{many}{error}", code)
        return code
    except Exception as error:  # noqa: BLE001 - top level of the command: report and exit
        if show_traceback:
            traceback.print_exc()
        report(describe_unexpected(error), 1)
        return 1


def describe_unexpected(error: Exception) -> str:
    """Describe an unexpected error and its origin in one line."""
    text = " ".join(str(error).split())
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    if "RESOURCE_EXHAUSTED" in text or isinstance(error, MemoryError):
        fix = (
            "lower train.batch_size or data.max_length, raise train.accumulation, or set"
            " model.remat"
        )
        return f"out of memory: {text}; {fix}"
    return (
        f"{type(error).__name__}: {text or 'no message'} ({_place(error)}); run with --traceback"
        " for details"
    )


def _place(error: Exception) -> str:
    """Return the file and line that raised an error, in a worker process if its notes say so."""
    noted = re.findall(r'File "(.+?)", line (\d+)', "\n".join(getattr(error, "__notes__", ())))
    frames = traceback.extract_tb(error.__traceback__)
    return ":".join(noted[-1]) if noted else f"{frames[-1].filename}:{frames[-1].lineno}"

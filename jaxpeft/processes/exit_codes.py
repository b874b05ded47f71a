"""How a process ends: an error in a few lines, as a person at a terminal reads it, and the exit
code.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable

from jaxpeft.errors import JaxpeftError

_LONGEST = 400


def write_error(text: str, code: int) -> None:
    """Write an error to standard error."""
    del code
    sys.stderr.write(f"jaxpeft: {text}\n")


def run_guarded(
    body: Callable[[], int], *, show_traceback: bool, tell: Callable[[str, int], None] = write_error
) -> int:
    """Run a function, and report its error in a few lines, without Python's traceback unless it is
    asked for.

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
        tell(describe_unexpected(error), 1)
        return 1


def describe_unexpected(error: Exception) -> str:
    """Return in one line what an error is that no check has foreseen, and where it comes from."""
    said = " ".join(str(error).split())
    said = said if len(said) <= _LONGEST else f"{said[:_LONGEST]}..."
    if "RESOURCE_EXHAUSTED" in said or isinstance(error, MemoryError):
        fix = (
            "lower train.batch_size or data.max_length, raise train.accumulation, or set"
            " model.remat"
        )
        return f"out of memory: {said}; {fix}"
    return (
        f"{type(error).__name__}: {said or 'no reason given'} ({_place(error)}); run it with"
        " --traceback to see more"
    )


def _place(error: Exception) -> str:
    """Return the file and line that raised an error; of a worker process's, those in its note."""
    noted = re.findall(r'File "(.+?)", line (\d+)', "\n".join(getattr(error, "__notes__", ())))
    frames = traceback.extract_tb(error.__traceback__)
    return ":".join(noted[-1]) if noted else f"{frames[-1].filename}:{frames[-1].lineno}"

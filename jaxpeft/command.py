"""What the commands share: overrides on the command line, and errors told to the person at the terminal."""

from __future__ import annotations

import sys

from jaxpeft.errors import JaxpeftError


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


def complain(error: JaxpeftError) -> int:
    """Writes an error to standard error; gives the exit code: 2 for bad input, 1 for any other failure."""
    many = f"{len(error.problems)} problems:\n" if len(error.problems) > 1 else ""
    sys.stderr.write(f"jaxpeft: {many}{error}\n")
    return 2 if isinstance(error, ValueError) else 1

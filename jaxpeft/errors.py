"""Errors of jaxpeft: each lists all problems found, one per line, with the fix."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

_LONGEST_NAME = 200
"""Longer text is not a mistyped name."""
_CONTROLS = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Characters that control a terminal, end lines or reorder text, and halves of surrogate pairs."""


class JaxpeftError(Exception):
    """An error with one or more problems.

    Args:
        problems: one or several strings, each naming the field, the value, the file and the fix.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (
            (problems,) if isinstance(problems, str) else tuple(problems)
        )
        super().__init__("\n".join(self.problems))


class ConfigError(JaxpeftError, ValueError):
    """A config, a model's config or a method's hyperparameters are invalid."""


class DataError(JaxpeftError, ValueError):
    """Data rows are invalid."""


class WorkerError(JaxpeftError, RuntimeError):
    """A data worker process has exited or hangs."""


class WeightsError(JaxpeftError, ValueError):
    """A weight file is invalid, or does not fit the model."""


class AdapterError(JaxpeftError, ValueError):
    """An adapter folder is invalid, or does not fit the base."""


class TargetError(JaxpeftError, ValueError):
    """A method's targets do not match modules of the model."""


class CheckpointError(JaxpeftError, RuntimeError):
    """A checkpoint cannot be resumed from."""


class DamagedError(CheckpointError, ValueError):
    """All checkpoints are damaged, so that running again fails in the same way."""


class PeersError(JaxpeftError, RuntimeError):
    """The processes of a run could not connect, or one was lost."""


class ExportError(JaxpeftError, RuntimeError):
    """An exported adapter or model does not reproduce the outputs of what it was made from."""


class TrainingError(JaxpeftError, RuntimeError):
    """Training cannot continue."""


def show(value: object, most: int = 80) -> str:
    """Return the repr of a value for a message, truncated if it is long.

    Args:
        value: value given by the user.
        most: maximum number of characters.
    """
    try:
        text = repr(value)
    except (
        ValueError,
        RecursionError,
    ):
        # an integer with thousands of digits, or deeply nested lists
        return f"{type(value).__name__} that is too large to be shown"
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def printable(text: str, keep: str = "\t\n") -> str:
    r"""Return text for a terminal, with control characters as `\u001b`, as in JSON.

    Args:
        text: text that may come from a file.
        keep: control characters to keep.
    """
    return _CONTROLS.sub(
        lambda found: found[0] if found[0] in keep else f"\\u{ord(found[0]):04x}", text
    )


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """Return a hint such as `; did you mean 'rank'?`, or an empty string if no name is similar.

    Args:
        name: name given by the user.
        known: valid names.
        n: maximum number of suggestions.
    """
    near = (
        difflib.get_close_matches(name, list(known), n=n, cutoff=0.5)
        if len(name) <= _LONGEST_NAME
        else []
    )
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def shorten(text: str, most: int = 80) -> str:
    """Return text for a message: quoted if it has unprintable characters, and truncated if it is
    long.

    Args:
        text: a name, a path or an error message.
        most: maximum number of characters.
    """
    plain = text if text and text.isprintable() else repr(text)
    return plain if len(plain) <= most else f"{plain[:most]}... ({len(text):,} characters)"

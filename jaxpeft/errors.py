"""The errors that jaxpeft raises at its users: each lists every problem found, one a line, with the
fix.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

_LONGEST_NAME = 200
"""Of longer texts nobody meant a name."""


class JaxpeftError(Exception):
    """A refusal with one or more problems.

    Args:
        problems: one string a problem, each naming the field, the value, the file and the fix; one
            string is one problem.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (
            (problems,) if isinstance(problems, str) else tuple(problems)
        )
        super().__init__("\n".join(self.problems))


class ConfigError(JaxpeftError, ValueError):
    """A config, a model's config or a method's hyperparameters cannot be used."""


class DataError(JaxpeftError, ValueError):
    """Data rows cannot be used."""


class WorkerError(JaxpeftError, RuntimeError):
    """A process that makes batches has ended, or hangs."""


class WeightsError(JaxpeftError, ValueError):
    """A weight file cannot be used, or does not fit the model."""


class AdapterError(JaxpeftError, ValueError):
    """An adapter folder cannot be used, or does not fit the base."""


class TargetError(JaxpeftError, ValueError):
    """A method's targets do not name sites of the model."""


class CheckpointError(JaxpeftError, RuntimeError):
    """A checkpoint cannot be resumed from."""


class DamagedError(CheckpointError, ValueError):
    """Steps were saved, and none of them is good: starting again meets the same."""


class PeersError(JaxpeftError, RuntimeError):
    """The processes of a run have not found each other, or have lost one."""


class ExportError(JaxpeftError, RuntimeError):
    """What was written does not compute what it was made from."""


class TrainingError(JaxpeftError, RuntimeError):
    """Training cannot go on."""


def show(value: object, most: int = 80) -> str:
    """Return a value as a message shows it: as Python writes it, and cut where that is long.

    Args:
        value: what the user gave.
        most: how many characters are shown.
    """
    try:
        text = repr(value)
    except (
        ValueError,
        RecursionError,
    ):  # a whole number of thousands of digits; lists in lists in lists
        return f"{type(value).__name__} that is too large to be shown"
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """Return a hint such as `; did you mean 'rank'?`, or an empty string where nothing is near.

    Args:
        name: what was written.
        known: what could have been meant.
        n: how many names to offer at most.
    """
    near = (
        difflib.get_close_matches(name, list(known), n=n, cutoff=0.5)
        if len(name) <= _LONGEST_NAME
        else []
    )
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def shorten(text: str, most: int = 80) -> str:
    """Return a text for a message: in quotes where it has what cannot be printed, and cut where it
    is long.

    Args:
        text: a name, a path or what an error says.
        most: how many characters are shown.
    """
    plain = text if text and text.isprintable() else repr(text)
    return plain if len(plain) <= most else f"{plain[:most]}... ({len(text):,} characters)"

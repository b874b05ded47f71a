"""Read untrusted JSON files, and reject contents that no valid config has."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from jaxpeft.errors import WeightsError

_DIGITS = 300
"""Integers with more digits exceed the range of a float."""
_LEVELS = 100


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        WeightsError: the file is missing or invalid; gives the line and column.
    """
    if not path.is_file():
        raise WeightsError(
            f"{path}: no such file; a model folder contains config.json and model.safetensors"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise WeightsError(f"{path}: not UTF-8 text at byte {error.start}") from error
    if text.startswith("version https://git-lfs"):
        raise WeightsError(
            f"{path}: a Git LFS pointer, not the file; run `git lfs pull` in its repository"
        )
    return parse_json(text, str(path))


def parse_json(text: str | bytes, where: str, *, once: bool = False) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        text: JSON text.
        where: name of the source, for messages.
        once: whether duplicate keys are errors.

    Raises:
        WeightsError: the text is not a JSON object, is nested more than 100 levels deep, or
            contains an integer of more than 300 digits or an unpaired surrogate.
    """
    try:
        value: object = json.loads(
            text, parse_int=_whole_number, object_pairs_hook=_once if once else None
        )
        deep = next((True for level in _levels(value) if level > _LEVELS), False)
        json.dumps("" if deep else value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise WeightsError(
            f"{where}:{error.lineno}:{error.colno}: not JSON ({error.msg})"
        ) from error
    except UnicodeDecodeError as error:
        raise WeightsError(f"{where}: not UTF-8 text at byte {error.start}") from error
    except UnicodeEncodeError as error:
        raise WeightsError(
            f"{where}: contains an unpaired surrogate (\\ud800 to \\udfff), which is not valid text"
        ) from error
    except _NumberError as error:
        raise WeightsError(
            f"{where}: contains an integer of {error} digits, which is too large"
        ) from error
    except _TwiceError as error:
        raise WeightsError(f"{where}: has the key {error} twice") from error
    except RecursionError:
        deep, value = True, None
    if deep:
        raise WeightsError(f"{where}: nested too deeply to be a config")
    if not isinstance(value, dict):
        raise WeightsError(
            f"{where}: must contain a JSON object, contains a {type(value).__name__}"
        )
    return cast(dict[str, Any], value)


class _NumberError(Exception):
    """An integer is too long."""


class _TwiceError(Exception):
    """An object contains a key twice."""


def _whole_number(text: str) -> int:
    if len(text) > _DIGITS:
        raise _NumberError(f"{len(text):,}")
    return int(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _TwiceError(repr(key))
        found[key] = value
    return found


def _levels(value: object) -> Iterator[int]:
    """Yield the nesting level of every list and object."""
    waiting: list[tuple[object, int]] = [(value, 1)]
    while waiting:
        one, level = waiting.pop()
        inside = (
            one.values() if isinstance(one, Mapping) else one if isinstance(one, list) else None
        )
        if inside is not None:
            yield level
            waiting += [(each, level + 1) for each in cast(list[object], inside)]

"""JSON files from outside: read by one reader, which refuses what no config holds before anything
trips over it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from jaxpeft.errors import WeightsError

_DIGITS = 300
"""Longer whole numbers are more than a float can be."""
_LEVELS = 100


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        WeightsError: the file is missing, or holds something else; the message gives the line and
            column.
    """
    if not path.is_file():
        raise WeightsError(
            f"{path}: no such file; a model folder holds config.json and model.safetensors"
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
    """Read a JSON object from its text.

    Args:
        text: the content.
        where: what to call it in a message.
        once: whether a key may stand once only in an object.

    Raises:
        WeightsError: it is not JSON or no object, is nested more than 100 levels deep, or holds a
            whole number of more than 300 digits or half of a surrogate pair.
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
            f"{where}: holds half of a surrogate pair (\\ud800 to \\udfff), which is no text"
        ) from error
    except _NumberError as error:
        raise WeightsError(
            f"{where}: holds a whole number of {error} digits; no setting is that large"
        ) from error
    except _TwiceError as error:
        raise WeightsError(f"{where}: names {error} twice") from error
    except RecursionError:
        deep, value = True, None
    if deep:
        raise WeightsError(f"{where}: nested too deeply to be a config")
    if not isinstance(value, dict):
        raise WeightsError(f"{where}: must hold a JSON object, holds a {type(value).__name__}")
    return cast(dict[str, Any], value)


class _NumberError(Exception):
    """A whole number is too long."""


class _TwiceError(Exception):
    """A key stands twice in one object."""


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
    """Yield the level of every list and object."""
    waiting: list[tuple[object, int]] = [(value, 1)]
    while waiting:
        one, level = waiting.pop()
        inside = (
            one.values() if isinstance(one, Mapping) else one if isinstance(one, list) else None
        )
        if inside is not None:
            yield level
            waiting += [(each, level + 1) for each in cast(list[object], inside)]

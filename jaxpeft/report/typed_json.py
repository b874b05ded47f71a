"""Read a JSON object as a dataclass, and check the type of each field."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, cast, get_args, get_origin

from jaxpeft.core.options import convert, hints_of
from jaxpeft.errors import DataError, shorten, show

T = TypeVar("T")
_Read = tuple[Any, list[str]]
"""A value, and the problems with it."""


def instance_of(cls: type[T], values: object, file: Path) -> T:
    """Return an instance of a dataclass whose fields may be dataclasses, lists and mappings of
    them; ignore other fields of the objects.

    Args:
        cls: the dataclass; a field with a default may be missing. Its method `problems()`, if any,
            checks several fields together.
        values: the object.
        file: its file, for messages.

    Raises:
        DataError: lists every field that is missing or invalid.
    """
    found, problems = _read(values, cls, "")
    if problems:
        raise DataError([f"{file}: {problem}" for problem in problems])
    return cast(T, found)


def _read(value: object, hint: Any, name: str) -> _Read:
    """Return the value of a field, and its problems."""
    choices = [one for one in get_args(hint) if one is not type(None)]
    if get_origin(hint) in (Union, types.UnionType) and dataclasses.is_dataclass(choices[0]):
        return (None, []) if value is None else _read(value, choices[0], name)
    if get_origin(hint) is tuple and dataclasses.is_dataclass(choices[0]):
        return _read_list(value, choices[0], name)
    if get_origin(hint) is dict and dataclasses.is_dataclass(choices[-1]):
        return _read_mapping(value, choices[-1], name)
    if dataclasses.is_dataclass(hint):
        return _read_object(value, hint, name)
    found, problems = convert(value, hint, name)
    return found, [f"{problem}; was the file edited?" for problem in problems]


def _read_object(value: object, cls: Any, name: str) -> _Read:
    if not isinstance(value, Mapping):
        return value, [_must_be("an object", value, name)]
    values = cast("Mapping[str, Any]", value)
    found: dict[str, Any] = {}
    problems: list[str] = []
    for field in dataclasses.fields(cls):
        inside = f"{name}.{field.name}" if name else field.name
        if field.name in values:
            found[field.name], wrong = _read(values[field.name], hints_of(cls)[field.name], inside)
            problems += wrong
        elif field.default is field.default_factory is dataclasses.MISSING:
            problems.append(f"{inside}: is missing; was it written by another version of jaxpeft?")
    if problems:
        return value, problems
    instance: Any = cls(**found)
    check: Callable[[], list[str]] | None = getattr(instance, "problems", None)
    prefix = f"{name}." if name else ""
    return instance, [f"{prefix}{problem}" for problem in (check() if check else [])]


def _read_list(value: object, cls: Any, name: str) -> _Read:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return value, [_must_be("a list of objects", value, name)]
    pairs = [
        _read(one, cls, f"{name}[{i}]") for i, one in enumerate(cast("Sequence[object]", value))
    ]
    return tuple(one for one, _ in pairs), [wrong for _, problems in pairs for wrong in problems]


def _read_mapping(value: object, cls: Any, name: str) -> _Read:
    if not isinstance(value, Mapping):
        return value, [_must_be("an object", value, name)]
    pairs = {
        key: _read(one, cls, f"{name}.{shorten(key)}")
        for key, one in cast("Mapping[str, object]", value).items()
    }
    found = {key: one for key, (one, _) in pairs.items()}
    return found, [wrong for _, problems in pairs.values() for wrong in problems]


def _must_be(what: str, value: object, name: str) -> str:
    where = f"{name}: " if name else ""
    return f"{where}must be {what}, is {show(value)} ({type(value).__name__}); was the file edited?"

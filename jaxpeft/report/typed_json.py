"""Read a JSON object as a dataclass, and check the type of each field."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from jaxpeft.core.options import convert, hints_of
from jaxpeft.errors import DataError

T = TypeVar("T")


def instance_of(cls: type[T], values: Mapping[str, Any], file: Path) -> T:
    """Return an instance of a dataclass; ignore other fields of the object.

    Args:
        cls: the dataclass; a field with a default may be missing.
        values: the object.
        file: its file, for messages.

    Raises:
        DataError: lists every field that is missing or has another type.
    """
    found: dict[str, Any] = {}
    problems: list[str] = []
    for field in dataclasses.fields(cast(Any, cls)):
        name, where = field.name, f"{file}: {field.name}"
        if name in values:
            found[name], wrong = convert(values[name], hints_of(cls)[name], where)
            problems += [f"{problem}; was the file edited?" for problem in wrong]
        elif field.default is field.default_factory is dataclasses.MISSING:
            problems.append(f"{where}: is missing; was it written by another version of jaxpeft?")
    if problems:
        raise DataError(problems)
    return cls(**found)

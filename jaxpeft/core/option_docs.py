"""The text about options for help pages and schemas, read from the dataclass fields."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from jaxpeft.core.options import ALIASES, hints_of

_SIGNS = {"above": ">", "at_least": ">=", "below": "<", "at_most": "<="}


@dataclass(frozen=True)
class OptionDoc:
    """The documentation of one option.

    Attributes:
        name: name of the option, without its section.
        type: its type, such as `int | None`.
        default: its default as a Python literal.
        bounds: its bounds, such as `> 0, <= 1`; may be empty.
        doc: description.
    """

    name: str
    type: str
    default: str
    bounds: str
    doc: str


def option_docs(cls: type[Any]) -> tuple[OptionDoc, ...]:
    """Return the options of a dataclass in order, without fields that are nested sections."""
    hints = hints_of(cls)
    return tuple(
        OptionDoc(
            field.name,
            type_text(hints[field.name]),
            repr(default_of(field)),
            ", ".join(
                f"{sign} {field.metadata[bound]}"
                for bound, sign in _SIGNS.items()
                if bound in field.metadata
            ),
            doc_of(field),
        )
        for field in dataclasses.fields(cls)
        if field.init and not dataclasses.is_dataclass(hints[field.name])
    )


def doc_of(field: dataclasses.Field[Any]) -> str:
    """Return the description of an option, including its alias."""
    others = [alias for alias, name in ALIASES.items() if name == field.name]
    also = "".join(f"; also called `{other}`" for other in others)
    return f"{field.metadata['doc']}{also}"


def type_text(hint: Any) -> str:
    """Return a type as an annotation, with `list` for tuples."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " | ".join(type_text(choice) for choice in inside)
    if origin is Literal:
        return " | ".join(map(repr, inside))
    if origin is tuple:
        return f"list[{type_text(inside[0])}]"
    if origin is dict:
        return f"dict[{', '.join(map(type_text, inside))}]"
    return "None" if hint is type(None) else hint.__name__


def first_line(cls: type[Any]) -> str:
    """Return the first sentence of a class's docstring, on one line."""
    summary = str(cls.__doc__).strip().split("\n\n")[0]
    return " ".join(summary.split())


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return the default of an option as plain values."""
    if field.default is not dataclasses.MISSING:
        return list(field.default) if isinstance(field.default, tuple) else field.default
    return typing.cast(Any, field.default_factory)()

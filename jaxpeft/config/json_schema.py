"""JSON schema of configs, with which editors complete and check YAML and JSON configs."""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

from jaxpeft.config.schema import Config
from jaxpeft.core.method import Method
from jaxpeft.core.option_docs import default_of, doc_of, first_line
from jaxpeft.core.options import ALIASES, bounds_of, hints_of
from jaxpeft.methods import METHODS

_KEYWORDS = {
    "above": "exclusiveMinimum",
    "at_least": "minimum",
    "below": "exclusiveMaximum",
    "at_most": "maximum",
}
_SCALARS = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}


def schema() -> dict[str, Any]:
    """Return the schema of a config file (JSON Schema, draft 2020-12).

    It checks each option by itself; incompatible options are only found when the config is loaded.
    """
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A jaxpeft config",
        **_section(
            Config, {"$schema": {"type": "string", "description": "this schema, for editors"}}
        ),
        "$defs": {"method": _method()},
    }


def schema_text() -> str:
    """Return the schema as the text of a file."""
    return json.dumps(schema(), indent=2) + "\n"


def _section(cls: type[Any], more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    hints = hints_of(cls)
    own = {
        field.name: _option(field, hints[field.name])
        for field in dataclasses.fields(cls)
        if field.init
    }
    own |= {alias: own[name] for alias, name in ALIASES.items() if name in own}
    return {
        "type": "object",
        "description": first_line(cls),
        "properties": {**(more or {}), **own},
        "additionalProperties": False,
    }


def _method() -> dict[str, Any]:
    """Return the schema of a method's section; its `name` (default lora) determines the options."""
    return {
        "type": "object",
        "description": "The fine-tuning method: `name` and its options.",
        "properties": {"name": {"enum": list(METHODS), "default": "lora"}},
        "allOf": [
            {
                "if": {
                    "properties": {"name": {"const": name}},
                    **({} if name == "lora" else {"required": ["name"]}),
                },
                "then": _section(cls, {"name": {"const": name}}),
            }
            for name, cls in METHODS.items()
        ],
    }


def _option(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    if hint is Method:
        return {"$ref": "#/$defs/method"}
    if dataclasses.is_dataclass(hint):
        return _section(_class(hint))
    return {
        "description": doc_of(field),
        "default": default_of(field),
        **_type(hint, field.metadata),
    }


def _type(hint: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return {"anyOf": [_type(choice, metadata) for choice in inside]}
    if origin is Literal:
        return {"enum": list(inside)}
    if origin is tuple:
        return {"type": "array", "items": _type(inside[0], metadata)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _type(inside[1], metadata)}
    if hint is Method:
        return {"$ref": "#/$defs/method"}
    if dataclasses.is_dataclass(hint):
        return _section(_class(hint))
    limits = (
        {_KEYWORDS[name]: bound for name, bound in bounds_of(hint, metadata).items()}
        if hint in (int, float)
        else {}
    )
    return {"type": _SCALARS[hint], **limits}


def _class(hint: Any) -> type[Any]:
    return hint

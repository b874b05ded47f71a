"""The methods, one file each. A new method is one file, and one line in `_ALL`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxpeft.core.method import Method
from jaxpeft.core.options import parse
from jaxpeft.errors import ConfigError, nearest
from jaxpeft.methods.bitfit import BitFit
from jaxpeft.methods.full import Full
from jaxpeft.methods.head import Head
from jaxpeft.methods.lora import LoRA

_ALL: tuple[type[Method], ...] = (LoRA, BitFit, Head, Full)

METHODS: Mapping[str, type[Method]] = {method.name: method for method in _ALL}
"""Every method by its name in configs and files."""


def from_dict(values: Mapping[str, Any]) -> Method:
    """Makes the method whose `as_dict` gives these values.

    Raises:
        ConfigError: there is no such method, or an option of it is wrong.
    """
    name = str(values.get("name"))
    if name not in METHODS:
        raise ConfigError(f"method.name: {name!r} is not a method{nearest(name, METHODS)} (known: {', '.join(METHODS)})")
    method, problems = parse(METHODS[name], {key: value for key, value in values.items() if key != "name"}, "method")
    if method is None:
        raise ConfigError(problems)
    return method


MARKERS: Mapping[str, type[Method]] = {
    (method.leaf_names or method.root_names)[0]: method
    for method in reversed(_ALL)  # of methods that compute alike, such as LoRA's, the first
    if method.leaf_names or method.root_names
}
"""The method that computes a module which holds a marker leaf."""

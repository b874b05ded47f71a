"""Several methods in one adapter folder: the additional methods that a method's files can store
(`PeftFormat.companion`).

In jaxpeft they are one mixed method. A part that only trains the head adds no options.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jaxpeft.core.method import Method
from jaxpeft.core.training_hooks import trains_head_alone
from jaxpeft.methods import METHODS

_COMPANIONS = [method.peft.companion for method in METHODS.values() if method.peft.companion]
MODULES = "|".join(sorted({re.escape(companion.module) for companion in _COMPANIONS}))
"""A regular expression of the modules in which PEFT stores an additional method."""


def split(method: Method) -> tuple[Method, tuple[Method, ...]] | None:
    """Return the main method of a folder and the additional ones; None if it needs several folders.

    Args:
        method: the method to save.
    """
    if method.parts() == (method,):
        return method, ()
    parts = [part for part in method.parts() if not trains_head_alone(part)]
    if len(parts) == 1 and parts[0].peft.layout == method.peft.layout:
        return parts[0], ()
    for main in parts:
        others = tuple(part for part in parts if part is not main)
        if (
            others
            and main.peft.companion is not None
            and {part.name for part in others} == {main.peft.companion.method}
        ):
            return main, others
    return None


def rename(method: Method, text: str) -> str:
    """Convert a tensor name between its form in a folder of one method and of several methods.

    The conversion is its own inverse, so a wrong name stays wrong.

    Args:
        method: the method of the folder.
        text: the name, or a message that contains it.
    """
    main, others = split(method) or (method, ())
    if main.peft.companion is None or not others:
        return text
    module, own = (
        f".{main.peft.companion.module}",
        "|".join(map(re.escape, METHODS[main.peft.companion.method].peft.tensors.values())),
    )
    return re.sub(
        rf"({re.escape(module)})?(\.(?:{own})\b)",
        lambda found: found[2] if found[1] else module + found[2],
        text,
    )


def write_options(main: Method, sites: Mapping[str, Method]) -> dict[str, Any]:
    """Return the option that describes the additional methods; empty if there are none.

    Args:
        main: the main method.
        sites: the additional method of each site, by the site's Hugging Face name.
    """
    return (
        {main.peft.companion.option: main.peft.companion.write(sites)}
        if main.peft.companion and sites
        else {}
    )


def read_options(
    kind: type[Method], config: Mapping[str, Any], tied: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return `(options, problems)` of the additional methods in an `adapter_config.json`.

    Args:
        kind: the file's main method.
        config: its content.
        tied: whether the language-model head is tied to the embedding.
    """
    option = config.get(kind.peft.companion.option) if kind.peft.companion else None
    return kind.peft.companion.read(option, tied) if kind.peft.companion and option else ([], [])

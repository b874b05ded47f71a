"""Several methods in one adapter folder: those that a method's files hold beside it, as
`Method.beside` says.

Here they are a method made of methods. One that trains the head alone, and so names modules that
are saved whole, adds nothing to the options.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jaxpeft.core.method import Method
from jaxpeft.core.training_hooks import trains_head_alone
from jaxpeft.methods import METHODS

MODULES = "|".join(
    sorted(
        {re.escape(method.peft.beside.module) for method in METHODS.values() if method.peft.beside}
    )
)
"""An expression of the modules in which PEFT keeps a method beside another."""


def split(method: Method) -> tuple[Method, tuple[Method, ...]] | None:
    """Return the method whose options a folder holds, and those beside it; None where it takes
    several folders.

    Args:
        method: what is to be saved.
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
            and main.peft.beside is not None
            and {part.name for part in others} == {main.peft.beside.method}
        ):
            return main, others
    return None


def rename(method: Method, text: str) -> str:
    """Return a tensor's name, or a text that holds it, with that of a folder of its method alone
    turned to that beside another, and back.

    A name that is wrong where it stands stays wrong: it is turned as well.

    Args:
        method: what the folder holds.
        text: the name, or a message.
    """
    main, others = split(method) or (method, ())
    if main.peft.beside is None or not others:
        return text
    module, own = (
        f".{main.peft.beside.module}",
        "|".join(map(re.escape, METHODS[main.peft.beside.method].peft.tensors.values())),
    )
    return re.sub(
        rf"({re.escape(module)})?(\.(?:{own})\b)",
        lambda found: found[2] if found[1] else module + found[2],
        text,
    )


def write_options(main: Method, sites: Mapping[str, Method]) -> dict[str, Any]:
    """Return the option of the methods beside a method, empty where there are none.

    Args:
        main: the method.
        sites: those beside it by the Hugging Face name of their sites.
    """
    return (
        {main.peft.beside.option: main.peft.beside.write(sites)}
        if main.peft.beside and sites
        else {}
    )


def read_options(
    kind: type[Method], config: Mapping[str, Any], tied: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return `(options, problems)`: the options of each method that an `adapter_config.json` holds
    beside its own.

    Args:
        kind: the file's own method.
        config: its content.
        tied: whether the language-model head is the embedding.
    """
    given = config.get(kind.peft.beside.option) if kind.peft.beside else None
    return kind.peft.beside.read(given, tied) if kind.peft.beside and given else ([], [])

"""Options of a config by section, for help and documentation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from jaxpeft.config.candidates import CandidateConfig
from jaxpeft.config.schema import Config
from jaxpeft.core.method import Method
from jaxpeft.core.option_docs import OptionDoc, first_line, option_docs
from jaxpeft.core.options import hints_of
from jaxpeft.errors import ConfigError, nearest, shorten
from jaxpeft.methods import METHODS

NAME_OF_METHOD = OptionDoc(
    "name", "str", "'lora'", "", "fine-tuning method, one of `config.method.NAME`"
)


@dataclass(frozen=True)
class SectionDoc:
    """One section of a config.

    Attributes:
        name: name such as `model`, or `method.NAME` for the options of a method.
        doc: description.
        paper: source of a method, otherwise empty.
        options: options in order.
    """

    name: str
    doc: str
    options: tuple[OptionDoc, ...]
    paper: str = ""


def sections() -> tuple[SectionDoc, ...]:
    """Return every section of a config, with a section per method."""
    return tuple(_sections())


def section(name: str) -> SectionDoc:
    """Return a section by its name, with or without the prefix `config.`.

    Raises:
        ConfigError: no such section exists.
    """
    known = {found.name: found for found in sections()}
    key = name.removeprefix("config.")
    if key not in known:
        main = ", ".join(one for one in known if "." not in one)
        raise ConfigError(
            f"--help {shorten(name)}: no such section{nearest(key, known)} (known: {main}, and"
            " method.NAME)"
        )
    return known[key]


def _sections() -> Iterator[SectionDoc]:
    for field in dataclasses.fields(Config):
        hint: Any = hints_of(Config)[field.name]
        if hint is Method:
            yield SectionDoc(field.name, "The fine-tuning method.", (NAME_OF_METHOD,))
            yield from (
                SectionDoc(f"method.{name}", first_line(cls), option_docs(cls), cls.paper)
                for name, cls in METHODS.items()
            )
        elif dataclasses.is_dataclass(hint):
            yield SectionDoc(
                field.name, first_line(cast(type[Any], hint)), option_docs(cast(type[Any], hint))
            )
    yield SectionDoc(
        "compare.candidates",
        f"{first_line(CandidateConfig)} Its `method` is a section like `config.method`.",
        option_docs(CandidateConfig),
    )

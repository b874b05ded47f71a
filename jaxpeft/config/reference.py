"""The options of a config by section, as help and documentation print them."""

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
    "name", "str", "'lora'", "", "the fine-tuning method, one of `config.method.NAME`"
)


@dataclass(frozen=True)
class SectionDoc:
    """One section of a config.

    Attributes:
        name: such as `model`; of a method's options `method.NAME`.
        doc: what it is about.
        paper: where a method comes from, empty elsewhere.
        options: in their order.
    """

    name: str
    doc: str
    options: tuple[OptionDoc, ...]
    paper: str = ""


def sections() -> tuple[SectionDoc, ...]:
    """Return every section of a config, each method's options as one of their own."""
    return tuple(_sections())


def section(name: str) -> SectionDoc:
    """Return a section by its name, with or without `config.` in front.

    Raises:
        ConfigError: there is none of that name.
    """
    known = {found.name: found for found in sections()}
    asked = name.removeprefix("config.")
    if asked not in known:
        usual = ", ".join(one for one in known if "." not in one)
        raise ConfigError(
            f"--help {shorten(name)}: no section of that name{nearest(asked, known)} (known:"
            f" {usual}, and method.NAME)"
        )
    return known[asked]


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
        f"{first_line(CandidateConfig)} Its `method` is a section like `config.method`, which is"
        " taken where it is left out.",
        option_docs(CandidateConfig),
    )

"""Parse the command line into a frozen dataclass of options, like a section of a config."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, get_args, get_origin

from jaxpeft.config.literals import read_value
from jaxpeft.core.option_docs import OptionDoc, option_docs
from jaxpeft.core.options import hints_of, option, parse
from jaxpeft.errors import ConfigError, nearest, shorten

A = TypeVar("A")
Overrides = tuple[tuple[str, str], ...]
"""`(dotted option, text)` pairs, from `--config.x.y=value`."""
HELP = ("--help", "-h", "-help")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Arguments of every command."""

    traceback: bool = option(False, "show the traceback of an error")


@dataclass(frozen=True, kw_only=True)
class ConfigArguments(Arguments):
    """Arguments of every command that reads a config."""

    config: str | None = option(
        None,
        "config file: .py, .yaml or .json; override an option by --config.SECTION.OPTION=VALUE",
    )
    schema: bool = option(False, "print the JSON schema of YAML and JSON configs, and exit")


def argument_docs(cls: type[Arguments]) -> tuple[OptionDoc, ...]:
    """Return the documentation of a command's arguments; those shared by all commands come last."""
    shared = {field.name for field in dataclasses.fields(ConfigArguments)} - {"config"}
    docs = [
        dataclasses.replace(one, doc=f"{one.doc}; comma separated")
        if one.type.startswith("list[")
        else one
        for one in option_docs(cls)
    ]
    return tuple(sorted(docs, key=lambda one: one.name in shared))


def flag(name: str) -> str:
    """Return the command-line flag of an argument."""
    return f"--{name.replace('_', '-')}"


def read_arguments(cls: type[A], argv: Sequence[str]) -> tuple[A, Overrides]:
    """Parse a command line.

    Args:
        cls: frozen dataclass of options. Lists are separated by commas, or repeat their flag.
        argv: arguments, without the program name.

    Returns:
        The arguments, and config overrides if the command reads a config.

    Raises:
        ConfigError: lists every unknown argument, and missing or wrong value.
    """
    overrides, rest = (
        split_overrides(argv) if issubclass(cls, ConfigArguments) else ((), list(argv))
    )
    texts, remaining = _parser(cls).parse_known_args(rest)
    problems = _unknown(remaining, cls)
    values = {name: _value(text, hints_of(cls)[name]) for name, text in vars(texts).items()}
    arguments, wrong = parse(cls, values, "")
    problems += [_in_flags(problem) for problem in wrong]
    if problems or arguments is None:
        raise ConfigError(problems)
    return arguments, overrides


def split_overrides(argv: Sequence[str]) -> tuple[Overrides, list[str]]:
    """Split a command line into config overrides (`--config.x.y=value`, `--config.x.y value`) and
    other arguments.
    """
    overrides: list[tuple[str, str]] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        name = word.lstrip("-")
        if word.startswith("-") and name.startswith("config."):
            dotted, equals, value = name.removeprefix("config.").partition("=")
            overrides.append((dotted, value if equals else next(words, "")))
        else:
            rest.append(word)
    return tuple(overrides), rest


class _Parser(argparse.ArgumentParser):
    """Splits a command line into flags and texts; the options check types and bounds."""

    def error(self, message: str) -> typing.NoReturn:
        """Raise an argparse error as a ConfigError."""
        named = message.removeprefix("argument ")
        raise ConfigError(
            f"{named.split('/')[0].split(':')[0]}:{named.partition(':')[2]}; see --help"
        )


def _parser(cls: type[Any]) -> _Parser:
    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for field in dataclasses.fields(cls):
        also: tuple[str, ...] = field.metadata.get("also", ())
        spellings = dict.fromkeys((flag(field.name), f"--{field.name}", *map(flag, also)))
        if hints_of(cls)[field.name] is bool:
            parser.add_argument(*spellings, dest=field.name, nargs="?", const="true")
        else:
            parser.add_argument(
                *spellings,
                dest=field.name,
                action="append" if _list_flag(cls, field.name) else "store",
            )
    return parser


def _list_flag(cls: type[Any], name: str) -> bool:
    hint = hints_of(cls)[name]
    return any(get_origin(choice) is tuple for choice in (hint, *get_args(hint)))


def _value(text: str | list[str], hint: Any) -> Any:
    if isinstance(text, str):
        # a folder may be named `none`
        return text if hint == str | None else read_value(text, hint)
    return tuple(part for one in text for part in one.split(",") if part)


def _unknown(words: Sequence[str], cls: type[Any]) -> list[str]:
    """Return the problems of unparsed words; a word after an unknown flag is its value."""
    known = [flag(field.name) for field in dataclasses.fields(cls)]
    found: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        name = word.partition("=")[0]
        if word.startswith("-"):
            found.append(f"{shorten(name)}: no such option{nearest(name, known)}; see --help")
        elif not before.startswith("-") or "=" in before:
            found.append(f"{shorten(word)!r}: not an option; see --help")
    return found


def _in_flags(problem: str) -> str:
    """Convert a problem of a field to one of its flag: `.slices: must be ...` becomes
    `--slices: must be ...`.
    """
    name, colon, why = problem.removeprefix(".").partition(":")
    return f"{flag(name)}{colon}{why}"

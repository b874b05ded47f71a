"""Text of `--help`: options of a command and of its config."""

from __future__ import annotations

import itertools
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from jaxpeft.command.parser import HELP, Arguments, ConfigArguments, argument_docs, flag
from jaxpeft.config import reference
from jaxpeft.core.option_docs import OptionDoc
from jaxpeft.errors import ConfigError

_WIDEST = 100
_MORE = "--help SECTION prints one section, such as --help method.lora"


def requested_section(argv: Sequence[str]) -> str | None:
    """Return the section given to `--help`, empty for all sections; None without `--help`."""
    for word, following in itertools.pairwise([*argv, ""]):
        name, _, section = word.partition("=")
        if name in HELP:
            return section or ("" if following.startswith("-") else following)
    return None


def help_text(cls: type[Arguments], about: str, section: str) -> str:
    """Return a command's help.

    Args:
        cls: class of its arguments.
        about: introduction.
        section: config section to print; empty for all.

    Raises:
        ConfigError: no such section exists, or the command reads no config.
    """
    configured = issubclass(cls, ConfigArguments)
    if section and not configured:
        raise ConfigError(
            f"--help {section}: this command reads no config; see --help for its options"
        )
    if section:
        return _lines(_section(reference.section(section)))
    own = [
        about.strip(),
        "",
        "Command options:",
        "",
        *_options(argument_docs(cls), flags=True),
    ]
    return _lines([*own, *(_config() if configured else ())])


def _config() -> Iterator[str]:
    yield "Config options, set by --config.SECTION.OPTION=VALUE:"
    yield _MORE
    yield ""
    for one in reference.sections():
        if not one.name.startswith("method."):
            yield from _section(one)
        if one.name == "method":
            yield "  See --help method.NAME for the options of each:"
            methods = [found for found in reference.sections() if found.name.startswith("method.")]
            for method in methods:
                yield from _wrap(f"  {method.name.removeprefix('method.'):18}{method.doc}", 20)
            yield ""


def _section(one: reference.SectionDoc) -> Iterator[str]:
    yield from _wrap(f"config.{one.name}: {one.doc}{f' ({one.paper})' if one.paper else ''}", 0)
    yield ""
    yield from _options(one.options, flags=False)


def _options(options: Iterable[OptionDoc], *, flags: bool) -> Iterator[str]:
    for one in options:
        name = flag(one.name) if flags else one.name
        bounds = f", {one.bounds}" if one.bounds else ""
        yield from _wrap(f"  {name}: {one.type} = {one.default}{bounds}", 6)
        yield from _wrap(f"      {one.doc}", 6)
    yield ""


def _wrap(text: str, indent: int) -> list[str]:
    width = min(_WIDEST, shutil.get_terminal_size().columns)
    return textwrap.wrap(
        text, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(lines).rstrip() + "\n"

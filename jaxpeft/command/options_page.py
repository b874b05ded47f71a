"""Write the page of all options: `python -m jaxpeft.command.options_page > docs/options.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from jaxpeft.command.parser import argument_docs, flag
from jaxpeft.command.verbs import VERBS, command_line
from jaxpeft.config import reference
from jaxpeft.core.option_docs import OptionDoc

_INTRODUCTION = """# Options

Every option of a config, with its type, its default, its bounds and what it does; then the options
of each command. `python -m jaxpeft.command.options_page` makes this page. `python -m jaxpeft.train
--help` prints the same, and `--help method.lora` one section.

An option is set in a config file or on the command line:

| where | how |
|---|---|
| `NAME.py` | `config.optimizer.learning_rate = 1e-4` ([a recipe](../configs/quickstart.py)) |
| `NAME.yaml` | `optimizer: {learning_rate: 1e-4}` |
| `NAME.json` | `{"optimizer": {"learning_rate": 1e-4}}` |
| the command line | `--config.optimizer.learning_rate=1e-4` |

A YAML or JSON file holds what differs from the defaults. `python -m jaxpeft.train --schema >
jaxpeft.schema.json` writes the JSON schema of both. With `# yaml-language-server:
$schema=jaxpeft.schema.json` as the first line of a YAML file, or `"$schema": "jaxpeft.schema.json"`
in a JSON file, an editor completes options and checks their values.
"""


def page() -> str:
    """Return the page."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield _INTRODUCTION
    for one in reference.sections():
        level = "###" if "." in one.name else "##"
        yield f"{level} config.{one.name}\n"
        yield f"{_escape(one.doc)}{f' Paper: {one.paper}' if one.paper else ''}\n"
        yield from _table(one.options)
    yield "## Commands\n"
    for verb in VERBS:
        module = command_line(verb)
        yield f"### {verb}\n"
        yield f"{str(module.__doc__).splitlines()[0]}\n"
        yield from _table(argument_docs(module.ARGUMENTS), flags=True)


def _table(options: Iterable[OptionDoc], *, flags: bool = False) -> Iterator[str]:
    yield "| option | type | default | bounds | meaning |"
    yield "|---|---|---|---|---|"
    for one in options:
        name = flag(one.name) if flags else one.name
        bounds = f"`{one.bounds}`" if one.bounds else ""
        yield (
            f"| `{name}` | `{_escape(one.type)}` | `{_escape(one.default)}` | {bounds} |"
            f" {_escape(one.doc)} |"
        )
    yield ""


def _escape(text: str) -> str:
    """Return a text for a cell of a table, where a bar ends the cell."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(page())

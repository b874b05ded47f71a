"""Generate the options page: `python -m jaxpeft.command.options_page > docs/options.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from jaxpeft.command.parser import argument_docs, flag
from jaxpeft.command.verbs import VERBS, command_line
from jaxpeft.config import reference
from jaxpeft.core.option_docs import OptionDoc

_INTRODUCTION = """# Options

All config options with their types, defaults and bounds, followed by the options of each command.
`python -m jaxpeft.command.options_page` generates this page. `python -m jaxpeft.train --help`
prints the same; `--help method.lora` prints one section.

Set an option in a config file or on the command line:

| where | how |
|---|---|
| `NAME.py` | `config.optimizer.learning_rate = 1e-4` ([a recipe](../configs/quickstart.py)) |
| `NAME.yaml` | `optimizer: {learning_rate: 1e-4}` |
| `NAME.json` | `{"optimizer": {"learning_rate": 1e-4}}` |
| the command line | `--config.optimizer.learning_rate=1e-4` |

A YAML or JSON file contains the options that differ from the defaults. `python -m jaxpeft.train
--schema > jaxpeft.schema.json` writes the JSON schema of both. With `# yaml-language-server:
$schema=jaxpeft.schema.json` as the first line of a YAML file, or `"$schema": "jaxpeft.schema.json"`
in a JSON file, an editor completes options and checks their values.
"""


def page() -> str:
    """Return the text of the page."""
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
    """Escape text for a table cell."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(page())

"""Inspect the data: `python -m jaxpeft.data --config configs/NAME.py [--show 3]`.

Set options of the config by name: `--config.data.max_length=256`. Prints rows as the model will see
them, with the tokens in the loss highlighted, and statistics: lengths, truncated and dropped rows,
packing, labels. Reads no weights.
"""

from __future__ import annotations

import logging
import sys
from contextlib import nullcontext
from dataclasses import dataclass

from rich.console import Console

from jaxpeft.command.parser import ConfigArguments, Overrides
from jaxpeft.command.running import load_config, run_command
from jaxpeft.config import Config
from jaxpeft.core.options import option


@dataclass(frozen=True, kw_only=True)
class DataArguments(ConfigArguments):
    """The arguments of `data`."""

    show: int = option(3, "rows to show", at_least=0)


ARGUMENTS = DataArguments


def main(argv: list[str]) -> int:
    """Print the data of a config; return the exit code."""

    def body(arguments: DataArguments, overrides: Overrides) -> int:
        _show(load_config(arguments, overrides), arguments.show)
        return 0

    return run_command(DataArguments, argv, __doc__, body, level=logging.WARNING)


def _show(config: Config, rows: int) -> None:
    from jaxpeft.data import pipeline, report
    from jaxpeft.data.examples import reading
    from jaxpeft.hub import sources

    console = Console(highlight=False, soft_wrap=True)
    source = sources.resolve(config.model.path, config.model.revision)
    examples = None if config.data.streaming else reading.read_examples(config, source)
    for part in report.reading_notes(examples[0]) if examples else ():
        console.print(part)
    if examples is not None and examples[0].kind == "preference":
        for part in report.pairs(examples[0], rows):
            console.print(part)
        console.print(
            f"{examples[0].rows.name}: {len(examples[0])} valid preference pairs, but no method"
            " trains on pairs yet"
        )
        return
    splits = pipeline.read_splits(config, source, lambda what: nullcontext(), examples)
    for part in () if examples else report.reading_notes(splits.examples):
        console.print(part)
    for part in report.rows(splits, rows, color=console.is_terminal):
        console.print(part)
    console.print(report.statistics(config, splits))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

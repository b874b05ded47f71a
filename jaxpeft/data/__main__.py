"""Look at the data: `python -m jaxpeft.data --config configs/NAME.py [--show 3]`.

Options of the config are set by name: `--config.data.max_length=256`. Prints rows as the model will
see them, the learned tokens set off from the rest, and what there is to know of the data before
money is spent on it: lengths, what is cut and dropped, packing, labels. Reads no weights.
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
    """Show the data of a config; return the exit code."""

    def body(given: DataArguments, overrides: Overrides) -> int:
        _show(load_config(given, overrides), given.show)
        return 0

    return run_command(DataArguments, argv, __doc__, body, level=logging.WARNING)


def _show(config: Config, rows: int) -> None:
    from jaxpeft.data import pipeline, report
    from jaxpeft.data.examples import reading
    from jaxpeft.hub import sources

    console = Console(highlight=False, soft_wrap=True)
    source = sources.resolve(config.model.path, config.model.revision)
    read = None if config.data.streaming else reading.read_examples(config, source)
    for part in report.reading_notes(read[0]) if read else ():
        console.print(part)
    if read is not None and read[0].kind == "preference":
        for part in report.pairs(read[0], rows):
            console.print(part)
        console.print(
            f"{read[0].rows.name}: {len(read[0])} preference pairs, all of them whole; no method"
            " trains on them yet"
        )
        return
    splits = pipeline.read_splits(config, source, lambda what: nullcontext(), read)
    for part in () if read else report.reading_notes(splits.examples):
        console.print(part)
    for part in report.rows(splits, rows, color=console.is_terminal):
        console.print(part)
    console.print(report.statistics(config, splits))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

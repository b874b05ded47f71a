"""`python -m jaxpeft.data --config configs/NAME.py [--show 3] [--config.SECTION.OPTION=VALUE ...]`: what would be trained on.

Prints rows as the model will see them, the learned tokens set off from the rest, and what there is to know of the data
before money is spent on it: lengths, what is cut and dropped, packing, labels. No weights are read.
"""

from __future__ import annotations

import logging
import sys
from contextlib import nullcontext

from absl import flags
from rich.console import Console

from jaxpeft import config as configs
from jaxpeft import logs
from jaxpeft.command import guarded, split_overrides
from jaxpeft.errors import ConfigError


def _flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string("config", None, "the config file, as for jaxpeft.train", flag_values=values)
    flags.DEFINE_integer("show", 3, "rows to show", lower_bound=0, flag_values=values)
    flags.DEFINE_bool("traceback", False, "show Python's traceback of an error", flag_values=values)
    return values


def main(argv: list[str]) -> int:
    """Shows the data of a config; gives the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[logs.StderrHandler()])
    if {"--help", "-h", "-help"} & set(argv):
        sys.stdout.write(f"{__doc__}\n{_flags().get_help()}")
        return 0
    return guarded(lambda: _checked(argv), show_traceback="--traceback" in argv)


def _checked(argv: list[str]) -> int:
    overrides, rest = split_overrides(argv)
    given = _flags()
    try:
        left = given(["jaxpeft.data", *rest])[1:]
    except flags.Error as error:
        raise ConfigError(f"{error}; see --help") from error
    if left or given.config is None:
        raise ConfigError(f"{left[0]!r}: not an option" if left else "--config: is not given")
    _show(configs.load(given.config, overrides), given.show)
    return 0


def _show(config: configs.Config, rows: int) -> None:
    from jaxpeft.data import pipeline, reading, report
    from jaxpeft.hub import sources

    console = Console(highlight=False, soft_wrap=True)
    source = sources.resolve(config.model.path, config.model.revision)
    read = None if config.data.streaming else reading.read_examples(config, source)
    for part in report.reading(read[0]) if read else ():
        console.print(part)
    if read is not None and read[0].kind == "preference":
        for part in report.pairs(read[0], rows):
            console.print(part)
        console.print(
            f"{read[0].rows.name}: {len(read[0])} preference pairs, all of them whole; no method trains on them yet"
        )
        return
    splits = pipeline.read_splits(config, source, lambda what: nullcontext(), read)
    for part in () if read else report.reading(splits.examples):
        console.print(part)
    for part in report.rows(splits, rows, colour=console.is_terminal):
        console.print(part)
    console.print(report.statistics(config, splits))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

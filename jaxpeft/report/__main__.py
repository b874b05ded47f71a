"""Write the page of a run: `python -m jaxpeft.report --run DIR [--evaluation FILE.json]`.

The page is one HTML file without scripts, which needs no network: the result, the curves, sample
answers of the base and of the tuned model, how the run was made, and how to repeat it. A run that
has not finished gets a page, too. Exit codes: 0 done, 2 bad input, 1 any other failure.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from jaxpeft import atomic
from jaxpeft.command.output_paths import file_problem
from jaxpeft.command.parser import Arguments
from jaxpeft.command.running import run_command, write_lines
from jaxpeft.core.options import option
from jaxpeft.errors import ConfigError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ReportArguments(Arguments):
    """The arguments of `report`."""

    run: str | None = option(
        None,
        "folder of a run of `python -m jaxpeft.train`, or of its adapter; also --adapter",
        also=("adapter",),
    )
    evaluation: tuple[str, ...] = option(
        (), "files that `python -m jaxpeft.evaluate --json` wrote, to show their metrics"
    )
    output: str | None = option(
        None, "file to write; default report.html in the folder of the run", also=("out",)
    )


ARGUMENTS = ReportArguments


def main(argv: list[str]) -> int:
    """Write the page of a run; return the exit code."""
    return run_command(ReportArguments, argv, __doc__, lambda args, _: _run(args))


def _run(args: ReportArguments) -> int:
    if args.run is None:
        raise ConfigError("--run: is required: the folder of a run; see --help")
    from jaxpeft.report import evaluation_file, run_folder, run_page
    from jaxpeft.report.evaluation_section import section_of

    folder = run_folder.find(Path(args.run))
    out = Path(args.output or folder / "report.html")
    if problem := file_problem("--output", str(out)):
        raise ConfigError(problem)
    run = run_folder.read(folder)
    sections = [section_of(run, evaluation_file.read(Path(file))) for file in args.evaluation]
    for one in sections:
        if one.other_run:
            _log.warning("--evaluation %s: %s", one.found.file, one.other_run)
    atomic.write_text(out, run_page.html(run, sections))
    write_lines(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

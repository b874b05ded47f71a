"""Evaluate a model or an adapter: `python -m jaxpeft.evaluate --adapter DIR --data FILE`.

Every metric has a confidence interval, from resampled rows. `--against base` compares the adapter
with its base on the same rows, `--against DIR` with another adapter. `--general FILE` measures what
a language model has forgotten. Rows are read and tokenized as in the run that trained the adapter.

The task decides the metrics:

    sequence classification   accuracy, F1, Matthews correlation, calibration; of regression,
                              correlations and the squared error
    token classification      F1 of entities and of tags
    language model            loss, perplexity and bits per byte of the answers; with --metrics,
                              also of generated answers: exact_match, number_match, rouge1, rouge2,
                              rougeL, bleu, chrf, and with --run-code, code_passes

Exit codes: 0 done, 2 bad input, 1 any other failure.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxpeft.command.model_arguments import NEW_TOKENS, ModelArguments, data_flags
from jaxpeft.command.output_paths import file_problem, folder_problem
from jaxpeft.command.running import run_command, write_lines
from jaxpeft.config.literals import unescape
from jaxpeft.core.options import option
from jaxpeft.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments(ModelArguments):
    """The arguments of `evaluate`."""

    data: str | None = option(None, "rows to evaluate: a file, a folder of files, or a Hub id")
    against: str | None = option(
        None, "what to compare with: 'base', or the folder of another adapter of the same task"
    )
    output: str | None = option(
        None, "JSON file to write, with all metrics and rows; also --json", also=("json",)
    )
    plot: str | None = option(None, "folder for reliability.png and confusion.png")
    metrics: tuple[str, ...] = option(
        (), "metrics to report, such as loss,exact_match; by default those of the task"
    )
    limit: int | None = option(
        None,
        "maximum number of rows of --data, and of --general; they are sampled by the seed",
        at_least=1,
    )
    show: int = option(3, "number of changed and of worst rows to print", at_least=0)
    seed: int = option(0, "seed of samples and resamples", at_least=0)
    batch_size: int = option(32, "rows per batch", at_least=1, at_most=2**20)
    resamples: int = option(1000, "resamples of an interval", at_least=1, at_most=10**6)
    level: float = option(0.95, "confidence level of the intervals", above=0, below=1)
    interval: Literal["percentile", "bca"] = option(
        "percentile", "bootstrap interval: of percentiles, or bias-corrected and accelerated"
    )
    max_new_tokens: int = option(
        NEW_TOKENS, "maximum number of new tokens of an answer", at_least=1
    )
    temperature: float = option(0.0, "temperature of generated answers; 0 for greedy", at_least=0)
    run_code: Literal["answer", "prompt"] | None = option(
        None,
        "run generated Python code with the tests of its row, in a limited process: code that the"
        " answer contains, or the prompt's code that the answer continues",
    )
    tests: str | None = option(None, "column of these tests; by default test, tests or test_list")
    general: str | None = option(None, "general text on which forgetting is measured")
    general_prompts: int = option(
        50, "beginnings of that text to continue, with and without the adapter", at_least=0
    )
    thresholds: str | None = option(
        None, "rows on which the thresholds of a multi-label classification are chosen"
    )
    format: str | None = option(None, "format of the rows, as data.format; by default the run's")
    separator: str | None = option(None, "text between prompt and completion; by default the run's")
    max_length: int | None = option(None, "tokens per row; by default the run's", at_least=2)
    chat_template: str | None = option(None, "chat template; by default the run's")


ARGUMENTS = EvaluateArguments


def main(argv: list[str]) -> int:
    """Evaluate a model; return the exit code."""
    return run_command(EvaluateArguments, argv, __doc__, lambda args, _: _run(args))


def _run(args: EvaluateArguments) -> int:
    data_options = _data_options(args)
    # imports JAX, so only for valid arguments
    from jaxpeft import atomic
    from jaxpeft.evaluate.assessment import assess
    from jaxpeft.evaluate.plot import draw
    from jaxpeft.evaluate.report import report
    from jaxpeft.evaluate.result_json import result_json

    with data_flags():
        found = assess(_request(args, data_options))
    write_lines(report(found, args.show))
    if args.output is not None:
        text = json.dumps(result_json(found), indent=1, ensure_ascii=False)
        atomic.write_text(Path(args.output).expanduser(), text + "\n")
    if args.plot is not None:
        files = draw(Path(args.plot).expanduser(), found.own, found.rows.labels)
        write_lines(f"plots: {', '.join(map(str, files))}")
    return 0


def _request(args: EvaluateArguments, data_options: dict[str, Any]) -> Any:
    from jaxpeft.evaluate.evaluation_request import EvaluationRequest, General
    from jaxpeft.evaluate.generated import Generating
    from jaxpeft.evaluation.intervals import Bootstrap

    return EvaluationRequest(
        str(args.data),
        model=args.model,
        adapter=None if args.adapter is None else Path(args.adapter),
        against=args.against,
        metrics=args.metrics,
        limit=args.limit,
        bootstrap=Bootstrap(args.resamples, args.level, args.seed, args.interval),
        generating=Generating(
            args.max_new_tokens,
            args.temperature,
            args.seed,
            args.batch_size,
            args.run_code,
            args.tests,
        ),
        general=None if args.general is None else General(args.general, args.general_prompts),
        thresholds=args.thresholds,
        plots=args.plot is not None,
        load=args.load_options,
        data_options=data_options,
    )


def _data_options(args: EvaluateArguments) -> dict[str, Any]:
    """Return the options of `config.data` that the flags set.

    Raises:
        ConfigError: A flag is missing or wrong; it lists all problems.
    """
    problems = [] if args.data else ["--data: is required; give a file of rows"]
    if args.adapter is None and args.model is None:
        problems.append("--adapter: is required without --model; see --help")
    problems += args.column_problems()
    outputs = (file_problem("--output", args.output), folder_problem("--plot", args.plot))
    problems += [problem for problem in outputs if problem]
    if problems:
        raise ConfigError(problems)
    columns = args.read_columns()
    names = ("format", "max_length", "chat_template")
    found = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.separator is not None:
        found["separator"] = unescape(args.separator)
    return found | ({"columns": columns} if columns else {})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Generate text with a model and its adapter: `python -m jaxpeft.generate --adapter DIR`.

    --prompt TEXT          continue one text, shown as it is generated
    --prompts IN.jsonl     complete every row, and write the rows with their completions to
                           --output; a row has a "prompt", "messages" or an "instruction"
    --chat                 talk to the model in the terminal
    --input FILE           predict the labels of every row with a classifier, and write the rows
                           with labels and probabilities to --output, or show them

`--adapter` is the folder of an adapter or of the run that trained it; its base is the recorded one
unless `--model` is given. `--model` alone generates with the base. An interrupted `--prompts` run
continues where it stopped. Exit codes: 0 done, 2 bad input, 1 any other failure.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from jaxpeft.command.model_arguments import NEW_TOKENS, ModelArguments, data_flags
from jaxpeft.command.output_paths import file_problem
from jaxpeft.command.running import run_command
from jaxpeft.core.options import option
from jaxpeft.errors import ConfigError, printable


@dataclass(frozen=True, kw_only=True)
class GenerateArguments(ModelArguments):
    """The arguments of `generate`."""

    prompt: str | None = option(None, "text to continue")
    prompts: str | None = option(None, "file of rows to complete, such as IN.jsonl")
    input: str | None = option(None, "file of rows to classify, such as IN.csv")
    output: str | None = option(None, "JSONL file for the rows of --prompts or --input")
    chat: bool = option(False, "chat in the terminal")
    max_new_tokens: int = option(NEW_TOKENS, "maximum number of new tokens of a text", at_least=1)
    temperature: float = option(
        0.0, "divides the logits before sampling; 0 chooses the most likely token", at_least=0
    )
    top_k: int | None = option(None, "sample from the k most likely tokens", at_least=1)
    top_p: float | None = option(
        None,
        "sample from the most likely tokens whose probabilities sum to p",
        above=0,
        at_most=1,
    )
    min_p: float | None = option(
        None,
        "sample from the tokens with at least this share of the largest probability",
        above=0,
        at_most=1,
    )
    repetition_penalty: float = option(
        1.0, "makes tokens of the prompt and the text so far less likely if above 1", above=0
    )
    stop: tuple[str, ...] = option((), "texts that end a completion, and are left out")
    samples: int = option(1, "number of completions of each row of --prompts", at_least=1)
    log_probs: bool = option(False, "write the token ids and their log-probabilities as well")
    seed: int = option(0, "seed of the samples", at_least=0)
    batch_size: int = option(32, "number of texts that are generated together", at_least=1)
    system: str | None = option(None, "system text of chats without one")
    chat_template: str | None = option(
        None, "name of a chat template, or path of a Jinja file; by default the tokenizer's"
    )


ARGUMENTS = GenerateArguments


def main(argv: list[str]) -> int:
    """Generate text; return the exit code."""
    return run_command(GenerateArguments, argv, __doc__, lambda args, _: _run(args))


def _run(args: GenerateArguments) -> int:
    problems = _problems(args)
    if problems:
        raise ConfigError(problems)
    columns = args.read_columns()
    # imports JAX, so only for valid arguments
    from jaxpeft.generate import batch, chat, predict
    from jaxpeft.generate.session import check_prompts, open_session, sampling_of, text_prompt

    sampling_of(args)
    if args.prompts is not None and args.output is not None:
        with data_flags():
            rows, prompts = batch.read_file(args, args.prompts, columns)
        check_prompts(args, {rows.where(i): prompt for i, prompt in enumerate(prompts)})
        return batch.complete_file(open_session(args), rows, prompts, args.output)
    if args.input is not None:
        with data_flags():
            predict.predict_file(args, args.input, args.output, columns)
    elif args.chat:
        check_prompts(args, {"the prompt": chat.opening(args.system)})
        chat.talk(open_session(args))
    else:
        check_prompts(args, {"--prompt": text_prompt(args.prompt or "")})
        session = open_session(args)
        session.answer(text_prompt(args.prompt or ""), _write)
        sys.stdout.write("\n")
    return 0


def _write(text: str) -> None:
    """Write generated text; to a terminal, without control characters that would act on it."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _problems(args: GenerateArguments) -> list[str]:
    """List the problems across arguments."""
    modes = {"--prompt": args.prompt, "--prompts": args.prompts, "--chat": args.chat or None}
    modes |= {"--input": args.input}
    given = [flag for flag, value in modes.items() if value is not None]
    found = args.column_problems()
    if args.columns and args.prompts is None and args.input is None:
        found.append("--columns: has no effect without --prompts or --input; remove it")
    if args.output is not None and Path(args.output).suffix.lower() in (".csv", ".tsv"):
        found.append(f"--output {args.output}: JSON lines are written; name it .jsonl")
    if args.model is None and args.adapter is None:
        found.append("--adapter: is required, or --model for a base alone; see --help")
    if len(given) != 1:
        what = "none is" if not given else f"{' and '.join(given)} are"
        found.append(f"{', '.join(modes)}: exactly one is required, {what} given; see --help")
    if args.prompts is not None and args.output is None:
        found.append("--output: is required with --prompts; set the JSONL file to write")
    if args.prompts is None and args.input is None and args.output is not None:
        found.append("--output: has no effect without --prompts or --input; remove it")
    if problem := file_problem("--output", args.output, is_new=True):
        found.append(problem)
    needs = {"--samples": None if args.samples == 1 else args.samples}
    needs |= {"--log-probs": args.log_probs or None}
    if args.prompts is None:
        found += [
            f"{flag}: has no effect without --prompts; remove it"
            for flag, value in needs.items()
            if value is not None
        ]
    if args.system is not None and args.prompt is not None:
        found.append("--system: --prompt continues a text without a chat; use --chat or --prompts")
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

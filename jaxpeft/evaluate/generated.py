"""Answers that a language model generates for rows, and their scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxpeft.command.model_arguments import NEW_TOKENS
from jaxpeft.core.paths import Tree
from jaxpeft.data.chat.dialogs import last_answer
from jaxpeft.data.examples.make import CHATS
from jaxpeft.errors import ConfigError
from jaxpeft.evaluate.prepared_rows import PreparedRows
from jaxpeft.evaluate.scored import Scored
from jaxpeft.evaluation.code_tests import program_of, row_tests, run_program
from jaxpeft.evaluation.intervals import Statistic
from jaxpeft.evaluation.text_scores import CORPUS, row_scores, text_statistic
from jaxpeft.inference.adapted_model import AdaptedModel
from jaxpeft.inference.generation import complete, ends_of
from jaxpeft.inference.sampling import Sampling

CODE = "code_passes"
_YES_OR_NO = ("exact_match", "number_match", CODE)


@dataclass(frozen=True)
class Generating:
    """How answers are generated.

    Attributes:
        max_new_tokens: maximum number of tokens of an answer.
        temperature: temperature of the samples; 0 for greedy answers.
        seed: seed of the samples.
        batch_size: prompts that run together.
        code: how a program starts whose tests run: with the `answer`, or with the `prompt` that
            the answer continues; None to run no code.
        tests: column of the tests; None for a usual one.
    """

    max_new_tokens: int = NEW_TOKENS
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 32
    code: Literal["answer", "prompt"] | None = None
    tests: str | None = None

    @property
    def greedy(self) -> Generating:
        """The same without sampling."""
        return dataclasses.replace(self, temperature=0.0)


@dataclass(frozen=True)
class Answer:
    """A generated text, and whether it was cut at the maximum number of tokens."""

    text: str
    is_cut: bool


def generate_answers(
    loaded: AdaptedModel, params: Tree, prompts: Sequence[Sequence[int]], how: Generating
) -> list[Answer]:
    """Return what a model generates after each prompt."""
    tokenizer, settings = loaded.tokenizer, loaded.settings
    own = {one for one in (settings.eos_token_id, tokenizer.eos_token_id) if one is not None}
    completions = complete(
        loaded.model,
        params,
        prompts,
        max_new_tokens=how.max_new_tokens,
        sampling=Sampling(how.temperature),
        seed=how.seed,
        eos=sorted(own | ends_of(loaded.model, None)),
        batch_size=how.batch_size,
    )
    return [
        Answer(tokenizer.decode(list(one.tokens), skip_special_tokens=True), one.ending == "length")
        for one in completions
    ]


def require_answers(rows: PreparedRows, how: Generating) -> None:
    """Refuse rows that have no answers to compare with, or no tests of code that runs.

    Raises:
        ConfigError: The format of the rows has no answers, or the system cannot limit programs.
        DataError: A row has no tests.
    """
    if rows.examples.kind not in CHATS:
        raise ConfigError(
            f"--metrics: rows of {rows.examples.rows.name} have format {rows.examples.kind}, which"
            " has no answers to generate; use rows with prompts, or set --separator"
        )
    if how.code is not None:
        run_program("pass")
        for row in rows.kept.tolist():
            row_tests(rows.examples.rows.records[row], how.tests)


def score_texts(
    base: Scored,
    loaded: AdaptedModel,
    params: Tree,
    rows: PreparedRows,
    metrics: Sequence[str],
    how: Generating,
) -> Scored:
    """Generate the answers of rows, and add their scores to those of a language model.

    Args:
        base: results from token losses.
        loaded: the model.
        params: its parameters.
        rows: the rows, which have answers.
        metrics: metrics of texts.
        how: how answers are generated.
    """
    prompts = [rows.encoder.prompt(rows.examples, row) for row in rows.kept.tolist()]
    references = [last_answer(rows.examples.texts[row]) for row in rows.kept.tolist()]
    answers = generate_answers(loaded, params, prompts, how)
    texts = [answer.text for answer in answers]
    textual = [metric for metric in metrics if metric != CODE]
    scores = row_scores(textual, texts, references)
    statistics: list[Statistic] = [base.statistic, text_statistic(textual, texts, references)]
    if CODE in metrics:
        passed = _run_tests(rows, prompts, texts, how)
        scores[CODE] = passed
        statistics.append(lambda chosen: {CODE: float(passed[chosen].mean())})

    def compute(chosen: np.ndarray) -> Mapping[str, float]:
        return {name: value for one in statistics for name, value in one(chosen).items()}

    # sentence BLEU and chrF only rank rows: the metrics are those of all rows
    renamed = {f"sentence_{name}" if name in CORPUS else name: one for name, one in scores.items()}
    return Scored(
        compute,
        {**base.scores, **renamed},
        {name: scores[name] == 1.0 for name in _YES_OR_NO if name in scores},
        texts,
        references,
        cut=[answer.is_cut for answer in answers],
    )


def _run_tests(
    rows: PreparedRows, prompts: Sequence[Sequence[int]], texts: Sequence[str], how: Generating
) -> np.ndarray:
    """Return whether the program of each row passes its tests, as 0 or 1, float64 [n]."""
    tokenizer: Any = rows.encoder.tokenizer
    start: Literal["answer", "prompt"] = how.code or "answer"
    programs = [
        program_of(
            rows.examples.rows.records[row],
            tokenizer.decode(list(prompt), skip_special_tokens=True),
            text,
            start=start,
            column=how.tests,
        )
        for row, prompt, text in zip(rows.kept.tolist(), prompts, texts, strict=True)
    ]
    return np.array([float(run_program(program).passed) for program in programs])

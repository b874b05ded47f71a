"""Forgetting of a language model: its loss and its answers on general text, before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxpeft.data.examples.make import CHATS
from jaxpeft.evaluate.evaluation_request import EvaluationRequest, General
from jaxpeft.evaluate.generated import generate_answers
from jaxpeft.evaluate.prepared_rows import PreparedRows, prepare_rows
from jaxpeft.evaluate.row_outputs import Runner, by_row
from jaxpeft.evaluate.scored import score_losses
from jaxpeft.evaluation.intervals import (
    Bootstrap,
    Contrast,
    Estimate,
    contrast,
    estimate,
    mean_of,
)
from jaxpeft.inference.adapted_model import AdaptedModel

_PLAIN = {"separator": "", "columns": {}, "format": "auto"}
"""General text has columns and a format of its own."""


@dataclass(frozen=True)
class Forgetting:
    """The change of a language model on general text.

    Attributes:
        path: file of the text.
        rows: number of rows.
        metrics: metrics of the adapted model and of its base; the difference in loss is what was
            forgotten.
        divergence: mean divergence of the next-token distribution from the base's, KL(base,
            adapted), in nats per token.
        changed: share of greedy answers that differ from the base's; None without prompts.
        answers: prompts, and the answers of the adapted model and of the base.
    """

    path: str
    rows: int
    metrics: Mapping[str, Contrast]
    divergence: Estimate
    changed: Estimate | None
    answers: tuple[tuple[str, str, str], ...] = ()


def measure_forgetting(
    loaded: AdaptedModel, request: EvaluationRequest, general: General
) -> Forgetting:
    """Measure forgetting on general text.

    Args:
        loaded: the model with its adapter.
        request: what to evaluate.
        general: the text.

    Raises:
        DataError: The text cannot be read.
    """
    rows = prepare_rows(
        general.path,
        loaded,
        {**request.data_options, **_PLAIN},
        limit=request.limit,
        seed=request.bootstrap.seed,
    )
    runner = Runner(loaded, request.generating.batch_size, rows.encoder.pad_id)
    losses, own = score_losses(runner.losses(loaded.params, rows.encoded), rows)
    _, other = score_losses(runner.losses(loaded.base, rows.encoded), rows)
    count, options = len(rows.kept), request.bootstrap
    apart = runner.divergences(loaded.params, loaded.base, rows.encoded)
    by_text = by_row(apart, rows.encoded, rows.kept)

    def divergence(chosen: np.ndarray) -> Mapping[str, float]:
        return {"kl": float(by_text[chosen].sum() / losses.tokens[chosen].sum())}

    answers = _answers(loaded, rows, request, general)
    return Forgetting(
        general.path,
        count,
        contrast(own.statistic, other.statistic, count, options),
        estimate(divergence, count, options)["kl"],
        _changed(answers, options) if answers else None,
        answers,
    )


def _changed(answers: Sequence[tuple[str, str, str]], options: Bootstrap) -> Estimate:
    differ = np.array([own != base for _, own, base in answers], np.float64)
    return estimate(mean_of({"changed": differ}), len(differ), options)["changed"]


def _answers(
    loaded: AdaptedModel, rows: PreparedRows, request: EvaluationRequest, general: General
) -> tuple[tuple[str, str, str], ...]:
    """Return prompts with the greedy answers of the adapted model and of the base."""
    prompts = _prompts(rows, general)
    if not prompts:
        return ()
    own, base = (
        generate_answers(loaded, params, prompts, request.generating.greedy)
        for params in (loaded.params, loaded.base)
    )
    texts = [loaded.tokenizer.decode(list(one), skip_special_tokens=True) for one in prompts]
    return tuple(
        (text, first.text, second.text)
        for text, first, second in zip(texts, own, base, strict=True)
    )


def _prompts(rows: PreparedRows, general: General) -> Sequence[Sequence[int]]:
    """Return the prompts of rows with answers, or the beginnings of texts."""
    chosen = rows.kept[: general.prompts].tolist()
    if rows.examples.kind in CHATS:
        return [rows.encoder.prompt(rows.examples, row) for row in chosen]
    encoded = rows.encoded
    first = np.searchsorted(encoded.source, chosen)
    starts = encoded.offsets[first]
    sizes = np.minimum(encoded.lengths[first], general.prompt_tokens)
    return [
        encoded.tokens[start : start + size].tolist()
        for start, size in zip(starts.tolist(), sizes.tolist(), strict=True)
    ]

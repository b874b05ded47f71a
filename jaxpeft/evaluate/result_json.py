"""The result of an evaluation as plain JSON values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jaxpeft
from jaxpeft.evaluate.assessment import Assessment
from jaxpeft.evaluate.general_text import Forgetting
from jaxpeft.evaluate.scored import Scored
from jaxpeft.evaluation.intervals import Contrast, Estimate
from jaxpeft.evaluation.paired import McNemar, Wins, count_wins, mcnemar, worst_rows
from jaxpeft.evaluation.wording import is_lower_better
from jaxpeft.hub.adapters.adapter_folder import read_adapter
from jaxpeft.hub.sources import folder_sha256

VERSION = 1
"""Version of the JSON; increased when a field is renamed or changes its meaning."""
_LONGEST_INPUT = 200


def result_json(found: Assessment) -> dict[str, Any]:
    """Return the content of the JSON file: metrics, comparison, classes, rows and forgetting."""
    request, rows = found.request, found.rows
    return {
        "version": VERSION,
        "jaxpeft_version": jaxpeft.__version__,
        "model": found.title,
        "adapter": None
        if request.adapter is None
        else _adapter(read_adapter(request.adapter).folder),
        "against": found.other_title or None,
        "notes": list(found.notes),
        "data": {
            "path": rows.examples.rows.name,
            "sha256": rows.examples.rows.sha256,
            "format": rows.examples.kind,
            "problem": rows.problem,
            "rows": len(found.own),
            "dropped": len(rows.examples) - len(found.own),
            "truncated": rows.encoded.counts["truncated"],
            "max_length": rows.encoded.max_length,
        },
        "bootstrap": dataclasses.asdict(request.bootstrap),
        "generation": dataclasses.asdict(request.generating) if request.text_metrics else None,
        "metrics": {name: metric_json(one) for name, one in found.metrics.items()},
        "paired": _paired(found),
        "thresholds": (
            None
            if found.thresholds is None
            else dict(zip(rows.labels, found.thresholds.tolist(), strict=True))
        ),
        **_by_class(found.own, rows.labels),
        "worst": worst(found, len(found.own)),
        "changed": changed(found),
        "rows": [_row(found, i) for i in range(len(found.own))],
        "forgetting": None if found.forgetting is None else _forgetting(found.forgetting),
    }


def metric_json(one: Estimate | Contrast) -> dict[str, Any]:
    """Return a metric as `value`, `low` and `high`; of two models, also `against`, `difference`
    and `p`.
    """
    if isinstance(one, Estimate):
        return dataclasses.asdict(one)
    return {
        **dataclasses.asdict(one.own),
        "against": dataclasses.asdict(one.other),
        "difference": dataclasses.asdict(one.difference),
        "p": one.p,
    }


def worst(found: Assessment, count: int) -> list[int]:
    """Return the rows with the worst scores, the worst first, as indices of `rows`."""
    name = next(iter(found.own.scores))
    return worst_rows(found.own.scores[name], count, lower_is_better=is_lower_better(name))


def changed(found: Assessment) -> list[int]:
    """Return the rows whose prediction differs from the other model's, as indices of `rows`; none
    if that has a constant answer.
    """
    if found.other is None or found.against_constant:
        return []
    pairs = zip(found.own.predictions, found.other.predictions, strict=True)
    return [i for i, (own, other) in enumerate(pairs) if own != other]


def wins(found: Assessment) -> dict[str, Wins]:
    """Return the wins against the other model by score; empty without one. The probability of the
    label is left out, since it falls where the loss rises.
    """
    if found.other is None:
        return {}
    return {
        name: count_wins(scores, found.other.scores[name], lower_is_better=is_lower_better(name))
        for name, scores in found.own.scores.items()
        if name != "probability"
    }


def tests_of_correctness(found: Assessment) -> dict[str, McNemar]:
    """Return McNemar's test against the other model by metric; empty without one, or if it has a
    constant answer.
    """
    if found.other is None or found.against_constant:
        return {}
    return {
        name: mcnemar(right, found.other.correct[name]) for name, right in found.own.correct.items()
    }


def _paired(found: Assessment) -> dict[str, Any] | None:
    if found.other is None:
        return None
    return {
        "wins": {name: dataclasses.asdict(one) for name, one in wins(found).items()},
        "mcnemar": {
            name: dataclasses.asdict(one) for name, one in tests_of_correctness(found).items()
        },
    }


def _adapter(given: Path) -> dict[str, Any]:
    folder = read_adapter(given).folder
    return {"path": str(folder.expanduser().resolve()), "sha256": folder_sha256(folder)}


def _by_class(own: Scored, labels: tuple[str, ...]) -> dict[str, Any]:
    matrix = own.confusion
    return {
        "classes": [dataclasses.asdict(one) for one in own.classes],
        "confusion": None if matrix is None else {"labels": labels, "counts": matrix.tolist()},
        "calibration": None if own.calibration is None else dataclasses.asdict(own.calibration),
    }


def _row(found: Assessment, at: int) -> dict[str, Any]:
    examples, number = found.rows.examples, int(found.rows.kept[at])
    row: dict[str, Any] = {
        "row": number,
        "where": examples.rows.where(number),
        "input": shown_input(found, at),
        **_result(found.own, at),
    }
    if found.own.truth:
        row["truth"] = found.own.truth[at]
    if found.other is not None:
        row["against"] = _result(found.other, at)
    return row


def _result(scored: Scored, at: int) -> dict[str, Any]:
    scores = {name: float(values[at]) for name, values in scored.scores.items()}
    if not scored.predictions:
        return {"scores": scores}
    cut = {"cut": scored.cut[at]} if scored.cut else {}
    return {"prediction": scored.predictions[at], **cut, "scores": scores}


def shown_input(found: Assessment, at: int) -> str:
    """Return the beginning of a row's text."""
    examples, row = found.rows.examples, int(found.rows.kept[at])
    text: Any = examples.texts[row]
    if isinstance(text, list):
        text = " ".join(map(str, text))
    elif not isinstance(text, str):
        text = found.rows.encoder.tokenizer.decode(
            found.rows.encoder.prompt(examples, row), skip_special_tokens=True
        )
    pair = f" | {examples.pairs[row]}" if examples.pairs else ""
    return f"{text}{pair}"[:_LONGEST_INPUT]


def _forgetting(one: Forgetting) -> Mapping[str, Any]:
    return {
        "path": one.path,
        "rows": one.rows,
        "metrics": {name: metric_json(metric) for name, metric in one.metrics.items()},
        "kl": dataclasses.asdict(one.divergence),
        "changed_answers": None if one.changed is None else dataclasses.asdict(one.changed),
        "answers": [
            {"prompt": prompt, "answer": own, "base": base} for prompt, own, base in one.answers
        ],
    }

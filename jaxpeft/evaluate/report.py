"""The result of an evaluation as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxpeft.errors import printable
from jaxpeft.evaluate.assessment import Assessment
from jaxpeft.evaluate.general_text import Forgetting
from jaxpeft.evaluate.result_json import changed, shown_input, tests_of_correctness, wins, worst
from jaxpeft.evaluate.scored import Scored
from jaxpeft.evaluation.by_class import lowest_first
from jaxpeft.evaluation.intervals import Contrast, Estimate
from jaxpeft.evaluation.wording import (
    is_lower_better,
    model_name,
    p_clause,
    p_value,
    smallest_p,
    verdict,
)

_MOST_CLASSES, _LARGEST_MATRIX, _MOST_CONFUSED, _LONGEST = 10, 10, 5, 70


def report(found: Assessment, count: int) -> str:
    """Return the result of an evaluation as text.

    Args:
        found: the result.
        count: number of changed and of worst rows to show.
    """
    rows = found.rows
    lines = [
        f"{found.title} on {len(found.own)} rows of {rows.examples.rows.name}",
        *([f"compared with {found.other_title}"] if found.other_title else []),
        *found.notes,
    ]
    dropped = len(rows.examples) - len(found.own)
    if dropped:
        lines.append(f"rows without a token in the loss, which are not evaluated: {dropped}")
    lines += ["", *_metrics(found.metrics, found, model_name(found.other_title))]
    lines += _paired(found)
    if found.forgetting is not None:
        lines += ["", *_forgetting(found.forgetting, found)]
    lines += [*_classes(found), *_confusion(found), *_thresholds(found)]
    lines += [*_changed_rows(found, count), *_worst_rows(found, count)]
    return "\n".join(printable(line, keep="") for line in lines)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return aligned lines: the first column to the left, the others to the right."""
    header, *rows = ([printable(cell, keep="") for cell in row] for row in (header, *rows))
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    ]


def _metrics(
    metrics: Mapping[str, Estimate | Contrast], found: Assessment, other: str
) -> list[str]:
    options = found.request.bootstrap
    level, smallest = f"{options.level:.0%} interval", smallest_p(options.resamples)
    if not any(isinstance(one, Contrast) for one in metrics.values()):
        cells = [
            [_named(name), *_estimate(one)]
            for name, one in metrics.items()
            if isinstance(one, Estimate)
        ]
        return table(["metric", "value", level], cells)
    header = ["metric", "value", level, other, level, "difference", level, "p", ""]
    return table(header, [_cells(name, one, smallest) for name, one in metrics.items()])


def _named(name: str) -> str:
    return f"{name} (lower is better)" if is_lower_better(name) else name


def _cells(name: str, one: Estimate | Contrast, smallest: float) -> list[str]:
    if isinstance(one, Estimate):
        return [_named(name), *_estimate(one), *"-----", ""]
    return [
        _named(name),
        *_estimate(one.own),
        *_estimate(one.other),
        *_estimate(one.difference, "+"),
        "-" if one.p is None else p_value(one.p, smallest),
        verdict(name, one.difference.low, one.difference.high),
    ]


def _estimate(one: Estimate, sign: str = "") -> list[str]:
    if one.low is None or one.high is None:
        return [f"{one.value:{sign}.4f}", "-"]
    return [f"{one.value:{sign}.4f}", f"{one.low:{sign}.4f} to {one.high:{sign}.4f}"]


def _paired(found: Assessment) -> Iterator[str]:
    other = model_name(found.other_title)
    if found.other is not None:
        yield ""
    for name, one in wins(found).items():
        yield (
            f"{name} by row: better in {one.wins}, worse in {one.losses}, equal in {one.ties}"
            f" (sign test {p_clause(one.p)})"
        )
    for name, test in tests_of_correctness(found).items():
        yield (
            f"{name}: only this model right in {test.only_own}, only {other} in"
            f" {test.only_other}, both in {test.both}, neither in {test.neither} (McNemar"
            f" {p_clause(test.p)})"
        )


def _forgetting(one: Forgetting, found: Assessment) -> Iterator[str]:
    yield f"forgetting, on {one.rows} rows of {one.path}"
    yield from _metrics(one.metrics, found, "base")
    value, interval = _estimate(one.divergence)
    yield f"divergence of the next token from the base's: {value} nats ({interval})"
    if one.changed is not None:
        value, interval = _estimate(one.changed)
        yield f"share of {len(one.answers)} greedy answers that changed: {value} ({interval})"


def _classes(found: Assessment) -> Iterator[str]:
    classes = found.own.classes
    if not classes:
        return
    shown = lowest_first(classes)[:_MOST_CLASSES]
    yield ""
    if len(shown) < len(classes):
        yield f"the {len(shown)} of {len(classes)} classes with the lowest F1 (--output has all):"
    cells = [
        [one.label, *(f"{x:.3f}" for x in (one.precision, one.recall, one.f1)), str(one.support)]
        for one in (shown if len(shown) < len(classes) else classes)
    ]
    yield from table(["class", "precision", "recall", "F1", "rows"], cells)


def _confusion(found: Assessment) -> Iterator[str]:
    matrix, labels = found.own.confusion, found.rows.labels
    if matrix is None:
        return
    yield ""
    if len(labels) <= _LARGEST_MATRIX:
        yield from table(
            ["true \\ predicted", *labels],
            [[label, *map(str, row)] for label, row in zip(labels, matrix.tolist(), strict=True)],
        )
        return
    pairs = [
        (int(matrix[i, j]), labels[i], labels[j])
        for i in range(len(labels))
        for j in range(len(labels))
        if i != j and matrix[i, j]
    ]
    most = sorted(pairs, key=lambda pair: -pair[0])[:_MOST_CONFUSED]
    yield "most frequent confusions:"
    yield from table(["true", "predicted", "rows"], [[a, b, str(n)] for n, a, b in most])


def _thresholds(found: Assessment) -> Iterator[str]:
    if found.thresholds is None:
        return
    yield ""
    yield f"thresholds, chosen on {found.request.thresholds}:"
    cells = zip(found.rows.labels, found.thresholds.tolist(), strict=True)
    yield from table(["label", "threshold"], [[label, f"{cut:.3f}"] for label, cut in cells])


def _changed_rows(found: Assessment, count: int) -> Iterator[str]:
    other = found.other
    if other is None or not other.predictions or found.against_constant:
        return
    rows = changed(found)
    yield ""
    yield f"{len(rows)} of {len(found.own)} predictions differ" + (":" if rows[:count] else "")
    for i in rows[:count]:
        yield from _line(found, i)
        yield f"    {model_name(found.other_title)}: {_prediction(other, i)}"


def _worst_rows(found: Assessment, count: int) -> Iterator[str]:
    if not count:
        return
    name = next(iter(found.own.scores))
    yield ""
    yield f"worst rows, by {name}:"
    for i in worst(found, count):
        yield from _line(found, i)
        if found.own.truth:
            yield f"    {name} {found.own.scores[name][i]:.4f}"


def _line(found: Assessment, at: int) -> Iterator[str]:
    own, examples = found.own, found.rows.examples
    where = examples.rows.where(int(found.rows.kept[at]))
    yield f"  {where.rsplit('/', 1)[-1]}: {_short(shown_input(found, at))}"
    if not own.predictions:
        name = next(iter(own.scores))
        yield f"    {name} {own.scores[name][at]:.4f}"
        return
    yield f"    truth: {_short(own.truth[at])}"
    yield f"    model: {_prediction(own, at)}"


def _prediction(scored: Scored, at: int) -> str:
    """Return a prediction, with an ellipsis if it was cut."""
    text = _short(scored.predictions[at])
    return f"{text}…" if scored.cut and scored.cut[at] and not text.endswith("…") else text


def _short(value: Any) -> str:
    text = " ".join((", ".join(map(str, value)) if isinstance(value, list) else str(value)).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"

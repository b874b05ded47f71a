"""Geometry of the charts of a classifier: reliability and confusion, which a template draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxpeft.evaluation.calibration import Calibration
from jaxpeft.report.evaluation_file import Confusion
from jaxpeft.report.svg_charts import WIDTH, Axis, Tick

_MOST_CELLS, _MOST_NUMBERS = 20, 10
"""Classes up to which there is a matrix, and up to which its cells have numbers."""
_MOST_PAIRS, _LONGEST_NAME = 10, 16
_LEFT, _RIGHT, _TOP = 36, 12, 10
_SIDE, _STRIP, _GAP = 210, 44, 14
_NAMES = 128


@dataclass(frozen=True)
class Rectangle:
    """A bar or a cell.

    Attributes:
        x, y, width, height: its place.
        tip: its meaning in words.
        share: how dark it is, from 0 to 1.
        text: the number in it; empty without one.
    """

    x: float
    y: float
    width: float
    height: float
    tip: str
    share: float = 1.0
    text: str = ""


@dataclass(frozen=True)
class Reliability:
    """Shares of correct predictions by probability, above the numbers of predictions.

    Attributes:
        summary: its content in words.
        bars: share of each bin.
        counts: number of predictions of each bin.
        means: mean probability and share of each bin, as points.
        x, y: ticks of the axes.
        left, right, top, bottom: bounds of the upper area.
        width, height: size of the drawing.
    """

    summary: str
    bars: Sequence[Rectangle]
    counts: Sequence[Rectangle]
    means: Sequence[tuple[float, float]]
    x: Sequence[Tick]
    y: Sequence[Tick]
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = _TOP + _SIDE
    width: int = WIDTH
    height: int = _TOP + _SIDE + _GAP + _STRIP + 22


@dataclass(frozen=True)
class Matrix:
    """A confusion matrix: a row for each true class, a numbered column for each predicted one.

    Attributes:
        summary: its content in words.
        cells: its cells.
        rows: the name of each class at the middle of its row.
        columns: the number of each class at the middle of its column.
        names: the full names.
        left: where the cells start.
        width, height: size of the drawing.
    """

    summary: str
    cells: Sequence[Rectangle]
    rows: Sequence[Tick]
    columns: Sequence[Tick]
    names: Sequence[str]
    left: int
    width: int
    height: float


def draw_reliability(found: Calibration) -> Reliability:
    """Return the chart of a classifier's reliability.

    Args:
        found: its calibration.
    """
    unit, most = Axis(0, 1), max(found.counts, default=0) or 1

    def across(share: float) -> float:
        return round(_LEFT + (WIDTH - _LEFT - _RIGHT) * unit.at(share) / 100, 1)

    def up(share: float) -> float:
        return round(_TOP + _SIDE * (1 - unit.at(share) / 100), 1)

    bars: list[Rectangle] = []
    counts: list[Rectangle] = []
    floor = _TOP + _SIDE + _GAP + _STRIP
    filled = [i for i, count in enumerate(found.counts) if count]
    for i in filled:
        left, right = across(found.edges[i]), across(found.edges[i + 1])
        tip = (
            f"probability {found.edges[i]:.2f} to {found.edges[i + 1]:.2f}: {found.counts[i]:,}"
            f" predictions, {found.accuracy[i]:.1%} correct"
        )
        place, wide = left + 0.5, round(right - left - 1, 1)
        high, tall = up(found.accuracy[i]), round(_STRIP * found.counts[i] / most, 1)
        bars.append(Rectangle(place, high, wide, round(_TOP + _SIDE - high, 1), tip))
        counts.append(Rectangle(place, floor - tall, wide, tall, tip))
    ticks = (0, 0.25, 0.5, 0.75, 1)
    return Reliability(
        f"reliability: {'; '.join(bar.tip for bar in bars)}",
        bars,
        counts,
        [(across(found.confidence[i]), up(found.accuracy[i])) for i in filled],
        [Tick(across(at), f"{at:g}") for at in ticks],
        [Tick(up(at), f"{at:g}") for at in ticks],
    )


def draw_confusion(found: Confusion) -> Matrix | None:
    """Return the chart of a confusion matrix; None if it has too many classes to draw.

    Args:
        found: the matrix.
    """
    count = len(found.labels)
    if not 0 < count <= _MOST_CELLS:
        return None
    size = min((WIDTH - _NAMES - 4) / count, 40)
    cells: list[Rectangle] = []
    for i, row in enumerate(found.counts):
        for j, rows in enumerate(row):
            share = rows / max(sum(row), 1)
            tip = f"{rows:,} rows of {found.labels[i]}, predicted as {found.labels[j]}"
            text = str(rows) if rows and count <= _MOST_NUMBERS else ""
            x, y = round(_NAMES + j * size, 1), round(22 + i * size, 1)
            side = round(size - 1, 1)
            cells.append(Rectangle(x, y, side, side, tip, round(share, 3), text))
    middles = [round((i + 0.5) * size, 1) for i in range(count)]
    right = sum(row[i] for i, row in enumerate(found.counts))
    total = sum(map(sum, found.counts))
    return Matrix(
        f"confusion of {count} classes: {right:,} of {total:,} predictions are correct",
        cells,
        [
            Tick(22 + at, f"{_short(name)} {i}")
            for i, (at, name) in enumerate(zip(middles, found.labels, strict=True), 1)
        ],
        [Tick(_NAMES + at, str(i)) for i, at in enumerate(middles, 1)],
        found.labels,
        _NAMES,
        WIDTH,
        round(26 + count * size, 1),
    )


def most_confused(found: Confusion) -> list[tuple[str, str, int]]:
    """Return the most frequent confusions: true class, predicted class, number of rows."""
    pairs = [
        (found.labels[i], found.labels[j], rows)
        for i, row in enumerate(found.counts)
        for j, rows in enumerate(row)
        if i != j and rows
    ]
    return sorted(pairs, key=lambda pair: -pair[2])[:_MOST_PAIRS]


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"

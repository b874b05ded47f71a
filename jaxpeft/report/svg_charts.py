"""Geometry of the charts of a page, which its template draws as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 360, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 12, 10, 26
_MOST_POINTS = 240
"""A longer curve is drawn as the means of as many groups of steps."""
_LEAST_RANGE = 5e-3
"""Least range of an axis in relation to its values, so that the labels of ticks differ."""
_LARGEST = 1e100
"""Largest absolute value that is drawn; the ticks of larger ones overflow."""
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Tick:
    """A tick of an axis: its position in the drawing, and its label."""

    at: float
    text: str


@dataclass(frozen=True)
class Curve:
    """A curve: its name, the `d` of its path, and its points if each is marked."""

    name: str
    path: str
    marks: Points


@dataclass(frozen=True)
class Chart:
    """A line chart over steps.

    Attributes:
        title: its title.
        summary: its content in words, for readers who do not see it.
        x, y: ticks of the axes.
        curves: its curves.
        left, right, bottom: bounds of its area.
        width, height: size of the drawing.
    """

    title: str
    summary: str
    x: Sequence[Tick]
    y: Sequence[Tick]
    curves: Sequence[Curve]
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    bottom: int = HEIGHT - _BOTTOM
    width: int = WIDTH
    height: int = HEIGHT


@dataclass(frozen=True)
class Axis:
    """A horizontal axis from `low` to `high`, on which intervals are drawn."""

    low: float
    high: float

    def at(self, value: float) -> float:
        """Return the position of a value in percent, kept inside."""
        share = (value - self.low) / (self.high - self.low)
        return round(100 * min(max(share, 0.0), 1.0), 2)


def is_drawable(value: float) -> bool:
    """Return whether a value is finite, and not too large for an axis."""
    return abs(value) <= _LARGEST


def points_of(lines: Iterable[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """Return the drawable values of a metric by step.

    Args:
        lines: lines of a `metrics.jsonl`.
        key: name of the metric.
    """
    return [(line["step"], line[key]) for line in lines if is_drawable(line.get(key, math.nan))]


def draw(
    title: str,
    series: Mapping[str, Points],
    *,
    marked: Sequence[str] = (),
    from_zero: bool = False,
) -> Chart | None:
    """Return a line chart, or None without points.

    Args:
        title: its title.
        series: points by name; a series without points is left out.
        marked: names of series with a mark at each point.
        from_zero: whether the vertical axis includes 0.
    """
    series = {name: _thin(points) for name, points in series.items() if points}
    if not series:
        return None
    every = [point for points in series.values() for point in points]
    last = max(step for step, _ in every)
    across = Axis(0, max(last, 1))
    x = [at for at in nice_ticks([0, across.high], whole=True) if at <= across.high]
    y = nice_ticks([value for _, value in every] + [0.0] * from_zero)
    up = Axis(y[0], y[-1])

    def place(point: tuple[float, float]) -> tuple[float, float]:
        step, value = point
        return (
            round(_LEFT + (WIDTH - _LEFT - _RIGHT) * across.at(step) / 100, 1),
            round(HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * up.at(value) / 100, 1),
        )

    curves = [
        _curve(name, [place(point) for point in points], name in marked or len(points) == 1)
        for name, points in series.items()
    ]
    return Chart(
        title,
        _describe(title, series),
        [Tick(place((at, up.low))[0], label(at)) for at in x],
        [Tick(place((0, at))[1], label(at)) for at in y],
        curves,
    )


def _curve(name: str, points: Points, marked: bool) -> Curve:
    return Curve(name, "M" + "L".join(f"{x} {y}" for x, y in points), points if marked else ())


def _thin(points: Points) -> Points:
    """Return the means of groups of neighbors, if there are too many points to draw."""
    size = math.ceil(len(points) / _MOST_POINTS)
    groups = (points[start : start + size] for start in range(0, len(points), size))
    return [(group[-1][0], math.fsum(value for _, value in group) / len(group)) for group in groups]


def _describe(title: str, series: Mapping[str, Points]) -> str:
    parts = (
        f"{name} from {label(points[0][1])} at step {label(points[0][0])} to"
        f" {label(points[-1][1])} at step {label(points[-1][0])}"
        for name, points in series.items()
    )
    return f"{title} by step: {'; '.join(parts)}"


def nice_ticks(values: Sequence[float], *, whole: bool = False) -> list[float]:
    """Return round numbers whose range includes all values, at least two.

    Args:
        values: drawable numbers.
        whole: whether the numbers are integers.
    """
    from matplotlib.ticker import MaxNLocator

    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    if high - low < _LEAST_RANGE * size or not size:
        # a single value, or almost: its ticks would have one label
        low, high = low - (size / 10 or 1), high + (size / 10 or 1)
    return [float(at) for at in MaxNLocator(4, integer=whole).tick_values(low, high)]


def interval_axis(values: Sequence[float]) -> Axis:
    """Return the axis for a metric's values: 0 to 1 for shares, else round numbers around them."""
    if all(0 <= value <= 1 for value in values):
        return Axis(0, 1)
    ticks = nice_ticks(values)
    return Axis(ticks[0], ticks[-1])


def label(value: float) -> str:
    """Format a number of an axis: `0.25`, `5e-05`, `1,500`, `20k`."""
    if abs(value) >= 1e4:
        from matplotlib.ticker import EngFormatter

        return EngFormatter(places=None, sep="")(value)
    if abs(value) >= 1e3:
        return f"{value:,.0f}"
    return f"{value:.4g}"

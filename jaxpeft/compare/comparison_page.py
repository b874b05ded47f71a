"""The page of a comparison: its table, with the intervals drawn."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxpeft.compare.spread import LEVEL, spread_of
from jaxpeft.config.schema import Config
from jaxpeft.evaluation.metrics import LOWER_IS_BETTER
from jaxpeft.report.base_title import base_title
from jaxpeft.report.page_templates import render
from jaxpeft.report.svg_charts import Axis, is_drawable, nice_ticks
from jaxpeft.train import next_steps, records


def html(
    config: Config,
    found: Mapping[str, Any],
    best: str,
    texts: Mapping[str, Any],
    folder: Path,
) -> str:
    """Return the page of a comparison.

    Args:
        config: config with the candidates.
        found: contents of `comparison.json`.
        best: name of the best candidate.
        texts: `introduction`, `notes`, `run` (the best candidate's first run), and `prediction`,
            the code that uses its adapter.
        folder: folder of the comparison.
    """
    done = {name: one for name, one in found["candidates"].items() if one["runs"]}
    command = ["python", "-m", "jaxpeft.compare", "--config", str(folder / records.CONFIG)]
    return render(
        "comparison.html",
        found=found,
        base=base_title(config.model.path),
        lower_is_better=found["metric"] in LOWER_IS_BETTER,
        best=best,
        before=spread_of(found["before"]).mean if found["before"] else None,
        axis=_axis(done),
        level=f"{LEVEL:.0%}",
        marks={name: _marks(one["figure"]) for name, one in done.items()},
        repeat=shlex.join([*command, "--workdir", "runs/again"]),
        run_page=next_steps.report(folder / texts["run"]),
        **texts,
    )


def _axis(done: Mapping[str, Any]) -> Axis:
    """Return the axis of all values and intervals that can be drawn."""
    figures = [one["figure"] for one in done.values()]
    ends = [end for one in figures for end in (one["mean"], *(one["interval"] or ()))]
    ticks = nice_ticks([end for end in ends if is_drawable(end)] or [0.0, 1.0])
    return Axis(ticks[0], ticks[-1])


def _marks(figure: Mapping[str, Any]) -> Sequence[tuple[int, float, float | None, float | None]]:
    """Return the color, mean and interval of a candidate, as the template draws them."""
    if not is_drawable(figure["mean"]):
        return []
    low, high = figure["interval"] or (None, None)
    return [(0, figure["mean"], low, high)]

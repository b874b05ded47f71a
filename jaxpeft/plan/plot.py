"""Plot a plan: device memory by strategy."""

from __future__ import annotations

from pathlib import Path

from jaxpeft.chips import GIB
from jaxpeft.plan.report import Plan

_PARTS = ("base", "adapters", "optimizer", "activations", "temporaries")


def draw(path: Path, plan: Plan) -> None:
    """Plot the memory per device by strategy as a PNG.

    Args:
        path: path of the PNG.
        plan: plan to plot; rejected strategies are omitted.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in plan.rows if row.memory is not None]
    rows += [
        row.nearest
        for row in plan.rows
        if row.nearest is not None and row.nearest.memory is not None
    ]
    names = [f"{row.strategy}\n{row.change}" if row.change else row.strategy for row in rows]
    figure, axes = plt.subplots(figsize=(max(6, 1.6 * len(rows)), 4), layout="constrained")
    below = [0.0] * len(rows)
    for part in _PARTS:
        sizes = [getattr(row.memory, part) / GIB for row in rows]
        axes.bar(names, sizes, bottom=below, label=part)
        below = [low + size for low, size in zip(below, sizes, strict=True)]
    limit = next(
        (row.memory.limit for row in rows if row.memory is not None and row.memory.limit), None
    )
    if limit is not None:
        axes.axhline(limit / GIB, color="black", linestyle="--", linewidth=1, label="limit")
    axes.set(title=f"{plan.topology}: memory of one device", ylabel="GiB")
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)

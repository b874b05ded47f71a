"""Plot a run: training and validation loss, and the validation metric, by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxpeft.train.records import METRICS, read_lines


def draw(path: Path, name: str, folder: Path, metric: str) -> None:
    """Plot the losses and a validation metric of a run as a PNG.

    Args:
        path: path of the PNG.
        name: name of the method.
        folder: folder of the run, with `metrics.jsonl`.
        metric: validation metric to plot.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    lines = read_lines(folder / METRICS)
    color = _curve(left, name, lines, "loss")
    _curve(
        left,
        f"{name}, validation",
        lines,
        "validation/loss",
        color=color,
        linestyle="--",
        marker="o",
    )
    _curve(right, name, lines, f"validation/{metric}", marker="o")
    left.set(title="loss", xlabel="step", ylabel="loss")
    right.set(title=f"validation {metric}", xlabel="step", ylabel=metric)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _curve(axes: Any, name: str, lines: list[dict[str, Any]], key: str, **style: Any) -> Any:
    """Plot a curve; return its color."""
    points = [(line["step"], line[key]) for line in lines if key in line]
    (line,) = axes.plot(
        [step for step, _ in points], [value for _, value in points], label=name, **style
    )
    return line.get_color()

"""Plots of an evaluation: reliability of the probabilities, and the confusion matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jaxpeft.evaluate.scored import Scored
from jaxpeft.evaluation.calibration import Calibration

_MOST_NUMBERS = 15
"""Classes up to which cells contain their numbers."""
_MOST_NAMES = 100


def draw(folder: Path, own: Scored, labels: tuple[str, ...]) -> list[Path]:
    """Write `reliability.png` and `confusion.png`, as far as they exist for the problem.

    Args:
        folder: folder to write to; created if necessary.
        own: results of the model.
        labels: label names.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    if own.calibration is not None:
        written.append(_reliability(folder / "reliability.png", own.calibration))
    if own.confusion is not None:
        written.append(_confusion(folder / "confusion.png", own.confusion, labels))
    return written


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def _reliability(path: Path, found: Calibration) -> Path:
    plt = _pyplot()
    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(5, 6), layout="constrained", sharex=True, height_ratios=(3, 1)
    )
    edges, counts = np.array(found.edges), np.array(found.counts)
    filled, width = counts > 0, edges[1] - edges[0]
    upper.bar(
        edges[:-1][filled], np.array(found.accuracy)[filled], width, align="edge", edgecolor="white"
    )
    upper.plot([0, 1], [0, 1], color="gray", linestyle="--", label="calibrated")
    upper.plot(
        np.array(found.confidence)[filled],
        np.array(found.accuracy)[filled],
        "o",
        color="C1",
        label="mean of a bin",
    )
    upper.set(ylabel="share of correct predictions", ylim=(0, 1), title=f"ECE {found.ece:.4f}")
    upper.legend()
    lower.bar(edges[:-1], counts, width, align="edge", edgecolor="white")
    lower.set(xlabel="probability of the prediction", ylabel="predictions", xlim=(0, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _confusion(path: Path, matrix: np.ndarray, labels: tuple[str, ...]) -> Path:
    plt = _pyplot()
    size = min(16.0, 3.0 + 0.35 * len(labels))
    figure, axes = plt.subplots(figsize=(size, size), layout="constrained")
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, shrink=0.7, label="share of the true class")
    axes.set(xlabel="predicted", ylabel="true")
    if len(labels) <= _MOST_NAMES:
        font = 9 if len(labels) <= _MOST_NUMBERS else 5
        axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=font)
        axes.set_yticks(range(len(labels)), labels, fontsize=font)
    if len(labels) <= _MOST_NUMBERS:
        for (i, j), count in np.ndenumerate(matrix):
            color = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, str(count), ha="center", va="center", color=color, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path

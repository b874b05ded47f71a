"""Plot of a comparison: metric over trainable parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def draw(path: Path, found: Mapping[str, Any]) -> None:
    """Plot each candidate's metric over its trainable parameters as a PNG; bars are standard
    deviations.

    Args:
        path: path of the PNG.
        found: contents of `comparison.json`.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    markers = "os^vD<>pPX*h"
    for i, (name, one) in enumerate(found["candidates"].items()):
        if one["runs"] and math.isfinite(one["figure"]["mean"]):
            axes.errorbar(
                one["trainable_parameters"],
                one["figure"]["mean"],
                one["figure"]["deviation"] or None,
                label=name,
                capsize=3,
                linestyle="none",
                marker=markers[i % len(markers)],
                markersize=8,
                color=f"C{i % 10}",
            )
    axes.set(
        xscale="log", xlabel="trainable parameters", ylabel=f"{found['split']} {found['metric']}"
    )
    axes.set_title(
        f"{found['metric']} over trainable parameters, mean of {len(found['seeds'])} seed(s)"
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=120)
    plt.close(figure)

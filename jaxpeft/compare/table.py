"""What a comparison has found, as a table (Markdown and JSON) and as a plot of the figure over
trainable parameters.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxpeft.config.schema import Config, as_dict
from jaxpeft.evaluation.metrics import LOWER_IS_BETTER
from jaxpeft.train import next_steps

Result = Mapping[str, Any]
_NOTES = (
    "`±` is the standard deviation over seeds. Memory is the peak of the run's process on a CPU,"
    " libraries and compilation included, and the device's own where it tells. Time is that of"
    " training with its evaluations: their compilation counts, that of the step does not. The file"
    " is the saved adapter; of `full` that is the whole model."
)


@dataclass(frozen=True)
class Spread:
    """A figure over seeds.

    Attributes:
        values: one a seed.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation, None of one value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def format(self, pattern: str = "{:.4f}") -> str:
        """Write it as people do."""
        around = (
            ""
            if self.deviation is None
            else f" ± {pattern.replace('+', '').format(self.deviation)}"
        )
        return pattern.format(self.mean) + around

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {"mean": self.mean, "deviation": self.deviation, "values": list(self.values)}


def summary(
    config: Config, results: Mapping[str, Sequence[Result]], failed: Mapping[str, str]
) -> dict[str, Any]:
    """Return what a comparison has found as plain values: what `comparison.json` holds.

    Args:
        config: with the candidates.
        results: what the runs of each candidate have left, by its name; some may be missing.
        failed: why runs have failed, by what they are called.
    """
    some = next(result for runs in results.values() for result in runs)
    metric, reference = some["metric"], config.compare.compared_with
    figures = {
        name: Spread(tuple(r["test"][metric] for r in runs))
        for name, runs in results.items()
        if runs
    }
    measured = some["forgetting"]
    began = [
        told[metric] for runs in results.values() for run in runs if (told := run.get("before"))
    ]
    before = Spread(tuple(began)) if began else None
    return {
        "metric": metric,
        "split": some.get("split", "test"),
        "before": before.as_dict() if before else None,
        "reference": reference if reference in figures else None,
        "seeds": list(config.compare.seeds),
        "forgetting": (
            measured
            and {
                "rows": config.compare.forgetting,
                **{k: measured[k] for k in ("measure", "before")},
            }
        ),
        "device": some["device"],
        "jax": some["jax"],
        "candidates": {
            name: _candidate(config, name, runs, figures, figures.get(reference or ""))
            for name, runs in results.items()
        },
        "failed": dict(failed),
        "config": as_dict(config),
    }


def _candidate(
    config: Config,
    name: str,
    runs: Sequence[Result],
    figures: Mapping[str, Spread],
    reference: Spread | None,
) -> dict[str, Any]:
    (candidate,) = (one for one in config.compare.candidates if one.title == name)
    made: dict[str, Any] = {"method": candidate.method.as_dict(), "runs": len(runs)}
    if not runs:
        return made
    first, figure = runs[0], figures[name]
    forgotten = tuple(run["forgetting"]["lost"] for run in runs if run["forgetting"])
    return made | {
        "figure": figure.as_dict(),
        "of_reference": (
            figure.mean / reference.mean if reference is not None and reference.mean else None
        ),
        "trainable_parameters": first["trainable_parameters"],
        "trainable_share": first["trainable_parameters"] / first["total_parameters"],
        "peak_memory_gb": max(run["peak_memory_gb"] for run in runs),
        "seconds": Spread(tuple(run["seconds"] for run in runs)).as_dict(),
        "adapter_bytes": first["adapter_bytes"],
        "forgetting": Spread(forgotten).as_dict() if forgotten else None,
        "tests": [run["test"] for run in runs],
    }


def write(
    config: Config, results: Mapping[str, Sequence[Result]], failed: Mapping[str, str], folder: Path
) -> Mapping[str, Any]:
    """Write `comparison.json`, `comparison.md` and `comparison.png`; return `summary`, whose
    arguments these are.
    """
    made = summary(config, results, failed)
    (folder / "comparison.json").write_text(json.dumps(made, indent=2) + "\n")
    (folder / "comparison.md").write_text(markdown(config, made))
    draw(folder / "comparison.png", made)
    return made


def closing_text(
    made: Mapping[str, Any], results: Mapping[str, Sequence[Result]], folder: Path
) -> str:
    """Return what the end of a comparison prints: the figures, what is left, and how the best
    adapter predicts.

    Args:
        made: what `summary` gives.
        results: what the runs of each candidate have left, by its name.
        folder: of the comparison.
    """
    rows = [next_steps.row("before training", _spread(made["before"]))] if made["before"] else []
    done = {name: one for name, one in made["candidates"].items() if one["runs"]}
    for name, one in done.items():
        rows.append(
            next_steps.row(
                name, _spread(one["figure"]), one["trainable_share"], one["seconds"]["mean"]
            )
        )
    lower = made["metric"] in LOWER_IS_BETTER
    best = min(done, key=lambda name: done[name]["figure"]["mean"] * (1 if lower else -1))
    lines = [
        f"{made['split']} {made['metric']}{' (lower is better)' * lower}",
        *rows,
        "",
        (
            f"in {folder}: comparison.md, comparison.json, comparison.png, and adapter/,"
            " metrics.jsonl of each run in NAME/seed-N/"
        ),
    ]
    prediction = results[best][0].get("prediction")
    return "\n".join(
        [*lines, f"next, use the adapter of {best}:", prediction] if prediction else lines
    )


def _spread(plain: Mapping[str, Any]) -> str:
    return Spread(tuple(plain["values"])).format()


def markdown(config: Config, made: Mapping[str, Any]) -> str:
    """Return what `summary` gives as a page with a table."""
    columns = _columns(made)
    lines = [
        _introduction(config, made),
        *(
            [f"Before training: {made['metric']} {_spread(made['before'])}."]
            if made["before"]
            else []
        ),
        "",
        f"| method | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
        *(_row(name, one, made, len(columns)) for name, one in made["candidates"].items()),
        "",
        _NOTES,
    ]
    if made["forgetting"]:
        lines += ["", _forgetting_note(made["forgetting"])]
    if made["failed"]:
        lines += [
            "",
            "Failed:",
            "",
            *(f"* {name}: {' '.join(why.split())}" for name, why in made["failed"].items()),
        ]
    return "\n".join(lines) + "\n"


def _introduction(config: Config, made: Mapping[str, Any]) -> str:
    train, seeds = config.train, made["seeds"]
    rows = config.data.test or config.data.validation or "the rows held out"
    length = f"{train.steps} steps" if train.steps else f"{train.epochs:g} epochs"
    said = f"{'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}"
    where = f"{made['device']}, jax {made['jax']}"
    return (
        f"{config.model.path} on {_short_path(rows)}, {length} of {train.batch_size} rows, {said};"
        f" {where}."
    )


def _columns(made: Mapping[str, Any]) -> list[str]:
    lower = " (lower is better)" if made["metric"] in LOWER_IS_BETTER else ""
    columns = [f"{made['metric']}{lower}", "trained", "of all", "peak memory", "time", "file"]
    if made["reference"]:
        columns.insert(1, f"of {made['reference']}")
    return [*columns, "forgetting"] if made["forgetting"] else columns


def _row(name: str, one: Mapping[str, Any], made: Mapping[str, Any], columns: int) -> str:
    wanted = len(made["seeds"])
    title = name if one["runs"] == wanted else f"{name} ({one['runs']} of {wanted} runs)"
    if not one["runs"]:
        return f"| {title} |{' - |' * columns}"
    cells = [_spread(one["figure"])]
    if made["reference"]:
        cells.append("-" if one["of_reference"] is None else f"{one['of_reference']:.1%}")
    cells += [
        f"{one['trainable_parameters']:,}",
        f"{one['trainable_share']:.3%}",
        f"{one['peak_memory_gb']:.2f} GB",
        f"{one['seconds']['mean']:.0f} s",
        _bytes(one["adapter_bytes"]),
    ]
    if made["forgetting"]:
        lost = one["forgetting"]
        cells.append("-" if lost is None else Spread(tuple(lost["values"])).format("{:+.4f}"))
    return f"| {title} | {' | '.join(cells)} |"


def _forgetting_note(forgetting: Mapping[str, Any]) -> str:
    rows, before = _short_path(forgetting["rows"]), forgetting["before"]
    if forgetting["measure"] == "loss":
        return (
            f"Forgetting: by how much the mean loss of a token of {rows} has grown; it is"
            f" {before:.4f} of the base."
        )
    return (
        f"Forgetting: of {rows}, the share of sentences whose own class has the nearest mean, the"
        f" head left off, of the base ({before:.4f}) less that of the adapted model"
        " (`jaxpeft/evaluation/forgetting.py`)."
    )


def _short_path(path: str) -> str:
    """Name rows by the end of their path."""
    return "/".join(path.rsplit("/", 2)[-2:])


def _bytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e4 else f"{count / 1e3:.1f} kB"


def draw(path: Path, made: Mapping[str, Any]) -> None:
    """Draw the figure of each candidate over its trainable parameters as a PNG; bars are standard
    deviations.

    Args:
        path: of the PNG.
        made: what `summary` gives.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    markers = "os^vD<>pPX*h"
    for i, (name, one) in enumerate(made["candidates"].items()):
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
        xscale="log", xlabel="trainable parameters", ylabel=f"{made['split']} {made['metric']}"
    )
    axes.set_title(
        f"{made['metric']} over trainable parameters, mean of {len(made['seeds'])} seed(s)"
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=120)
    plt.close(figure)

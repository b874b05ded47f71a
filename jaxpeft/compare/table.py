"""Results of a comparison as a table (Markdown and JSON) and a plot of metric over trainable
parameters.
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
    "`±` is the standard deviation over seeds. Memory is the device's peak if it reports one;"
    " otherwise (on a CPU) it is that of the process, including libraries and compilation. Time"
    " includes training, evaluations and their compilation, but not compiling the step. The file is"
    " the saved adapter; for `full` it is the complete model."
)


@dataclass(frozen=True)
class Spread:
    """A metric over seeds.

    Attributes:
        values: one value per seed.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation, None for a single value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def format(self, pattern: str = "{:.4f}") -> str:
        """Format as `mean ± deviation`."""
        around = (
            ""
            if self.deviation is None
            else f" ± {pattern.replace('+', '').format(self.deviation)}"
        )
        return pattern.format(self.mean) + around

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"mean": self.mean, "deviation": self.deviation, "values": list(self.values)}


def summary(
    config: Config, results: Mapping[str, Sequence[Result]], failed: Mapping[str, str]
) -> dict[str, Any]:
    """Return the contents of `comparison.json`.

    Args:
        config: config with the candidates.
        results: results of each candidate's runs, by name; some may be missing.
        failed: error of each failed run, by its description.
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
        before[metric] for runs in results.values() for run in runs if (before := run.get("before"))
    ]
    start = Spread(tuple(began)) if began else None
    return {
        "metric": metric,
        "split": some.get("split", "test"),
        "before": start.as_dict() if start else None,
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
    described: dict[str, Any] = {"method": candidate.method.as_dict(), "runs": len(runs)}
    if not runs:
        return described
    first, figure = runs[0], figures[name]
    forgotten = tuple(run["forgetting"]["lost"] for run in runs if run["forgetting"])
    return described | {
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
    """Write `comparison.json`, `comparison.md` and `comparison.png`.

    Takes the arguments of `summary` and returns its result.
    """
    found = summary(config, results, failed)
    (folder / "comparison.json").write_text(json.dumps(found, indent=2) + "\n")
    (folder / "comparison.md").write_text(markdown(config, found))
    draw(folder / "comparison.png", found)
    return found


def closing_text(
    found: Mapping[str, Any], results: Mapping[str, Sequence[Result]], folder: Path
) -> str:
    """Return the text printed at the end: metrics, files, and code that predicts with the best
    adapter.

    Args:
        found: result of `summary`.
        results: results of each candidate's runs, by name.
        folder: folder of the comparison.
    """
    rows = [next_steps.row("before training", _spread(found["before"]))] if found["before"] else []
    done = {name: one for name, one in found["candidates"].items() if one["runs"]}
    for name, one in done.items():
        rows.append(
            next_steps.row(
                name, _spread(one["figure"]), one["trainable_share"], one["seconds"]["mean"]
            )
        )
    lower = found["metric"] in LOWER_IS_BETTER
    best = min(done, key=lambda name: done[name]["figure"]["mean"] * (1 if lower else -1))
    lines = [
        f"{found['split']} {found['metric']}{' (lower is better)' * lower}",
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


def markdown(config: Config, found: Mapping[str, Any]) -> str:
    """Return a Markdown page with the table of a `summary`."""
    columns = _columns(found)
    lines = [
        _introduction(config, found),
        *(
            [f"Before training: {found['metric']} {_spread(found['before'])}."]
            if found["before"]
            else []
        ),
        "",
        f"| method | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
        *(_row(name, one, found, len(columns)) for name, one in found["candidates"].items()),
        "",
        _NOTES,
    ]
    if found["forgetting"]:
        lines += ["", _forgetting_note(found["forgetting"])]
    if found["failed"]:
        lines += [
            "",
            "Failed:",
            "",
            *(f"* {name}: {' '.join(why.split())}" for name, why in found["failed"].items()),
        ]
    return "\n".join(lines) + "\n"


def _introduction(config: Config, found: Mapping[str, Any]) -> str:
    train, seeds = config.train, found["seeds"]
    rows = config.data.test or config.data.validation or "held-out rows"
    length = f"{train.steps} steps" if train.steps else f"{train.epochs:g} epochs"
    listed = f"{'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}"
    where = f"{found['device']}, jax {found['jax']}"
    return (
        f"{config.model.path} on {_short_path(rows)}, {length} of {train.batch_size} rows,"
        f" {listed}; {where}."
    )


def _columns(found: Mapping[str, Any]) -> list[str]:
    lower = " (lower is better)" if found["metric"] in LOWER_IS_BETTER else ""
    columns = [f"{found['metric']}{lower}", "trained", "of all", "peak memory", "time", "file"]
    if found["reference"]:
        columns.insert(1, f"of {found['reference']}")
    return [*columns, "forgetting"] if found["forgetting"] else columns


def _row(name: str, one: Mapping[str, Any], found: Mapping[str, Any], columns: int) -> str:
    total = len(found["seeds"])
    title = name if one["runs"] == total else f"{name} ({one['runs']} of {total} runs)"
    if not one["runs"]:
        return f"| {title} |{' - |' * columns}"
    cells = [_spread(one["figure"])]
    if found["reference"]:
        cells.append("-" if one["of_reference"] is None else f"{one['of_reference']:.1%}")
    cells += [
        f"{one['trainable_parameters']:,}",
        f"{one['trainable_share']:.3%}",
        f"{one['peak_memory_gb']:.2f} GB",
        f"{one['seconds']['mean']:.0f} s",
        _bytes(one["adapter_bytes"]),
    ]
    if found["forgetting"]:
        lost = one["forgetting"]
        cells.append("-" if lost is None else Spread(tuple(lost["values"])).format("{:+.4f}"))
    return f"| {title} | {' | '.join(cells)} |"


def _forgetting_note(forgetting: Mapping[str, Any]) -> str:
    rows, before = _short_path(forgetting["rows"]), forgetting["before"]
    if forgetting["measure"] == "loss":
        return (
            f"Forgetting: increase of the mean token loss on {rows}, which is {before:.4f} for the"
            " base."
        )
    return (
        f"Forgetting: decrease of the nearest-class-mean accuracy on {rows}, computed without the"
        f" head, which is {before:.4f} for the base (`jaxpeft/evaluation/forgetting.py`)."
    )


def _short_path(path: str) -> str:
    """Return the last two components of a path."""
    return "/".join(path.rsplit("/", 2)[-2:])


def _bytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e4 else f"{count / 1e3:.1f} kB"


def draw(path: Path, found: Mapping[str, Any]) -> None:
    """Plot each candidate's metric over its trainable parameters as a PNG; bars are standard
    deviations.

    Args:
        path: path of the PNG.
        found: result of `summary`.
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

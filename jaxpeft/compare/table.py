"""Results of a comparison as JSON, a Markdown table, an HTML page and a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxpeft import atomic
from jaxpeft.compare import comparison_page, plot
from jaxpeft.compare.spread import LEVEL, Spread, difference, spread_of
from jaxpeft.config.schema import Config, as_dict
from jaxpeft.evaluation.metrics import LOWER_IS_BETTER
from jaxpeft.names import short_path
from jaxpeft.report.page_templates import size
from jaxpeft.train import next_steps, records

Result = Mapping[str, Any]
_SPREAD = "`±` is the standard deviation over seeds. "
_INTERVAL = (
    "The interval is that of the mean over seeds (Student's t); it does not include the variation"
    " by test rows. "
)
_COST = (
    "Memory is the device's peak if it reports one; otherwise (on a CPU) it is that of the process,"
    " including libraries and compilation. Time includes training, evaluations and their"
    " compilation, but not compiling the step. The file is the saved adapter; for full fine-tuning"
    " it is the complete model."
)


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
        name: {run["config"]["train"]["seed"]: run["test"][metric] for run in runs}
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
    figures: Mapping[str, Mapping[int, float]],
    reference: Mapping[int, float] | None,
) -> dict[str, Any]:
    """Return the results of a candidate.

    Args:
        config: config with the candidates.
        name: name of the candidate.
        runs: results of its runs.
        figures: metric by seed of each candidate that has results.
        reference: that of the reference candidate; None without one.
    """
    (candidate,) = (one for one in config.compare.candidates if one.title == name)
    described: dict[str, Any] = {"method": candidate.method.as_dict(), "runs": len(runs)}
    if not runs:
        return described
    first, figure = runs[0], Spread(tuple(figures[name].values()))
    other = Spread(tuple(reference.values())) if reference else None
    gap = difference(figures[name], reference) if reference else None
    forgotten = tuple(run["forgetting"]["lost"] for run in runs if run["forgetting"])
    return described | {
        "figure": figure.as_dict(),
        "of_reference": figure.mean / other.mean if other is not None and other.mean else None,
        "minus_reference": gap.as_dict() if gap is not None else None,
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
    """Write `comparison.json`, `comparison.md`, `comparison.html`, `comparison.png`, and the config
    as `config.json`.

    Takes the arguments of `summary` and returns its result.
    """
    found = summary(config, results, failed)
    (folder / records.CONFIG).write_text(json.dumps(found["config"], indent=2) + "\n")
    (folder / "comparison.json").write_text(json.dumps(found, indent=2) + "\n")
    (folder / "comparison.md").write_text(markdown(config, found))
    best = best_of(found)
    texts = {
        "introduction": _introduction(config, found),
        "notes": _notes(found),
        "run": f"{best}/seed-{results[best][0]['config']['train']['seed']}",
        "prediction": results[best][0].get("prediction", ""),
    }
    page = comparison_page.html(config, found, best, texts, folder)
    atomic.write_text(folder / "comparison.html", page)
    plot.draw(folder / "comparison.png", found)
    return found


def best_of(found: Mapping[str, Any]) -> str:
    """Return the name of the candidate with the best mean in a `summary`."""
    done = {name: one for name, one in found["candidates"].items() if one["runs"]}
    sign = 1 if found["metric"] in LOWER_IS_BETTER else -1
    return min(done, key=lambda name: done[name]["figure"]["mean"] * sign)


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
    rows = (
        [next_steps.row("before training", spread_of(found["before"]).format())]
        if found["before"]
        else []
    )
    done = {name: one for name, one in found["candidates"].items() if one["runs"]}
    for name, one in done.items():
        rows.append(
            next_steps.row(
                name,
                spread_of(one["figure"]).format(),
                one["trainable_share"],
                one["seconds"]["mean"],
            )
        )
    lower = found["metric"] in LOWER_IS_BETTER
    best = best_of(found)
    lines = [
        f"{found['split']} {found['metric']}{' (lower is better)' * lower}",
        *rows,
        "",
        (
            f"in {folder}: comparison.html, comparison.md, comparison.json, comparison.png, and"
            " adapter/, metrics.jsonl of each run in NAME/seed-N/"
        ),
    ]
    prediction = results[best][0].get("prediction")
    return "\n".join(
        [*lines, f"next, use the adapter of {best}:", prediction] if prediction else lines
    )


def markdown(config: Config, found: Mapping[str, Any]) -> str:
    """Return a Markdown page with the table of a `summary`."""
    columns = _columns(found)
    lines = [
        _introduction(config, found),
        *(
            [f"Before training: {found['metric']} {spread_of(found['before']).format()}."]
            if found["before"]
            else []
        ),
        "",
        f"| method | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
        *(_row(name, one, found, len(columns)) for name, one in found["candidates"].items()),
        "",
        _SPREAD + "\n\n".join(_notes(found)),
    ]
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
    length = (
        f"{train.steps} steps"
        if train.steps
        else f"{train.epochs:g} epoch{'s' * (train.epochs != 1)}"
    )
    listed = f"{'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}"
    where = f"{found['device']}, jax {found['jax']}"
    return (
        f"{config.model.path} on {short_path(rows)}, {length} of {train.batch_size} rows,"
        f" {listed}; {where}."
    )


def _columns(found: Mapping[str, Any]) -> list[str]:
    lower = " (lower is better)" if found["metric"] in LOWER_IS_BETTER else ""
    columns = [f"{found['metric']}{lower}", "trained", "of all", "peak memory", "time", "file"]
    if found["reference"]:
        columns.insert(1, f"of {found['reference']}")
    if len(found["seeds"]) > 1:
        columns.insert(1, f"{LEVEL:.0%} interval")
    return [*columns, "forgetting"] if found["forgetting"] else columns


def _row(name: str, one: Mapping[str, Any], found: Mapping[str, Any], columns: int) -> str:
    total = len(found["seeds"])
    title = name if one["runs"] == total else f"{name} ({one['runs']} of {total} runs)"
    if not one["runs"]:
        return f"| {title} |{' - |' * columns}"
    cells = [spread_of(one["figure"]).format()]
    if total > 1:
        ends = one["figure"]["interval"]
        cells.append("-" if ends is None else f"{ends[0]:.4f} to {ends[1]:.4f}")
    if found["reference"]:
        cells.append("-" if one["of_reference"] is None else f"{one['of_reference']:.1%}")
    cells += [
        f"{one['trainable_parameters']:,}",
        f"{one['trainable_share']:.3%}",
        f"{one['peak_memory_gb']:.2f} GB",
        f"{one['seconds']['mean']:.0f} s",
        size(one["adapter_bytes"]),
    ]
    if found["forgetting"]:
        lost = one["forgetting"]
        cells.append("-" if lost is None else Spread(tuple(lost["values"])).format("{:+.4f}"))
    return f"| {title} | {' | '.join(cells)} |"


def _notes(found: Mapping[str, Any]) -> list[str]:
    costs = f"{_INTERVAL}{_COST}" if len(found["seeds"]) > 1 else _COST
    return [costs, *([_forgetting_note(found["forgetting"])] if found["forgetting"] else [])]


def _forgetting_note(forgetting: Mapping[str, Any]) -> str:
    rows, before = short_path(forgetting["rows"]), forgetting["before"]
    if forgetting["measure"] == "loss":
        return (
            f"Forgetting: increase of the mean token loss on {rows}, which is {before:.4f} for the"
            " base."
        )
    return (
        f"Forgetting: decrease of the nearest-class-mean accuracy on {rows}, computed without the"
        f" head, which is {before:.4f} for the base (`jaxpeft/evaluation/forgetting.py`)."
    )

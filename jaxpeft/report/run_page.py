"""The page of a run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxpeft.config.schema import as_dict
from jaxpeft.core import paths
from jaxpeft.core.options import changed_options
from jaxpeft.evaluation.metrics import LOWER_IS_BETTER
from jaxpeft.names import short_path
from jaxpeft.report.base_title import base_title
from jaxpeft.report.evaluation_section import EvaluationSection
from jaxpeft.report.incidents import find_incidents
from jaxpeft.report.page_templates import render
from jaxpeft.report.run_folder import Counts, RunFolder, Start
from jaxpeft.report.svg_charts import Chart, draw, points_of
from jaxpeft.train import records

_TASKS = {
    "causal_lm": "language modeling",
    "sequence_classification": "sequence classification",
    "token_classification": "token classification",
}


def html(run: RunFolder, evaluations: Sequence[EvaluationSection] = ()) -> str:
    """Return the page of a run.

    Args:
        run: the run, finished or not.
        evaluations: evaluations to show.
    """
    config, start, result = run.config, run.start, run.result
    metric = result.metric if result else start.metric
    return render(
        "run.html",
        run=run,
        config=config,
        start=start,
        result=result,
        metric=metric,
        lower_is_better=metric in LOWER_IS_BETTER,
        method=config.method.name,
        base=base_title(config.model.path),
        task=_TASKS[config.model.task],
        rows=", ".join(map(short_path, config.data.sources)),
        progress=_progress(run),
        share=_share(run),
        metrics=_metric_rows(run),
        charts=_charts(run, metric),
        evaluations=evaluations,
        incidents=find_incidents(run, metric),
        forgetting=result.forgetting if result else None,
        subject=_subject(run),
        options=_options(run),
        splits=_splits(run),
        environment=_environment(run),
        hashes=_hashes(start),
        settings=_settings(run),
        repeat=_command(str(run.folder / records.CONFIG), "runs/again"),
        resume=_command(str(run.folder / records.CONFIG), str(run.folder)),
    )


def _command(config: str, workdir: str) -> str:
    words = ["python", "-m", "jaxpeft.train", "--config", config, "--workdir", workdir]
    return shlex.join(words)


def _progress(run: RunFolder) -> str:
    """Return how far the run has come, such as `60 of 102 steps`."""
    done = run.result.steps if run.result else max((line["step"] for line in run.lines), default=0)
    planned = run.start.steps
    return f"{done:,} steps" if planned in (0, done) else f"{done:,} of {planned:,} steps"


def _share(run: RunFolder) -> tuple[int, int] | None:
    """Return the numbers of trainable parameters and of all; None if they are unknown."""
    known = run.result or run.start
    return (known.trainable_parameters, known.total_parameters) if known.total_parameters else None


@dataclass(frozen=True)
class MetricRow:
    """A metric before and after training, and on the validation rows of the best step."""

    name: str
    before: float | None
    after: float | None
    validation: float | None


def _metric_rows(run: RunFolder) -> list[MetricRow]:
    """Return a row for each metric; of a run that has not finished, the newest validation."""
    result = run.result
    newest = next((line for line in reversed(run.lines) if "validation/loss" in line), {})
    validation = (
        result.validation
        if result
        else {name.removeprefix("validation/"): newest[name] for name in newest if name != "step"}
    )
    after = result.after if result else {}
    names = dict.fromkeys([*after, *validation, *run.before])
    return [
        MetricRow(name, run.before.get(name), after.get(name), validation.get(name))
        for name in names
    ]


def _charts(run: RunFolder, metric: str) -> list[Chart]:
    lines = run.lines
    losses = {"training": points_of(lines, "loss"), "validation": points_of(lines, _of("loss"))}
    found = [draw("loss", losses, marked=["validation"])]
    if metric not in ("", "loss"):
        title = f"{metric}, validation"
        found.append(draw(title, {title: points_of(lines, _of(metric))}, marked=[title]))
    found += [
        draw(title, {title: points_of(lines, key)}, from_zero=True)
        for title, key in (
            ("learning rate", "learning_rate"),
            ("gradient norm", "grad_norm"),
            ("tokens per second", "tokens_per_second"),
        )
    ]
    return [chart for chart in found if chart is not None]


def _of(metric: str) -> str:
    return f"validation/{metric}"


def _subject(run: RunFolder) -> list[tuple[str, str]]:
    """Return the base, the task and the method as named facts."""
    model, start, train = run.config.model, run.start, run.config.train
    revision = f" at {model.revision}" if model.revision else ""
    rows = [
        ("base", f"{model.path}{revision}"),
        ("quantization", model.quant if model.quant != "none" else ""),
        ("task", _TASKS[model.task]),
        ("classes", ", ".join(start.labels)),
        ("steps" if train.steps else "epochs", f"{train.steps or train.epochs:,g}"),
        ("batch size", f"{train.batch_size:,} rows"),
        ("optimizer", run.config.optimizer.name),
        ("learning rate", f"{run.config.optimizer.learning_rate:g}"),
    ]
    return [(name, value) for name, value in rows if value]


def _environment(run: RunFolder) -> list[tuple[str, str]]:
    found = {name: str(value) for name, value in run.start.environment.items()}
    peak = max((line["memory_gb"] for line in run.lines if "memory_gb" in line), default=None)
    device = found.pop("device", "")
    rows = {
        "jaxpeft": found.pop("jaxpeft", ""),
        "jax": found.pop("jax", ""),
        "devices": f"{found.pop('devices', '')} x {device}" if device else "",
        "peak memory": "" if peak is None else f"{peak:.2f} GB",
        "seed": str(run.config.train.seed),
    }
    return [(name, value) for name, value in {**rows, **found}.items() if value]


def _hashes(start: Start) -> list[tuple[str, str]]:
    other = [(name, text) for name, text in start.data.items() if isinstance(text, str)]
    rows = [(f"{split} rows", text) for split, text in start.sources.items()]
    base = [("base", start.base_sha256)] if start.base_sha256 else []
    return [*base, *rows, *other]


def _options(run: RunFolder) -> list[tuple[str, str, bool]]:
    """Return the options of the method: name, value, and whether it differs from the default."""
    method = run.config.method
    changed = changed_options(method)
    return [
        (name, _plain(value), name in changed)
        for name, value in method.as_dict().items()
        if name != "name"
    ]


def _plain(value: Any) -> str:
    """Return an option's value as text; an empty list or mapping as `none`."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "none" if value in (None, {}) else str(value)


@dataclass(frozen=True)
class Split:
    """The rows of a split: where they are from, and how many they are."""

    name: str
    source: str
    counts: Counts | None


def _splits(run: RunFolder) -> list[Split]:
    data, start = run.config.data, run.start
    sources = {
        "train": ", ".join(data.sources),
        "validation": data.validation or f"{data.validation_share:.0%} of the training rows",
        "test": data.test or "the test rows beside the training rows",
    }
    if not data.test and "test" not in start.rows:
        del sources["test"]
    return [Split(name, text, start.rows.get(name)) for name, text in sources.items()]


def _settings(run: RunFolder) -> list[tuple[str, str]]:
    """Return every option of the config but the method's, as `section.option` and value."""
    sections = as_dict(run.config)
    del sections["method"], sections["compare"]
    return [(name, _plain(value)) for name, value in paths.flatten(sections).items()]

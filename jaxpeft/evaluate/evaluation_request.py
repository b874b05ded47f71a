"""What to evaluate: `EvaluationRequest`, checked before a file is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from jaxpeft.errors import ConfigError, nearest
from jaxpeft.evaluate.generated import CODE, Generating
from jaxpeft.evaluation.intervals import Bootstrap
from jaxpeft.evaluation.metrics import figures_of
from jaxpeft.evaluation.text_scores import TextMetric

BASE = "base"
_PLURALS = {
    "lm": "language models",
    "regression": "regression",
    "single_label": "classification",
    "multi_label": "multi-label classification",
    "token": "token classification",
}
TEXT_METRICS = (*get_args(TextMetric), CODE)


@dataclass(frozen=True)
class General:
    """Text on which forgetting is measured.

    Attributes:
        path: file of the text.
        prompts: maximum number of prompts to answer, with and without the adapter; 0 for none.
        prompt_tokens: tokens of a prompt, the beginning of a text.
    """

    path: str
    prompts: int = 50
    prompt_tokens: int = 16


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate.

    Attributes:
        data: rows to evaluate.
        model: folder or hub id of the base; None for the one that the adapter records.
        adapter: folder of the adapter or of its run; None for the base alone.
        against: `base`, or the folder of another adapter of the same task; None for no comparison.
        metrics: metrics to report; empty for those of the task.
        limit: maximum number of rows, sampled by the seed.
        bootstrap: how intervals are computed.
        generating: how answers are generated.
        general: text on which forgetting is measured; None for none.
        thresholds: rows on which the thresholds of a multi-label classification are chosen.
        plots: whether plots are wanted, which only classifiers have.
        load: further arguments of `load_adapted`.
        data_options: options of `config.data` that replace those of the adapter's run.

    Raises:
        ConfigError: Options contradict each other; it lists all problems.
    """

    data: str
    model: str | None = None
    adapter: Path | None = None
    against: str | None = None
    metrics: Sequence[str] = ()
    limit: int | None = None
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    generating: Generating = field(default_factory=Generating)
    general: General | None = None
    thresholds: str | None = None
    plots: bool = False
    load: Mapping[str, Any] = field(default_factory=dict[str, Any])
    data_options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        problems: list[str] = []
        if self.adapter is None:
            needed = {"against base": self.against == BASE, "general": self.general is not None}
            problems += [
                f"--{name}: compares an adapter with its base; set --adapter"
                for name, given in needed.items()
                if given
            ]
        if CODE in self.metrics and self.generating.code is None:
            problems.append(
                f"--metrics: {CODE} runs generated programs; allow it with --run-code answer, or"
                " --run-code prompt if answers continue the code of the prompt"
            )
        if problems:
            raise ConfigError(problems)

    @property
    def text_metrics(self) -> tuple[str, ...]:
        """The metrics for which answers are generated."""
        wanted = [*self.metrics, *([CODE] if self.generating.code else [])]
        return tuple(dict.fromkeys(name for name in wanted if name in TEXT_METRICS))


def shown_metrics(request: EvaluationRequest, problem: str, labels: Sequence[str]) -> list[str]:
    """Return the metrics to report, in order.

    Args:
        request: what to evaluate.
        problem: `single_label`, `multi_label`, `regression`, `token` or `lm`.
        labels: label names.

    Raises:
        ConfigError: A metric, or another part of the request, does not exist for the problem.
    """
    usual = ["loss", *figures_of(problem, labels)]
    extra = {"lm": ["bits_per_byte"], "regression": [], "token": []}.get(problem, ["ece"])
    own = [name for name in (*usual, *extra) if problem != "regression" or name != "loss"]
    known = (*own, *TEXT_METRICS) if problem == "lm" else tuple(own)
    unknown = [
        f"--metrics: {name!r} is not a metric of {_PLURALS[problem]}{nearest(name, known)} (known:"
        f" {', '.join(known)})"
        for name in request.metrics
        if name not in known
    ]
    if unknown:
        raise ConfigError(unknown)
    for name, given in (("run-code", request.generating.code), ("general", request.general)):
        if given and problem != "lm":
            raise ConfigError(f"--{name}: is for language models, not {_PLURALS[problem]}; omit it")
    if request.plots and problem in ("lm", "regression"):
        raise ConfigError(f"--plot: there is nothing to plot for {_PLURALS[problem]}; omit it")
    if not request.metrics:
        return [*own, *request.text_metrics]
    return list(dict.fromkeys([*request.metrics, *request.text_metrics]))

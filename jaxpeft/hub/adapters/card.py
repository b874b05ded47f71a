"""The model card of an adapter folder, in the Hub's format: base, data, metrics, and how to load
it. No path of this machine is in it.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jaxpeft
from jaxpeft.core.method import Method
from jaxpeft.core.options import changed_options
from jaxpeft.hub.adapters.folder_layout import CONFIG, FolderLayout
from jaxpeft.hub.adapters.settings import Settings
from jaxpeft.hub.adapters.usage import apply_lines, generation_lines
from jaxpeft.hub.sources import is_local, package_of, public_name

_PIPELINES = {
    "causal_lm": ("text-generation", "AutoModelForCausalLM"),
    "sequence_classification": ("text-classification", "AutoModelForSequenceClassification"),
    "token_classification": ("token-classification", "AutoModelForTokenClassification"),
    "encoder": ("feature-extraction", "AutoModel"),
}
"""The Hub's name of a task, and the class of `transformers` that loads its base."""


@dataclass(frozen=True)
class Training:
    """How an adapter was trained.

    Attributes:
        datasets: Hub ids of the training rows.
        rows: names of the training rows, without folders of this machine.
        evaluated: name of the rows of the metrics.
        split: their split, `test` or `validation`.
        metrics: metrics of the adapter on the split.
        before: metrics before training; empty if they were not measured.
        length: length of the training, such as `102 steps of 32 rows with seed 0`.
        command: command that trains it.
    """

    datasets: Sequence[str]
    rows: Sequence[str]
    evaluated: str
    split: str
    metrics: Mapping[str, float]
    before: Mapping[str, float]
    length: str
    command: str


def known_elsewhere(method: Method, layout: FolderLayout) -> bool:
    """Return whether the layout's library has the method, and so can load the folder."""
    return method.peft.type is not None or layout.name != "peft"


def text(
    method: Method,
    layout: FolderLayout,
    config: Mapping[str, Any],
    settings: Settings,
    training: Training | None = None,
    note: str = "",
    has_tokenizer: bool = False,
) -> str:
    """Return the model card.

    Args:
        method: the method that was trained.
        layout: layout of the folder.
        config: content of `adapter_config.json`.
        settings: settings of the run.
        training: how it was trained; None if that is unknown.
        note: why the outputs differ in the layout's library; empty if they are the same.
        has_tokenizer: whether the folder contains a tokenizer; if not, the base's is used.
    """
    base = str(config["base_model_name_or_path"])
    name = _inline(public_name(base)) if base else "an unnamed base"
    elsewhere = known_elsewhere(method, layout)
    kind = "adapter" if elsewhere else "weights"
    in_peft = layout.name == "peft" and elsewhere and not note
    library = layout.name if elsewhere and not note else "jaxpeft"
    parts = [
        f"---\n{_metadata(method, library, base, settings, training)}\n---",
        f"# {method.name} {kind} for {name}",
        _introduction(method, layout, training),
        *([_results(training)] if training else []),
        "## How to load it",
        *([_peft_code(base, config, settings)] if in_peft else []),
        *([layout.usage.strip()] if layout.usage and not note else []),
        *([f"Note: {note}"] if note else []),
        _own_code(base, config, settings, has_tokenizer),
        "## Details",
        _details(method, config, settings),
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(
    method: Method,
    library: str,
    base: str,
    settings: Settings,
    training: Training | None,
) -> str:
    """Return the metadata as YAML, without what is unknown."""
    from huggingface_hub import EvalResult, ModelCardData

    pipeline = _PIPELINES[settings.task][0] if settings.task else None
    results: list[EvalResult] = []
    if training is not None:
        results = [
            EvalResult(
                task_type=pipeline or "other",
                dataset_type=training.evaluated,
                dataset_name=training.evaluated,
                dataset_split=training.split,
                metric_type=metric,
                metric_value=round(value, 4),
            )
            for metric, value in training.metrics.items()
        ]
    data = ModelCardData(
        base_model=public_name(base) if base else None,
        library_name=library,
        pipeline_tag=pipeline,
        tags=["jaxpeft", method.name],
        datasets=list(training.datasets) if training is not None and training.datasets else None,
        model_name=f"{method.name} for {public_name(base)}" if results else None,
        eval_results=results or None,
    )
    return data.to_yaml().strip()


def _introduction(method: Method, layout: FolderLayout, training: Training | None) -> str:
    on = f" on {_inline(', '.join(training.rows))}" if training else ""
    files = f"`{CONFIG}` and `{layout.weights}`"
    trained = f"Trained with jaxpeft {jaxpeft.__version__}{on};"
    if known_elsewhere(method, layout):
        return f"{trained} {files} are in the file format of {layout.library}."
    return (
        f"{trained} {files} contain all trained weights of the base and its head."
        f" {layout.library} has no method {method.name!r}: load them with `jaxpeft.load_adapter`,"
        " or export a full model with `python -m jaxpeft.export --to merged`."
    )


def _results(training: Training) -> str:
    columns = {training.split: training.metrics}
    if training.before:
        columns = {"before training": training.before, **columns}
    rows = [
        f"| metric | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
        *(
            f"| {metric} | {' | '.join(_number(of.get(metric)) for of in columns.values())} |"
            for metric in training.metrics
        ),
    ]
    return (
        f"## Results\n\n{chr(10).join(rows)}\n\nAfter {training.length}. The command, in the folder"
        f" of the run:\n\n```\n{training.command}\n```"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _peft_code(base: str, config: Mapping[str, Any], settings: Settings) -> str:
    loader = _PIPELINES[settings.task or "encoder"][1]
    named = f"path/to/{public_name(base)}" if is_local(base) else base
    count = f", num_labels={settings.num_labels}" if settings.num_labels else ""
    lines = (
        "from peft import PeftModel",
        f"from transformers import {loader}",
        "",
        f"base = {loader}.from_pretrained({named!r}{_revision(config)}{count})",
        "model = PeftModel.from_pretrained(base, 'path/to/this/folder')",
    )
    return "```python\n" + "\n".join(lines) + "\n```"


def _own_code(base: str, config: Mapping[str, Any], settings: Settings, has_tokenizer: bool) -> str:
    named = package_of(base) or (f"path/to/{public_name(base)}" if is_local(base) else base)
    tokenizer = "'path/to/this/folder'" if has_tokenizer else "model.source.folder"
    lines = (
        "import jaxpeft",
        "import transformers",
        "",
        "settings = jaxpeft.read_settings('path/to/this/folder')",
        f"model, params = jaxpeft.load({named!r}{_revision(config)}, **settings.load_options)",
        "method, params = jaxpeft.load_adapter('path/to/this/folder', model, params)",
        f"tokenizer = transformers.AutoTokenizer.from_pretrained({tokenizer})",
        "",
        *_first_output(settings),
    )
    return "```python\n" + "\n".join(lines) + "\n```"


def _first_output(settings: Settings) -> tuple[str, ...]:
    """Return the lines that print a text, the predicted label, or the shape of hidden states."""
    if settings.task == "causal_lm":
        return generation_lines("tokenizer('The beginning of a text')['input_ids']")
    shown = "outputs.shape" if settings.task == "encoder" else "settings.predict(outputs)"
    return apply_lines("'A sentence.'", shown=shown)


def _revision(config: Mapping[str, Any]) -> str:
    return f", revision={config['revision']!r}" if config.get("revision") else ""


def _details(method: Method, config: Mapping[str, Any], settings: Settings) -> str:
    changed = ", ".join(f"{name}={value!r}" for name, value in changed_options(method).items())
    rows = [f"method: {method.name}({_inline(changed)})"]
    rows += [f"revision of the base: {config['revision']}"] if config.get("revision") else []
    rows += [f"SHA-256 of the base: {settings.base_sha256}"] if settings.base_sha256 else []
    rows += [f"problem type: {settings.problem_type}"] if settings.problem_type else []
    rows += [f"outputs, in order: {_inline(', '.join(settings.labels))}"] if settings.labels else []
    return "\n".join(f"* {row}" for row in rows)


def _inline(text: str) -> str:
    """Return text of a file as one line without markup."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")

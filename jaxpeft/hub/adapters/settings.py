"""Settings of a run that are needed to use its adapter or model: `Settings`, saved in
`jaxpeft.json`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxpeft.choices import TASKS
from jaxpeft.errors import AdapterError, show
from jaxpeft.quant.quantize import read_quant

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
"""Problem types of a sequence classifier, named as in the `config.json` of `transformers`."""
DATA_OPTIONS = (
    "format",
    "columns",
    "encoding",
    "delimiter",
    "quoting",
    "header",
    "field",
    "labels",
    "label_separator",
    "unlabeled",
    "max_length",
    "add_bos",
    "add_eos",
)
"""Options of `config.data` that `Settings.data` records, if they are not the defaults."""


@dataclass(frozen=True)
class Settings:
    """The settings that an adapter was trained with.

    Attributes:
        task: `causal_lm`, `sequence_classification`, `token_classification` or `encoder`.
        num_labels: number of outputs of a classifier.
        labels: label names of a classifier in the order of its outputs; empty if unnamed.
        problem_type: problem type of a sequence classifier, one of `PROBLEM_TYPES`.
        pooling: the sequence classifier's input; None for the architecture's own.
        separator: text between a prompt and its completion.
        data: further options of `config.data` by name, some of `DATA_OPTIONS`, as plain values;
            they determine how rows are read and tokenized.
        pad_token_id: id of the padding token.
        eos_token_id: id of the token that ends an answer in the chat template.
        vocab_size: number of tokens of the model, including added ones.
        quant: quantization of the base, as plain values.
        base_sha256: SHA-256 of the base's weights.
        base_config: architecture of the base as plain values; with the weights, its identity.
    """

    task: str | None = None
    num_labels: int | None = None
    labels: tuple[str, ...] = ()
    problem_type: str | None = None
    pooling: str | None = None
    separator: str | None = None
    data: Mapping[str, Any] | None = None
    pad_token_id: int | None = None
    eos_token_id: int | None = None
    vocab_size: int | None = None
    quant: Mapping[str, Any] | None = None
    base_sha256: str | None = None
    base_config: Mapping[str, Any] | None = None

    @property
    def load_options(self) -> dict[str, Any]:
        """The arguments with which `jaxpeft.load` loads the base."""
        names = ("task", "num_labels", "pooling", "vocab_size")
        options = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return options | ({"quant": read_quant(self.quant, "settings")} if self.quant else {})

    def predict(self, logits: Any) -> list[Any]:
        """Return the predictions of a classifier's logits, by label name.

        Args:
            logits: `[rows, labels]`, or `[rows, tokens, labels]` of a token classifier.

        Returns:
            For each row, the most likely label; for `multi_label_classification`, the list of
            labels with a probability above 0.5; for a regression, the number; for a token
            classifier, the list of its tokens' labels.
        """
        values = np.asarray(logits, np.float32)
        if self.problem_type == "regression":
            return values[..., 0].tolist()
        names = np.array(
            self.labels or [f"LABEL_{i}" for i in range(values.shape[-1])], dtype=object
        )
        if self.problem_type == "multi_label_classification":
            return [names[row > 0].tolist() for row in values]
        return names[values.argmax(-1)].tolist()

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {key: list(value) if key == "labels" else value for key, value in vars(self).items()}


_FIELDS = {field.name for field in dataclasses.fields(Settings)}


def parse_settings(extra: Mapping[str, Any], where: Path) -> Settings:
    """Return the settings of a `jaxpeft.json`; missing fields are None.

    Args:
        extra: its content, which is not trusted.
        where: the file, for messages.

    Raises:
        AdapterError: Fields are invalid; it lists all of them.
        ConfigError: This version does not know the quantization of the base.
    """
    fields = {key: value for key, value in extra.items() if key in _FIELDS and value is not None}
    wrong = [
        (key, fields[key], must)
        for key, (good, must) in _MUST.items()
        if key in fields and not good(fields[key])
    ]
    if wrong:
        fix = "fix it, or remove the file to load the adapter as another library's"
        raise AdapterError(
            [
                f"{where}: {key}: must be {must}, is {show(value)}; {fix}"
                for key, value, must in wrong
            ]
        )
    if "quant" in fields:
        read_quant(fields["quant"], where)
    labels, count = fields.pop("labels", ()), fields.get("num_labels")
    if labels and count != len(labels):
        raise AdapterError(f"{where}: labels: {len(labels)} names for num_labels {count}; fix it")
    return Settings(**fields, labels=tuple(labels))


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _is_count(value: Any) -> bool:
    return _is_token(value) and value > 0


def _is_names(value: Any) -> bool:
    return (
        isinstance(value, list)
        and all(isinstance(name, str) for name in value)
        and len(set(value)) == len(value)
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_MUST: Mapping[str, tuple[Any, str]] = {
    "task": (lambda value: _is_text(value) and value in TASKS, f"one of {', '.join(TASKS)}"),
    "num_labels": (_is_count, "a positive integer"),
    "labels": (_is_names, "a list of unique names"),
    "problem_type": (
        lambda value: _is_text(value) and value in PROBLEM_TYPES,
        f"one of {', '.join(PROBLEM_TYPES)}",
    ),
    "pooling": (_is_text, "a name"),
    "separator": (_is_text, "text"),
    "data": (
        lambda value: isinstance(value, dict) and set(value) <= set(DATA_OPTIONS),
        f"an object of {', '.join(DATA_OPTIONS)}",
    ),
    "pad_token_id": (_is_token, "a token id"),
    "eos_token_id": (_is_token, "a token id"),
    "vocab_size": (_is_count, "a positive integer"),
    "base_sha256": (lambda value: _is_text(value) and len(value) == 64, "64 hexadecimal digits"),
    "base_config": (lambda value: isinstance(value, dict), "an object"),
}

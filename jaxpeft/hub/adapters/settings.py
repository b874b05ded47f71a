"""What a run decided that whoever uses its adapter or model must know: `Settings`, kept in
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
"""Those of a sequence classifier, by the names that `config.json` of `transformers` has for them.
"""


@dataclass(frozen=True)
class Settings:
    """What was decided when an adapter was trained.

    Attributes:
        task: `causal_lm`, `sequence_classification`, `token_classification` or `encoder`.
        num_labels: outputs of a classifier.
        labels: the names of a classifier's labels, in the order of its outputs; empty where they
            have none.
        problem_type: of a sequence classifier, one of `PROBLEM_TYPES`.
        pooling: what a sequence classifier reads; None for the architecture's own.
        separator: what stood between a prompt and its completion.
        pad_token_id: of the token that rows were padded with.
        eos_token_id: of the token that ended an answer, as the chat template writes it.
        vocab_size: of the model, with the tokens that were added.
        quant: how the base was quantized, as plain values.
        base_sha256: of the weights of the base.
        base_config: its architecture, as plain values; with the weights it is what makes it the
            same base.
    """

    task: str | None = None
    num_labels: int | None = None
    labels: tuple[str, ...] = ()
    problem_type: str | None = None
    pooling: str | None = None
    separator: str | None = None
    pad_token_id: int | None = None
    eos_token_id: int | None = None
    vocab_size: int | None = None
    quant: Mapping[str, Any] | None = None
    base_sha256: str | None = None
    base_config: Mapping[str, Any] | None = None

    @property
    def load_options(self) -> dict[str, Any]:
        """What `jaxpeft.load` is to be given for the base, beside its path."""
        names = ("task", "num_labels", "pooling", "vocab_size")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return given | ({"quant": read_quant(self.quant, "settings")} if self.quant else {})

    def predict(self, logits: Any) -> list[Any]:
        """Return what a classifier's logits say, in the names of its labels.

        Args:
            logits: `[rows, labels]`, or `[rows, tokens, labels]` of a token classifier.

        Returns:
            For each row the likeliest label; of `multi_label_classification` a list of those that
            are likelier than not; of a regression the number; of a token classifier a list with the
            label of each token.
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
    """Return the settings that a `jaxpeft.json` holds; what it does not say is None.

    Args:
        extra: its content, from anywhere.
        where: the file, for messages.

    Raises:
        AdapterError: listing every field that is not what it must be.
        ConfigError: the base was quantized in a way that this version does not know.
    """
    given = {key: value for key, value in extra.items() if key in _FIELDS and value is not None}
    wrong = [
        (key, given[key], must)
        for key, (good, must) in _MUST.items()
        if key in given and not good(given[key])
    ]
    if wrong:
        fix = "fix it, or remove the file: the adapter is then loaded as one of another library"
        raise AdapterError(
            [
                f"{where}: {key}: must be {must}, is {show(value)}; {fix}"
                for key, value, must in wrong
            ]
        )
    if "quant" in given:
        read_quant(given["quant"], where)
    labels, count = given.pop("labels", ()), given.get("num_labels")
    if labels and count != len(labels):
        raise AdapterError(f"{where}: labels: {len(labels)} names for num_labels {count}; fix it")
    return Settings(**given, labels=tuple(labels))


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
    "num_labels": (_is_count, "a whole number above 0"),
    "labels": (_is_names, "a list of names, each once"),
    "problem_type": (
        lambda value: _is_text(value) and value in PROBLEM_TYPES,
        f"one of {', '.join(PROBLEM_TYPES)}",
    ),
    "pooling": (_is_text, "a name"),
    "separator": (_is_text, "text"),
    "pad_token_id": (_is_token, "a token"),
    "eos_token_id": (_is_token, "a token"),
    "vocab_size": (_is_count, "a whole number above 0"),
    "base_sha256": (lambda value: _is_text(value) and len(value) == 64, "64 hexadecimal digits"),
    "base_config": (lambda value: isinstance(value, dict), "an object"),
}

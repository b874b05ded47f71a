"""The labels of a checkpoint's own classification head, as given in its `config.json`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxpeft.errors import WeightsError
from jaxpeft.hub.sources import Source
from jaxpeft.hub.weights.safetensors_files import open_folder
from jaxpeft.json_files import read_json

_ARCHITECTURES = {
    "sequence_classification": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
}
_PROBLEMS: Mapping[str, Literal["single_label", "multi_label", "regression"]] = {
    "single_label_classification": "single_label",
    "multi_label_classification": "multi_label",
    "regression": "regression",
}
_OUTPUT = re.compile(r"(classifier|score|classifier\.out_proj)\.weight")
_PLACEHOLDER = re.compile(r"LABEL_\d+")


@dataclass(frozen=True)
class BaseHead:
    """The classification head of a checkpoint.

    A run loads it if it has the same number of classes.

    Attributes:
        names: label names by id; empty if the file has none.
        size: number of outputs.
        problem: problem type it was trained for; None if the file does not say.
        file: path of the `config.json`.
    """

    names: tuple[str, ...]
    size: int
    problem: Literal["single_label", "multi_label", "regression"] | None
    file: str


def read_head(source: Source, task: str) -> BaseHead | None:
    """Return the checkpoint's head for a task, or None if it has no such head.

    Raises:
        WeightsError: The files cannot be read, or `id2label` and `label2id` contradict each other.
    """
    file = source.folder / "config.json"
    config = read_json(file)
    suffix, architectures = _ARCHITECTURES.get(task), config.get("architectures") or ()
    if suffix is None or (
        architectures and not any(str(name).endswith(suffix) for name in architectures)
    ):
        return None
    outputs = [
        tensor for name, tensor in open_folder(source.folder).items() if _OUTPUT.fullmatch(name)
    ]
    if len(outputs) != 1 or len(outputs[0].shape) != 2:
        return None
    names = _names(config, str(file))
    size = outputs[0].shape[0]
    return BaseHead(
        names if len(names) == size else (),
        size,
        _PROBLEMS.get(str(config.get("problem_type"))),
        str(file),
    )


def _names(config: Mapping[str, Any], file: str) -> tuple[str, ...]:
    """Return the label names by id; empty if they are only placeholders such as `LABEL_0`."""
    by_id, by_name = (
        _ids(config.get("id2label"), flipped=False),
        _ids(config.get("label2id"), flipped=True),
    )
    if by_id and by_name and by_id != by_name and set(by_id.values()) == set(by_name.values()):
        raise WeightsError(
            f"{file}: id2label and label2id give the classes different ids; fix the wrong one"
        )
    found = by_id or by_name
    names = tuple(found[i] for i in sorted(found))
    numbered = sorted(found) == list(range(len(found))) and len(set(names)) == len(names)
    return names if numbered and not all(map(_PLACEHOLDER.fullmatch, names)) else ()


def _ids(mapping: Any, *, flipped: bool) -> dict[int, str]:
    """Return the label name of each id; empty if an id is not an integer."""
    if not isinstance(mapping, Mapping):
        return {}
    pairs: list[tuple[Any, Any]] = [
        (value, key) if flipped else (key, value) for key, value in mapping.items()
    ]
    valid = all(re.fullmatch(r"[0-9]{1,9}", str(number)) for number, _ in pairs)
    return {int(number): str(name) for number, name in pairs} if valid else {}

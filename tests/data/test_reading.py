"""Sources of a config: labels are those of all of them, whatever their columns are called."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxpeft.config.schema import Config
from jaxpeft.data.reading import read_examples
from tests.training.runs import make_config, tiny_models

__all__ = ["make_config", "tiny_models"]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("names", [("text", "label"), ("sentence", "intent")], ids=["the same columns", "others"])
def test_labels_are_those_of_all_sources(
    make_config: Callable[..., Config], tmp_path: Path, names: tuple[str, str]
) -> None:
    first = write(tmp_path / "a.jsonl", [{"text": f"word{i}", "label": "red"} for i in range(10)])
    other = write(tmp_path / "b.jsonl", [{names[0]: f"word{i}", names[1]: "blue"} for i in range(10, 20)])
    config = make_config(data__train=(first, other), data__validation_share=0.2)
    train, validation, _ = read_examples(config)
    assert train.label_names == validation.label_names == ("blue", "red")
    assert (len(train), len(validation)) == (16, 4)
    told = dict(zip(train.texts, train.labels.tolist(), strict=True))  # type: ignore[union-attr]
    assert all(label == (int(text.removeprefix("word")) < 10) for text, label in told.items())

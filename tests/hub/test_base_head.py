"""What a base's files say of its head: read from what transformers writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxpeft.errors import WeightsError
from jaxpeft.hub.base_head import BaseHead, read_head
from jaxpeft.hub.sources import Source

SIZES = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 16,
}
NAMES = {0: "entailment", 1: "neutral", 2: "contradiction"}


def saved(folder: Path, model: str, **options: Any) -> Source:
    import transformers

    made = getattr(transformers, model)
    made(made.config_class(**SIZES, **options)).save_pretrained(folder)
    return Source(str(folder), folder)


@pytest.mark.parametrize(
    "model", ["RobertaForSequenceClassification", "BertForSequenceClassification"]
)
def test_names_and_problem_are_those_of_the_file(tmp_path: Path, model: str) -> None:
    source = saved(tmp_path, model, id2label=NAMES, problem_type="single_label_classification")
    wanted = BaseHead(tuple(NAMES.values()), 3, "single_label", str(tmp_path / "config.json"))
    assert read_head(source, "sequence_classification") == wanted
    assert read_head(source, "token_classification") is None
    assert read_head(source, "causal_lm") is None


def test_placeholders_are_no_names(tmp_path: Path) -> None:
    source = saved(tmp_path, "BertForTokenClassification", num_labels=4)
    assert read_head(source, "token_classification") == BaseHead(
        (), 4, None, str(tmp_path / "config.json")
    )


def test_a_base_without_a_head_has_no_classes(tmp_path: Path) -> None:
    source = saved(tmp_path, "BertModel", id2label=NAMES)
    assert read_head(source, "sequence_classification") is None


def test_ids_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    source = saved(tmp_path, "BertForSequenceClassification", id2label=NAMES)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(
        json.dumps(config | {"label2id": {"neutral": 0, "entailment": 1, "contradiction": 2}})
    )
    with pytest.raises(WeightsError, match="id2label and label2id give the classes different ids"):
        read_head(source, "sequence_classification")

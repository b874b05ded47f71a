"""Columns: found by their usual names, or refused with the columns present."""

from __future__ import annotations

import pytest

from jaxpeft.config import schema
from jaxpeft.data.columns import FIELDS, Columns, find_columns
from jaxpeft.errors import DataError


@pytest.mark.parametrize(
    ("present", "kind", "found"),
    [
        ("text category", "classification", ("text", None, "category")),
        ("idx sentence label", "classification", ("sentence", None, "label")),
        ("sentence1 sentence2 label idx", "classification", ("sentence1", "sentence2", "label")),
        ("question sentence label", "classification", ("question", "sentence", "label")),
        ("tokens ner_tags", "token_classification", ("tokens", None, "ner_tags")),
        ("text title", "text", ("text", None, None)),
    ],
)
def test_usual_names_are_found(present, kind, found):
    assert find_columns(present.split(), Columns(), kind, "F") == Columns(*found)


def test_given_columns_are_used():
    present = ["a", "b", "text", "label"]
    asked = Columns("a", label="b")
    assert find_columns(present, asked, "classification", "F") == asked
    pair = Columns(text_pair="b")
    assert find_columns(present, pair, "classification", "F") == Columns("text", "b", "label")


@pytest.mark.parametrize(
    ("present", "asked", "kind", "said"),
    [
        ("mr ref", Columns(), "text", ["F: the text column is none of the usual names (text, content, document, story, body); name it. Columns present: mr, ref"]),
        ("text content", Columns(), "text", ["F: the text column could be text or content; name it. Columns present: text, content"]),
        ("text labell", Columns(label="label"), "classification", ["F: no column 'label' (for label); did you mean 'labell'? Columns present: text, labell"]),
        ("tokens ner_tags pos_tags", Columns(), "token_classification", ["F: the label column could be ner_tags or pos_tags; name it. Columns present: tokens, ner_tags, pos_tags"]),
        ("text text_pair premise hypothesis label", Columns(), "classification", ["F: the texts could be ('text', 'text_pair') or ('premise', 'hypothesis'); name the columns text and text_pair. Columns present: text, text_pair, premise, hypothesis, label"]),
    ],
)  # fmt: skip
def test_missing_and_ambiguous_columns_are_refused(present, asked, kind, said):
    with pytest.raises(DataError) as caught:
        find_columns(present.split(), asked, kind, "F")
    assert str(caught.value).splitlines() == said


def test_all_missing_columns_are_reported_at_once():
    with pytest.raises(DataError) as caught:
        find_columns(["x"], Columns(), "classification", "F")
    assert [line.split(" column")[0] for line in str(caught.value).splitlines()] == ["F: the text", "F: the label"]


def test_the_config_knows_the_fields_of_the_columns():
    assert schema.DATA_FIELDS == FIELDS


@pytest.mark.parametrize(
    ("present", "kind", "found"),
    [
        ("system conversations id", "messages", {"messages": "conversations", "system": "system"}),
        ("instruction input output system history", "instruction",
         {"instruction": "instruction", "input": "input", "output": "output", "system": "system", "history": "history"}),
        ("prompt completion tools", "prompt_completion", {"prompt": "prompt", "completion": "completion", "tools": "tools"}),
        ("prompt chosen rejected system_prompt", "preference",
         {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "system": "system_prompt"}),
    ],
)  # fmt: skip
def test_what_goes_before_a_dialog_is_found(present, kind, found):
    assert find_columns(present.split(), Columns(), kind, "F") == Columns(**found)

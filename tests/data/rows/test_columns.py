"""Columns: found by their usual names, or refused with the columns present."""

from __future__ import annotations

import pytest

from jaxpeft.config import data_config
from jaxpeft.data.rows.columns import FIELDS, Columns, find_columns, find_format
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
        ("Text Label", "classification", ("Text", None, "Label")),
        ("Sentence1 sentence2 LABEL", "classification", ("Sentence1", "sentence2", "LABEL")),
        ("text Score label Text", "classification", ("text", None, "label")),
        ("Tokens NER_tags", "token_classification", ("Tokens", None, "NER_tags")),
    ],
)
def test_usual_names_are_found(present, kind, found):
    assert find_columns(present.split(), Columns(), kind, "F") == Columns(*found)


def test_outer_spaces_and_case_of_a_header_do_not_matter():
    found = find_columns([" Prompt ", "COMPLETION", "System"], Columns(), "prompt_completion", "F")
    assert found.named_fields() == {
        "prompt": " Prompt ",
        "completion": "COMPLETION",
        "system": "System",
    }
    assert find_format([" Prompt ", "COMPLETION"], Columns(), "F") == "prompt_completion"
    with pytest.raises(DataError, match="the text column has none of the usual names"):
        find_columns(["Text", "TEXT", "label"], Columns(), "classification", "F")


@pytest.mark.parametrize(
    ("present", "name", "told"),
    [
        (["the film was great", "joy"], "a.tsv", True),
        (["q", "a"], "x/b.csv.gz", True),
        (["1", "2"], "a.tsv", False),
        (["the film was great", "joy"], "a.jsonl", False),
        (["input", "emotion"], "a.csv", False),
    ],
)
def test_a_first_line_that_may_be_a_row_is_told(present, name, told):
    for find in (
        lambda: find_columns(present, Columns(), "classification", name),
        lambda: find_format(present, Columns(), name),
    ):
        with pytest.raises(DataError) as caught:
            find()
        assert (
            "if the first line is a row, set data.header to False and name the" in str(caught.value)
        ) is told


@pytest.mark.parametrize(
    ("present", "texts", "said"),
    [
        (
            "id dialogue summary",
            "dialogue summary",
            "data.columns such as {'prompt': 'dialogue', 'completion': 'summary'}",
        ),
        (
            "id conversation reply",
            "id conversation reply",
            "data.columns such as {'prompt': 'conversation', 'completion': 'reply'}",
        ),
        (
            "id system_prompt question reply",
            "system_prompt question reply",
            "data.columns such as {'instruction': 'question', 'output': 'reply'}",
        ),
        ("dialog mood", "dialog mood", "data.columns such as {'prompt': ..., 'completion': ...}"),
    ],
)
def test_columns_of_plain_texts_are_no_chats(present, texts, said):
    with pytest.raises(DataError) as caught:
        find_format(present.split(), Columns(), "F", texts.split())
    assert "the format is not one of" in str(caught.value)
    assert said in str(caught.value)


def test_a_column_that_is_named_for_chats_is_one():
    assert find_format(["dialogue"], Columns(messages="dialogue"), "F", ["dialogue"]) == "messages"
    assert find_format(["dialogue", "summary"], Columns(), "F", ["summary"]) == "messages"


def test_given_columns_are_used():
    present = ["a", "b", "text", "label"]
    asked = Columns("a", label="b")
    assert find_columns(present, asked, "classification", "F") == asked
    pair = Columns(text_pair="b")
    assert find_columns(present, pair, "classification", "F") == Columns("text", "b", "label")


@pytest.mark.parametrize(
    ("present", "asked", "kind", "said"),
    [
        (
            "mr ref",
            Columns(),
            "text",
            [
                (
                    "F: the text column has none of the usual names (text, content, document, story,"
                    " body); set it in data.columns. Columns present: mr, ref"
                )
            ],
        ),
        (
            "text content",
            Columns(),
            "text",
            [
                (
                    "F: the text column could be text or content; set it in data.columns. Columns present: text,"
                    " content"
                )
            ],
        ),
        (
            "text labell",
            Columns(label="label"),
            "classification",
            [
                (
                    "F: no column 'label' (for label); did you mean 'labell'? Columns present: text,"
                    " labell"
                )
            ],
        ),
        (
            "tokens ner_tags pos_tags",
            Columns(),
            "token_classification",
            [
                (
                    "F: the label column could be ner_tags or pos_tags; set it in data.columns. Columns present:"
                    " tokens, ner_tags, pos_tags"
                )
            ],
        ),
        (
            "text text_pair premise hypothesis label",
            Columns(),
            "classification",
            [
                (
                    "F: the texts could be ('text', 'text_pair') or ('premise', 'hypothesis'); set text"
                    " and text_pair in data.columns. Columns present: text, text_pair, premise,"
                    " hypothesis, label"
                )
            ],
        ),
    ],
)
def test_missing_and_ambiguous_columns_are_refused(present, asked, kind, said):
    with pytest.raises(DataError) as caught:
        find_columns(present.split(), asked, kind, "F")
    assert str(caught.value).splitlines() == said


def test_all_missing_columns_are_reported_at_once():
    with pytest.raises(DataError) as caught:
        find_columns(["x"], Columns(), "classification", "F")
    assert [line.split(" column")[0] for line in str(caught.value).splitlines()] == [
        "F: the text",
        "F: the label",
    ]


def test_the_config_knows_the_fields_of_the_columns():
    assert data_config.DATA_FIELDS == FIELDS


@pytest.mark.parametrize(
    ("present", "kind", "found"),
    [
        ("system conversations id", "messages", {"messages": "conversations", "system": "system"}),
        (
            "instruction input output system history",
            "instruction",
            {
                "instruction": "instruction",
                "input": "input",
                "output": "output",
                "system": "system",
                "history": "history",
            },
        ),
        (
            "prompt completion tools",
            "prompt_completion",
            {"prompt": "prompt", "completion": "completion", "tools": "tools"},
        ),
        (
            "prompt chosen rejected system_prompt",
            "preference",
            {
                "prompt": "prompt",
                "chosen": "chosen",
                "rejected": "rejected",
                "system": "system_prompt",
            },
        ),
    ],
)
def test_what_goes_before_a_dialog_is_found(present, kind, found):
    assert find_columns(present.split(), Columns(), kind, "F") == Columns(**found)

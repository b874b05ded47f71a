"""Examples: labels to ids, the problem, and rows that are refused."""

from __future__ import annotations

import numpy as np
import pytest

from jaxpeft.data.examples.make import join, make_examples, split_at
from jaxpeft.data.rows.columns import Columns
from jaxpeft.errors import ConfigError, DataError


@pytest.fixture
def refusal(rows_of):
    """Return the lines of the error that records are refused with."""

    def refused(*records, kind="classification", **options) -> list[str]:
        with pytest.raises(DataError) as caught:
            make_examples(rows_of(*records), kind=kind, **options)
        return str(caught.value).splitlines()

    return refused


def test_string_labels_are_sorted_and_stored(classified):
    examples = classified(("a", "y"), ("b", "x"), ("c", "y"))
    assert (examples.label_names, examples.problem, examples.num_labels) == (
        ("x", "y"),
        "single_label",
        2,
    )
    assert examples.labels.tolist() == [1, 0, 1]
    assert examples.labels.dtype == np.int32
    assert len(examples) == 3


@pytest.mark.parametrize("values", [[10, 2, 0], ["10", "2", "0"]])
def test_whole_numbers_are_sorted_by_value(rows_of, values):
    examples = make_examples(
        rows_of(*({"text": "a", "label": v} for v in values)), kind="classification"
    )
    assert examples.label_names == ("0", "2", "10")
    assert examples.labels.tolist() == [2, 1, 0]


def test_truth_values_are_labels(rows_of):
    rows = rows_of({"text": "a", "label": True}, {"text": "b", "label": False})
    assert make_examples(rows, kind="classification").label_names == ("false", "true")


def test_another_split_uses_the_labels_of_the_training_split(classified):
    train = classified(("a", "x"), ("b", "y"), ("c", "z"))
    test = classified(("d", "z"), like=train)
    assert (test.labels.tolist(), test.label_names) == ([2], train.label_names)


def test_what_is_cut_or_joined_from_other_columns_is_another_data_set(rows_of):
    rows = rows_of({"t1": "one: a", "t2": "two: b"})
    cut = [split_at(rows, ": ", Columns(text=column)) for column in ("t1", "t2")]
    assert len({of.sha256 for of in cut} | {rows.sha256}) == 3
    assert {of.source for of in cut} == {rows.sha256}
    two = (
        rows_of({"q1": "one", "q2": "two", "answer": "c"}),
        rows_of({"q1": "one", "q2": "two", "completion": "d"}),
    )
    joined = [
        join(
            [
                make_examples(
                    two[0],
                    kind="prompt_completion",
                    columns=Columns(prompt=column, completion="answer"),
                ),
                make_examples(
                    two[1],
                    kind="prompt_completion",
                    columns=Columns(prompt=column, completion="completion"),
                ),
            ]
        )
        for column in ("q1", "q2")
    ]
    assert joined[0].sha256 != joined[1].sha256


@pytest.mark.parametrize(
    ("kind", "field"), [("classification", "prompt"), ("token_classification", "text_pair")]
)
def test_columns_of_fields_that_a_format_has_not_are_refused(rows_of, kind, field):
    rows = rows_of({"text": "a", "tokens": ["a"], "label": "x"})
    with pytest.raises(
        DataError,
        match=f"data.columns sets {field}, which rows of format {kind} do not have; remove it",
    ):
        make_examples(rows, kind=kind, columns=Columns(**{field: "text"}))


def test_an_unknown_label_is_refused_with_its_row_and_the_nearest(classified, refusal):
    train = classified(("a", "billing"), ("b", "refund"))
    said = refusal({"text": "d", "label": "billing"}, {"text": "e", "label": "biling"}, like=train)
    where = (
        "rows.jsonl:2:1 (row 2): field 'label' contains 'biling', which is not one of the 2 known"
        " labels"
    )
    assert said == [f"""{where}: '{{"text": "e", "label": "biling"}}'; did you mean 'billing'?"""]


def test_lists_of_labels_are_multi_hot(rows_of, refusal):
    rows = rows_of(
        {"text": "a", "labels": ["y", "x"]},
        {"text": "b", "labels": []},
        {"text": "c", "labels": ["z"]},
    )
    examples = make_examples(rows, kind="classification")
    assert (examples.problem, examples.label_names) == ("multi_label", ("x", "y", "z"))
    assert examples.labels.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert examples.labels.dtype == np.float32
    other = make_examples(
        rows_of({"text": "a", "labels": ["z", "y"]}), kind="classification", like=examples
    )
    assert other.labels.tolist() == [[0, 1, 1]]
    assert (
        "contains 'q', which is not one"
        in refusal({"text": "a", "labels": ["x", "q"]}, like=examples)[0]
    )


def test_numbers_with_a_point_are_regression(rows_of):
    rows = rows_of({"text": "a", "score": 1.5}, {"text": "b", "score": 2})
    examples = make_examples(rows, kind="classification")
    assert (examples.problem, examples.num_labels, examples.label_names) == ("regression", 1, ())
    assert examples.labels.tolist() == [1.5, 2.0]
    assert examples.labels.dtype == np.float32
    asked = make_examples(
        rows_of({"text": "a", "score": "0.25"}), kind="classification", problem="regression"
    )
    assert asked.labels.tolist() == [0.25]


@pytest.mark.parametrize("value", [float("-inf"), float("inf"), "nan", "1e999"])
def test_a_regression_target_must_be_finite(refusal, value):
    (said,) = refusal({"text": "a", "score": value}, problem="regression")
    assert f"field 'score' contains {value!r}, which is not finite" in said


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("high", "contains a str, not a number"),
        (True, "contains a bool, not a number"),
        ([1.0], "contains a list, not a number"),
    ],
)
def test_a_regression_target_must_be_a_number(refusal, value, said):
    assert said in refusal({"text": "a", "score": value}, problem="regression")[0]


def test_pairs_are_read(rows_of):
    rows = rows_of(
        {"premise": "a", "hypothesis": "b", "label": 0},
        {"premise": "c", "hypothesis": "d", "label": 1},
    )
    examples = make_examples(rows, kind="classification")
    assert (examples.texts, examples.pairs) == (["a", "c"], ["b", "d"])


def test_every_bad_row_is_reported(refusal):
    said = refusal(
        {"text": "a", "label": "x"},
        {"label": "y"},
        {"text": 7, "label": "x"},
        {"text": "  ", "label": "x"},
        {"text": "b", "label": None},
        {"text": "b", "label": 1.5},
        {"text": "\ud800", "label": "y"},
        problem="single_label",
    )
    assert [line.split(": ")[1] for line in said] == [
        "field 'text' is missing",
        "field 'text' contains a int, not a string",
        "field 'text' is empty",
        "field 'text' contains half of a surrogate pair",
        "field 'label' is missing",
        "field 'label' contains a float, not a string or an integer",
    ]
    assert (
        said[0]
        == "rows.jsonl:2:1 (row 2): field 'text' is missing: '{\"label\": \"y\"}'; add it or remove"
        " the row"
    )


def test_an_empty_label_is_refused(refusal):
    said = refusal({"text": "a", "label": ""}, {"text": "b", "label": "x"})
    assert "field 'label' contains an empty string, not a string or an integer" in said[0]


def test_one_label_is_not_a_classification(refusal):
    assert refusal({"text": "a", "label": "x"}) == [
        "rows.jsonl: column 'label' has the labels x; a classifier needs at least 2"
    ]


def test_words_and_tags(rows_of):
    rows = rows_of(
        {"tokens": ["a", "b"], "ner_tags": ["O", "B-X"]}, {"tokens": ["c"], "ner_tags": ["O"]}
    )
    examples = make_examples(rows, kind="token_classification")
    assert examples.label_names == ("B-X", "O")
    assert [tags.tolist() for tags in examples.labels] == [[1, 0], [1]]
    other = make_examples(
        rows_of({"tokens": ["z"], "ner_tags": ["O"]}), kind="token_classification", like=examples
    )
    assert other.labels[0].tolist() == [1]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "rows.jsonl:2:1 (row 2): 2 words but 1 tags: "),
        (
            {"tokens": "a b", "tags": ["O"]},
            "rows.jsonl:2:1 (row 2): field 'tokens' does not contain a list of words: ",
        ),
        (
            {"tokens": [], "tags": []},
            "rows.jsonl:2:1 (row 2): field 'tokens' does not contain a list of words: ",
        ),
        (
            {"tokens": ["a", ""], "tags": ["O", "O"]},
            "rows.jsonl:2:1 (row 2): field 'tokens' is empty: ",
        ),
        (
            {"tokens": ["a"], "tags": "O"},
            "rows.jsonl:2:1 (row 2): field 'tags' contains a str, not a list of labels: ",
        ),
    ],
)
def test_bad_words_and_tags_are_refused(refusal, record, said):
    good = {"tokens": ["a", "b"], "tags": ["O", "X"]}
    assert refusal(good, record, kind="token_classification")[0].startswith(said)


def test_text_needs_no_label(rows_of):
    examples = make_examples(rows_of({"text": "a"}, {"text": "b"}), kind="text")
    assert (examples.texts, examples.labels, examples.num_labels) == (["a", "b"], None, 0)


def test_the_hash_follows_content_columns_and_labels(rows_of, classified):
    one = classified(("a", "x"), ("b", "y"))
    again = classified(("a", "x"), ("b", "y"))
    other = classified(("a", "x"), ("c", "y"))
    rows = rows_of(
        {"text": "a", "body": "b", "label": "x"}, {"text": "c", "body": "d", "label": "y"}
    )
    by_text = make_examples(rows, kind="classification", columns=Columns("text"))
    by_body = make_examples(rows, kind="classification", columns=Columns("body"))
    assert one.sha256 == again.sha256
    assert len({one.sha256, other.sha256, by_text.sha256, by_body.sha256}) == 4


def test_unknown_kinds_and_problems_are_refused(rows_of):
    with pytest.raises(
        ConfigError, match=r"kind='classificaton' is not one of .*did you mean 'classification'"
    ):
        make_examples(rows_of({"text": "a"}), kind="classificaton")  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError,
        match="problem='regression' is for kind='classification', not 'text'; remove it",
    ):
        make_examples(rows_of({"text": "a"}), kind="text", problem="regression")

"""Labels as people have them: read as they are meant, or refused with what to do."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest

from jaxpeft.config.data_config import DataConfig
from jaxpeft.data.examples.labeling import BY_USER, Labeling, labeling_of, select_labeled
from jaxpeft.data.examples.make import Examples, make_examples
from jaxpeft.data.rows.read import Rows
from jaxpeft.errors import ConfigError, DataError
from jaxpeft.hub.base_head import BaseHead
from tests.data.conftest import make_rows

HEAD = BaseHead(("entailment", "neutral", "contradiction"), 3, None, "m/config.json")


def texts(*labels: Any) -> Rows:
    return make_rows(*({"text": f"t{i}", "label": label} for i, label in enumerate(labels)))


def read(*labels: Any, labeling: Labeling | tuple[str, ...] = (), **options: Any) -> Examples:
    return make_examples(texts(*labels), kind="classification", labels=labeling, **options)


def tags(*rows: list[Any], labeling: Labeling | tuple[str, ...] = ()) -> Examples:
    records = [{"tokens": [f"w{i}" for i in range(len(row))], "ner_tags": row} for row in rows]
    return make_examples(make_rows(*records), kind="token_classification", labels=labeling)


def refusal(*labels: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(*labels, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        ([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [1.0, 0, 1.0]], ("0", "1", "2")),
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1]], ("x", "y", "z")),
        (
            [[True, False, False], [False, True, False], [False, False, True], [True, False, True]],
            ("0", "1", "2"),
        ),
        ([["1", "0", "0"], ["0", "1", "0"], ["0", "0", "1"], ["1", "0", "1"]], ("0", "1", "2")),
    ],
    ids=["floats", "named", "truth values", "strings"],
)
def test_vectors_of_0_and_1_are_read_by_position(rows: list[Any], names: tuple[str, ...]) -> None:
    examples = read(*rows, labeling=names if names[0] == "x" else ())
    assert (examples.problem, examples.label_names) == ("multi_label", names)
    assert examples.labels.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1]]
    other = read([0, 1, 1], like=examples)
    assert other.labels.tolist() == [[0, 1, 1]]
    assert "is not a list of 3 numbers 0 or 1, as in other rows" in refusal([0, 2], like=examples)


def test_two_classes_as_vectors_and_as_ids_are_told_apart() -> None:
    vectors, ids = read([1, 0], [0, 1]), read([0], [1], [0, 1])
    assert (vectors.label_names, ids.label_names) == (("0", "1"), ("0", "1"))
    assert vectors.labels.tolist() == [[1, 0], [0, 1]]
    assert ids.labels.tolist() == [[1, 0], [0, 1], [1, 1]]
    assert (read([0, 1], like=vectors).labels.tolist(), read([0, 1], like=ids).labels.tolist()) == (
        [[0, 1]],
        [[1, 1]],
    )
    assert vectors.sha256 != read([1, 0], [0, 1], labeling=Labeling(("0", "1"), BY_USER)).sha256


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([[0, 0, 1], [1, 0]], "field 'label' contains the label '0' more than once"),
        ([[3, -1], [2, 3]], "field 'label' contains the label '-1', which means no label"),
        (
            [[1, 0, -100], [0, 1, 0]],
            "field 'label' contains the label '-100', which means no label",
        ),
        ([[0.2, 0.8], [1.0, 0.0]], "field 'label' contains a float, not a string or an integer"),
    ],
)
def test_lists_that_are_neither_vectors_nor_labels_are_refused(rows: list[Any], said: str) -> None:
    assert said in refusal(*rows)


@pytest.mark.parametrize("labeling", [labeling_of(DataConfig(train="F"), HEAD), ("x", "y", "z")])
@pytest.mark.parametrize(
    "rows", [[[1, 0], [0, 1]], [["0", "1"], ["1", "1"]], [[True, False, False, True]]]
)
def test_vectors_of_another_length_than_the_labels_are_no_ids(
    rows: list[Any], labeling: Any
) -> None:
    origin = "data.labels" if isinstance(labeling, tuple) else "m/config.json"
    size = len(rows[0])
    assert (
        f"column 'label' contains lists of {size} numbers 0 or 1, but {origin} has 3 labels; give one"
        f" number per label, or name the {size} labels in data.labels"
        in refusal(*rows, labeling=labeling)
    )
    own = tuple("abcd"[:size])
    assert read(
        *rows, labeling=labeling_of(DataConfig(train="F", labels=own), HEAD)
    ).labeling.vectors


def test_tags_of_minus_100_are_not_learned() -> None:
    examples = tags([0, 1, -100, 1], [-100, 1])
    assert examples.label_names == ("0", "1")
    assert [row.tolist() for row in examples.labels] == [[0, 1, -100, 1], [-100, 1]]
    told = tags(["O", "B", "?"], ["?", "O"], labeling=Labeling(unlabeled=("?",)))
    assert (told.label_names, [row.tolist() for row in told.labels]) == (
        ("B", "O"),
        [[1, 0, -100], [-100, 1]],
    )
    with pytest.raises(
        DataError, match=r"'-1' .*among classes numbered from 0 usually means no label"
    ):
        tags([0, 1, 2, -1])


@pytest.mark.parametrize(
    ("values", "unlabeled", "kept"),
    [
        ([0, 1, -100, 1], (), [0, 1, 1]),
        (["0", "-100", "1"], (), ["0", "1"]),
        (["yes", "-", "no"], ("-",), ["yes", "no"]),
        ([0, 2, -1.0, 1], ("-1",), [0, 2, 1]),
        (["a", None, "", float("nan"), "b"], ("",), ["a", "b"]),
        ([0.5, -100, 1.0], (), [0.5, -100, 1.0]),
    ],
)
def test_rows_without_a_label_are_left_out_and_told(
    values: list[Any], unlabeled: tuple[str, ...], kept: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    rows = texts(*values)
    found = select_labeled(rows, "label", unlabeled)
    assert [record["label"] for record in found.records] == kept
    left = len(values) - len(kept)
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [
        f"{left} of {len(values)} rows have no label, the first is rows.jsonl:" in line
        for line in told
    ] == [True] * bool(left)


def test_rows_of_which_none_has_a_label_are_refused() -> None:
    with pytest.raises(
        DataError, match=r"2 of 2 rows have no label, the first is .*add labeled rows"
    ):
        select_labeled(texts(-100, -100), "label", ())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            ["entailment", "neutral", "-"],
            (
                "'-' (once, in rows.jsonl:3:1 (row 3)) among words usually means no label; if"
                " it means no label, set data.unlabeled=('-',); if it is a class, name all classes in"
                " data.labels"
            ),
        ),
        (
            ["yes", "no", "?"],
            "'?' (once, in rows.jsonl:3:1 (row 3)) among words usually means no label",
        ),
        (
            [0, 1, 2, -1, -1],
            "'-1' (2 times, first in rows.jsonl:4:1 (row 4)) among classes numbered from 0",
        ),
        (
            ["pos", "neg", "pos ", "Pos"],
            "labels that differ only in spelling: 'pos' (once, in rows.jsonl:1",
        ),
        (
            ["cafe\u0301", "x", "caf\u00e9"],
            r"'cafe\u0301' (once, in rows.jsonl:1:1 (row 1)) and 'caf\xe9' (once",
        ),
        (["pos", "neg", "\ufeffpos"], r"'pos' (once, in rows.jsonl:1:1 (row 1)) and '\ufeffpos'"),
        (["1.0", "0", "1"], "'1.0' (once, in rows.jsonl:1:1 (row 1)) and '1' (once"),
        (["01", "1", "02"], "'01' (once, in rows.jsonl:1:1 (row 1)) and '1' (once"),
        ([True, 0, 1, False], "'true' (once, in rows.jsonl:1:1 (row 1)) and '1' (once"),
        (["yes", "maybe", "TRUE"], "'yes' (once, in rows.jsonl:1:1 (row 1)) and 'TRUE' (once"),
        (
            ["not good", "fine", "not  good"],
            "'not good' (once, in rows.jsonl:1:1 (row 1)) and 'not  good' (once",
        ),
        (
            ["sci-fi", "drama", "sci_fi"],
            "'sci-fi' (once, in rows.jsonl:1:1 (row 1)) and 'sci_fi' (once",
        ),
        (
            ["4", "4,27", "3"],
            (
                "contains '4,27' (once, in rows.jsonl:2:1 (row 2)), which looks like several labels;"
                " if so, set data.label_separator=','; if it is one label, set"
                " data.problem='single_label'; write decimal numbers with a point"
            ),
        ),
        (["joy", "fear", "joy|fear"], "if so, set data.label_separator='|'"),
        (["joy;fear", "fear;rage", "rage;joy"], "if so, set data.label_separator=';'"),
        (["3 4", "5"], "if so, set data.label_separator=' '"),
        (
            ["['a', 'b']", "['a']"],
            (
                "looks like several labels; if so, remove brackets and quotes and set"
                " data.label_separator"
            ),
        ),
    ],
)
def test_labels_that_are_not_what_they_seem_are_refused(values: list[Any], said: str) -> None:
    assert said in refusal(*values)


@pytest.mark.parametrize(
    "values",
    [
        ["+", "-"],
        [-1, 1],
        ["A-", "A", "A+"],
        ["a1", "a-2", "a 10"],
        ["n", "f", "0", "1"],
        ["cancel", "transfer", "cancel transfer"],
        ["Paris, France", "Lyon, France", "Rome, Italy"],
        ["1_0", "\uff14", " 1 ", "1e3", "0x1", "nan", "inf", "2.5"],
    ],
)
def test_labels_that_are_names_are_classes(values: list[Any]) -> None:
    examples = read(*values)
    assert (examples.problem, set(examples.label_names)) == ("single_label", set(map(str, values)))


def test_what_the_user_names_is_meant() -> None:
    assert read("yes", "no", "-", labeling=("yes", "no", "-")).labels.tolist() == [0, 1, 2]
    assert read("a", "A", labeling=("A", "a")).labels.tolist() == [1, 0]
    assert read("4", "4,27", problem="single_label").label_names == ("4", "4,27")


def test_a_separator_tells_several_labels_of_a_string_apart() -> None:
    how = Labeling(separator=",")
    examples = read("27", "4, 27", "", 3, labeling=how)
    assert (examples.problem, examples.label_names) == ("multi_label", ("3", "4", "27"))
    assert examples.labels.tolist() == [[0, 0, 1], [0, 1, 1], [0, 0, 0], [1, 0, 0]]
    assert read("27,3", like=examples).labels.tolist() == [[1, 0, 1]]
    named = read("1", "0,2", labeling=Labeling(("joy", "fear", "rage"), BY_USER, separator=","))
    assert (named.label_names, named.labels.tolist()) == (
        ("joy", "fear", "rage"),
        [[0, 1, 0], [1, 0, 1]],
    )


@pytest.mark.parametrize(
    "values",
    [[0, 1, 1], ["0", "1", "1.0"], [False, True, True], ["neg", "pos", 1], [0.0, 1.0, "pos"]],
)
def test_given_names_may_be_written_as_numbers(values: list[Any]) -> None:
    examples = read(*values, labeling=("neg", "pos"))
    assert (examples.label_names, examples.labels.tolist()) == (("neg", "pos"), [0, 1, 1])


def test_numbers_are_no_ids_of_names_that_the_rows_told() -> None:
    train = read("neg", "pos")
    assert "contains '0', which is not one of the 2 known labels" in refusal(0, like=train)
    assert "not one of the 2 known labels of data.labels, which are numbered from 0" in refusal(
        1, 2, labeling=("neg", "pos")
    )
    assert read(5, 7, labeling=("7", "5")).labels.tolist() == [1, 0]


@pytest.mark.parametrize("value", [1e39, "-1e39", 1e300, 10**39])
def test_targets_beyond_float32_are_refused(value: Any) -> None:
    assert f"contains {value!r}, which exceeds the range of float32" in refusal(
        1.5, value, problem="regression"
    )
    assert np.isfinite(read(1.5, 3.4028234e38, -3e38).labels).all()


@pytest.mark.parametrize(
    ("value", "held"), [("", "an empty string"), (" ", "an empty string"), (float("nan"), "NaN")]
)
def test_rows_without_a_target_can_be_left_out(value: Any, held: str) -> None:
    said = refusal("1.5", value, problem="regression")
    assert f"contains {held}, not a finite number" in said
    assert "drop such rows with data.unlabeled=('',)" in said
    rows = texts("1.5", value)
    assert len(select_labeled(rows, "label", ("",), "regression")) == 1


@pytest.mark.parametrize("value", ["2_0", "\uff14", "0x1"])
def test_what_only_looks_like_a_number_is_no_target(value: str) -> None:
    assert "rows.jsonl:2:1 (row 2)" in refusal("1.5", value, problem="regression")


def test_a_kept_head_says_the_classes_and_their_order() -> None:
    labeling = labeling_of(DataConfig(train="F"), HEAD)
    for values in (["contradiction", "entailment"], [2, 0], ["2", "0"]):
        examples = read(*values, labeling=labeling)
        assert (examples.label_names, examples.num_labels, examples.labels.tolist()) == (
            HEAD.names,
            3,
            [2, 0],
        )
    said = refusal("entailment", "contradition", labeling=labeling)
    assert (
        "has the labels contradition, entailment, but the head of the base, which is kept, has"
        " entailment, neutral, contradiction (m/config.json): 'contradition' is not one of them; did"
        " you mean 'contradiction'" in said
    )
    assert "'3' is not one of them" in refusal(0, 1, 3, labeling=labeling)
    assert "'a' is not one of them" in refusal("a", "b", "c", labeling=labeling)
    assert "'Neutral' is not one of them; did you mean 'neutral'" in refusal(
        "entailment", "Neutral", labeling=labeling
    )
    assert "set data.unlabeled=('-',)" in refusal(*HEAD.names, "-", labeling=labeling)


@pytest.mark.parametrize("values", [["joy", "rage"], [1, 2, 3, 4, 5]])
def test_rows_of_another_task_make_a_head_of_their_own(values: list[Any]) -> None:
    examples = read(*values, labeling=labeling_of(DataConfig(train="F"), HEAD))
    assert (examples.label_names, examples.num_labels) == (tuple(map(str, values)), len(values))


def test_numbers_that_are_taken_as_ids_of_a_head_are_told(caplog: pytest.LogCaptureFixture) -> None:
    read(2, 0, labeling=labeling_of(DataConfig(train="F"), HEAD))
    assert (
        "labels are numbers; using them as ids of m/config.json: 0 entailment, 1 neutral, 2"
        " contradiction" in caplog.text
    )


def test_cells_without_a_label_are_not_told_as_ids(caplog: pytest.LogCaptureFixture) -> None:
    several = labeling_of(DataConfig(train="F"), BaseHead(HEAD.names, 3, "multi_label", "c"))
    assert "contains a str, not a list of labels" in refusal("a", "b", labeling=several)
    assert not caplog.records


def test_a_head_that_only_counts_its_classes_has_no_names(caplog: pytest.LogCaptureFixture) -> None:
    labeling = labeling_of(DataConfig(train="F"), BaseHead((), 3, None, "m/config.json"))
    assert read(2, 0, labeling=labeling).label_names == ("0", "1", "2")
    assert read(0, 1, labeling=labeling).label_names == ("0", "1")
    assert not caplog.records
    assert read("b", "a", "c", labeling=labeling).label_names == ("a", "b", "c")
    assert "m/config.json does not name its classes: assuming the order a, b, c" in caplog.text


def test_own_names_must_stand_in_the_order_of_the_head(caplog: pytest.LogCaptureFixture) -> None:
    same = labeling_of(
        DataConfig(train="F", labels=("Entailment", "Neutral", "Contradiction")), HEAD
    )
    assert read("Neutral", 0, labeling=same).labels.tolist() == [1, 0]
    with pytest.raises(
        ConfigError,
        match=r"the class order entailment, neutral, contradiction .*remove data.labels",
    ):
        labeling_of(DataConfig(train="F", labels=("contradiction", "entailment", "neutral")), HEAD)
    assert labeling_of(DataConfig(train="F", labels=("a", "b")), HEAD).names == ("a", "b")
    assert not caplog.records
    assert labeling_of(DataConfig(train="F", labels=("a", "b", "c")), HEAD).names == ("a", "b", "c")
    assert (
        "the base's head is kept; its weights were trained for the classes entailment"
        in caplog.text
    )


def test_a_kept_head_says_the_problem() -> None:
    regression = labeling_of(DataConfig(train="F"), BaseHead((), 1, "regression", "c"))
    examples = read(0, 1, 5, labeling=regression)
    assert (examples.problem, examples.num_labels, examples.labels.tolist()) == (
        "regression",
        1,
        [0, 1, 5],
    )
    assert examples.labels.dtype == np.float32
    assert read("a", "b", labeling=regression).problem == "single_label"
    several = labeling_of(DataConfig(train="F"), BaseHead(("x", "y"), 2, "multi_label", "c"))
    assert read(["x"], ["y", "x"], labeling=several).labels.tolist() == [[1, 0], [1, 1]]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            ["4.88", "n/a", "3.0"],
            (
                "'4.88' (once, in rows.jsonl:1:1 (row 1)) is a decimal number but 'n/a' (once, in"
                " rows.jsonl:2:1 (row 2))"
            ),
        ),
        (
            [f"a text {i}" for i in range(30)],
            "has 30 different labels in 30 rows, such as 'a text 0'",
        ),
        (
            [-1, 0, 1],
            (
                "'-1' (once, in rows.jsonl:1:1 (row 1)) is used as a class; if it means no label, set"
                " data.unlabeled=('-1',)"
            ),
        ),
        (["nan", "x"], "'nan' (once, in rows.jsonl:1:1 (row 1)) is used as a class"),
    ],
)
def test_classes_that_may_be_none_are_told(
    values: list[Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    read(*values)
    assert said in caplog.text

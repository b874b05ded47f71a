"""What columns may be meant for, told from their names and what they hold."""

from __future__ import annotations

import pytest

from jaxpeft.data.rows.roles import A_RATING, AN_OPTION, role, roles


@pytest.mark.parametrize(
    ("column", "meant"),
    [
        ("id", ""),
        ("Unnamed: 0", ""),
        ("__index_level_0__", ""),
        ("answer_id", ""),
        ("Topic", "a class"),
        ("", ""),
        ("answerKey", "the answer"),
        ("test_list", "tests of the answer"),
        ("canonical_solution", "the answer"),
        ("is_correct", "a rating of the answer"),
        ("Complex_CoT", "the reasoning before the answer"),
        ("color", None),
        ("2", None),
    ],
)
def test_the_words_of_a_name_say_what_a_column_is_meant_for(column: str, meant: str | None) -> None:
    assert role(column) == meant


@pytest.mark.parametrize(
    ("column", "held", "meant"),
    [
        ("review_result", bool, None),
        ("score_chosen", float, A_RATING),
        ("skip_prompt_formatting", bool, None),
        ("answer", bool, "the answer"),
        ("Answer", int, "the answer"),
        ("sample_weight", float, "a weight of the row"),
        ("num_answers", int, ""),
    ],
)
def test_numbers_and_truths_are_what_all_words_of_a_name_say(
    column: str, held: type, meant: str | None
) -> None:
    assert role(column, held) == meant


@pytest.mark.parametrize(
    "names", ["A B C D", "a b", "opa opb opc", "op1 op2", "Sol_0 Sol_1", "A) B)", "x.a x.b"]
)
def test_columns_that_are_counted_are_options(names: str) -> None:
    present = dict.fromkeys(names.split(), str)
    assert roles(present, present) == dict.fromkeys(present, AN_OPTION)


@pytest.mark.parametrize("names", ["A", "A C", "alpha beta", "1 2", "b c", "opa sob"])
def test_other_columns_are_none(names: str) -> None:
    present = dict.fromkeys(names.split(), str)
    assert AN_OPTION not in roles(present, present).values()

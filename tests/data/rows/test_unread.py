"""Columns that nothing reads: named once, and refused where the answer may be among them."""

from __future__ import annotations

import pytest

from jaxpeft.data.rows.columns import Columns, find_columns, find_format
from jaxpeft.data.rows.unread import filled_columns, find_unread, plain_texts, refuse_partial
from jaxpeft.errors import DataError
from tests.data.conftest import make_rows


def judged(present: str, held: dict[str, type] | None = None, **asked: str) -> None:
    columns, named = present.split(), Columns(**asked)
    kind = find_format(columns, named, "F")
    refuse_partial(
        dict.fromkeys(columns, str) | (held or {}),
        named,
        find_columns(columns, named, kind, "F"),
        kind,
        "F",
    )


@pytest.mark.parametrize(
    ("present", "said"),
    [
        (
            "task_id text code test_list",
            (
                "rows of format text would use only 'text', without 'code' (perhaps"
                " the answer); set data.columns, such as {'prompt': 'text', 'completion': 'code'};"
                " if this is intended, set data.format='text'"
            ),
        ),
        (
            "document summary id",
            "set data.columns, such as {'prompt': 'document', 'completion': 'summary'}",
        ),
        ("text chosen", "without 'chosen' (perhaps the answer)"),
        (
            "prompt completion label",
            (
                "would use only 'prompt', 'completion', without 'label' (perhaps a rating of the"
                " answer); remove this column and the rows with bad answers; if"
                " this is intended, set data.format='prompt_completion'"
            ),
        ),
        ("prompt response rating", "without 'rating' (perhaps a rating of the answer)"),
        ("messages label", "without 'label' (perhaps a rating of the answer)"),
        ("instruction output label", "without 'label' (perhaps a rating of the answer)"),
        (
            "question reasoning answer",
            "without 'reasoning' (perhaps the reasoning before the answer)",
        ),
        (
            "question choices answer answerKey",
            "without 'choices' (perhaps a part of the question), 'answerKey' (perhaps the answer)",
        ),
        (
            "context question answer",
            "such as {'instruction': 'question', 'input': 'context', 'output': 'answer'}",
        ),
        (
            "question A B C D answer",
            (
                "without 'A' (perhaps an option to choose from), 'B' (perhaps an option to choose"
                " from), 'C' (perhaps an option to choose from), 'D' (perhaps an option to choose"
                " from); write all parts of the question into the text of 'question'; if this"
            ),
        ),
        (
            "question distractor1 distractor2 answer",
            "write all parts of the question into the text of 'question'",
        ),
        (
            "question opa opb opc opd answer",
            "write all parts of the question into the text of 'question'",
        ),
        ("input A B output", "write all parts of the question into the text of 'input'"),
        (
            "instruction sol1 sol2 output",
            "write all parts of the question into the text of 'instruction'",
        ),
        (
            "question answer hint",
            "such as {'instruction': 'question', 'input': 'hint', 'output': 'answer'}",
        ),
        ("prompt completion weight", "without 'weight' (perhaps a weight of the row)"),
        ("messages images", "without 'images' (perhaps an image or audio)"),
    ],
)
def test_rows_that_say_more_than_would_be_learned_are_refused(present: str, said: str) -> None:
    with pytest.raises(DataError) as caught:
        judged(present)
    assert said in str(caught.value)
    assert f"Columns present: {', '.join(present.split())}" in str(caught.value)


@pytest.mark.parametrize(
    ("present", "held", "said"),
    [
        (
            "question choices answer",
            {"choices": list, "answer": int},
            "write 'choices' and 'answer' as texts, and set data.columns",
        ),
        (
            "question passage answer",
            {"answer": bool},
            "write 'answer' as texts, and set data.columns, such as {'instruction': 'question', ",
        ),
        (
            "text answers",
            {"answers": list},
            "write 'answers' as texts, and set data.columns, such as {'prompt': 'text', ",
        ),
        (
            "text solution is_result",
            {"is_result": bool},
            "without 'solution' (perhaps the answer); set data.columns",
        ),
    ],
)
def test_what_is_no_text_is_not_named_as_one(
    present: str, held: dict[str, type], said: str
) -> None:
    with pytest.raises(DataError) as caught:
        judged(present, held)
    assert said in str(caught.value)


def test_numbers_and_truths_with_a_word_of_an_answer_are_none() -> None:
    judged(
        "text role review_result skip_prompt_formatting",
        {"review_result": bool, "skip_prompt_formatting": bool},
    )


@pytest.mark.parametrize(
    ("present", "asked"),
    [
        ("question answer A", {}),
        ("question answer alpha beta", {}),
        ("text code", {"text": "text"}),
        ("prompt completion label", {"completion": "completion"}),
        ("instruction context response category", {}),
        ("instruction input output prompt", {}),
        ("prompt prompt_id messages category", {}),
        ("prompt chosen rejected score_chosen score_rejected", {}),
        ("text id url title timestamp", {}),
        ("text token_count language_score score", {}),
    ],
)
def test_what_is_meant_and_what_is_not_missed_is_not_refused(
    present: str, asked: dict[str, str]
) -> None:
    judged(present, **asked)


@pytest.mark.parametrize(
    ("present", "kind", "line", "missed"),
    [
        ("text label", "classification", "", False),
        (
            "id text label",
            "classification",
            "columns used: 'text' (text), 'label' (label); unused: 'id'",
            False,
        ),
        (
            "question context label",
            "classification",
            "columns used: 'question' (text), 'label' (label); unused: 'context' (perhaps a second text)",
            True,
        ),
        (
            "text category",
            "text",
            "columns used: 'text' (text); unused: 'category' (perhaps a class)",
            True,
        ),
        (
            "text label foo",
            "classification",
            "columns used: 'text' (text), 'label' (label); unused: 'foo'",
            True,
        ),
        (
            "text title label",
            "text",
            (
                "columns used: 'text' (text); unused: 'title' (perhaps a second text), "
                "'label' (perhaps a class or a score)"
            ),
            True,
        ),
        (
            "messages answer",
            "messages",
            "columns used: 'messages' (messages); unused: 'answer' (perhaps the answer)",
            True,
        ),
    ],
)
def test_what_is_not_read_is_told_in_one_line(
    present: str, kind: str, line: str, missed: bool
) -> None:
    columns = present.split()
    assert find_unread(
        dict.fromkeys(columns, str), find_columns(columns, Columns(), kind, "F"), kind
    ) == (line, missed)


def test_a_column_of_which_a_value_is_read_is_read() -> None:
    present, asked = (
        ["question", "answers", "answers.text.0", "id"],
        Columns(prompt="question", completion="answers.text.0"),
    )
    line, missed = find_unread(
        dict.fromkeys(present, str),
        find_columns(present, asked, "prompt_completion", "F"),
        "prompt_completion",
    )
    assert (line.partition("; ")[2], missed) == ("unused: 'id'", False)


def test_texts_that_look_like_json_are_not_plain() -> None:
    rows = make_rows(
        {"a": "x", "b": "[1]", "c": ["x"], "d": None}, {"a": None, "b": "x", "c": "x", "d": "y"}
    )
    assert plain_texts(rows, filled_columns(rows)) == ["a", "d"]


def test_a_column_without_a_value_is_not_missed() -> None:
    rows = make_rows(
        {"prompt": "a", "completion": "b", "label": None, "tools": []},
        {"prompt": "c", "completion": 5},
    )
    assert filled_columns(rows) == {"prompt": str, "completion": int}

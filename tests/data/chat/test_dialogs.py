"""Rows to dialogs: every usual way of writing them, and what is wrong with a row by its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxpeft.data.chat.dialogs import Completion, Dialog, Preference, read_dialog, read_preference
from jaxpeft.data.examples.make import Examples, make_examples
from jaxpeft.data.rows.columns import Columns, find_format
from jaxpeft.data.rows.read import read_rows
from jaxpeft.errors import DataError

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
SHARE = [
    {"from": "system", "value": "be kind"},
    {"from": "human", "value": "hi"},
    {"from": "gpt", "value": "hello"},
]


@pytest.mark.parametrize(
    ("present", "asked", "kind"),
    [
        ("text", {}, "text"),
        ("story title", {}, "text"),
        ("prompt completion", {}, "prompt_completion"),
        ("question answer", {}, "prompt_completion"),
        ("instruction input output id", {}, "instruction"),
        ("instruction context response category", {}, "instruction"),
        ("messages", {}, "messages"),
        ("id conversations", {}, "messages"),
        ("chosen rejected", {}, "preference"),
        ("prompt chosen rejected", {}, "preference"),
        ("mr ref", {"prompt": "mr", "completion": "ref"}, "prompt_completion"),
        ("instruction output text", {"text": "text"}, "text"),
        ("body turns", {"messages": "turns"}, "messages"),
        ("a b c", {"instruction": "a", "input": "b", "output": "c"}, "instruction"),
    ],
)
def test_the_format_is_told_by_the_columns(present: str, asked: dict[str, str], kind: str) -> None:
    assert find_format(present.split(), Columns(**asked), "F") == kind


@pytest.mark.parametrize(
    ("present", "asked", "text"),
    [
        (
            "instruction output text",
            {},
            "the format could be text or instruction; set data.format to one of them. Columns",
        ),
        (
            "mr ref",
            {},
            "the format is not one of text, prompt_completion, instruction, messages, preference",
        ),
        ("mr ref", {"prompt": "mrr"}, "no column 'mrr' (for prompt); did you mean 'mr'?"),
    ],
)
def test_columns_that_fit_no_format_or_several_are_refused(
    present: str, asked: dict[str, str], text: str
) -> None:
    with pytest.raises(DataError) as caught:
        find_format(present.split(), Columns(**asked), "F")
    assert text in str(caught.value)


def examples(path: Path, rows: list[dict[str, Any]], kind: Any, **columns: str) -> Examples:
    file = path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_examples(read_rows(file), kind=kind, columns=Columns(**columns))


@pytest.mark.parametrize(
    ("kind", "row", "dialog"),
    [
        ("prompt_completion", {"prompt": "hi", "completion": " hello"}, Completion("hi", " hello")),
        ("prompt_completion", {"question": "hi", "answer": "hello"}, Completion("hi", "hello")),
        ("prompt_completion", {"prompt": TURNS[:1], "completion": TURNS[1:]}, Dialog(tuple(TURNS))),
        ("prompt_completion", {"prompt": TURNS[:1], "completion": "hello"}, Dialog(tuple(TURNS))),
        (
            "instruction",
            {"instruction": "add", "input": "1 2", "output": "3"},
            Dialog(
                (
                    {"role": "user", "content": "add\n\n1 2", "instruction": "add", "input": "1 2"},
                    {"role": "assistant", "content": "3"},
                )
            ),
        ),
        (
            "instruction",
            {"instruction": "add", "input": "", "output": "3"},
            Dialog(
                (
                    {"role": "user", "content": "add", "instruction": "add", "input": ""},
                    {"role": "assistant", "content": "3"},
                )
            ),
        ),
        ("messages", {"messages": TURNS}, Dialog(tuple(TURNS))),
        (
            "messages",
            {"conversations": SHARE},
            Dialog(({"role": "system", "content": "be kind"}, *TURNS)),
        ),
        (
            "messages",
            {"messages": TURNS, "tools": [{"name": "f"}]},
            Dialog(tuple(TURNS), ({"name": "f"},)),
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, TURNS[1]]},
            Dialog(tuple(TURNS)),
        ),
        (
            "preference",
            {"prompt": "hi", "chosen": "hello", "rejected": "go"},
            Preference(Completion("hi", "hello"), Completion("hi", "go")),
        ),
        (
            "preference",
            {"chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "go"}]},
            Preference(
                Dialog(tuple(TURNS)), Dialog((TURNS[0], {"role": "assistant", "content": "go"}))
            ),
        ),
    ],
)
def test_rows_of_every_format_are_read(
    tmp_path: Path, kind: str, row: dict[str, Any], dialog: Any
) -> None:
    assert examples(tmp_path, [row], kind).texts == [dialog]


CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}


@pytest.mark.parametrize(
    "turn", [CALL, {**CALL, "content": None}, {**CALL, "content": "", "extra": {"a": [1]}}]
)
def test_a_call_of_a_tool_reaches_the_template_as_it_is(
    tmp_path: Path, turn: dict[str, Any]
) -> None:
    (dialog,) = examples(tmp_path, [{"messages": [TURNS[0], turn]}], "messages").texts
    assert dialog.messages[1] == turn


SYSTEM = {"role": "system", "content": "be kind"}
PAST = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
TOOL = {"type": "function", "function": {"name": "f"}}
ASKED = {"role": "user", "content": "add", "instruction": "add", "input": ""}
ANSWER = {"role": "assistant", "content": "3"}


@pytest.mark.parametrize(
    ("kind", "row", "dialog"),
    [
        ("messages", {"messages": TURNS, "system": "be kind"}, Dialog((SYSTEM, *TURNS))),
        ("messages", {"conversations": SHARE[1:], "system": "be kind"}, Dialog((SYSTEM, *TURNS))),
        ("messages", {"conversations": SHARE, "system": "be kind"}, Dialog((SYSTEM, *TURNS))),
        ("messages", {"messages": TURNS, "system": "", "tools": ""}, Dialog(tuple(TURNS))),
        (
            "messages",
            {"messages": TURNS, "tools": json.dumps([TOOL])},
            Dialog(tuple(TURNS), (TOOL,)),
        ),
        (
            "messages",
            {"messages": TURNS, "tools": [json.dumps(TOOL)]},
            Dialog(tuple(TURNS), (TOOL,)),
        ),
        ("messages", {"messages": json.dumps(TURNS)}, Dialog(tuple(TURNS))),
        (
            "prompt_completion",
            {"prompt": TURNS[:1], "completion": TURNS[1:], "tools": [TOOL], "system": "be kind"},
            Dialog((SYSTEM, *TURNS), (TOOL,)),
        ),
        (
            "prompt_completion",
            {"prompt": [*PAST, TURNS[0]], "completion": TURNS[1:]},
            Dialog((*PAST, *TURNS), masked=frozenset([1])),
        ),
        (
            "instruction",
            {"instruction": "add", "output": "3", "system": "be kind", "history": [["q", "a"]]},
            Dialog((SYSTEM, *PAST, ASKED, ANSWER)),
        ),
        (
            "instruction",
            {"instruction": "add", "output": "3", "history": json.dumps([["q", "a"], ["q", "a"]])},
            Dialog((*PAST, *PAST, ASKED, ANSWER)),
        ),
        (
            "instruction",
            {"instruction": "add", "output": "3", "history": []},
            Dialog((ASKED, ANSWER)),
        ),
        (
            "messages",
            {
                "conversations": [
                    SHARE[1],
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
                    {"from": "observation", "value": "4"},
                    SHARE[2],
                ]
            },
            Dialog(
                (
                    TURNS[0],
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [
                            {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
                        ],
                    },
                    {"role": "tool", "content": "4"},
                    TURNS[1],
                )
            ),
        ),
    ],
)
def test_what_stands_beside_a_chat_becomes_part_of_it(
    tmp_path: Path, kind: str, row: dict[str, Any], dialog: Dialog
) -> None:
    assert examples(tmp_path, [row], kind).texts == [dialog]


@pytest.mark.parametrize(
    ("marked", "learned"),
    [
        ([{"weight": 0}, {"weight": 1}], [3]),
        ([{"weight": 0.0}, {}], [3]),
        ([{}, {"weight": 0}], [1]),
        ([{"train": False}, {"train": True}], [3]),
        ([{"train": None, "weight": None}, {}], [1, 3]),
        ([{"weight": 0, "train": False}, {"weight": 1, "train": True}], [3]),
        ([{"loss": False}, {}], [3]),
        ([{"trainable": True}, {"train_on_turn": False}], [1]),
    ],
)
def test_a_turn_of_no_weight_is_not_learned(
    tmp_path: Path, marked: list[dict[str, Any]], learned: list[int]
) -> None:
    turns = [turn for marks in marked for turn in (TURNS[0], {**TURNS[1], **marks})]
    (dialog,) = examples(tmp_path, [{"messages": turns}], "messages").texts
    assert dialog.answers == learned
    (dialog,) = examples(
        tmp_path, [{"messages": turns, "system": "be kind"}], "messages", system="system"
    ).texts
    assert dialog.answers == [turn + 1 for turn in learned]


@pytest.mark.parametrize(
    ("kind", "row", "text"),
    [
        ("messages", {"messages": "hi"}, "field 'messages' is plain text, not JSON"),
        ("messages", {"messages": []}, "field 'messages' does not contain a list of messages"),
        ("messages", {"messages": ["hi"]}, "contains a str as turn 1, not an object"),
        (
            "messages",
            {"messages": [{"role": "usr", "content": "hi"}]},
            "has the unknown role 'usr' in turn 1",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": "\ud83d"}]},
            "contains half of a surrogate pair in turn 1",
        ),
        ("messages", {"messages": [{"role": "usr", "content": "hi"}]}, "did you mean 'user'?"),
        (
            "messages",
            {"messages": [{"from": "humann", "value": "hi"}]},
            "has the unknown role 'humann' in turn 1",
        ),
        ("messages", {"messages": [{"content": "hi"}]}, "has no role in turn 1"),
        (
            "messages",
            {"messages": [*TURNS, {"role": "user", "content": 3}]},
            "has a int as the content of turn 3",
        ),
        (
            "messages",
            {"messages": [TURNS[0], {"role": "assistant", "content": " "}]},
            "has an empty turn 2 (assistant)",
        ),
        ("messages", {"messages": [TURNS[0]]}, "'messages' has no assistant turn"),
        (
            "messages",
            {"messages": [*TURNS, {"role": "system", "content": "x"}]},
            "has its system turn at position 3",
        ),
        (
            "messages",
            {"messages": [{"role": "system", "content": "x"}] * 2 + TURNS},
            "has 2 system turns (1, 2)",
        ),
        ("messages", {"messages": TURNS, "tools": "f"}, "field 'tools' is plain text, not JSON"),
        (
            "messages",
            {"messages": TURNS, "tools": [3]},
            "field 'tools' contains a list, not a list of objects",
        ),
        (
            "messages",
            {"messages": TURNS, "tools": {"name": "f"}},
            "field 'tools' contains a dict, not a list of objects",
        ),
        (
            "messages",
            {"messages": [TURNS[0], {**TURNS[1], "weight": 0.5}]},
            "has weight='0.5' in turn 2",
        ),
        (
            "messages",
            {"messages": [TURNS[0], {**TURNS[1], "masked": True}]},
            "has 'masked' in turn 2, which is not supported",
        ),
        (
            "messages",
            {"messages": [TURNS[0], {**TURNS[1], "train": True, "loss": False}]},
            "has train and loss in turn 2",
        ),
        (
            "messages",
            {"messages": [TURNS[0], {**TURNS[1], "tool_calls": [{"function": "f"}]}]},
            "contains a tool call without a name in turn 2",
        ),
        (
            "messages",
            {"messages": [TURNS[0], {**TURNS[1], "function_call": {"name": 3}}]},
            "contains no valid tool call in turn 2",
        ),
        (
            "messages",
            {
                "messages": [
                    TURNS[0],
                    {**TURNS[1], "content": [{"type": "image_url", "text": "alt"}]},
                ]
            },
            "a part of type 'image_url' in turn 2",
        ),
        (
            "messages",
            {"messages": [TURNS[0], {**TURNS[1], "content": [{"type": "text", "text": 5}]}]},
            "a part of type 'text' in turn 2",
        ),
        (
            "messages",
            {"messages": [{"from": "human", "value": "a", "content": "b"}, TURNS[1]]},
            "has content and a different value in turn 1",
        ),
        (
            "messages",
            {"messages": "A: hi"},
            "set data.columns={'prompt': 'messages', 'completion': ...}",
        ),
        (
            "messages",
            {"messages": [TURNS[0], {**TURNS[1], "weight": "0"}]},
            "has weight='0' in turn 2",
        ),
        ("messages", {"messages": [TURNS[0], {**TURNS[1], "train": 0}]}, "has train='0' in turn 2"),
        (
            "messages",
            {"messages": [{**TURNS[0], "train": True}, TURNS[1]]},
            "sets train in turn 1 (user)",
        ),
        (
            "messages",
            {"messages": [TURNS[0], {**TURNS[1], "weight": 1, "train": False}]},
            "contradict each other",
        ),
        (
            "messages",
            {"messages": [TURNS[0], {**TURNS[1], "weight": 0}]},
            "'messages' excludes every answer from the loss",
        ),
        (
            "messages",
            {"messages": [SYSTEM, *TURNS], "system": "be rude"},
            "has a system turn and another one in 'system'",
        ),
        (
            "messages",
            {
                "messages": [
                    TURNS[0],
                    {
                        "role": "assistant",
                        "tool_calls": [{"function": {"name": "f", "arguments": "x"}}],
                    },
                ]
            },
            "has 'x' as the arguments of a tool call in turn 2",
        ),
        (
            "prompt_completion",
            {"prompt": "hi", "completion": "x", "system": "y"},
            "has 'system' with a plain-text prompt",
        ),
        (
            "instruction",
            {"instruction": "a", "output": "x", "history": ["b"]},
            "field 'history' is not a list of pairs",
        ),
        ("prompt_completion", {"prompt": "hi", "completion": ""}, "field 'completion' is empty"),
        (
            "prompt_completion",
            {"prompt": "hi", "completion": None},
            "field 'completion' is missing",
        ),
        (
            "prompt_completion",
            {"prompt": 3, "completion": "x"},
            "field 'prompt' does not contain a list of messages",
        ),
        (
            "prompt_completion",
            {"prompt": "hi", "completion": TURNS},
            "'completion' starts with a user turn",
        ),
        ("instruction", {"instruction": "", "output": "x"}, "field 'instruction' is empty"),
        (
            "preference",
            {"prompt": "hi", "chosen": "a", "rejected": "a"},
            "'chosen' and 'rejected' are the same",
        ),
    ],
)
def test_a_wrong_row_is_named_with_its_line_and_turn(
    tmp_path: Path, kind: str, row: dict[str, Any], text: str
) -> None:
    good = {
        "messages": TURNS,
        "prompt": "a",
        "completion": "b",
        "instruction": "a",
        "output": "b",
        "chosen": "a",
        "rejected": "b",
    }
    columns = {
        "prompt_completion": {"prompt": "prompt", "completion": "completion"},
        "instruction": {"instruction": "instruction", "output": "output"},
    }
    optional = {name: name for name in ("system", "history") if name in row}
    with pytest.raises(DataError) as caught:
        examples(tmp_path, [good, good | row], kind, **columns.get(kind, {}), **optional)
    assert text in str(caught.value)
    assert "rows.jsonl:2:1 (row 2): " in str(caught.value)


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_a_thought_has_each_name_that_templates_know(key: str) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", key: "r"}]
    answer = read_dialog({"messages": turns}, Columns(messages="messages")).messages[1]
    assert answer["reasoning_content"] == answer["thinking"] == "r"


def test_a_call_of_a_function_is_a_call_of_a_tool() -> None:
    call = {"name": "f", "arguments": '{"city": "Paris"}'}
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "function_call": call},
    ]
    answer = read_dialog({"messages": turns}, Columns(messages="messages")).messages[1]
    assert answer == {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": call}],
    }


def test_answers_that_are_whole_chats_hold_the_prompt() -> None:
    chats = [
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]
        for text in ("good", "bad")
    ]
    row = {"prompt": "q", "chosen": chats[0], "rejected": chats[1]}
    made = read_preference(row, Columns(prompt="prompt", chosen="chosen", rejected="rejected"))
    assert isinstance(made.chosen, Dialog) and len(made.chosen.messages) == 2

"""Dialogs written out: rows that hold what generation sees, whatever a template does to earlier
turns; and no word of the user's.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from jaxpeft.data.chat.dialogs import Dialog
from jaxpeft.data.chat.scripts import Script
from jaxpeft.data.chat.supervise import IGNORED, label, write
from jaxpeft.data.chat.templates import RenderError, Template
from jaxpeft.data.tokens.tokenize import prefix, special_tokens
from tests.data.chat.chats import tokenizer_of
from tests.data.chat.families import FAMILIES, REFUSED, SHAPES, TOOL, call, said, thought, user

TOKENIZER = "bytes"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if"
    " add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def template_of(source: str) -> Template:
    return Template(source, TOKENS)


def dialog_of(messages: list[dict[str, Any]], tools: Any = ()) -> Dialog:
    unlearned = [
        i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight") == 0
    ]
    return Dialog(tuple(messages), tuple(tools), frozenset(unlearned))


def written(source: str, messages: list[dict[str, Any]], tools: Any = ()) -> list[Script]:
    script = write(dialog_of(messages, tools), template_of(source))
    return [*script.earlier, script]


def learned(source: str, messages: list[dict[str, Any]], tools: Any = ()) -> list[str]:
    return [
        row.text[start:end]
        for row in written(source, messages, tools)
        for start, end in row.loss_spans
    ]


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@pytest.mark.parametrize(
    ("family", "shape"), [(family, shape) for family in FAMILIES for shape in SHAPES]
)
def test_before_an_answer_stand_the_very_tokens_of_the_prompt_to_generate_it(
    family: str, shape: str, kind: str
) -> None:
    tokenizer, messages, source = tokenizer_of(kind), SHAPES[shape], FAMILIES[family]
    dialog = dialog_of(messages, [TOOL] if shape.startswith("a tool") else [])
    if (family, shape) in REFUSED:
        with pytest.raises(RenderError, match=REFUSED[family, shape]):
            write(dialog, template_of(source))
        return
    script = write(dialog, template_of(source))
    (last,) = label([script], tokenizer, begin=prefix(tokenizer), end=tokenizer.eos_token_id)
    seen, answers = list[list[int]](), list[str]()
    for row in (*last.earlier, last):
        for i in range(1, len(row.ids)):
            if row.labels[i] != IGNORED and row.labels[i - 1] == IGNORED:
                seen.append(row.ids[:i])
                answers.append("")
            if row.labels[i] != IGNORED:
                answers[-1] = tokenizer.decode(row.ids[len(seen[-1]) : i + 1])
    turns = [
        i for i in dialog.answers if i or family not in ("moving", "moving to the end", "calls")
    ]  # which read the first turn
    if family == "opened" and shape == "begins with the assistant":
        turns = turns[1:]  # nothing is thought before it, and generation would begin with a thought
    for turn, before in zip(turns, seen, strict=True):
        if not turn:  # transformers renders no empty chat
            text = template_of(source).render([], generate=True)
            assert before == tokenizer(text, add_special_tokens=False)["input_ids"]
            continue
        assert before == tokenizer.apply_chat_template(
            messages[:turn],
            chat_template=source,
            tools=list(dialog.tools) or None,
            add_generation_prompt=True,
            return_dict=False,
        )
    for turn, answer in zip(turns, answers, strict=True):
        message = messages[turn]
        assert (message["content"] or "weather").split("\n")[-1] in answer
        assert not any(m["content"] in answer for m in messages if m["role"] != "assistant")
        if "</think>" in (message["content"] or "") and family in (
            "hidden",
            "opened",
            "opened and hidden",
        ):
            assert "I add" in answer  # the thought is learned, though later rows lack it


@pytest.mark.parametrize(
    ("family", "shape", "answers"),
    [
        (
            "channels",
            "three",
            [f"<|channel|>final<|message|>{thought(n)['content']}<|return|>" for n in (2, 5, 9)],
        ),
        (
            "hidden",
            "three",
            [f"<think>\nI add {n}.\n</think>\n\nThe sum is {n}.<|im_end|>\n" for n in (2, 5, 9)],
        ),
        ("opened", "three", [f"I add {n}.\n</think>\n\nThe sum is {n}.</s>" for n in (2, 5, 9)]),
        (
            "opened and hidden",
            "three",
            [f"I add {n}.\n</think>\n\nThe sum is {n}.<|im_end|>\n" for n in (2, 5, 9)],
        ),
        ("moving", "system", [f" {thought(n)['content']}</s>" for n in (2, 5)]),
        ("moving to the end", "system", [f" {thought(n)['content']}</s>" for n in (2, 5)]),
        (
            "calls",
            "a tool",
            [
                '{"name": "weather", "parameters": {"city": "Paris"}}<|eom_id|>',
                thought(7)["content"] + "<|eot_id|>",
            ],
        ),
        (
            "hidden",
            "a fault that is not learned",
            ["<think>\nI add 2.\n</think>\n\nThe sum is 2.<|im_end|>\n"],
        ),
        ("calls", "begins with the assistant", [thought(2)["content"] + "<|eot_id|>"]),
    ],
)
def test_what_is_learned_of_a_family(family: str, shape: str, answers: list[str]) -> None:
    assert learned(FAMILIES[family], SHAPES[shape], [TOOL] if shape == "a tool" else []) == answers


@pytest.mark.parametrize(
    ("family", "shape", "rows"),
    [
        ("calls", "three", [3]),  # nothing is rewritten
        ("hidden", "three", [1, 1, 1]),
        (
            "hidden",
            "a tool, then more",
            [2, 1],
        ),  # the thoughts behind a question stay until the next
        ("moving", "three", [3]),
        ("moving", "system", [1, 1]),
        ("moving to the end", "system", [1, 1]),
        ("channels", "three", [1, 1, 1]),
    ],
)
def test_answers_share_a_row_until_a_text_is_rewritten(
    family: str, shape: str, rows: list[int]
) -> None:
    made = written(FAMILIES[family], SHAPES[shape], [TOOL] if shape.startswith("a tool") else [])
    assert [len(row.loss_spans) for row in made] == rows


@pytest.mark.parametrize("family", ["hidden", "opened and hidden"])
def test_a_thought_in_the_content_and_one_of_its_own_are_the_same(family: str) -> None:
    own = said("The sum is 2.", reasoning_content="I add 2.")
    assert written(FAMILIES[family], [user("Add."), own]) == written(
        FAMILIES[family], [user("Add."), thought(2)]
    )


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ("<think>\nI add.\n</think>\n\n5", "I add.\n</think>\n\n5</s>"),
        ("<think>I add.</think>5", "I add.</think>5</s>"),
        ("<think>\n\nI add.</think>5", "\nI add.</think>5</s>"),
        ("\n<think> I add.</think>5", "I add.</think>5</s>"),
        ("I add.\n</think>\n5", "I add.\n</think>\n5</s>"),  # as generation gives it
        ("<think>\n</think>5", "</think>5</s>"),
    ],
)
def test_a_thought_that_the_prompt_opens_goes_on_behind_it(content: str, answer: str) -> None:
    assert learned(FAMILIES["opened"], [user("Add."), said(content)]) == [answer]


def test_an_answer_that_generation_cannot_begin_is_not_learned_and_told() -> None:
    """History often comes without thoughts: the last answer is learned, the others are its
    context.
    """
    turns = [user("Add 2."), said("2"), user("Add 3."), thought(5)]
    (row,) = written(FAMILIES["opened"], turns)
    assert [row.text[a:b] for a, b in row.loss_spans] == ["I add 5.\n</think>\n\nThe sum is 5.</s>"]
    assert row.excluded == (
        (
            r"an answer is excluded from the loss: generation starts turn 2 with '<think>\n', but its content"
            r" does not"
        ),
    )
    with pytest.raises(RenderError, match="generation starts turn 2 with") as caught:
        written(FAMILIES["opened"], turns[:2])
    assert (
        caught.value.fix
        == "write the reasoning into the content, as '<think>...</think>', or name a template whose"
        " prompt opens no reasoning as data.chat_template"
    )


LEAKS = {
    "the question is written with its answer": (
        "{% for m in messages %}{% if m.role == 'assistant' %}Q: {{ messages[loop.index0 -"
        " 1].content }} A: {{ m.content }}\n{% endif %}{% endfor %}"
    ),
    "the question is repeated behind the answer": (
        "{% for m in messages %}{{ m.content }}\n{% endfor %}{% if messages[-1].role == 'assistant'"
        " %}{{ messages[-2].content }}{% endif %}"
    ),
    "the last turn is written first": (
        "{% for m in messages | reverse %}{{ m.content }}\n{% endfor %}"
    ),
    "in capitals": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ messages[loop.index0 - 1].content"
        " | upper }}: {{ m.content }}\n{% endif %}{% endfor %}"
    ),
    "the system text behind the answer": (
        "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if messages[-1].role == 'assistant' %}{{ messages[0].content }}{% endif %}"
    ),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_words_of_other_turns_are_never_learned(leak: str) -> None:
    turns = [{"role": "system", "content": "Be brief."}, user("Add 2."), said("The sum is 2.")]
    with pytest.raises(
        RenderError, match=r"writes words of another turn into turn 3|differently once it follows"
    ) as caught:
        written(LEAKS[leak], turns)
    assert caught.value.fix == "fix the template, or name another as data.chat_template"


@pytest.mark.parametrize(
    ("source", "turn", "text"),
    [
        (
            (
                "{% for m in messages %}{{ m.role }}:{% for part in m.content %}{{ part.text }}{%"
                " endfor %}{{ '.' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
            ),
            said("5"),
            "does not write the content of turn 2",
        ),
        (
            (
                "{% for m in messages %}{{ m.role }}: {{ m.content or '' }}\n{% endfor %}{% if"
                " add_generation_prompt %}assistant: {% endif %}"
            ),
            call({"city": "Paris"}),
            "does not write the tool calls of turn 2",
        ),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}",
            call({}),
            "does not write the tool calls of turn 2",
        ),
        (
            (
                "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{"
                " c.function.name }}{% endfor %}{% endfor %}"
            ),
            call({}),
            "writes 'None' for the content of turn 2, which is null",
        ),
        (
            "{% for m in messages %}{{ m.content }}{{ messages | length }}{% endfor %}",
            said("5"),
            "the turns before turn 2 differently once it follows",
        ),
        (
            "{% for m in messages %}{{ m.content | length }} {{ m.content }}{% endfor %}",
            said("5"),
            "whose words would be in the loss",
        ),
    ],
)
def test_what_a_template_does_not_write_is_refused(
    source: str, turn: dict[str, Any], text: str
) -> None:
    with pytest.raises(RenderError, match=text):
        written(source, [user("Add."), turn])


def test_what_a_template_leaves_out_of_an_answer_is_told() -> None:
    (row,) = written(CHATML, [user("Add."), said("5", reasoning_content="I add.")], [TOOL])
    assert row.notes == (
        "the chat template does not write 'reasoning_content'",
        "the chat template does not write the tools",
    )
    (row,) = written(
        FAMILIES["calls"], [user("Add."), call({"city": "Paris"}, "Let me look.")], [TOOL]
    )
    assert row.notes == ("the chat template does not write the content of turns with tool calls",)
    (row,) = written(
        FAMILIES["hidden"], [user("Add."), said("5", reasoning_content="I add.")], [TOOL]
    )
    assert row.notes == ()


ARGUMENTS = '{"city": "Par\\"is"}'
RAW = (
    "{% for m in messages %}{{ m.role }}: {{ m.content or '' }}{% for c in m.tool_calls or [] %}{{"
    " c.function.name + c.function.arguments }}{% endfor %}\n{% endfor %}{% if"
    " add_generation_prompt %}assistant: {% endif %}"
)
EITHER = RAW.replace(
    "{{ c.function.name + c.function.arguments }}",
    "{{ c.function.name }}{{ c.function.arguments if c.function.arguments is string else"
    " c.function.arguments | tojson }}",
)
ITEMS = RAW.replace(
    "{{ c.function.name + c.function.arguments }}",
    "{{ c.function.name }}({% for k, v in c.function.arguments | items %}{{ k }}={{ v }}{%"
    " endfor %})",
)


@pytest.mark.parametrize(
    ("source", "given", "answer"),
    [
        (
            FAMILIES["calls"],
            ARGUMENTS,
            '{"name": "weather", "parameters": {"city": "Par\\"is"}}<|eom_id|>',
        ),
        (
            FAMILIES["hidden"],
            ARGUMENTS,
            (
                '<think>\n\n</think>\n\n<tool_call>\nweather {"city":'
                ' "Par\\"is"}\n</tool_call><|im_end|>\n'
            ),
        ),
        (ITEMS, ARGUMENTS, 'weather(city=Par"is)'),
        (ITEMS, "", "weather()"),
        (
            RAW,
            '{"city":"Paris"}',
            'weather{"city":"Paris"}',
        ),  # a template that wants a text gets it as it is
        (EITHER, '{"city":"Paris"}', 'weather{"city":"Paris"}'),
        (EITHER, {"city": "Paris"}, 'weather{"city": "Paris"}'),
    ],
)
def test_arguments_that_are_json_are_written_once(source: str, given: Any, answer: str) -> None:
    assert learned(source, [user("Weather?"), call(given)], [TOOL]) == [answer]
    later = [user("Weather?"), call(given), {"role": "tool", "content": "sunny"}, said("Sunny.")]
    assert answer in written(source, later, [TOOL])[-1].text or source == FAMILIES["hidden"]


def test_flags_and_names_that_a_template_looks_at_are_no_fault_of_a_row() -> None:
    flag = (
        "{% for m in messages %}{{ m.role }}{% if m.content.endswith('/brief') %} (brief){% endif"
        " %}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert learned(flag, [user("Add 2. /brief"), said("2")]) == ["2\n"]
    named = EITHER.replace(
        "{{ c.function.name }}",
        "{{ 'built in' if c.function.name == 'weather' else c.function.name }}",
    )
    assert learned(named, [user("Weather?"), call({"city": "Paris"})]) == [
        'built in{"city": "Paris"}'
    ]


def test_marks_that_the_text_holds_already_are_not_taken() -> None:
    turns = [user("\ue000 Add \ue001 2."), said("\ue002 2 \ue003")]
    assert learned(CHATML, turns) == ["\ue002 2 \ue003<|im_end|>\n"]


def test_a_tokenizer_with_templates_by_name_writes_chats_with_tools_by_their_own() -> None:
    template = Template({"default": CHATML, "tool_use": "{{ tools | tojson }}" + CHATML}, TOKENS)
    turns = (user("Add."), said("5"))
    assert write(Dialog(turns), template).text.startswith("<|im_start|>user")
    assert write(Dialog(turns, (TOOL,)), template).text.startswith('[{"type"')
    assert special_tokens(tokenizer_of(TOKENIZER))["eos_token"] == "</s>"


def test_a_second_answer_in_a_row_is_learned_behind_what_generation_sees() -> None:
    turns = [
        user("Add."),
        said("The sum is 2."),
        said("Or is it 3?"),
        user("Again."),
        said("It is 4."),
    ]
    first, last = written(FAMILIES["hidden"], turns)
    answers = [first.text[start:end] for start, end in first.loss_spans]
    assert answers == [
        f"<think>\n\n</think>\n\n{text}<|im_end|>\n" for text in ("The sum is 2.", "Or is it 3?")
    ]
    prompt = template_of(FAMILIES["hidden"]).render(turns[:2], generate=True)
    assert first.text[: first.loss_spans[1][0]] == prompt
    assert [last.text[start:end] for start, end in last.loss_spans] == [
        "<think>\n\n</think>\n\nIt is 4.<|im_end|>\n"
    ]

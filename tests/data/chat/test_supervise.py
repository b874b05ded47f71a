"""What is learned of a dialog: exactly the answers, with the tokens that generation sees, whatever
the template.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from jaxpeft.data.chat.dialogs import Completion, Dialog
from jaxpeft.data.chat.supervise import IGNORED, Labeled, label, prefixes, write, write_prompt
from jaxpeft.data.chat.templates import Template
from jaxpeft.data.tokens.tokenize import prefix, special_tokens
from tests.data.chat.chats import CHATS, LIST, PARIS, SUM, TEMPLATES, USER, tokenizer_of

ROWS = [
    (family, chat, kind)
    for family in TEMPLATES
    for chat in CHATS
    for kind in ("bytes", "metaspace")
    if not (family == "turns" and chat == "system")
]
every_chat = pytest.mark.parametrize(("family", "chat", "kind"), ROWS)


def template_of(family: str, tokenizer: Any) -> Template:
    return made(TEMPLATES[family], tuple(special_tokens(tokenizer).items()))


@functools.cache
def made(source: str, tokens: tuple[tuple[str, str], ...]) -> Template:
    """Make a template once: each starts a process."""
    return Template(source, dict(tokens))


def rows_of(family: str, messages: Any, tokenizer: Any) -> list[Labeled]:
    """Return the rows of a dialog."""
    script = write(Dialog(tuple(messages)), template_of(family, tokenizer))
    (made,) = label([script], tokenizer, begin=prefix(tokenizer), end=tokenizer.eos_token_id)
    rows = [*made.earlier, made]
    assert all(len(row.ids) == len(row.labels) for row in rows)
    return rows


def labeled(family: str, messages: Any, tokenizer: Any) -> Labeled:
    return rows_of(family, messages, tokenizer)[-1]


def answers(rows: list[Labeled]) -> list[tuple[list[int], list[int]]]:
    """Return of each run of learned tokens those before it, and itself."""
    runs: list[tuple[list[int], list[int]]] = []
    for row in rows:
        assert row.labels[0] == IGNORED
        for i in range(1, len(row.ids)):
            if row.labels[i] != IGNORED and row.labels[i - 1] == IGNORED:
                runs.append((row.ids[:i], []))
            if row.labels[i] != IGNORED:
                assert row.labels[i] == row.ids[i]
                runs[-1][1].append(row.ids[i])
    return runs


@every_chat
@pytest.mark.representatives("*-system-bytes", "*-three turns-metaspace", "*-a number-bytes")
def test_generation_sees_the_tokens_that_training_saw(family: str, chat: str, kind: str) -> None:
    """The prompt of every answer, written for generation by jaxpeft and by transformers, is what
    stands before it.
    """
    tokenizer, messages = tokenizer_of(kind), CHATS[chat]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    made = answers(rows_of(family, messages, tokenizer))
    assert len(made) == len(turns)
    for (before, _), turn in zip(made, turns, strict=True):
        script = write_prompt(Dialog(messages[:turn]), template_of(family, tokenizer))
        (prompt,) = label([script], tokenizer, begin=prefix(tokenizer), end=tokenizer.eos_token_id)
        assert before == prompt.ids
        if family == "headers" and chat == "system":
            continue  # transformers writes the day on which it runs
        assert before == tokenizer.apply_chat_template(
            list(messages[:turn]),
            chat_template=TEMPLATES[family],
            add_generation_prompt=True,
            return_dict=False,
        )


@every_chat
@pytest.mark.representatives("*-system-bytes", "*-three turns-metaspace", "*-a number-bytes")
def test_just_the_answers_are_learned_and_each_with_its_end(
    family: str, chat: str, kind: str
) -> None:
    tokenizer, messages = tokenizer_of(kind), CHATS[chat]
    said = [message["content"] for message in messages if message["role"] == "assistant"]
    decoded = [tokenizer.decode(run) for _, run in answers(rows_of(family, messages, tokenizer))]
    assert len(decoded) == len(said)
    for text, content in zip(decoded, said, strict=True):
        assert content in text
        assert "France?" not in text
        assert "user" not in text
    ends = {
        "marks": "<|im_end|>",
        "brackets": "</s>",
        "headers": "<|eot_id|>",
        "turns": "<end_of_turn>",
        "thoughts": "<|im_end|>",
    }
    for text in decoded if family in ends else []:
        assert ends[family] in text
    if family == "plain":
        # the template marks no end: the tokenizer's own is added
        assert decoded[-1].endswith("</s>")


@every_chat
@pytest.mark.representatives("*-system-bytes", "*-three turns-metaspace", "*-a number-bytes")
def test_the_tokens_are_the_whole_text_and_begin_with_one_bos_at_most(
    family: str, chat: str, kind: str
) -> None:
    tokenizer, messages = tokenizer_of(kind), CHATS[chat]
    made = labeled(family, messages, tokenizer)
    if messages[-1]["role"] == "user":
        messages = messages[:-1]  # what follows the last answer teaches nothing
    text = template_of(family, tokenizer).render(messages, generate=False)
    if kind == "bytes":
        assert tokenizer.decode(made.ids).removesuffix("</s>") == text.removesuffix("</s>")
    assert made.ids.count(tokenizer.bos_token_id) == (family in ("brackets", "headers", "turns"))


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("What is 2 and 3?", " 5"),
        ("Answer: ", "42"),
        ("Answer:", "42"),
        ("Yes,\n", "\n- one"),
        ("a", "b"),
        ("one ", " two"),
    ],
)
def test_a_completion_begins_behind_the_tokens_of_its_prompt(
    kind: str, prompt: str, completion: str
) -> None:
    tokenizer = tokenizer_of(kind)
    script = write(Completion(prompt, completion), None)
    (made,) = label([script], tokenizer, begin=prefix(tokenizer), end=tokenizer.eos_token_id)
    before = tokenizer(prompt)["input_ids"]
    assert made.ids[: len(before)] == before
    assert made.labels == [IGNORED] * len(before) + made.ids[len(before) :]
    assert made.ids[-1] == tokenizer.eos_token_id
    assert made.ids.count(tokenizer.bos_token_id) == made.ids.count(tokenizer.eos_token_id) == 1
    if kind == "bytes":
        assert tokenizer.decode(made.ids) == f"<s>{prompt}{completion}</s>"


def test_a_template_that_writes_eos_gets_no_second_one() -> None:
    tokenizer = tokenizer_of("bytes")
    made = labeled("brackets", (USER, PARIS), tokenizer)
    assert made.ids.count(tokenizer.eos_token_id) == 1
    assert made.labels[-1] == tokenizer.eos_token_id


UNKNOWN = (
    "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|stop|>\n{% endfor %}{% if"
    " add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@pytest.mark.parametrize("said", ["42", "I say </s> now"], ids=["plain", "with the mark inside"])
def test_marks_that_are_no_tokens_of_the_tokenizer_end_no_answer_so_eos_is_added(
    kind: str, said: str
) -> None:
    tokenizer = tokenizer_of(kind)
    script = write(
        Dialog((USER, {"role": "assistant", "content": said})),
        Template(UNKNOWN, special_tokens(tokenizer)),
    )
    (made,) = label([script], tokenizer, begin=prefix(tokenizer), end=tokenizer.eos_token_id)
    assert made.ids[-1] == made.labels[-1] == tokenizer.eos_token_id
    (without,) = label([script], tokenizer, begin=prefix(tokenizer), end=None)
    assert without.ids == made.ids[:-1]


@pytest.mark.parametrize("said", ["d", "e", "s", "end", "A", "|", "Yes"])
@pytest.mark.parametrize("family", ["marks", "brackets", "headers", "turns", "thoughts"])
def test_an_answer_ends_once_though_it_stands_in_the_mark_of_its_end(
    family: str, said: str
) -> None:
    tokenizer = tokenizer_of("bytes")
    made = labeled(family, (USER, {"role": "assistant", "content": said}), tokenizer)
    assert made.ids.count(tokenizer.eos_token_id) == (family == "brackets")


def test_eos_is_learned_where_it_is_the_pad_token_too() -> None:
    tokenizer = tokenizer_of("bytes")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert labeled("plain", (USER, SUM), tokenizer).labels[-1] == tokenizer.eos_token_id


def test_answers_share_a_row_as_long_as_no_token_before_them_changes() -> None:
    tokenizer = tokenizer_of("bytes")
    assert len(rows_of("marks", CHATS["three turns"], tokenizer)) == 1
    # each answer's thought is dropped later on
    assert len(rows_of("thoughts", CHATS["three turns"], tokenizer)) == 3
    # the text is the same, but "\n\n" and "Paris" are one piece where both are there
    assert len(rows_of("headers", CHATS["two turns"], tokenizer)) == 2
    assert len(write(Dialog(CHATS["two turns"]), template_of("headers", tokenizer)).loss_spans) == 2


def test_an_earlier_answer_is_learned_as_generation_writes_it() -> None:
    rows = rows_of("thoughts", (USER, PARIS, USER, LIST), tokenizer_of("bytes"))
    decode = tokenizer_of("bytes").decode
    (_, first), (before, last) = answers(rows)
    assert decode(first) == f"<think>\nI know it.\n</think>\n\n{PARIS['content']}<|im_end|>\n"
    assert "I know it." not in decode(before)
    assert decode(last) == f"<think>\nI add.\n</think>\n\n{LIST['content']}<|im_end|>\n"


def test_a_token_that_spans_the_end_of_an_answer_is_not_learned() -> None:
    """Where the next turn follows without a mark, one token may hold the end of an answer and the
    user's first letters.
    """
    glued = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = tokenizer_of("bytes")
    turns = (
        USER,
        {"role": "assistant", "content": " on"},
        {"role": "user", "content": "e two"},
        SUM,
    )
    (made,) = label([write(Dialog(turns), Template(glued, {}))], tokenizer, begin=[], end=None)
    assert "Ġone" in tokenizer.convert_ids_to_tokens(made.ids)
    assert [tokenizer.decode(run) for _, run in answers([*made.earlier, made])] == [" on", "42"]


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_the_tokens_up_to_any_cut_are_those_of_the_text_up_to_there(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    text = "<s> <|im_start|>user\nAdd 2 ø.<|im_end|>\n\n<|im_start|> model<unk>: 42</s> <|im_end|>"
    cuts = list(range(len(text) + 1))
    (made,) = prefixes(tokenizer, [(text, cuts)])
    assert made == [tokenizer(text[:cut], add_special_tokens=False)["input_ids"] for cut in cuts]

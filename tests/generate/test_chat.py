"""The chat in the terminal."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jaxpeft.errors import ConfigError
from jaxpeft.generate.__main__ import GenerateArguments
from jaxpeft.generate.chat import talk
from jaxpeft.generate.session import Session, open_session
from jaxpeft.inference.prompts import PromptEncoder


@pytest.fixture(scope="module")
def session(adapter: Path) -> Session:
    return open_session(GenerateArguments(adapter=str(adapter), chat=True, max_new_tokens=5))


def say(session: Session, *lines: str) -> str:
    """Return what a chat with these lines shows."""
    out = io.StringIO()
    given: Iterator[str] = iter(lines)

    def read(_: str) -> str:
        line = next(given, None)
        if line is None:
            raise EOFError
        return line

    talk(session, read, Console(file=out, width=100))
    return out.getvalue()


def test_an_answer_depends_on_the_turns_before_it(session: Session) -> None:
    assert "/help lists the commands" in say(session)
    once = say(session, "word5", "word6", "/history")
    turns = [line for line in once.splitlines() if line.startswith(("user:", "assistant:"))]
    assert [turn.partition(":")[0] for turn in turns] == ["user", "assistant", "user", "assistant"]
    fresh = say(session, "word5", "/reset", "word6", "/history")
    assert fresh.count("user: ") == 1
    assert "user: word6" in fresh
    answers = [say(session, *lines, "word6").splitlines()[-3] for lines in ((), ("word5",))]
    assert answers[0] != answers[1]


def test_the_system_text_is_a_turn_and_can_be_removed(session: Session) -> None:
    shown = say(session, "/system word7", "word5", "/history", "/system", "word5", "/history")
    assert shown.count("system: word7") == 1


def test_the_base_answers_beside_the_tuned_model(session: Session) -> None:
    shown = say(session, "word5", "/base")
    head = next(line for line in shown.splitlines() if "base" in line and "tuned" in line)
    assert head.split() == ["base", "tuned"]
    both = say(session, "/base on", "word5", "/base off", "word6")
    assert both.count("tuned") == 1
    assert "/base: ask a question first" in say(session, "/base")
    assert "/base: takes on, off or nothing" in say(session, "/base what")


def test_an_unknown_command_is_told_and_quit_ends(session: Session) -> None:
    shown = say(session, "/foo\x1b[2J")
    assert "/foo\\u001b[2J: no such command; /help lists them" in shown and "\x1b" not in shown
    assert "/reset" in say(session, "/help")
    assert "word" not in say(session, "/quit", "word5")


def test_without_an_adapter_the_model_is_the_base(llama: str) -> None:
    args = GenerateArguments(model=llama, chat=True, chat_template="chatml", max_new_tokens=3)
    assert "/base: the model has no adapter" in say(open_session(args), "word5", "/base")
    plain = open_session(GenerateArguments(model=llama, chat=True))
    with pytest.raises(ConfigError, match="--chat-template: the tokenizer has no template"):
        say(plain)


def test_what_the_template_refuses_is_told_and_the_chat_goes_on(session: Session) -> None:
    args = dataclasses.replace(session.args, chat_template=None)
    strict = Session(session.loaded, args)
    template = (
        "{% if messages|length > 1 %}{{ raise_exception('bad [/INST] marker') }}{% endif %}word1"
    )
    object.__setattr__(strict, "encoder", PromptEncoder(_with_template(session, template)))
    shown = say(strict, "word5", "word6", "\ud800 lone", "/history")
    assert shown.count("bad [/INST] marker") == 2
    assert "user: word5" in shown


def _with_template(session: Session, template: str) -> Any:
    tokenizer = copy.deepcopy(session.loaded.tokenizer)
    tokenizer.chat_template = template
    return tokenizer

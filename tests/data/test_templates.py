"""Chat templates: rendered as transformers renders them, and stopped where they do what they may not."""

from __future__ import annotations

import resource
import threading
import time
from pathlib import Path

import pytest

from jaxpeft.data.templates import BUILT_IN, RenderError, Template, template_source
from jaxpeft.errors import ConfigError
from tests.data.chats import CHATS, TEMPLATES, USER, tokenizer_of

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("family", [*(f for f in TEMPLATES if f != "headers"), "chatml"])
@pytest.mark.parametrize("generate", [False, True])
def test_transformers_renders_the_same(family: str, chat: str, generate: bool) -> None:
    source = (TEMPLATES | BUILT_IN)[family]
    if family == "turns" and chat == "system":
        with pytest.raises(RenderError, match="no system turns"):
            Template(source, TOKENS).render(CHATS[chat], generate=generate)
        return
    theirs = tokenizer_of("bytes").apply_chat_template(
        list(CHATS[chat]), chat_template=source, add_generation_prompt=generate, tokenize=False
    )
    assert Template(source, TOKENS).render(CHATS[chat], generate=generate) == theirs


def test_tools_and_json_are_written_as_transformers_writes_them() -> None:
    source = "{% if tools %}{{ tools | tojson }}|{{ tools[0] | tojson(indent=2) }}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    tools = [{"type": "function", "function": {"name": "größe", "parameters": {"a": [1, 2]}}}]
    theirs = tokenizer_of("bytes").apply_chat_template([USER], chat_template=source, tools=tools, tokenize=False)
    assert Template(source, TOKENS).render([USER], generate=False, tools=tools) == theirs


def test_the_day_does_not_change_the_tokens() -> None:
    assert Template("{{ strftime_now('%Y-%m-%d') }}", {}).render([], generate=False) == "2024-07-26"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "may not"),
        ("{{ messages.append(1) }}", "may not"),
        ("{{ raise_exception.__globals__.items() }}", "may not"),
        ("{% for i in range(10**9) %}{% endfor %}", "may not|fails: Range too big"),
        ("{{ 'a' * 10**10 }}", "more than 10,000,000 items"),
        ("{{ 9 ** (9 ** 9) }}", "more than 10,000,000 items"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes more than 2 s"),
        ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "writes more than 10,000,000 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ messages[7].content }}", "fails"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ raise_exception('roles must alternate') }}", "fails: roles must alternate"),
    ],
)
def test_a_hostile_or_broken_template_is_stopped(source: str, text: str) -> None:
    template, started = Template(source, {}), time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RenderError, match=text):
        template.render([USER], generate=False)
    assert time.perf_counter() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


def test_what_is_no_jinja_is_refused_with_its_line() -> None:
    with pytest.raises(ConfigError, match=r"chat template: line 2: unexpected '}'"):
        Template("{% for m in messages %}\n{{ m.content }", {})


def test_the_limit_needs_the_main_thread() -> None:
    caught: list[BaseException] = []

    def run() -> None:
        try:
            Template("x", {}).render([], generate=False)
        except ConfigError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert "main thread" in str(caught[0])


def test_which_template_is_taken(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("mine")
    assert template_source("own", str(tmp_path / "mine.jinja"), "messages") == "mine"
    assert template_source("own", "chatml", "messages") == BUILT_IN["chatml"]
    assert template_source("own", None, "instruction") == "own"
    assert template_source(None, None, "instruction") == BUILT_IN["alpaca"]
    with pytest.raises(ConfigError, match="the tokenizer has none; set it to chatml or alpaca, or to a file"):
        template_source(None, None, "messages")
    with pytest.raises(ConfigError, match=r"'chatmll' is not one of chatml, alpaca, and no file .*No such file"):
        template_source(None, "chatmll", "messages")

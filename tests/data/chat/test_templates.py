"""Chat templates: rendered as transformers renders them, and stopped where they do what they may
not.
"""

from __future__ import annotations

import functools
import gc
import resource
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from jaxpeft.data.chat import sandbox, templates
from jaxpeft.data.chat.templates import (
    BUILT_IN,
    RenderError,
    RenderRequest,
    Template,
    template_source,
)
from jaxpeft.errors import ConfigError
from tests.data.chat.chats import CHATS, TEMPLATES, USER, tokenizer_of

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


STOPPED = "too much memory|takes more than 2 s"
"""A slow machine reaches the limit of time first."""


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("family", [*(f for f in TEMPLATES if f != "headers"), "chatml"])
@pytest.mark.parametrize("generate", [False, True])
def test_transformers_renders_the_same(family: str, chat: str, generate: bool) -> None:
    source = (TEMPLATES | BUILT_IN)[family]
    if family == "turns" and chat == "system":
        with pytest.raises(RenderError, match="no system turns"):
            made(source).render(CHATS[chat], generate=generate)
        return
    theirs = tokenizer_of("bytes").apply_chat_template(
        list(CHATS[chat]), chat_template=source, add_generation_prompt=generate, tokenize=False
    )
    assert made(source).render(CHATS[chat], generate=generate) == theirs


@functools.cache
def made(source: str) -> Template:
    """Make a template once: each starts a process."""
    return Template(source, TOKENS)


def test_tools_and_json_are_written_as_transformers_writes_them() -> None:
    source = (
        "{% if tools %}{{ tools | tojson }}|{{ tools[0] | tojson(indent=2) }}{% endif %}{% for m in"
        " messages %}{{ m.content }}{% endfor %}"
    )
    tools = [{"type": "function", "function": {"name": "größe", "parameters": {"a": [1, 2]}}}]
    theirs = tokenizer_of("bytes").apply_chat_template(
        [USER], chat_template=source, tools=tools, tokenize=False
    )
    assert Template(source, TOKENS).render([USER], generate=False, tools=tools) == theirs


def test_the_day_does_not_change_the_tokens() -> None:
    assert Template("{{ strftime_now('%Y-%m-%d') }}", {}).render([], generate=False) == "2024-07-26"


@pytest.mark.parametrize(
    ("source", "text", "fatal"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "does something forbidden", True),
        ("{{ messages.append(1) }}", "does something forbidden", True),
        ("{{ raise_exception.__globals__.items() }}", "does something forbidden", True),
        ("{% for i in range(10**9) %}{% endfor %}", "forbidden: Range too big", True),
        ("{{ 'a' * 10**10 }}", "more than 10,000,000 items", True),
        ("{{ 9 ** (9 ** 9) }}", "more than 10,000,000 items", True),
        pytest.param(
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "takes more than 2 s",
            True,
            marks=pytest.mark.slow,  # as case 40 of the fault tests
        ),
        (
            "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
            "writes more than 10,000,000 characters",
            True,
        ),
        (
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "too much memory, time or recursion",
            True,
        ),
        ("{{ '%2000000000d' % messages | length }}", "too much memory, time or recursion", True),
        (
            "{{ messages[0].content.center(2000000000) }}",
            "too much memory, time or recursion",
            True,
        ),
        ("{{ 'a' | center(2000000000) }}", "too much memory, time or recursion", True),
        (
            "{{ messages[0].content | center(2000000000) }}",
            "too much memory, time or recursion",
            True,
        ),
        (
            (
                "{% set a = 'a' * 4000000 %}{% for i in range(9999) %}{% if a.count(a[1:] + 'b')"
                " %}{% endif %}{% endfor %}"
            ),
            STOPPED,
            True,
        ),
        pytest.param(
            "{% for i in range(99999) %}{% if ('a.b ' * 999999) | urlize %}{% endif %}{% endfor %}",
            "takes more than 2 s",
            True,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            (
                "{% for i in range(99999) %}{% if ('<a>' * 999999) | striptags %}{% endif %}{%"
                " endfor %}"
            ),
            "takes more than 2 s",
            True,
            marks=pytest.mark.slow,
        ),
        ("{{ ('<' * 9000000) | e }}", "writes more than 10,000,000 characters", True),
        ("{{ ('a' * 9000000) | replace('a', 'b' * 9000000) }}", STOPPED, True),
        ("{{ ('a\n' * 99) | indent(3 * 10**8) }}", STOPPED, True),
        ("{{ range(9999) | list | tojson(indent=10**6) }}", STOPPED, True),
        (
            (
                "{% set n = namespace(x='a' * 999) %}{% for i in range(99) %}{% set n.x = n.x ~ n.x"
                " %}{% endfor %}"
            ),
            STOPPED,
            True,
        ),
        (
            (
                "{% macro f(n) %}{% for i in range(9) %}{{ f(n + 1) }}{% endfor %}{% endmacro %}{{"
                " f(0) }}"
            ),
            STOPPED,
            True,
        ),
        ("{{ messages[7].content }}", "fails", False),
        ("{{ 1 / 0 }}", "division by zero", False),
        ("{{ raise_exception('roles must alternate') }}", "fails: roles must alternate", False),
    ],
)
def test_a_hostile_or_broken_template_is_stopped(source: str, text: str, fatal: bool) -> None:
    template, started = Template(source, {}), time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RenderError, match=text) as caught:
        template.render([USER], generate=False)
    assert caught.value.fatal == fatal
    # of the processor's time it may take 4 s; the machine may be busy
    assert time.perf_counter() - started < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    if template._process.poll() is None:
        status = Path(f"/proc/{template._process.pid}/status").read_text()
        assert int(status.partition("VmHWM:")[2].split()[0]) < 600_000  # kB


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for a in [1] %}" * 40 + "{% endfor %}" * 40, "nested blocks"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "too much memory, time or recursion"),
        ("{{ " + "9" * 5000 + " }}", "digits"),
        ("{{ 1 }}" * 300_000, "too much memory, time or recursion"),
        pytest.param(
            "{{ '"
            + "a.b " * 200_000
            + "' | urlize | urlize | urlize | urlize | urlize | urlize }}",
            "too much",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_template_that_cannot_be_compiled_within_the_limits_is_refused(
    source: str, text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        Template(source, {}).render([USER], generate=False)


def test_a_reply_has_a_limit_of_time_and_of_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the limits inside do not stop, such as a machine that hands out no time, ends with the
    process.
    """
    slow = (
        "{% if messages[0].content == 'slow' %}{% for i in range(30000) %}{% for j in range(99)"
        " %}{% endfor %}{% endfor %}{% endif %}"
    )
    template = Template(slow + "{{ messages[0].content }}", {})
    assert template.render([{"content": "é" * 2_000_000}], generate=False) == "é" * 2_000_000
    with monkeypatch.context() as patch:
        patch.setattr(templates, "LARGEST", 1 << 20)
        with pytest.raises(RenderError, match=sandbox.TOO_MUCH):
            template.render([{"content": "a" * 2_000_000}], generate=False)
    with monkeypatch.context() as patch:
        patch.setattr(templates, "SECONDS", 0.0)
        with pytest.raises(RenderError, match=sandbox.TOO_MUCH):
            template.render([{"content": "slow"}], generate=False)
    assert template.render([{"content": "b"}], generate=False) == "b"


def test_a_chat_of_many_turns_is_written_to_each_of_its_cuts_though_their_texts_add_up_to_more_than_the_limit() -> (
    None
):
    template, turns = (
        Template("{% for m in messages %}{{ m.content }}{% endfor %}", {}),
        [{"content": "a" * 99_999}] * 60,
    )
    (texts,) = template.render_all([RenderRequest(turns, (), [(n, False) for n in range(61)])])
    assert [len(text) for text in texts] == [99_999 * n for n in range(61)]


def test_nothing_is_rendered_behind_a_template_that_hangs_and_the_next_one_is(
    tmp_path: Path,
) -> None:
    slow = (
        "{% if messages[0].slow %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor"
        " %}{% endfor %}{% endif %}x"
    )
    template = Template(slow, {})
    requests = [
        RenderRequest([{"slow": slow}], (), [(1, False)]) for slow in (False, True, False, True)
    ]
    first, second = template.render_all(requests)
    assert first == ["x"]
    assert isinstance(second, RenderError)
    assert second.fatal
    assert template.render([{"slow": False}], generate=False) == "x"


def test_a_renderer_that_has_died_is_started_again() -> None:
    template = Template("{{ '%2000000000d' % 1 if messages else 'x' }}", {})
    for _ in range(2):
        assert template.render([], generate=False) == "x"
        template._process.kill()
        template._process.wait()


def test_replies_that_are_not_waited_for_are_not_taken_for_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    template = Template("{{ messages[0].content }}", {})
    read, seen = Template._receive, list[str]()

    def interrupted(self: Template, seconds: float) -> Any:
        if seen:
            raise KeyboardInterrupt
        seen.append("a")
        return read(self, seconds)

    requests = [RenderRequest([{"content": text}], (), [(1, False)]) for text in "abc"]
    with monkeypatch.context() as patch:
        patch.setattr(Template, "_receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            template.render_all(requests)
    assert template.render([{"content": "d"}], generate=False) == "d"


def test_it_renders_in_any_thread() -> None:
    template, made = Template("x", {}), list[str]()
    thread = threading.Thread(target=lambda: made.append(template.render([], generate=False)))
    thread.start()
    thread.join()
    assert made == ["x"]


def test_a_process_ends_with_its_template() -> None:
    template = Template("x", {})
    process = template._process
    del template
    gc.collect()
    assert process.returncode is not None


def test_what_is_no_jinja_is_refused_with_its_line() -> None:
    with pytest.raises(ConfigError, match=r"chat template: line 2: unexpected '}'"):
        Template("{% for m in messages %}\n{{ m.content }", {})


def test_which_template_is_taken(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("mine")
    assert template_source("own", str(tmp_path / "mine.jinja"), "messages") == "mine"
    assert template_source("own", "chatml", "messages") == BUILT_IN["chatml"]
    assert template_source("own", None, "instruction") == "own"
    assert template_source(None, None, "instruction") == BUILT_IN["alpaca"]
    named = {"default": "own", "tool_use": "tools", "rag": "documents"}
    assert template_source(named, None, "instruction") == {"default": "own", "tool_use": "tools"}
    assert template_source(named, "rag", "messages") == "documents"
    assert template_source(named, "chatml", "messages") == BUILT_IN["chatml"]
    assert template_source({"chatml": "own", "default": "x"}, "chatml", "messages") == "own"
    with pytest.raises(
        ConfigError, match="has several templates but no default; set it to rag or tool_use"
    ):
        template_source({"rag": "a", "tool_use": "b"}, None, "instruction")
    with pytest.raises(
        ConfigError,
        match="'ragg' is not one of default, tool_use, rag, chatml, alpaca, and not a readable file",
    ):
        template_source(named, "ragg", "messages")
    with pytest.raises(
        ConfigError,
        match="the tokenizer has no template; set it to chatml or alpaca, or to a Jinja file",
    ):
        template_source(None, None, "messages")
    with pytest.raises(
        ConfigError,
        match=r"'chatmll' is not one of chatml, alpaca, and not a readable file .*No such file",
    ):
        template_source(None, "chatmll", "messages")


def test_a_time_limit_is_told_as_one_where_jinja_breaks_on_the_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def text(*args: Any) -> str:
        try:
            raise TimeoutError
        except TimeoutError:
            raise TypeError("'<=' not supported between instances of 'int' and 'NoneType'")  # noqa: B904 - as jinja does

    monkeypatch.setattr(sandbox, "_time_limit", nullcontext)
    monkeypatch.setattr(sandbox.Renderer, "_text", text)
    assert sandbox.Renderer({"default": "x"}, {}).reply([], [], [(0, True)]) == {
        "error": sandbox.TOO_LONG,
        "fatal": True,
    }


def test_a_foreign_template_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        template_source("own", None, "instruction")
        template_source({"default": "own"}, None, "instruction")
    assert not caplog.messages
    with caplog.at_level("INFO"):
        template_source(None, None, "instruction")
    assert caplog.messages == [
        "the tokenizer has no chat template: instructions use the built-in template 'alpaca'"
    ]

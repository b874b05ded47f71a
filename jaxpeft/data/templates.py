"""Chat templates, rendered in jinja's immutable sandbox, in limited time.

A template comes with a model's tokenizer, from whoever made it, and is a program: it may loop for ever, ask for Python's
internals or multiply strings. It gets no access to attributes that begin with an underscore, cannot change what it is
given, and is stopped after `SECONDS`.
"""

from __future__ import annotations

import datetime
import json
import signal
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls  # noqa: N812
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxpeft.errors import ConfigError

SECONDS = 2.0
LONGEST = 10_000_000
DAY = datetime.datetime(2024, 7, 26, tzinfo=datetime.UTC)
"""What a template that asks for the date is told: Llama's own default, since tokens must not depend on the day."""
BUILT_IN: Mapping[str, str] = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "alpaca": (
        "{{ bos_token }}"
        "{% for m in messages %}"
        "{% if m.role == 'assistant' %}{{ m.content + eos_token + '\\n\\n' }}"
        "{% elif m.role == 'system' %}{{ m.content + '\\n\\n' }}"
        "{% else %}"
        "{{ '### Instruction:\\n' + (m.instruction or m.content) + '\\n\\n' }}"
        "{% if m.input %}{{ '### Input:\\n' + m.input + '\\n\\n' }}{% endif %}"
        "{{ '### Response:\\n' }}"
        "{% endif %}{% endfor %}"
    ),
}
"""Templates for tokenizers that have none."""


class RenderError(Exception):
    """Why a template cannot be rendered for some messages: kept inside `jaxpeft.data`."""


class Template:
    """A compiled chat template.

    Args:
        source: jinja, with `messages`, `add_generation_prompt`, `tools` and the names of the special tokens.
        tokens: the tokenizer's special tokens by name, such as `bos_token`.

    Raises:
        ConfigError: it is no jinja.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        self.source, self._tokens = source, {"bos_token": "", "eos_token": "", **tokens}
        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise ConfigError(f"chat template: line {getattr(error, 'lineno', '?')}: {error}") from error

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, generate: bool, tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        """Writes messages out.

        Args:
            messages: the turns.
            generate: whether to end with what an answer of the assistant begins with.
            tools: for templates that list them.

        Raises:
            RenderError: the template refuses the messages, breaks, does what it may not, or takes too long.
            ConfigError: not in the main thread, where alone a template can be interrupted.
        """
        _require_main_thread()
        try:
            with _limited(SECONDS):
                parts: list[str] = []
                size = 0
                for part in self._template.generate(
                    messages=messages, add_generation_prompt=generate, tools=list(tools) or None, **self._tokens
                ):
                    parts.append(part)
                    size += len(part)
                    if size > LONGEST:
                        raise RenderError(f"the chat template writes more than {LONGEST:,} characters")
                return "".join(parts)
        except TimeoutError:
            raise RenderError(f"the chat template takes more than {SECONDS:.0f} s") from None
        except SecurityError as error:
            raise RenderError(f"the chat template does what a template may not: {error}") from None
        except (TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
            raise RenderError(f"the chat template fails: {error}") from None
        except (MemoryError, RecursionError) as error:
            raise RenderError(f"the chat template takes too much: {type(error).__name__}") from None


def _require_main_thread() -> None:
    if threading.current_thread() is not threading.main_thread():
        raise ConfigError("chat templates are rendered in the main thread, where the time they take can be limited")


@contextmanager
def _limited(seconds: float) -> Generator[None]:
    """Raises TimeoutError in the block after so many seconds."""
    before = signal.signal(signal.SIGALRM, _stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _stop(number: int, frame: object) -> None:
    raise TimeoutError


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox, without products that could fill the memory in one step."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Multiplies numbers and short sequences."""
        sizes = [len(side) * n for side, n in ((left, right), (right, left)) if hasattr(side, "__len__") and _whole(n)]
        if max(sizes, default=0) > LONGEST or (operator == "**" and _whole(right) and abs(right) > 1000):
            raise SecurityError(f"a product of more than {LONGEST:,} items")
        return super().call_binop(context, operator, left, right)


def _whole(value: Any) -> bool:
    return isinstance(value, int)


class _Generation(Extension):
    """Lets `{% generation %}` pass: the turns that are learned are found without it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
        """Gives the body as it is."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControls])
    environment.filters["tojson"] = _to_json
    functions: dict[str, Any] = {"raise_exception": _refuse, "strftime_now": DAY.strftime}
    environment.globals.update(functions)
    return environment


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def template_source(own: Any, given: str | None, kind: str) -> str:
    """Gives the template to write chats with.

    Args:
        own: the tokenizer's, if it has one.
        given: the name of a built-in template, or a file of jinja; taken before the tokenizer's.
        kind: the format of the rows; instructions take alpaca's template where there is no other.

    Raises:
        ConfigError: there is no template, or no such file.
    """
    if given is not None:
        if given in BUILT_IN:
            return BUILT_IN[given]
        try:
            return Path(given).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise ConfigError(
                f"data.chat_template: {given!r} is not one of {', '.join(BUILT_IN)}, and no file that can be read ({reason})"
            ) from None
    if isinstance(own, str):
        return own
    if kind == "instruction":
        return BUILT_IN["alpaca"]
    raise ConfigError(
        f"data.chat_template: the tokenizer has none; set it to {' or '.join(BUILT_IN)}, or to a file of jinja"
    )

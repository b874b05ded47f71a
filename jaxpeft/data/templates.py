"""Chat templates: which one is taken, and rendering with it in a process of its own (see `sandbox`)."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, cast

from jaxpeft.data import sandbox
from jaxpeft.errors import ConfigError

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
Cut = tuple[int, bool]
"""The first so many messages, and whether what an answer of the assistant begins with stands behind them."""


class RenderError(Exception):
    """Why a template cannot be rendered for some messages: kept inside `jaxpeft.data`.

    Args:
        reason: what to say.
        fatal: whether the template is at fault, whatever the messages: no further ones were rendered.
    """

    def __init__(self, reason: str, fatal: bool = False) -> None:
        super().__init__(reason)
        self.fatal = fatal


@dataclass(frozen=True)
class Request:
    """A chat to write out, as far as each of the cuts."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]]
    cuts: Sequence[Cut]


class Template:
    """A chat template, compiled and rendered in a process of its own.

    The process is started at once, and again after a chat that it has not survived.

    Args:
        source: jinja, with `messages`, `add_generation_prompt`, `tools` and the names of the special tokens.
        tokens: the tokenizer's special tokens by name, such as `bos_token`.

    Raises:
        ConfigError: it is no jinja.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        self.source = source
        self._begin = {"source": source, "tokens": dict(tokens)}
        self._lock = threading.Lock()
        self._process = self._start()

    def render_all(self, requests: Sequence[Request]) -> list[list[str] | RenderError]:
        """Gives for each chat its text at each cut, or why it cannot be rendered; a fatal error is the last.

        Raises:
            ConfigError: it is no jinja.
        """
        with self._lock:
            if self._process.poll() is not None:
                self._process = self._start()
            _send(self._process, [{"messages": r.messages, "tools": r.tools, "cuts": r.cuts} for r in requests])
            made: list[list[str] | RenderError] = []
            fatal = False
            try:
                while not fatal and len(made) < len(requests):
                    reply = _receive(self._process) or {"error": sandbox.TOO_MUCH, "fatal": True}
                    fatal = bool(reply.get("fatal"))
                    made.append(reply["texts"] if "texts" in reply else RenderError(reply["error"], fatal))
            finally:
                if not fatal and len(made) < len(requests):
                    _end(self._process)  # replies that nobody has read must not be taken for those of the next
            return made

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
        """
        (made,) = self.render_all([Request(messages, tools, [(len(messages), generate)])])
        if isinstance(made, RenderError):
            raise made
        return made[0]

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(  # noqa: S603 - this Python, and a file of jaxpeft
            [sys.executable, "-P", sandbox.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, encoding="utf-8", start_new_session=True,
        )  # fmt: skip
        weakref.finalize(self, _end, process)
        _send(process, self._begin)
        reply = _receive(process) or {"error": sandbox.TOO_MUCH}
        if reply["error"] is not None:
            _end(process)
            raise ConfigError(f"chat template: {reply['error']}; mend it, or name another as data.chat_template")
        return process


def _send(process: subprocess.Popen[str], values: Any) -> None:
    try:
        pipe = cast(IO[str], process.stdin)
        pipe.write(json.dumps(values, default=str) + "\n")
        pipe.flush()
    except BrokenPipeError:
        return  # it has ended: there will be no answer


def _receive(process: subprocess.Popen[str]) -> dict[str, Any] | None:
    line = cast(IO[str], process.stdout).readline()
    return json.loads(line) if line.endswith("\n") else None


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


@lru_cache(maxsize=4)
def compiled(source: str, tokens: tuple[tuple[str, str], ...]) -> Template:
    """Gives the template of a source and special tokens, as long as it is in use: each has a process.

    Raises:
        ConfigError: it is no jinja.
    """
    return Template(source, dict(tokens))


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

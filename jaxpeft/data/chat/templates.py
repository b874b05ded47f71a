"""Chat templates: choose one, and render with it in a separate process (see `sandbox`)."""

from __future__ import annotations

import json
import logging
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, cast

from jaxpeft.data.chat import sandbox
from jaxpeft.errors import ConfigError

SECONDS = 10.0
"""Timeout of a reply, in wall-clock time; the process itself has a lower limit of CPU time."""
SECONDS_TO_START = 60.0
LARGEST = 16 * sandbox.LONGEST
"""Maximum size of a reply in bytes."""
_log = logging.getLogger(__name__)
BUILT_IN: Mapping[str, str] = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n'"
        " }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
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
"""Templates for tokenizers without one."""
MEND = "fix the template, or name another as data.chat_template"
Cut = tuple[int, bool]
"""Number of leading messages to render, and whether to add the generation prompt."""


class RenderError(Exception):
    """A template cannot be rendered for some messages. Internal to `jaxpeft.data`.

    Args:
        reason: the error message.
        fatal: whether the template fails for any messages; rendering stops then.
        fix: how to fix it; by default, to fix or replace the template.
    """

    def __init__(self, reason: str, fatal: bool = False, fix: str | None = None) -> None:
        super().__init__(reason)
        self.fatal = fatal
        self.fix = fix or (MEND if fatal else f"correct the row, or {MEND}")


@dataclass(frozen=True)
class RenderRequest:
    """A chat to render up to each of the cuts."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]]
    cuts: Sequence[Cut]


class Template:
    """A chat template that is compiled and rendered in a separate process.

    The process starts immediately, and restarts after a chat that ended it.

    Args:
        source: Jinja source that uses `messages`, `add_generation_prompt`, `tools` and the names of
            the special tokens; or several sources by name: `tool_use` for chats with tools,
            `default` for all other chats.
        tokens: the tokenizer's special tokens by name, such as `bos_token`.

    Raises:
        ConfigError: the source is not valid Jinja.
    """

    def __init__(self, source: str | Mapping[str, str], tokens: Mapping[str, str]) -> None:
        sources = {"default": source} if isinstance(source, str) else dict(source)
        self._begin = {"sources": sources, "tokens": dict(tokens)}
        self._lock = threading.Lock()
        self._start()

    def render_all(
        self, requests: Sequence[RenderRequest]
    ) -> list[list[str | RenderError] | RenderError]:
        """Return the text or error of each cut of each chat; stop after a fatal error.

        Raises:
            ConfigError: the source is not valid Jinja.
        """
        with self._lock:
            if self._process.poll() is not None:
                self._start()
            _send(
                self._process,
                [{"messages": r.messages, "tools": r.tools, "cuts": r.cuts} for r in requests],
            )
            results: list[list[str | RenderError] | RenderError] = []
            fatal = False
            try:
                while not fatal and len(results) < len(requests):
                    reply = self._receive(SECONDS) or {"error": sandbox.TOO_MUCH, "fatal": True}
                    fatal = bool(reply.get("fatal"))
                    results.append(RenderError(reply["error"], fatal) if fatal else _texts(reply))
            finally:
                if not fatal and len(results) < len(requests):
                    _end(self._process)  # unread replies would be mistaken for the next call's
            return results

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        generate: bool,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """Render messages.

        Args:
            messages: the turns.
            generate: whether to add the generation prompt.
            tools: tools, for templates that list them.

        Raises:
            RenderError: the template rejects the messages, fails, does something forbidden, or
                takes too long.
        """
        (result,) = self.render_all([RenderRequest(messages, tools, [(len(messages), generate)])])
        text = result if isinstance(result, RenderError) else result[0]
        if isinstance(text, RenderError):
            raise text
        return text

    def _start(self) -> None:
        process = subprocess.Popen(  # noqa: S603 - this Python, and a file of jaxpeft
            [sys.executable, "-P", sandbox.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
        )
        weakref.finalize(self, _end, process)
        self._process, self._received = process, b""
        _send(process, self._begin)
        reply = self._receive(SECONDS_TO_START) or {"error": sandbox.TOO_MUCH}
        if reply["error"] is not None:
            _end(process)
            raise ConfigError(
                f"chat template: {reply['error']}; fix it, or name another as data.chat_template"
            )

    def _receive(self, seconds: float) -> dict[str, Any] | None:
        """Return the next reply.

        Returns None if the process has ended, or was ended here because the reply was too slow or
        too large.
        """
        pipe, until = cast(IO[bytes], self._process.stdout), time.monotonic() + seconds
        parts = [self._received]
        while b"\n" not in parts[-1]:
            with selectors.DefaultSelector() as selector:
                selector.register(pipe, selectors.EVENT_READ)
                ready = selector.select(max(0.0, until - time.monotonic()))
            part = pipe.read(1 << 20) if ready else b""
            if not part or sum(map(len, parts)) > LARGEST:
                _end(self._process)
                return None
            parts.append(part)
        line, _, self._received = b"".join(parts).partition(b"\n")
        return json.loads(line)


def _send(process: subprocess.Popen[bytes], values: Any) -> None:
    left = memoryview(json.dumps(values, default=str).encode() + b"\n")
    try:
        while left:
            left = left[cast(IO[bytes], process.stdin).write(left) :]
    except BrokenPipeError:
        return  # the process has ended: `_receive` returns None


def _texts(reply: Mapping[str, Any]) -> list[str | RenderError]:
    texts: list[str | RenderError] = []
    last = ""
    for shared, rest, error in reply["texts"]:
        last = last[:shared] + rest
        texts.append(last if error is None else RenderError(error))
    return texts


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


@lru_cache(maxsize=4)
def get_template(
    sources: tuple[tuple[str, str], ...], tokens: tuple[tuple[str, str], ...]
) -> Template:
    """Return a cached template with these sources and special tokens, since each has a process.

    Raises:
        ConfigError: the source is not valid Jinja.
    """
    return Template(dict(sources), dict(tokens))


def template_source(own: Any, choice: str | None, kind: str) -> str | Mapping[str, str]:
    """Return the chat template to use, in the form of a tokenizer's `chat_template`.

    Args:
        own: the tokenizer's template, a mapping of named templates, or None.
        choice: the name of a template of the tokenizer or of a built-in one, or the path of a Jinja
            file; None for the tokenizer's default.
        kind: the format of the rows; instructions fall back to the built-in `alpaca`.

    Raises:
        ConfigError: no template is available, or the file cannot be read.
    """
    named: Mapping[str, str] = own if isinstance(own, Mapping) else {}
    if choice is not None:
        known = {**BUILT_IN, **named}
        return known[choice] if choice in known else _read_file(choice, [*named, *BUILT_IN])
    if isinstance(own, str):
        return own
    if "default" in named:
        return {name: source for name, source in named.items() if name in ("default", "tool_use")}
    if named:
        raise ConfigError(
            "data.chat_template: the tokenizer has several templates but no default; set it to"
            f" {_join_names(named)}"
        )
    if kind == "instruction":
        _log.info(
            "the tokenizer has no chat template: instructions use the built-in template 'alpaca'"
        )
        return BUILT_IN["alpaca"]
    raise ConfigError(
        f"data.chat_template: the tokenizer has no template; set it to {_join_names(BUILT_IN)}, or"
        " to a Jinja file"
    )


def _join_names(names: Iterable[str]) -> str:
    return " or ".join(names)


def _read_file(path: str, names: Sequence[str]) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ConfigError(
            f"data.chat_template: {path!r} is not one of {', '.join(names)}, and not a readable"
            f" file ({reason})"
        ) from None

"""Chat templates: which one is taken, and rendering with it in a process of its own (see
`sandbox`).
"""

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
"""How long a reply may take; its process allows itself less of the processor's time."""
SECONDS_TO_START = 60.0
LARGEST = 16 * sandbox.LONGEST
"""Bytes of a reply."""
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
"""Templates for tokenizers that have none."""
MEND = "fix the template, or name another as data.chat_template"
Cut = tuple[int, bool]
"""The first so many messages, and whether what an answer of the assistant begins with stands behind
them.
"""


class RenderError(Exception):
    """Why a template cannot be rendered for some messages: kept inside `jaxpeft.data`.

    Args:
        reason: what to say.
        fatal: whether the template is at fault, whatever the messages: no further ones were
            rendered.
        fix: what to do about it; None for what is said of templates that fail.
    """

    def __init__(self, reason: str, fatal: bool = False, fix: str | None = None) -> None:
        super().__init__(reason)
        self.fatal = fatal
        self.fix = fix or (MEND if fatal else f"correct the row, or {MEND}")


@dataclass(frozen=True)
class RenderRequest:
    """A chat to write out, as far as each of the cuts."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]]
    cuts: Sequence[Cut]


class Template:
    """A chat template, compiled and rendered in a process of its own.

    The process is started at once, and again after a chat that it has not survived.

    Args:
        source: jinja, with `messages`, `add_generation_prompt`, `tools` and the names of the
            special tokens; or several, by name: `tool_use` is for chats with tools, `default` for
            the others.
        tokens: the tokenizer's special tokens by name, such as `bos_token`.

    Raises:
        ConfigError: it is no jinja.
    """

    def __init__(self, source: str | Mapping[str, str], tokens: Mapping[str, str]) -> None:
        sources = {"default": source} if isinstance(source, str) else dict(source)
        self._begin = {"sources": sources, "tokens": dict(tokens)}
        self._lock = threading.Lock()
        self._start()

    def render_all(
        self, requests: Sequence[RenderRequest]
    ) -> list[list[str | RenderError] | RenderError]:
        """Return for each chat what is written at each cut, or why that cannot be; a fatal error is
        the last.

        Raises:
            ConfigError: it is no jinja.
        """
        with self._lock:
            if self._process.poll() is not None:
                self._start()
            _send(
                self._process,
                [{"messages": r.messages, "tools": r.tools, "cuts": r.cuts} for r in requests],
            )
            made: list[list[str | RenderError] | RenderError] = []
            fatal = False
            try:
                while not fatal and len(made) < len(requests):
                    reply = self._receive(SECONDS) or {"error": sandbox.TOO_MUCH, "fatal": True}
                    fatal = bool(reply.get("fatal"))
                    made.append(RenderError(reply["error"], fatal) if fatal else _texts(reply))
            finally:
                if not fatal and len(made) < len(requests):
                    _end(
                        self._process
                    )  # replies that nobody has read must not be taken for those of the next
            return made

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        generate: bool,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """Write messages out.

        Args:
            messages: the turns.
            generate: whether to end with what an answer of the assistant begins with.
            tools: for templates that list them.

        Raises:
            RenderError: the template refuses the messages, breaks, does what it may not, or takes
                too long.
        """
        (made,) = self.render_all([RenderRequest(messages, tools, [(len(messages), generate)])])
        text = made if isinstance(made, RenderError) else made[0]
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
        """Return the next reply; None where the process has ended, or must: it takes too long, or
        says too much.
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
        return  # it has ended: there will be no answer


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
    """Return the template of sources and special tokens, as long as it is in use: each has a
    process.

    Raises:
        ConfigError: it is no jinja.
    """
    return Template(dict(sources), dict(tokens))


def template_source(own: Any, given: str | None, kind: str) -> str | Mapping[str, str]:
    """Return the template to write chats with, as a tokenizer's `chat_template` holds it: one, or
    several by name.

    Args:
        own: the tokenizer's: a template, several by name, or None.
        given: the name of one of the tokenizer's templates or of a built-in one, or a file of
            jinja; taken before the tokenizer's.
        kind: the format of the rows; instructions take alpaca's template where there is no other.

    Raises:
        ConfigError: there is no template, or no such file.
    """
    named: Mapping[str, str] = own if isinstance(own, Mapping) else {}
    if given is not None:
        known = {**BUILT_IN, **named}
        return known[given] if given in known else _read_file(given, [*named, *BUILT_IN])
    if isinstance(own, str):
        return own
    if "default" in named:
        return {name: source for name, source in named.items() if name in ("default", "tool_use")}
    if named:
        raise ConfigError(
            "data.chat_template: the tokenizer has several, none of them the default; set it to"
            f" {_join_names(named)}"
        )
    if kind == "instruction":
        _log.info(
            "the tokenizer has no chat template: instructions are written with the built-in"
            " 'alpaca'"
        )
        return BUILT_IN["alpaca"]
    raise ConfigError(
        f"data.chat_template: the tokenizer has none; set it to {_join_names(BUILT_IN)}, or to a"
        " file of jinja"
    )


def _join_names(names: Iterable[str]) -> str:
    return " or ".join(names)


def _read_file(given: str, names: Sequence[str]) -> str:
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ConfigError(
            f"data.chat_template: {given!r} is not one of {', '.join(names)}, and no file that can"
            f" be read ({reason})"
        ) from None

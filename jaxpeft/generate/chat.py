"""Chat in the terminal: `--chat`."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxpeft.data.chat.dialogs import Dialog
from jaxpeft.errors import DataError, printable
from jaxpeft.generate.session import Session

Message = Mapping[str, Any]
HELP = """\
/reset         forget the conversation
/system TEXT   set the system text, and forget the conversation; without TEXT, remove it
/base          answer the last question with the base as well, side by side
/base on       answer every question with both; /base off ends it
/history       show the conversation
/help          show these commands
/quit          end; so does Ctrl-D
"""


@dataclass(frozen=True)
class Conversation:
    """A conversation.

    Attributes:
        turns: its turns without the system text.
        system: the system text, or None.
        both: whether every question is answered by the base as well.
    """

    turns: tuple[Message, ...] = ()
    system: str | None = None
    both: bool = False

    @property
    def messages(self) -> tuple[Message, ...]:
        """The turns with the system text."""
        own = () if self.system is None else ({"role": "system", "content": self.system},)
        return (*own, *self.turns)

    def add(self, role: str, text: str) -> Conversation:
        """Return the conversation with another turn."""
        return dataclasses.replace(self, turns=(*self.turns, {"role": role, "content": text}))


def opening(system: str | None) -> Dialog:
    """Return a first question, with which a chat template is tried."""
    return Dialog(Conversation(system=system).add("user", "?").messages)


def talk(
    session: Session, read: Callable[[str], str] = input, console: Console | None = None
) -> None:
    """Chat until the end of the input.

    Args:
        session: the model.
        read: reads a line, given what to show before it.
        console: where to write; by default the terminal.

    Raises:
        ConfigError: The tokenizer has no chat template.
    """
    with suppress(ImportError):  # arrows and history in `input`
        importlib.import_module("readline")
    out = console or Console(file=sys.stdout, highlight=False)
    talked = Conversation(system=session.args.system)
    # an unusable template is an error before the first question
    session.encode(opening(session.args.system))
    shown = read is not input or sys.stdin.isatty()
    out.print("/help lists the commands, /quit ends", style="dim")
    while True:
        try:
            # without halves of surrogate pairs, which stand for undecodable bytes
            line = read("> " if shown else "").encode(errors="replace").decode().strip()
        except (EOFError, KeyboardInterrupt):
            out.print()
            return
        if not shown:
            out.print(_shown(f"> {line}"))
        if line in ("/quit", "/exit"):
            return
        try:
            talked = _respond(session, talked, line, out) if line else talked
        except KeyboardInterrupt:
            out.print("(stopped)", style="dim")
        except DataError as error:
            out.print(_shown(str(error), "red"))


def _respond(session: Session, talked: Conversation, line: str, out: Console) -> Conversation:
    """Obey a command, or answer a question; return the conversation after it."""
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    if not command.startswith("/"):
        return _answer(session, talked.add("user", line), out)
    if command == "/reset":
        out.print("(the conversation is forgotten)", style="dim")
        return dataclasses.replace(talked, turns=())
    if command == "/system":
        out.print(
            "(a new conversation, with this system text)" if rest else "(no system text)",
            style="dim",
        )
        return dataclasses.replace(talked, turns=(), system=rest or None)
    if command == "/base":
        return _base(session, talked, rest, out)
    if command == "/history":
        for message in talked.messages:
            out.print(_shown(f"{message['role']}: {message['content']}"))
    elif command == "/help":
        out.print(HELP, end="")
    else:
        out.print(_shown(f"{command}: no such command; /help lists them", "red"))
    return talked


def _answer(session: Session, asked: Conversation, out: Console) -> Conversation:
    """Answer the last turn of a conversation."""
    prompt = Dialog(asked.messages)
    if asked.both:
        base, tuned = session.answer(prompt, params=session.loaded.base), session.answer(prompt)
        _show_both(base.text, tuned.text, out)
    else:
        tuned = session.answer(prompt, lambda text: out.print(_shown(text), end=""))
        out.print()
    if tuned.cut:
        out.print(f"(cut at {session.args.max_new_tokens} tokens: --max-new-tokens)", style="dim")
    return asked.add("assistant", tuned.text)


def _base(session: Session, talked: Conversation, rest: str, out: Console) -> Conversation:
    """Obey `/base`."""
    if session.loaded.adapter is None:
        out.print("/base: the model has no adapter, so it is the base", style="red")
        return talked
    if rest in ("on", "off"):
        return dataclasses.replace(talked, both=rest == "on")
    if rest:
        out.print("/base: takes on, off or nothing; ask the question first", style="red")
    elif not talked.turns:
        out.print("/base: ask a question first", style="red")
    else:
        *before, answer = talked.turns
        asked = dataclasses.replace(talked, turns=tuple(before))
        base = session.answer(Dialog(asked.messages), params=session.loaded.base)
        _show_both(base.text, str(answer["content"]), out)
    return talked


def _show_both(base: str, tuned: str, out: Console) -> None:
    """Show two answers side by side."""
    table = Table(expand=True, box=None, padding=(0, 2, 0, 0))
    table.add_column("base", ratio=1)
    table.add_column("tuned", ratio=1)
    table.add_row(_shown(base), _shown(tuned))
    out.print(table)


def _shown(text: str, style: str = "") -> Text:
    """Return text as it is shown: without control characters that would act on the terminal."""
    return Text(printable(text), style)

"""Rows of which a part is to be learned: chats, instructions, prompts with completions, and preference pairs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxpeft.data.columns import Columns
from jaxpeft.data.problems import Record, RowError
from jaxpeft.errors import nearest

Message = Mapping[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant",
    "assistant": "assistant", "system": "system", "tool": "tool", "function": "tool", "observation": "tool",
    "function_response": "tool",
}  # fmt: skip
"""ShareGPT's names of the roles, and ours."""


@dataclass(frozen=True)
class Dialog:
    """A chat, written out by a template; the assistant's turns are learned.

    Attributes:
        messages: one mapping a turn, with `role` and `content` and whatever else the template reads.
        tools: the tools that the chat may use, as the template wants them.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Completion:
    """A text that is written out as it is; the completion is learned.

    Attributes:
        prompt: the first part.
        completion: the second part, joined to the first without anything between.
    """

    prompt: str
    completion: str


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt.

    Attributes:
        chosen: the better one, with its prompt.
        rejected: the worse one, with its prompt.
    """

    chosen: Dialog | Completion
    rejected: Dialog | Completion


def last_answer(dialog: Dialog | Completion) -> str:
    """Gives what the assistant says last."""
    if isinstance(dialog, Completion):
        return dialog.completion
    return next(str(message["content"]) for message in reversed(dialog.messages) if message["role"] == "assistant")


def read_text(value: Any) -> str:
    """Reads a text.

    Raises:
        RowError: it is no string, is empty, or cannot be written as UTF-8.
    """
    if not isinstance(value, str):
        raise RowError(f"holds a {type(value).__name__}, not a string", "write the text as a string")
    if not value.strip():
        raise RowError("is empty", "fill it or leave the row out")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError("holds half of a surrogate pair", "write the whole character") from None
    return value


def read_completion(record: Record, columns: Columns) -> Dialog | Completion:
    """Reads a prompt and its completion: two texts, or two lists of messages.

    Raises:
        RowError: a field is missing or wrong.
    """
    prompt, completion = field(record, columns.prompt), field(record, columns.completion)
    return _joined(prompt, completion, columns.prompt, columns.completion)


def read_instruction(record: Record, columns: Columns) -> Dialog:
    """Reads an instruction, its input if there is one, and the output, as alpaca's rows are, as a chat of two turns.

    The user's turn keeps `instruction` and `input` as well, for templates that part them.

    Raises:
        RowError: a field is missing or wrong.
    """
    instruction = named(read_text, record, columns.instruction)
    given = record.get(columns.input) if columns.input else None
    extra = named(read_text, record, columns.input) if given is not None and given != "" else ""
    asked = f"{instruction}\n\n{extra}" if extra else instruction
    user = {"role": "user", "content": asked, "instruction": instruction, "input": extra}
    return Dialog((user, {"role": "assistant", "content": named(read_text, record, columns.output)}))


def read_dialog(record: Record, columns: Columns) -> Dialog:
    """Reads a list of messages, with `role` and `content`, or ShareGPT's `from` and `value`.

    Raises:
        RowError: a field is missing or wrong.
    """
    messages = named(read_messages, record, columns.messages)
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError(f"{columns.messages!r} has no turn of the assistant", "add one or leave the row out")
    tools = record.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise RowError(
            f"'tools' holds a {type(tools).__name__}, not a list of objects", "write it as a list of objects"
        )
    return Dialog(messages, tuple(tools or ()))


def read_preference(record: Record, columns: Columns) -> Preference:
    """Reads a better and a worse answer: texts or messages, with the prompt in a column of its own or in both.

    Raises:
        RowError: a field is missing or wrong, or both answers are the same.
    """
    prompt = field(record, columns.prompt) if columns.prompt else None
    answers = [field(record, column) for column in (columns.chosen, columns.rejected)]
    if answers[0] == answers[1]:
        raise RowError(f"{columns.chosen!r} and {columns.rejected!r} are the same", "leave the row out")
    pair = zip(answers, (columns.chosen, columns.rejected), strict=True)
    if prompt is not None:
        return Preference(*(_joined(prompt, answer, columns.prompt, column) for answer, column in pair))
    return Preference(*(_whole(answer, column) for answer, column in pair))


def _whole(value: Any, column: str | None) -> Dialog | Completion:
    if isinstance(value, str):
        return Completion("", read_text(value))
    return Dialog(_within(read_messages, value, column))


def _joined(prompt: Any, answer: Any, prompt_column: str | None, answer_column: str | None) -> Dialog | Completion:
    if isinstance(prompt, str) and isinstance(answer, str):
        return Completion(_within(read_text, prompt, prompt_column), _within(read_text, answer, answer_column))
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    before = _within(read_messages, prompt, prompt_column)
    after = _within(read_messages, answer, answer_column)
    if any(message["role"] != "assistant" for message in after[:1]):
        raise RowError(f"{answer_column!r} begins with a turn of {after[0]['role']}", "begin it with the assistant's")
    return Dialog((*before, *after))


def read_messages(value: Any) -> tuple[Message, ...]:
    """Reads a list of messages.

    Raises:
        RowError: it is no list, or a message is wrong; the message names the turn.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise RowError("holds no list of messages", 'write it as [{"role": "user", "content": "..."}, ...]')
    messages = tuple(_message(turn, i) for i, turn in enumerate(value, 1))
    systems = [i for i, message in enumerate(messages, 1) if message["role"] == "system"]
    if len(systems) > 1:
        raise RowError(f"has {len(systems)} system turns ({', '.join(map(str, systems))})", "keep one, the first turn")
    if systems and systems[0] != 1:
        raise RowError(f"has its system turn at place {systems[0]}", "make it the first turn")
    return messages


def _message(turn: Any, number: int) -> Message:
    if not isinstance(turn, Mapping):
        raise RowError(f"holds a {type(turn).__name__} as turn {number}, not an object", "give it a role and a content")
    role = _role(turn, number)
    content = turn.get("content", turn.get("value"))
    calls = turn.get("tool_calls")
    if isinstance(content, list) and all(isinstance(part, Mapping) and "text" in part for part in content):
        content = "".join(str(part["text"]) for part in content)
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        kind = "nothing" if content is None else f"a {type(content).__name__}"
        raise RowError(f"holds {kind} as the content of turn {number}", "write it as a string")
    if not content.strip() and not calls and role in ("assistant", "user"):
        raise RowError(f"has an empty turn {number} ({role})", "fill it or leave the row out")
    rest = {key: value for key, value in turn.items() if key not in ("from", "value") and value is not None}
    message = {**rest, "role": role, "content": content}
    try:
        json.dumps(message, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise RowError(f"holds half of a surrogate pair in turn {number}", "write the whole character") from None
    return message


def _role(turn: Mapping[str, Any], number: int) -> str:
    if "role" in turn:
        role, known = turn["role"], ROLES
    elif "from" in turn:
        role, known = SHAREGPT.get(str(turn["from"]).lower(), turn["from"]), tuple(SHAREGPT)
    else:
        raise RowError(f"has no role in turn {number}", 'give it a "role" (or "from")')
    if role not in ROLES:
        raise RowError(
            f"has the unknown role {role!r} in turn {number}",
            nearest(str(role), known).removeprefix("; ") or f"use one of {', '.join(known)}",
        )
    return str(role)


def field(record: Record, column: str | None) -> Any:
    """Gives the value of a column.

    Raises:
        RowError: the row does not have it.
    """
    value = record.get(column or "")
    if value is None:
        raise RowError(f"field {column!r} is missing", "add it or leave the row out")
    return value


def named(read: Any, record: Record, column: str | None) -> Any:
    """Reads a column; what is wrong with it is said with the column's name."""
    return _within(read, field(record, column), column)


def _within(read: Any, value: Any, column: str | None) -> Any:
    try:
        return read(value)
    except RowError as error:
        raise RowError(f"field {column!r} {error.fault}", error.fix, error.column) from None

"""Messages of chats: read as rows have them, and checked turn by turn; what a template may read of
one stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpeft.data.problems import RowError
from jaxpeft.errors import nearest

Message = Mapping[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool", "ipython", "function")
SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""ShareGPT's names of the roles, and ours."""
CALLERS = ("function_call", "tool_call")
"""Whom ShareGPT's rows call the assistant where it calls a tool; the value is the call, as JSON."""
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""What rows and templates call the thought before an answer, the usual name first."""
LEARNED = ("train", "loss", "trainable", "train_on_turn")
"""What says, true or false, whether a turn is learned; `weight` says it by 1 or 0."""
_NOT_READ = ("masked", "mask", "train_detail", "train_details", "loss_weight", "loss_scale")
_CALL = '{"name": ..., "arguments": {...}}'
_TEXT_PARTS = ("text", "input_text", "output_text", None)


def read_text(value: Any) -> str:
    """Read a text.

    Raises:
        RowError: it is no string, is empty, or cannot be written as UTF-8.
    """
    if not isinstance(value, str):
        raise RowError(
            f"holds a {type(value).__name__}, not a string", "write the text as a string"
        )
    if not value.strip():
        raise RowError("is empty", "fill it or leave the row out")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError("holds half of a surrogate pair", "write the whole character") from None
    return value


def unfold(value: Any) -> Any:
    """Return what a text of JSON holds, such as a list in a field of a CSV file; other values as
    they are.

    Raises:
        RowError: the text is no JSON.
    """
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(f"is a text, not JSON ({error})", "write it as JSON") from None


def read_messages(value: Any) -> tuple[Message, ...]:
    """Read a list of messages.

    Raises:
        RowError: it is no list, or a message is wrong; the message names the turn.
    """
    value = unfold(value)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise RowError(
            "holds no list of messages", 'write it as [{"role": "user", "content": "..."}, ...]'
        )
    messages = tuple(_message(turn, i) for i, turn in enumerate(value, 1))
    systems = [i for i, message in enumerate(messages, 1) if message["role"] == "system"]
    if len(systems) > 1:
        raise RowError(
            f"has {len(systems)} system turns ({', '.join(map(str, systems))})",
            "keep one, the first turn",
        )
    if systems and systems[0] != 1:
        raise RowError(f"has its system turn at place {systems[0]}", "make it the first turn")
    return messages


def _message(turn: Any, number: int) -> Message:
    if not isinstance(turn, Mapping):
        raise RowError(
            f"holds a {type(turn).__name__} as turn {number}, not an object",
            "give it a role and a content",
        )
    turn = _with_calls(turn, number)
    role = _role(turn, number)
    content, calls = _content(turn, number), turn.get("tool_calls")
    if not isinstance(content, str) and not (content is None and calls):
        kind = "nothing" if content is None else f"a {type(content).__name__}"
        raise RowError(f"holds {kind} as the content of turn {number}", "write it as a string")
    if content is not None and not content.strip() and not calls and role in ("assistant", "user"):
        raise RowError(f"has an empty turn {number} ({role})", "fill it or leave the row out")
    is_learned(turn, role, number)
    _check_calls(calls, number)
    rest = {
        key: value
        for key, value in turn.items()
        if key not in ("from", "value") and value is not None
    }
    thought = next((rest[key] for key in THOUGHTS if key in rest), None)
    if thought is not None:  # under each name that templates know, as transformers gives it to them
        rest = {"thinking": thought, **rest, "reasoning_content": thought}
    message = {
        **rest,
        "role": role,
        **({"content": content} if "content" in turn or content is not None else {}),
    }
    try:
        json.dumps(message, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise RowError(
            f"holds half of a surrogate pair in turn {number}", "write the whole character"
        ) from None
    return message


def _with_calls(turn: Mapping[str, Any], number: int) -> Mapping[str, Any]:
    """Return a turn with its calls of tools as `tool_calls`, where it is written as ShareGPT's rows
    or OpenAI's older ones.
    """
    if turn.get("from") in CALLERS and "role" not in turn:
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": _calls_of(turn.get("value"), number),
        }
    if turn.get("function_call") is None:
        return turn
    if turn.get("tool_calls"):
        raise RowError(f"has function_call and tool_calls in turn {number}", "keep one of them")
    rest = {key: value for key, value in turn.items() if key != "function_call"}
    return {**rest, "tool_calls": _calls_of(turn["function_call"], number)}


def _content(turn: Mapping[str, Any], number: int) -> Any:
    """Return the content of a turn; that of several texts is joined.

    Raises:
        RowError: it stands there twice, or holds what is no text.
    """
    content = turn.get("content", turn.get("value"))
    if turn.get("value", content) != content:
        raise RowError(f"has a content and another value in turn {number}", "keep one of them")
    if not isinstance(content, list):
        return content
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            raise RowError(
                f"holds a part of type {str(kind)[:80]!r} in turn {number}",
                'only parts such as {"type": "text", "text": "..."} are learned; leave the row out',
            )
    return "".join(part["text"] for part in content)


def is_learned(turn: Mapping[str, Any], role: str, number: int = 0) -> bool:
    """Return whether a turn of the assistant is learned: not if its `weight` is 0, or one of
    `LEARNED` false.

    Raises:
        RowError: what says so is something else, or says two things.
    """
    if unread := [key for key in _NOT_READ if turn.get(key) is not None]:
        raise RowError(
            f"has {unread[0]!r} in turn {number}, which is not read",
            "write 'train' as true or false in its place",
        )
    said = {key: turn[key] for key in ("weight", *LEARNED) if turn.get(key) is not None}
    for key, value in said.items():
        allowed = (
            isinstance(value, bool)
            if key != "weight"
            else not isinstance(value, bool) and value in (0, 1)
        )
        if not allowed:
            known = "true or false" if key != "weight" else "0 or 1"
            raise RowError(
                f"has {key}={str(value)[:80]!r} in turn {number}", f"write {known}, or leave it out"
            )
        if value and role != "assistant":
            raise RowError(
                f"asks to learn turn {number} ({role}) by its {key}",
                "only the assistant's turns are learned",
            )
    if len({bool(value) for value in said.values()}) > 1:
        raise RowError(
            f"has {' and '.join(said)} in turn {number}, which say different things",
            "keep one of them",
        )
    return all(said.values())


def _check_calls(calls: Any, number: int) -> None:
    """Check calls of tools: the arguments of each are an object, or one as JSON."""
    if calls is None:
        return
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise RowError(
            f"holds no list of objects as tool_calls of turn {number}", "write one object a call"
        )
    for call in calls:
        inner = call.get("function") or call
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise RowError(f"holds a call without a name in turn {number}", f"write it as {_CALL}")
        given = inner.get("arguments")
        try:
            arguments = json.loads(given or "{}") if isinstance(given, str) else given
        except (ValueError, RecursionError):
            arguments = given
        if arguments is not None and not isinstance(arguments, Mapping):
            raise RowError(
                f"holds {str(given)[:80]!r} as the arguments of a call in turn {number}",
                "write an object, or one as JSON",
            )


def _calls_of(value: Any, number: int) -> list[Mapping[str, Any]]:
    """Read the calls of one of ShareGPT's turns: an object with `name` and `arguments`, or a list
    of them.
    """
    try:
        read = unfold(value)
    except RowError:
        read = None
    calls: list[Any] = read if isinstance(read, list) else [read]
    if not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
        raise RowError(f"holds no call of a tool in turn {number}", f"write it as {_CALL}")
    return [{"type": "function", "function": dict(call)} for call in calls]


def _role(turn: Mapping[str, Any], number: int) -> str:
    if "role" in turn:
        role, known = turn["role"], ROLES
    elif "from" in turn:
        role, known = SHAREGPT.get(str(turn["from"]).lower(), turn["from"]), (*SHAREGPT, *CALLERS)
    else:
        raise RowError(f"has no role in turn {number}", 'give it a "role" (or "from")')
    if role not in ROLES:
        raise RowError(
            f"has the unknown role {role!r} in turn {number}",
            nearest(str(role), known).removeprefix("; ") or f"use one of {', '.join(known)}",
        )
    return str(role)

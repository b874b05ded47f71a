"""Messages of chats: read as rows have them, and checked turn by turn; what a template may read of one stays as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpeft.data.problems import RowError
from jaxpeft.errors import nearest

Message = Mapping[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool", "ipython", "function")
SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant",
    "assistant": "assistant", "system": "system", "tool": "tool", "function": "tool", "observation": "tool",
    "function_response": "tool",
}  # fmt: skip
"""ShareGPT's names of the roles, and ours."""
CALLERS = ("function_call", "tool_call")
"""Whom ShareGPT's rows call the assistant where it calls a tool; the value is the call, as JSON."""


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


def unfold(value: Any) -> Any:
    """Return what a text of JSON holds, such as a list in a field of a CSV file; other values as they are.

    Raises:
        RowError: the text is no JSON.
    """
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(f"is a text, and no JSON ({error})", "write it as JSON") from None


def read_messages(value: Any) -> tuple[Message, ...]:
    """Reads a list of messages.

    Raises:
        RowError: it is no list, or a message is wrong; the message names the turn.
    """
    value = unfold(value)
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
    if turn.get("from") in CALLERS and "role" not in turn:
        turn = {"role": "assistant", "content": "", "tool_calls": _calls_of(turn.get("value"), number)}
    role = _role(turn, number)
    content = turn.get("content", turn.get("value"))
    calls = turn.get("tool_calls")
    if isinstance(content, list) and all(isinstance(part, Mapping) and "text" in part for part in content):
        content = "".join(str(part["text"]) for part in content)
    if not isinstance(content, str) and not (content is None and calls):
        kind = "nothing" if content is None else f"a {type(content).__name__}"
        raise RowError(f"holds {kind} as the content of turn {number}", "write it as a string")
    if content is not None and not content.strip() and not calls and role in ("assistant", "user"):
        raise RowError(f"has an empty turn {number} ({role})", "fill it or leave the row out")
    _check_weight(turn, role, number)
    _check_calls(calls, number)
    rest = {key: value for key, value in turn.items() if key not in ("from", "value") and value is not None}
    message = {**rest, "role": role, **({"content": content} if "content" in turn or content is not None else {})}
    try:
        json.dumps(message, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise RowError(f"holds half of a surrogate pair in turn {number}", "write the whole character") from None
    return message


def _check_weight(turn: Mapping[str, Any], role: str, number: int) -> None:
    """Check `weight`, which is 0 or 1, and `train`, which is true or false: whether the turn is learned."""
    said = {key: turn[key] for key in ("weight", "train") if turn.get(key) is not None}
    for key, value in said.items():
        allowed = isinstance(value, bool) if key == "train" else not isinstance(value, bool) and value in (0, 1)
        if not allowed:
            known = "true or false" if key == "train" else "0 or 1"
            raise RowError(f"has {key}={str(value)[:80]!r} in turn {number}", f"write {known}, or leave it out")
        if value and role != "assistant":
            raise RowError(
                f"asks to learn turn {number} ({role}) by its {key}", "only the assistant's turns are learned"
            )
    if len({bool(value) for value in said.values()}) > 1:
        raise RowError(f"has weight and train in turn {number}, which say different things", "keep one of them")


def _check_calls(calls: Any, number: int) -> None:
    """Check calls of tools: the arguments of each are an object, or one as JSON."""
    if calls is None:
        return
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise RowError(f"holds no list of objects as tool_calls of turn {number}", "write one object a call")
    for call in calls:
        given = (call.get("function") or call).get("arguments")
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
    """Read the calls of one of ShareGPT's turns: an object with `name` and `arguments`, or a list of them."""
    try:
        read = unfold(value)
    except RowError:
        read = None
    calls: list[Any] = read if isinstance(read, list) else [read]
    if not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
        raise RowError(f"holds no call of a tool in turn {number}", 'write it as {"name": ..., "arguments": {...}}')
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

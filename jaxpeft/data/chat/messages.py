"""Chat messages: parse them from rows and validate each turn.

Every key that a chat template may read is kept unchanged.
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
"""Role names of ShareGPT, mapped to ours."""
CALLERS = ("function_call", "tool_call")
"""ShareGPT's roles for an assistant turn that calls a tool; its value is the call, as JSON."""
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Keys for the reasoning before an answer in rows and templates, the most common one first."""
LOSS_FLAGS = ("train", "loss", "trainable", "train_on_turn")
"""Boolean keys that include a turn in the loss or exclude it; `weight` does so with 1 or 0."""
_UNSUPPORTED_FLAGS = (
    "masked",
    "mask",
    "train_detail",
    "train_details",
    "loss_weight",
    "loss_scale",
)
_CALL = '{"name": ..., "arguments": {...}}'
_TEXT_PARTS = ("text", "input_text", "output_text", None)


def read_text(value: Any) -> str:
    """Return a text field after validating it.

    Raises:
        RowError: the value is not a string, is empty, or cannot be encoded as UTF-8.
    """
    if not isinstance(value, str):
        raise RowError(
            f"contains a {type(value).__name__}, not a string", "write the text as a string"
        )
    if not value.strip():
        raise RowError("is empty", "fill it in or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError(
            "contains half of a surrogate pair", "write the complete character"
        ) from None
    return value


def unfold(value: Any) -> Any:
    """Parse a string as JSON, such as a list in a CSV field; return other values unchanged.

    Raises:
        RowError: the string is not valid JSON.
    """
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(f"is plain text, not JSON ({error})", "write it as JSON") from None


def read_messages(value: Any) -> tuple[Message, ...]:
    """Parse a list of messages.

    Raises:
        RowError: the value is not a list, or a message is invalid; the error names the turn.
    """
    value = unfold(value)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise RowError(
            "does not contain a list of messages",
            'write it as [{"role": "user", "content": "..."}, ...]',
        )
    messages = tuple(_message(turn, i) for i, turn in enumerate(value, 1))
    systems = [i for i, message in enumerate(messages, 1) if message["role"] == "system"]
    if len(systems) > 1:
        raise RowError(
            f"has {len(systems)} system turns ({', '.join(map(str, systems))})",
            "keep one, as the first turn",
        )
    if systems and systems[0] != 1:
        raise RowError(f"has its system turn at position {systems[0]}", "make it the first turn")
    return messages


def _message(turn: Any, number: int) -> Message:
    if not isinstance(turn, Mapping):
        raise RowError(
            f"contains a {type(turn).__name__} as turn {number}, not an object",
            'give it "role" and "content"',
        )
    turn = _with_calls(turn, number)
    role = _role(turn, number)
    content, calls = _content(turn, number), turn.get("tool_calls")
    if not isinstance(content, str) and not (content is None and calls):
        kind = "nothing" if content is None else f"a {type(content).__name__}"
        raise RowError(f"has {kind} as the content of turn {number}", "write it as a string")
    if content is not None and not content.strip() and not calls and role in ("assistant", "user"):
        raise RowError(f"has an empty turn {number} ({role})", "fill it in or remove the row")
    is_in_loss(turn, role, number)
    _check_calls(calls, number)
    rest = {
        key: value
        for key, value in turn.items()
        if key not in ("from", "value") and value is not None
    }
    reasoning = next((rest[key] for key in REASONING_KEYS if key in rest), None)
    if reasoning is not None:  # under both names that templates read, as transformers passes it
        rest = {"thinking": reasoning, **rest, "reasoning_content": reasoning}
    message = {
        **rest,
        "role": role,
        **({"content": content} if "content" in turn or content is not None else {}),
    }
    try:
        json.dumps(message, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise RowError(
            f"contains half of a surrogate pair in turn {number}", "write the complete character"
        ) from None
    return message


def _with_calls(turn: Mapping[str, Any], number: int) -> Mapping[str, Any]:
    """Convert the tool calls of ShareGPT, and OpenAI's older `function_call`, to `tool_calls`."""
    if turn.get("from") in CALLERS and "role" not in turn:
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": _calls_of(turn.get("value"), number),
        }
    if turn.get("function_call") is None:
        return turn
    if turn.get("tool_calls"):
        raise RowError(f"has both function_call and tool_calls in turn {number}", "keep one")
    rest = {key: value for key, value in turn.items() if key != "function_call"}
    return {**rest, "tool_calls": _calls_of(turn["function_call"], number)}


def _content(turn: Mapping[str, Any], number: int) -> Any:
    """Return the content of a turn; text parts are joined.

    Raises:
        RowError: the content is given twice, or has a part that is not text.
    """
    content = turn.get("content", turn.get("value"))
    if turn.get("value", content) != content:
        raise RowError(f"has content and a different value in turn {number}", "keep one")
    if not isinstance(content, list):
        return content
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            raise RowError(
                f"contains a part of type {str(kind)[:80]!r} in turn {number}",
                'only parts such as {"type": "text", "text": "..."} are supported; remove the row',
            )
    return "".join(part["text"] for part in content)


def is_in_loss(turn: Mapping[str, Any], role: str, number: int = 0) -> bool:
    """Return whether an assistant turn contributes to the loss.

    It does unless its `weight` is 0 or one of `LOSS_FLAGS` is false.

    Raises:
        RowError: a flag has another value, is set on another role, or contradicts another flag.
    """
    if unsupported := [key for key in _UNSUPPORTED_FLAGS if turn.get(key) is not None]:
        raise RowError(
            f"has {unsupported[0]!r} in turn {number}, which is not supported",
            "write 'train' as true or false instead",
        )
    flags = {key: turn[key] for key in ("weight", *LOSS_FLAGS) if turn.get(key) is not None}
    for key, value in flags.items():
        allowed = (
            isinstance(value, bool)
            if key != "weight"
            else not isinstance(value, bool) and value in (0, 1)
        )
        if not allowed:
            known = "true or false" if key != "weight" else "0 or 1"
            raise RowError(
                f"has {key}={str(value)[:80]!r} in turn {number}", f"write {known}, or remove it"
            )
        if value and role != "assistant":
            raise RowError(
                f"sets {key} in turn {number} ({role})",
                "remove it: only assistant turns can be in the loss",
            )
    if len({bool(value) for value in flags.values()}) > 1:
        raise RowError(
            f"has {' and '.join(flags)} in turn {number}, which contradict each other",
            "keep one",
        )
    return all(flags.values())


def _check_calls(calls: Any, number: int) -> None:
    """Check the tool calls of a turn: arguments must be an object, or an object as JSON."""
    if calls is None:
        return
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise RowError(
            f"does not have a list of objects as tool_calls of turn {number}",
            "write one object per call",
        )
    for call in calls:
        inner = call.get("function") or call
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise RowError(
                f"contains a tool call without a name in turn {number}", f"write it as {_CALL}"
            )
        raw = inner.get("arguments")
        try:
            arguments = json.loads(raw or "{}") if isinstance(raw, str) else raw
        except (ValueError, RecursionError):
            arguments = raw
        if arguments is not None and not isinstance(arguments, Mapping):
            raise RowError(
                f"has {str(raw)[:80]!r} as the arguments of a tool call in turn {number}",
                "write an object, or an object as JSON",
            )


def _calls_of(value: Any, number: int) -> list[Mapping[str, Any]]:
    """Parse the tool calls of a ShareGPT turn: an object with `name` and `arguments`, or a list."""
    try:
        read = unfold(value)
    except RowError:
        read = None
    calls: list[Any] = read if isinstance(read, list) else [read]
    if not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
        raise RowError(f"contains no valid tool call in turn {number}", f"write it as {_CALL}")
    return [{"type": "function", "function": dict(call)} for call in calls]


def _role(turn: Mapping[str, Any], number: int) -> str:
    if "role" in turn:
        role, known = turn["role"], ROLES
    elif "from" in turn:
        role, known = SHAREGPT.get(str(turn["from"]).lower(), turn["from"]), (*SHAREGPT, *CALLERS)
    else:
        raise RowError(f"has no role in turn {number}", 'add "role" (or "from")')
    if role not in ROLES:
        raise RowError(
            f"has the unknown role {role!r} in turn {number}",
            nearest(str(role), known).removeprefix("; ") or f"use one of {', '.join(known)}",
        )
    return str(role)

"""Rows with a prompt and an answer: chats, instructions, prompt-completion and preference pairs.

Only the answers contribute to the loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxpeft.data.chat.messages import Message, is_in_loss, read_messages, read_text, unfold
from jaxpeft.data.problems import Record, RowError
from jaxpeft.data.rows.columns import Columns

_UNWRITTEN = "answer to generate"


@dataclass(frozen=True)
class Dialog:
    """A chat to render with a template; the assistant's turns are in the loss.

    Attributes:
        messages: one mapping per turn, with `role`, `content` and any other key that the template
            reads.
        tools: the tools available to the chat, in the template's format.
        masked: indices of assistant turns that are excluded from the loss.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    masked: frozenset[int] = frozenset()

    @property
    def answers(self) -> list[int]:
        """Indices of the turns in the loss."""
        assistant = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        return [i for i in assistant if i not in self.masked]


@dataclass(frozen=True)
class Completion:
    """A text used without a template; only the completion is in the loss.

    Attributes:
        prompt: the context.
        completion: the text that follows the prompt, with nothing in between.
    """

    prompt: str
    completion: str


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt.

    Attributes:
        chosen: the better answer, with the prompt.
        rejected: the worse answer, with the prompt.
    """

    chosen: Dialog | Completion
    rejected: Dialog | Completion


def last_answer(dialog: Dialog | Completion) -> str:
    """Return the text of the last answer in the loss; empty if it only calls a tool."""
    if isinstance(dialog, Completion):
        return dialog.completion
    return str(dialog.messages[dialog.answers[-1]].get("content") or "")


def read_completion(record: Record, columns: Columns) -> Dialog | Completion:
    """Parse a prompt and its completion: two texts or two lists of messages.

    Lists of messages may come with tools and a system text.

    Raises:
        RowError: a field is missing or invalid.
    """
    prompt, completion = field(record, columns.prompt), field(record, columns.completion)
    return _join(prompt, completion, columns.prompt, columns.completion, _frame(record, columns))


def read_instruction(record: Record, columns: Columns) -> Dialog:
    """Parse an Alpaca row (instruction, optional input, output) into a chat.

    The user turn also has `instruction` and `input`, for templates that render them separately.
    The turns of a `history` come first, and are in the loss too.

    Raises:
        RowError: a field is missing or invalid.
    """
    instruction = read_column(read_text, record, columns.instruction)
    value = record.get(columns.input) if columns.input else None
    extra = (
        read_column(read_text, record, columns.input) if value is not None and value != "" else ""
    )
    content = f"{instruction}\n\n{extra}" if extra else instruction
    user = {"role": "user", "content": content, "instruction": instruction, "input": extra}
    history = _read_nested(_read_history, record.get(columns.history or ""), columns.history)
    answer = {"role": "assistant", "content": read_column(read_text, record, columns.output)}
    return _chat((*history, user, answer), _frame(record, columns))


def read_dialog(record: Record, columns: Columns) -> Dialog:
    """Parse a list of messages, with `role` and `content`, or ShareGPT's `from` and `value`.

    Raises:
        RowError: a field is missing or invalid.
    """
    value, column = field(record, columns.messages), columns.messages
    if isinstance(value, str) and value.strip() and value.strip()[0] not in "[{":
        raise RowError(
            f"field {column!r} is plain text, not JSON",
            "write it as a list of messages; if it is a prompt, set data.columns={'prompt':"
            f" {column!r}, 'completion': ...}}",
        )
    return _require_answer(
        _chat(_read_nested(read_messages, value, column), _frame(record, columns)), column
    )


def read_prompt(record: Record, columns: Columns) -> Dialog | Completion:
    """Parse what comes before an answer: a chat, an instruction, or a text to continue.

    A chat that ends with the assistant's turn is taken up to that turn, and the output of an
    instruction is ignored, so that rows for training can be used.

    Args:
        record: the row.
        columns: names the column of messages, instruction or prompt.

    Raises:
        RowError: a field is missing or invalid.
    """
    if columns.instruction is not None:
        answered = {**record, _UNWRITTEN: "?"}
        dialog = read_instruction(answered, dataclasses.replace(columns, output=_UNWRITTEN))
        return dataclasses.replace(dialog, messages=dialog.messages[:-1])
    column = columns.messages or columns.prompt
    value = field(record, column)
    if columns.messages is None and isinstance(value, str):
        text = _read_nested(read_text, value, column)
        return _plain(text, "", _frame(record, columns), column, None)
    messages = _read_nested(read_messages, value, column)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise RowError(f"field {column!r} has no turn before the answer", "add one")
    return _chat(messages, _frame(record, columns))


def read_preference(record: Record, columns: Columns) -> Preference:
    """Parse a chosen and a rejected answer, as texts or messages.

    The prompt has its own column, or is included in both answers.

    Raises:
        RowError: a field is missing or invalid, or both answers are the same.
    """
    prompt = field(record, columns.prompt) if columns.prompt else None
    answers = [field(record, column) for column in (columns.chosen, columns.rejected)]
    if answers[0] == answers[1]:
        raise RowError(
            f"{columns.chosen!r} and {columns.rejected!r} are the same", "remove the row"
        )
    pair, frame = (
        zip(answers, (columns.chosen, columns.rejected), strict=True),
        _frame(record, columns),
    )
    if prompt is None or all(map(_includes_prompt, answers)):
        return Preference(*(_read_with_prompt(answer, column, frame) for answer, column in pair))
    return Preference(
        *(_join(prompt, answer, columns.prompt, column, frame) for answer, column in pair)
    )


def _includes_prompt(answer: Any) -> bool:
    """Return whether an answer is a full chat: a list that does not start with the assistant."""
    return (
        isinstance(answer, list)
        and bool(answer)
        and read_messages(answer)[0]["role"] != "assistant"
    )


@dataclass(frozen=True)
class _Frame:
    """System text and tools of a row, with the names of their columns for error messages."""

    system: str
    tools: tuple[Mapping[str, Any], ...]
    columns: str


def _frame(record: Record, columns: Columns) -> _Frame:
    system, tools = columns.system or "", columns.tools or "tools"
    text = read_column(read_text, record, system) if record.get(system) not in (None, "") else ""
    read = _read_nested(_read_tools, record.get(tools), tools)
    return _Frame(
        text,
        read,
        " and ".join(repr(name) for name, value in ((system, text), (tools, read)) if value),
    )


def _read_tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    listed = unfold(value) or []
    tools = [unfold(tool) for tool in listed] if isinstance(listed, list) else [listed]
    if not isinstance(listed, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError(
            f"contains a {type(value).__name__}, not a list of objects",
            "write it as a list of objects",
        )
    return tuple(tools)


def _read_history(value: Any) -> tuple[Message, ...]:
    pairs = unfold(value) or []
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in pairs
    ):
        raise RowError("is not a list of pairs", 'write it as [["question", "answer"], ...]')
    roles = ("user", "assistant")
    return tuple(
        {"role": role, "content": read_text(text)}
        for pair in pairs
        for role, text in zip(roles, pair, strict=True)
    )


def _chat(messages: Sequence[Message], frame: _Frame, context: int = 0) -> Dialog:
    """Combine turns with the system text and tools; mask the first `context` turns."""
    masked = {
        i
        for i, message in enumerate(messages)
        if message["role"] == "assistant" and (i < context or not is_in_loss(message, "assistant"))
    }
    if not frame.system or (
        messages[0]["role"] == "system" and messages[0]["content"] == frame.system
    ):
        return Dialog(tuple(messages), frame.tools, frozenset(masked))
    if messages[0]["role"] == "system":
        raise RowError(f"has a system turn and another one in {frame.columns}", "keep one")
    system = {"role": "system", "content": frame.system}
    return Dialog((system, *messages), frame.tools, frozenset(i + 1 for i in masked))


def _require_answer(dialog: Dialog, column: str | None) -> Dialog:
    if dialog.answers:
        return dialog
    if any(message["role"] == "assistant" for message in dialog.messages):
        raise RowError(f"{column!r} excludes every answer from the loss", "remove the row")
    raise RowError(f"{column!r} has no assistant turn", "add one or remove the row")


def _read_with_prompt(value: Any, column: str | None, frame: _Frame) -> Dialog | Completion:
    if isinstance(value, str):
        return _plain("", _read_nested(read_text, value, column), frame, None, column)
    return _chat(_read_nested(read_messages, value, column), frame)


def _join(
    prompt: Any, answer: Any, prompt_column: str | None, answer_column: str | None, frame: _Frame
) -> Dialog | Completion:
    if isinstance(prompt, str) and isinstance(answer, str):
        texts = (
            _read_nested(read_text, prompt, prompt_column),
            _read_nested(read_text, answer, answer_column),
        )
        return _plain(*texts, frame, prompt_column, answer_column)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    before = _read_nested(read_messages, prompt, prompt_column)
    after = _read_nested(read_messages, answer, answer_column)
    if any(message["role"] != "assistant" for message in after[:1]):
        raise RowError(
            f"{answer_column!r} starts with a {after[0]['role']} turn",
            "start it with an assistant turn",
        )
    return _require_answer(_chat((*before, *after), frame, len(before)), answer_column)


def _plain(
    prompt: str,
    completion: str,
    frame: _Frame,
    prompt_column: str | None,
    completion_column: str | None,
) -> Completion:
    if frame.columns:
        fields = {"instruction": prompt_column or "...", "output": completion_column}
        raise RowError(
            f"has {frame.columns} with a plain-text prompt, to which no chat template is applied",
            f"set data.columns={fields} for a chat, or write prompt and completion as lists of"
            " messages",
        )
    return Completion(prompt, completion)


def field(record: Record, column: str | None) -> Any:
    """Return the value of a column.

    Raises:
        RowError: the row has no value in it.
    """
    value = record.get(column or "")
    if value is None:
        raise RowError(f"field {column!r} is missing", "add it or remove the row")
    return value


def read_column(read: Any, record: Record, column: str | None) -> Any:
    """Parse the value of a column; errors name the column."""
    return _read_nested(read, field(record, column), column)


def _read_nested(read: Any, value: Any, column: str | None) -> Any:
    try:
        return read(value)
    except RowError as error:
        raise RowError(f"field {column!r} {error.fault}", error.fix, error.column) from None

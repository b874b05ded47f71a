"""Rows of which a part is to be learned: chats, instructions, prompts with completions, and
preference pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxpeft.data.chat.messages import Message, is_learned, read_messages, read_text, unfold
from jaxpeft.data.problems import Record, RowError
from jaxpeft.data.rows.columns import Columns


@dataclass(frozen=True)
class Dialog:
    """A chat, written out by a template; the assistant's turns are learned.

    Attributes:
        messages: one mapping a turn, with `role` and `content` and whatever else the template
            reads.
        tools: the tools that the chat may use, as the template wants them.
        unlearned: the places of the assistant's turns that are not learned.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    unlearned: frozenset[int] = frozenset()

    @property
    def answers(self) -> list[int]:
        """The places of the turns that are learned."""
        assistant = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        return [i for i in assistant if i not in self.unlearned]


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
    """Return what the last answer that is learned says; empty where it only calls a tool."""
    if isinstance(dialog, Completion):
        return dialog.completion
    return str(dialog.messages[dialog.answers[-1]].get("content") or "")


def read_completion(record: Record, columns: Columns) -> Dialog | Completion:
    """Read a prompt and its completion: two texts, or two lists of messages, beside which tools and
    a system text may stand.

    Raises:
        RowError: a field is missing or wrong.
    """
    prompt, completion = field(record, columns.prompt), field(record, columns.completion)
    return _join(prompt, completion, columns.prompt, columns.completion, _frame(record, columns))


def read_instruction(record: Record, columns: Columns) -> Dialog:
    """Read an instruction, its input if there is one, and the output, as alpaca's rows are, as a
    chat.

    The user's turn keeps `instruction` and `input` as well, for templates that part them. The turns
    of a `history` stand before it, and are learned too.

    Raises:
        RowError: a field is missing or wrong.
    """
    instruction = read_column(read_text, record, columns.instruction)
    given = record.get(columns.input) if columns.input else None
    extra = (
        read_column(read_text, record, columns.input) if given is not None and given != "" else ""
    )
    asked = f"{instruction}\n\n{extra}" if extra else instruction
    user = {"role": "user", "content": asked, "instruction": instruction, "input": extra}
    history = _read_nested(_read_history, record.get(columns.history or ""), columns.history)
    answer = {"role": "assistant", "content": read_column(read_text, record, columns.output)}
    return _chat((*history, user, answer), _frame(record, columns))


def read_dialog(record: Record, columns: Columns) -> Dialog:
    """Read a list of messages, with `role` and `content`, or ShareGPT's `from` and `value`.

    Raises:
        RowError: a field is missing or wrong.
    """
    value, column = field(record, columns.messages), columns.messages
    if isinstance(value, str) and value.strip() and value.strip()[0] not in "[{":
        raise RowError(
            f"field {column!r} is a text, not JSON",
            "write it as a list of messages; if it is a prompt, set data.columns={'prompt':"
            f" {column!r}, 'completion': ...}}",
        )
    return _require_answer(
        _chat(_read_nested(read_messages, value, column), _frame(record, columns)), column
    )


def read_preference(record: Record, columns: Columns) -> Preference:
    """Read a better and a worse answer: texts or messages, with the prompt in a column of its own
    or in both.

    Raises:
        RowError: a field is missing or wrong, or both answers are the same.
    """
    prompt = field(record, columns.prompt) if columns.prompt else None
    answers = [field(record, column) for column in (columns.chosen, columns.rejected)]
    if answers[0] == answers[1]:
        raise RowError(
            f"{columns.chosen!r} and {columns.rejected!r} are the same", "leave the row out"
        )
    pair, frame = (
        zip(answers, (columns.chosen, columns.rejected), strict=True),
        _frame(record, columns),
    )
    if prompt is None or all(map(_holds_prompt, answers)):
        return Preference(*(_read_whole(answer, column, frame) for answer, column in pair))
    return Preference(
        *(_join(prompt, answer, columns.prompt, column, frame) for answer, column in pair)
    )


def _holds_prompt(answer: Any) -> bool:
    """Return whether an answer is a whole chat: one that does not begin with the assistant."""
    return (
        isinstance(answer, list)
        and bool(answer)
        and read_messages(answer)[0]["role"] != "assistant"
    )


@dataclass(frozen=True)
class _Frame:
    """What a row says of its chat beside the turns: the system text and the tools, each with its
    column.
    """

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
            f"holds a {type(value).__name__}, not a list of objects",
            "write it as a list of objects",
        )
    return tuple(tools)


def _read_history(value: Any) -> tuple[Message, ...]:
    pairs = unfold(value) or []
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in pairs
    ):
        raise RowError("is no list of pairs", 'write it as [["question", "answer"], ...]')
    roles = ("user", "assistant")
    return tuple(
        {"role": role, "content": read_text(text)}
        for pair in pairs
        for role, text in zip(roles, pair, strict=True)
    )


def _chat(messages: Sequence[Message], frame: _Frame, context: int = 0) -> Dialog:
    """Join turns with what stands beside them; the first `context` turns are not learned."""
    unlearned = {
        i
        for i, message in enumerate(messages)
        if message["role"] == "assistant" and (i < context or not is_learned(message, "assistant"))
    }
    if not frame.system or (
        messages[0]["role"] == "system" and messages[0]["content"] == frame.system
    ):
        return Dialog(tuple(messages), frame.tools, frozenset(unlearned))
    if messages[0]["role"] == "system":
        raise RowError(f"has a system turn, and another in {frame.columns}", "keep one of them")
    system = {"role": "system", "content": frame.system}
    return Dialog((system, *messages), frame.tools, frozenset(i + 1 for i in unlearned))


def _require_answer(dialog: Dialog, column: str | None) -> Dialog:
    if dialog.answers:
        return dialog
    if any(message["role"] == "assistant" for message in dialog.messages):
        raise RowError(f"{column!r} marks every answer as not learned", "leave the row out")
    raise RowError(f"{column!r} has no turn of the assistant", "add one or leave the row out")


def _read_whole(value: Any, column: str | None, frame: _Frame) -> Dialog | Completion:
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
            f"{answer_column!r} begins with a turn of {after[0]['role']}",
            "begin it with the assistant's",
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
            f"has {frame.columns} beside a prompt that is a text, which no template writes out",
            f"set data.columns={fields} for a chat, or write prompt and completion as lists of"
            " messages",
        )
    return Completion(prompt, completion)


def field(record: Record, column: str | None) -> Any:
    """Return the value of a column.

    Raises:
        RowError: the row does not have it.
    """
    value = record.get(column or "")
    if value is None:
        raise RowError(f"field {column!r} is missing", "add it or leave the row out")
    return value


def read_column(read: Any, record: Record, column: str | None) -> Any:
    """Read a column; what is wrong with it is said with the column's name."""
    return _read_nested(read, field(record, column), column)


def _read_nested(read: Any, value: Any, column: str | None) -> Any:
    try:
        return read(value)
    except RowError as error:
        raise RowError(f"field {column!r} {error.fault}", error.fix, error.column) from None

"""Render dialogs with a chat template and find where each answer starts and ends.

`P` is the rendering of the turns before an answer, with the generation prompt: the context that
generation sees. `E` is the rendering up to and including the answer. The answer is the part of `E`
after `P`; everything else is masked. Answers share a row while the next answer's `P` starts with
the previous one's `E`. If the template rewrites earlier turns once others follow (it drops their
reasoning, or ends them with another marker), the next answer starts a new row.

To find a turn's words in a rendering, the dialog is rendered once more with marks in its turns: a
mark is a character that does not occur in the text. This detects a user's words inside an answer,
whatever the template does.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from jaxpeft.data.chat.dialogs import Dialog, Message
from jaxpeft.data.chat.messages import REASONING_KEYS
from jaxpeft.data.chat.templates import MEND, Cut, RenderError, RenderRequest

T = TypeVar("T")
Writing = Generator[RenderRequest, "list[str | RenderError]", T]
"""A generator that yields render requests, receives the text or error of each cut, and returns a
result.
"""
PROMPT_KEYS = ("content", "instruction", "input")
ANOTHER_TEMPLATE = "name a template that does as data.chat_template"


@dataclass(frozen=True)
class Script:
    """A rendered dialog.

    Attributes:
        text: the turns up to the last answer in the loss.
        loss_spans: `(start, end)` of each answer in the loss, in characters, in order.
        tails: for each span, the text that ends it: after the answer's content, if known.
        has_bos: whether the text already has the tokens that start a text: templates write them.
        earlier: rows with earlier answers, if the template renders those differently in this row.
        excluded: for each answer that cannot be in the loss, the reason.
        notes: other messages for the user.
    """

    text: str
    loss_spans: tuple[tuple[int, int], ...]
    tails: tuple[str, ...]
    has_bos: bool
    earlier: tuple[Script, ...] = ()
    excluded: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def learned(self) -> tuple[tuple[int, int], ...]:
        """The loss spans, by their old name, accepted until 0.3."""
        return self.loss_spans

    @property
    def cuts(self) -> list[int]:
        """Start and end of each loss span; the end of the text if there are none."""
        return [at for span in self.loss_spans for at in span] or [len(self.text)]


@dataclass(frozen=True)
class _Answer:
    """An answer: its turn, the prompt that generation sees, and the text up to its end.

    `tail` is the template's text after the answer's content if marks were needed to find it; `text`
    is then composed here and not a rendering of the template.
    """

    turn: int
    prompt: str
    text: str
    tail: str | None = None


def write_dialog(dialog: Dialog) -> Writing[Script]:
    """Render a dialog up to its last answer, in one row unless the template rewrites earlier turns.

    Raises:
        RenderError: the template cannot render it, no answer can be in the loss, or the user's
            words would be.
    """
    dialog = dataclasses.replace(dialog, messages=(yield from _parse_arguments(dialog)))
    text, answers, errors = yield from _find_answers(dialog)
    if errors and not answers:
        raise errors[0]
    rows: list[list[_Answer]] = []
    for answer in answers:
        if rows and answer.prompt.startswith(rows[-1][-1].text):
            rows[-1].append(answer)
        else:
            rows.append([answer])
    scripts: list[Script] = []
    for row in rows:
        scripts.append((yield from _check(dialog, row)))
    last = scripts.pop() if scripts else Script(text, (), (), has_bos=True)
    excluded = tuple(f"an answer is excluded from the loss: {error}" for error in errors)
    return dataclasses.replace(last, earlier=tuple(scripts), excluded=excluded)


def write_turns(dialog: Dialog) -> Writing[Script]:
    """Render the turns as the prompt for generation.

    Raises:
        RenderError: the template cannot render them.
    """
    messages = yield from _parse_arguments(dialog)
    text = yield from _render(messages, dialog.tools, (len(messages), True))
    return Script(text, (), (), has_bos=True)


def _render(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], cut: Cut
) -> Writing[str]:
    (text,) = yield RenderRequest(messages, tools, [cut])
    if isinstance(text, RenderError):
        raise text
    return text


def _find_answers(dialog: Dialog) -> Writing[tuple[str, list[_Answer], list[RenderError]]]:
    """Return the text of the entire dialog, its answers, and the errors of unusable answers."""
    messages = dialog.messages
    around: list[Cut] = [cut for i in dialog.answers for cut in ((i, True), (i + 1, False))]
    cuts = list(dict.fromkeys([*around, (len(messages), False)]))
    texts = dict(zip(cuts, (yield RenderRequest(messages, dialog.tools, cuts)), strict=True))
    full_text = texts[len(messages), False]
    if isinstance(full_text, RenderError):
        raise full_text
    answers: list[_Answer] = []
    errors: list[RenderError] = []
    for i in dialog.answers:
        try:
            answers.append(
                (yield from _find_answer(dialog, i, texts[i, True], texts[i + 1, False]))
            )
        except RenderError as error:
            if error.fatal:
                raise
            errors.append(error)
    return full_text, answers, errors


def _find_answer(
    dialog: Dialog, i: int, prompt: str | RenderError, upto: str | RenderError
) -> Writing[_Answer]:
    if isinstance(prompt, RenderError):
        raise prompt
    if isinstance(upto, RenderError):
        raise upto
    if upto.startswith(prompt):
        if len(upto) == len(prompt):
            raise RenderError(f"the chat template writes nothing for turn {i + 1}", fix=MEND)
        return _Answer(i, prompt, upto)
    return (yield from _find_after_rewritten_turns(dialog, i, prompt, upto)) or (
        yield from _find_opened_answer(dialog, i, prompt, upto)
    )


def _find_after_rewritten_turns(
    dialog: Dialog, i: int, prompt: str, upto: str
) -> Writing[_Answer | None]:
    """Find an answer whose presence changes earlier turns: Mistral moves the system text to the
    last user turn.

    From the last letter of the previous turn on, the prompt must be a prefix of the rendering with
    the answer. The answer is the rest of that rendering. Returns None if it is no prefix.

    Raises:
        RenderError: the previous turn's words cannot be located, or the answer is not rendered.
    """
    previous = {i - 1} if i and dialog.messages[i - 1]["role"] == "assistant" else set[int]()
    before = yield from _find_marks(dialog, previous, prompt, (i, True))
    after = yield from _find_marks(dialog, {*previous, i}, upto, (i + 1, False))
    # the previous answer's marks come first among those of answers
    in_prompt, in_upto = (
        (before.content, after.content[: len(before.content)])
        if previous
        else (before.other_turns, after.other_turns)
    )
    if not in_prompt or not in_upto:
        return None
    header, rendered = prompt[in_prompt[-1] :], upto[in_upto[-1] :]
    if len(rendered) <= len(header) or not rendered.startswith(header):
        return None
    start = in_upto[-1] + len(header)
    inside = _MarkPositions(*([at for at in positions if at >= start] for positions in after))
    _find_missing_parts(dialog.messages[i], i, inside)
    return _Answer(i, prompt, prompt + upto[start:], upto[max(inside.content, default=start) :])


def _find_opened_answer(dialog: Dialog, i: int, prompt: str, upto: str) -> Writing[_Answer]:
    """Find an answer whose reasoning the prompt opens, but the template drops (as R1's does) or
    opens differently.

    A rendering with a mark as the content shows the template's text around it. Whatever the prompt
    has beyond the text before the mark is the start of the generated content; the answer is the
    rest of the content.
    """
    rewritten = RenderError(
        f"the chat template writes the turns before turn {i + 1} differently once it follows",
        fix=MEND,
    )
    content = dialog.messages[i].get("content")
    (turn_mark, answer_mark), turns = _unused_characters(upto, 2), dialog.messages[:i]
    probe = {"role": "assistant", "content": answer_mark}
    marked = [*(_mark(turn, PROMPT_KEYS, turn_mark, _before_last) for turn in turns), probe]
    around = yield from _render(marked, dialog.tools, (i + 1, False))
    before, separator, tail = around.partition(answer_mark)
    before = before.replace(turn_mark, "")
    if not separator or answer_mark in tail or turn_mark in tail or not prompt.startswith(before):
        raise rewritten
    if not isinstance(content, str) or dialog.messages[i].get("tool_calls"):
        raise rewritten
    if not (upto.startswith(before) and upto.endswith(tail)):
        raise rewritten
    rendered = upto[len(before) : len(upto) - len(tail)]
    if not content.rstrip().endswith(rendered.strip()):
        raise rewritten
    opened = prompt[len(before) :]
    rest = _text_after_opening(opened, content.rstrip() + rendered[len(rendered.rstrip()) :])
    if rest is None:
        tag = opened.strip()
        raise RenderError(
            f"generation starts turn {i + 1} with {opened!r}, but its content does not",
            fix=(
                f"write the reasoning into the content, as {tag + '...' + _closing_tag(tag)!r},"
                " or name a template whose prompt opens no reasoning as data.chat_template"
            ),
        )
    return _Answer(i, prompt, prompt + rest + tail, tail)


def _text_after_opening(opened: str, content: str) -> str | None:
    """Return the content after the tag that the prompt opens; None if the content has no such tag,
    opening or closing.
    """
    tag, body = opened.strip(), content.lstrip()
    if body.startswith(tag):
        rest, gap = body[len(tag) :], opened[len(opened.rstrip()) :]
        return rest.removeprefix(gap) if rest.startswith(gap) else rest.lstrip()
    return body if _closing_tag(tag) in body else None


def _closing_tag(tag: str) -> str:
    return tag.replace("<", "</", 1)


def _check(dialog: Dialog, row: Sequence[_Answer]) -> Writing[Script]:
    """Build the row of some answers after checking that its loss mask covers them and nothing else.

    Raises:
        RenderError: the loss mask would cover another turn's words, or an answer is not rendered.
    """
    last = row[-1]
    spans = tuple((len(answer.prompt), len(answer.text)) for answer in row)
    # a text with a tail is not a rendering: it was composed of the prompt and the answer's own
    # words, so check the prompt
    text, cut = (
        (last.text, (last.turn + 1, False))
        if last.tail is None
        else (last.prompt, (last.turn, True))
    )
    marks = yield from _find_marks(dialog, {answer.turn for answer in row}, text, cut)
    tails, notes = list[str](), list[str]()
    for answer, (start, end) in zip(row, spans, strict=True):
        inside = _MarkPositions(
            *([at for at in positions if start <= at < end] for positions in marks)
        )
        if inside.other_turns:
            raise RenderError(
                f"the chat template writes words of another turn into turn {answer.turn + 1}, which"
                " would add them to the loss",
                fix=MEND,
            )
        if answer.tail is None:
            notes += _find_missing_parts(dialog.messages[answer.turn], answer.turn, inside)
            yield from _check_null(dialog, answer)
        tails.append(answer.tail or answer.text[max(inside.content, default=start) : end])
    if dialog.tools and not marks.tools:
        notes.append("the chat template does not write the tools")
    return Script(last.text, spans, tuple(tails), has_bos=True, notes=tuple(notes))


def _check_null(dialog: Dialog, answer: _Answer) -> Writing[None]:
    """Check that null content is not rendered as the word 'None'.

    Raises:
        RenderError: it is: Jinja does so if the template does not test for null.
    """
    i, message = answer.turn, dialog.messages[answer.turn]
    if message.get("content", "") is not None or "None" not in answer.text[len(answer.prompt) :]:
        return
    messages = [*dialog.messages[:i], {**message, "content": ""}]
    if (yield from _render(messages, dialog.tools, (i + 1, False))) != answer.text:
        raise RenderError(
            f"the chat template writes 'None' for the content of turn {i + 1}, which is null",
            fix=f'write "" as the content, or {MEND}',
        )


class _MarkPositions(NamedTuple):
    """Positions of the marks in a text: in other turns; in the content, tool calls and reasoning of
    answers; and in the tools.
    """

    other_turns: list[int]
    content: list[int]
    calls: list[int]
    reasoning: list[int]
    tools: list[int]


def _find_marks(
    dialog: Dialog, answers: Collection[int], text: str, cut: Cut
) -> Writing[_MarkPositions]:
    """Render the turns of a cut with marks, and return the positions of the marks in `text`.

    Raises:
        RenderError: the template renders a different text with marks.
    """
    marks = _unused_characters(text, len(_MarkPositions._fields))
    turn_mark, content_mark, call_mark, reasoning_mark, tool_mark = marks
    # the template may look for a tool's name, or for a flag at the end of a turn: then retry with
    # fewer marks in other positions
    for place, name in ((_before_last, _before_first), (_before_first, _remove_mark)):
        messages: list[Message] = []
        for i, message in enumerate(dialog.messages[: cut[0]]):
            if i in answers:
                marked = _mark(message, ("content",), content_mark, place)
                marked = _mark(marked, REASONING_KEYS, reasoning_mark, place)
                calls = [
                    _mark_name(call, call_mark, name) for call in message.get("tool_calls") or ()
                ]
                messages.append({**marked, "tool_calls": calls} if calls else marked)
            else:
                messages.append(
                    message
                    if message["role"] == "assistant"
                    else _mark(message, PROMPT_KEYS, turn_mark, place)
                )
        tools = [_mark_name(tool, tool_mark, name) for tool in dialog.tools]
        plain, positions = _unmark((yield from _render(messages, tools, cut)), marks)
        if plain == text:
            return (
                _MarkPositions(*positions)
                if name is not _remove_mark
                else _MarkPositions(*positions)._replace(calls=[*range(len(text))], tools=[0])
            )
    raise RenderError(
        "the chat template renders other turns differently if one letter changes: whose words would"
        " be in the loss is unknown",
        fix=MEND,
    )


def _find_missing_parts(message: Message, i: int, inside: _MarkPositions) -> list[str]:
    """Return notes on the parts of an answer that the template omits.

    Raises:
        RenderError: the template omits the content or the tool calls.
    """
    if message.get("tool_calls") and not inside.calls:
        raise RenderError(
            f"the chat template does not write the tool calls of turn {i + 1}", fix=ANOTHER_TEMPLATE
        )
    notes: list[str] = []
    if _last_letter(message.get("content") or "") >= 0 and not inside.content:
        if not message.get("tool_calls"):
            raise RenderError(
                f"the chat template does not write the content of turn {i + 1}",
                fix=ANOTHER_TEMPLATE,
            )
        notes.append("the chat template does not write the content of turns with tool calls")
    keys = [
        key
        for key in REASONING_KEYS
        if isinstance(message.get(key), str) and _last_letter(message[key]) >= 0
    ]
    return notes + [
        f"the chat template does not write {key!r}" for key in keys[:1] if not inside.reasoning
    ]


PlaceMark = Callable[[str, str], str]


def _mark_name(call: Mapping[str, Any], mark: str, place: PlaceMark) -> Mapping[str, Any]:
    """Mark the name in a tool or a tool call."""
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _mark(call["function"], ("name",), mark, place)}
    return _mark(call, ("name",), mark, place)


def _mark(
    message: Mapping[str, Any], keys: Collection[str], mark: str, place: PlaceMark
) -> Mapping[str, Any]:
    return {
        key: place(value, mark) if key in keys and isinstance(value, str) else value
        for key, value in message.items()
    }


def _last_letter(text: str) -> int:
    """Return the position of the last letter before any tags at the end of a text, or -1."""
    end = len(text.rstrip())
    while end and text[end - 1] == ">" and (at := text.rfind("<", 0, end)) >= 0:
        end = len(text[:at].rstrip())
    return end - 1


def _before_last(text: str, mark: str) -> str:
    at = _last_letter(text)
    return f"{text[:at]}{mark}{text[at:]}" if at >= 0 else text


def _before_first(text: str, mark: str) -> str:
    at = len(text) - len(text.lstrip())
    return f"{text[:at]}{mark}{text[at:]}" if text.strip() else text


def _remove_mark(text: str, mark: str) -> str:
    return text


def _unused_characters(text: str, n: int) -> list[str]:
    """Return `n` private-use characters that do not occur in a text."""
    return list(
        itertools.islice((mark for mark in map(chr, range(0xE000, 0xF8FF)) if mark not in text), n)
    )


def _unmark(text: str, marks: Sequence[str]) -> tuple[str, list[list[int]]]:
    """Return a text without marks, and the positions of each mark in it."""
    positions: dict[str, list[int]] = {mark: [] for mark in marks}
    parts: list[str] = []
    length = 0
    for part in re.split(f"([{''.join(marks)}])", text):
        if part in positions:
            positions[part].append(length)
        else:
            parts.append(part)
            length += len(part)
    return "".join(parts), list(positions.values())


def _parse_arguments(dialog: Dialog) -> Writing[tuple[Message, ...]]:
    """Return the turns with tool-call arguments in the form that the template expects.

    JSON strings are kept if the template writes strings unchanged, and parsed if it would encode
    them as JSON again; a quotation mark in a test rendering shows which.
    """
    turns = [
        i
        for i, message in enumerate(dialog.messages)
        if any(map(_has_string_arguments, message.get("tool_calls") or ()))
    ]
    if not turns:
        return dialog.messages
    before, after = _unused_characters(
        json.dumps(dialog.messages, ensure_ascii=False, default=str), 2
    )
    probe = f'{before}"{after}'
    texts = yield RenderRequest(
        [_with_arguments(message, lambda _: probe) for message in dialog.messages],
        dialog.tools,
        [(i + 1, False) for i in turns],
    )
    if any(isinstance(text, str) and probe in text for text in texts):
        return dialog.messages
    return tuple(
        _with_arguments(message, lambda text: json.loads(text or "{}"))
        for message in dialog.messages
    )


def _has_string_arguments(call: Mapping[str, Any]) -> bool:
    return isinstance((call.get("function") or call).get("arguments"), str)


def _with_arguments(message: Message, change: Callable[[str], Any]) -> Message:
    def with_arguments(call: Mapping[str, Any]) -> Mapping[str, Any]:
        if not _has_string_arguments(call):
            return call
        inner = call.get("function") or call
        inner = {**inner, "arguments": change(inner["arguments"])}
        return {**call, "function": inner} if call.get("function") else inner

    calls = message.get("tool_calls")
    return {**message, "tool_calls": [with_arguments(call) for call in calls]} if calls else message

"""Dialogs written out by a chat template: where an answer begins and ends follows from what the
template writes.

`P` is what the template writes of the turns before an answer, with a prompt to generate: what
generation sees. `E` is what it writes of the turns up to the answer. The answer is what `E` has
behind `P`; the rest is never learned. Answers share a row as long as the next one's `P` begins with
the last one's `E`; where a template writes earlier turns otherwise once others follow (it drops
their thoughts, or another mark ends them), the next answer begins a row of its own.

What is told apart in a text is told by a mark, a character that stands nowhere in it: the dialog is
rendered once more with marks in its turns. So words of a user's turn in an answer are found,
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
from jaxpeft.data.chat.messages import THOUGHTS
from jaxpeft.data.chat.templates import MEND, Cut, RenderError, RenderRequest

T = TypeVar("T")
Writing = Generator[RenderRequest, "list[str | RenderError]", T]
"""Asks for renderings, gets the text or the error of each cut, and returns what it makes of them.
"""
ASKED = ("content", "instruction", "input")
ANOTHER = "name a template that does as data.chat_template"


@dataclass(frozen=True)
class Script:
    """A dialog written out.

    Attributes:
        text: the turns up to the last answer that is learned.
        learned: `(start, end)` of each part that is learned, in characters, in order.
        tails: what ends each learned part: behind its content, where that is known.
        begun: whether the text holds the tokens that a text begins with: a template writes them
            itself.
        earlier: the rows of the answers before those of this one, where the template writes them
            otherwise here.
        unlearned: why each answer that is not learned cannot be.
        notes: what else should be told.
    """

    text: str
    learned: tuple[tuple[int, int], ...]
    tails: tuple[str, ...]
    begun: bool
    earlier: tuple[Script, ...] = ()
    unlearned: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def cuts(self) -> list[int]:
        """Where each learned part begins and ends; the end of a text of which nothing is
        learned.
        """
        return [at for span in self.learned for at in span] or [len(self.text)]


@dataclass(frozen=True)
class _Answer:
    """An answer: its turn, what generation sees, and the text up to its end.

    `tail` is what the template writes from the end of its content on where marks have told it; such
    a text is none of the template's.
    """

    turn: int
    prompt: str
    text: str
    tail: str | None = None


def write_dialog(dialog: Dialog) -> Writing[Script]:
    """Write a dialog out up to its last answer, one row for all answers where no text is rewritten.

    Raises:
        RenderError: the template cannot write it, no answer can be learned, or words of the user
            would be.
    """
    dialog = dataclasses.replace(dialog, messages=(yield from _read_arguments(dialog)))
    whole, answers, unlearned = yield from _find_answers(dialog)
    if unlearned and not answers:
        raise unlearned[0]
    rows: list[list[_Answer]] = []
    for answer in answers:
        if rows and answer.prompt.startswith(rows[-1][-1].text):
            rows[-1].append(answer)
        else:
            rows.append([answer])
    scripts: list[Script] = []
    for row in rows:
        scripts.append((yield from _check(dialog, row)))
    last = scripts.pop() if scripts else Script(whole, (), (), begun=True)
    told = tuple(f"an answer is not learned: {error}" for error in unlearned)
    return dataclasses.replace(last, earlier=tuple(scripts), unlearned=told)


def write_turns(dialog: Dialog) -> Writing[Script]:
    """Write out the turns that an answer is generated from.

    Raises:
        RenderError: the template cannot write them.
    """
    messages = yield from _read_arguments(dialog)
    text = yield from _render(messages, dialog.tools, (len(messages), True))
    return Script(text, (), (), begun=True)


def _render(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], cut: Cut
) -> Writing[str]:
    (text,) = yield RenderRequest(messages, tools, [cut])
    if isinstance(text, RenderError):
        raise text
    return text


def _find_answers(dialog: Dialog) -> Writing[tuple[str, list[_Answer], list[RenderError]]]:
    """Return the text of the whole dialog, its answers, and why others cannot be learned."""
    messages = dialog.messages
    around: list[Cut] = [cut for i in dialog.answers for cut in ((i, True), (i + 1, False))]
    cuts = list(dict.fromkeys([*around, (len(messages), False)]))
    written = dict(zip(cuts, (yield RenderRequest(messages, dialog.tools, cuts)), strict=True))
    whole = written[len(messages), False]
    if isinstance(whole, RenderError):
        raise whole
    answers: list[_Answer] = []
    unlearned: list[RenderError] = []
    for i in dialog.answers:
        try:
            answers.append(
                (yield from _find_answer(dialog, i, written[i, True], written[i + 1, False]))
            )
        except RenderError as error:
            if error.fatal:
                raise
            unlearned.append(error)
    return whole, answers, unlearned


def _find_answer(
    dialog: Dialog, i: int, prompt: str | RenderError, upto: str | RenderError
) -> Writing[_Answer]:
    if isinstance(prompt, RenderError):
        raise prompt
    if isinstance(upto, RenderError):
        raise upto
    if upto.startswith(prompt):
        if len(upto) == len(prompt):
            raise RenderError(f"the chat template writes nothing of turn {i + 1}", fix=MEND)
        return _Answer(i, prompt, upto)
    return (yield from _text_behind_question(dialog, i, prompt, upto)) or (
        yield from _open_answer(dialog, i, prompt, upto)
    )


def _text_behind_question(
    dialog: Dialog, i: int, prompt: str, upto: str
) -> Writing[_Answer | None]:
    """Find an answer behind which the template writes earlier turns otherwise: Mistral's moves the
    system text to the last turn.

    From the last letter of the turn before on, both texts must begin alike: what generation sees,
    and what the template writes once the answer follows. The answer is the rest of the latter. None
    where they differ there too.

    Raises:
        RenderError: the words of the turn before cannot be told, or the answer is not written.
    """
    said = {i - 1} if i and dialog.messages[i - 1]["role"] == "assistant" else set[int]()
    before = yield from _find_marks(dialog, said, prompt, (i, True))
    found = yield from _find_marks(dialog, {*said, i}, upto, (i + 1, False))
    # the marks of an answer before come first among those of answers
    asked, again = (
        (before.said, found.said[: len(before.said)]) if said else (before.asked, found.asked)
    )
    if not asked or not again:
        return None
    header, written = prompt[asked[-1] :], upto[again[-1] :]
    if len(written) <= len(header) or not written.startswith(header):
        return None
    start = again[-1] + len(header)
    inside = _Places(*([at for at in places if at >= start] for places in found))
    _missing_parts(dialog.messages[i], i, inside)
    return _Answer(i, prompt, prompt + upto[start:], upto[max(inside.said, default=start) :])


def _open_answer(dialog: Dialog, i: int, prompt: str, upto: str) -> Writing[_Answer]:
    """Find an answer whose thought the prompt opens, and which the template writes without (as R1's
    does) or opens otherwise.

    What the template writes around a content is told by writing a mark as the content. What the
    prompt has more in front of it is what generation begins the content with; the answer is the
    rest of the content.
    """
    rewritten = RenderError(
        f"the chat template writes the turns before turn {i + 1} differently once it follows",
        fix=MEND,
    )
    said = dialog.messages[i].get("content")
    (asked, answered), turns = _free(upto, 2), dialog.messages[:i]
    probe = {"role": "assistant", "content": answered}
    marked = [*(_mark(turn, ASKED, asked, _before_last) for turn in turns), probe]
    around = yield from _render(marked, dialog.tools, (i + 1, False))
    before, found, tail = around.partition(answered)
    before = before.replace(asked, "")
    if not found or answered in tail or asked in tail or not prompt.startswith(before):
        raise rewritten
    if not isinstance(said, str) or dialog.messages[i].get("tool_calls"):
        raise rewritten
    if not (upto.startswith(before) and upto.endswith(tail)):
        raise rewritten
    written = upto[len(before) : len(upto) - len(tail)]
    if not said.rstrip().endswith(written.strip()):
        raise rewritten
    opened = prompt[len(before) :]
    rest = _text_behind(opened, said.rstrip() + written[len(written.rstrip()) :])
    if rest is None:
        begin = opened.strip()
        raise RenderError(
            f"generation begins turn {i + 1} with {opened!r}, and its content does not",
            fix=(
                f"write the thought into the content, as {begin + '...' + _closing_text(begin)!r},"
                " or name a template whose prompt opens no thought as data.chat_template"
            ),
        )
    return _Answer(i, prompt, prompt + rest + tail, tail)


def _text_behind(opened: str, said: str) -> str | None:
    """Return what a content says behind what the prompt has opened; None where it says nothing of
    it.
    """
    begin, body = opened.strip(), said.lstrip()
    if body.startswith(begin):
        rest, gap = body[len(begin) :], opened[len(opened.rstrip()) :]
        return rest.removeprefix(gap) if rest.startswith(gap) else rest.lstrip()
    return body if _closing_text(begin) in body else None


def _closing_text(begin: str) -> str:
    return begin.replace("<", "</", 1)


def _check(dialog: Dialog, row: Sequence[_Answer]) -> Writing[Script]:
    """Make a row of answers, once marks have shown that it learns the answers, and no word of
    another turn.

    Raises:
        RenderError: it would learn other words, or an answer is not written.
    """
    last = row[-1]
    spans = tuple((len(answer.prompt), len(answer.text)) for answer in row)
    # a text that is none of the template's has been made of one, the prompt, and of the answer's
    # own words
    text, cut = (
        (last.text, (last.turn + 1, False))
        if last.tail is None
        else (last.prompt, (last.turn, True))
    )
    found = yield from _find_marks(dialog, {answer.turn for answer in row}, text, cut)
    tails, notes = list[str](), list[str]()
    for answer, (start, end) in zip(row, spans, strict=True):
        inside = _Places(*([at for at in places if start <= at < end] for places in found))
        if inside.asked:
            raise RenderError(
                f"the chat template writes words of another turn into turn {answer.turn + 1}, where"
                " they would be learned",
                fix=MEND,
            )
        if answer.tail is None:
            notes += _missing_parts(dialog.messages[answer.turn], answer.turn, inside)
            yield from _check_null(dialog, answer)
        tails.append(answer.tail or answer.text[max(inside.said, default=start) : end])
    if dialog.tools and not found.tools:
        notes.append("the chat template does not write the tools")
    return Script(last.text, spans, tuple(tails), begun=True, notes=tuple(notes))


def _check_null(dialog: Dialog, answer: _Answer) -> Writing[None]:
    """Check that no word is written for a content that is null.

    Raises:
        RenderError: it is, as jinja does where a template does not ask.
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


class _Places(NamedTuple):
    """Where marks stand in a text: those of other turns, of the content, calls and thoughts of
    answers, and of tools.
    """

    asked: list[int]
    said: list[int]
    called: list[int]
    thought: list[int]
    tools: list[int]


def _find_marks(dialog: Dialog, answers: Collection[int], text: str, cut: Cut) -> Writing[_Places]:
    """Render the turns of a cut with marks, and tell where these stand in the text without them.

    Raises:
        RenderError: with marks, another text is written.
    """
    marks = _free(text, len(_Places._fields))
    asked, said, called, thought, listed = marks
    # a name may be one that the template knows, and a flag may end a turn: then fewer marks, at
    # other places
    for place, name in ((_before_last, _text_before), (_text_before, _nowhere)):
        messages: list[Message] = []
        for i, message in enumerate(dialog.messages[: cut[0]]):
            if i in answers:
                changed = _mark(_mark(message, ("content",), said, place), THOUGHTS, thought, place)
                calls = [_mark_name(call, called, name) for call in message.get("tool_calls") or ()]
                messages.append({**changed, "tool_calls": calls} if calls else changed)
            else:
                messages.append(
                    message
                    if message["role"] == "assistant"
                    else _mark(message, ASKED, asked, place)
                )
        tools = [_mark_name(tool, listed, name) for tool in dialog.tools]
        plain, found = _unmark((yield from _render(messages, tools, cut)), marks)
        if plain == text:
            return (
                _Places(*found)
                if name is not _nowhere
                else _Places(*found)._replace(called=[*range(len(text))], tools=[0])
            )
    raise RenderError(
        "the chat template writes other turns differently where one has another letter: it is"
        " unknown whose words would be learned",
        fix=MEND,
    )


def _missing_parts(message: Message, i: int, inside: _Places) -> list[str]:
    """Tell what the template leaves out of an answer.

    Raises:
        RenderError: its content, or its calls of tools.
    """
    if message.get("tool_calls") and not inside.called:
        raise RenderError(
            f"the chat template does not write the tool calls of turn {i + 1}", fix=ANOTHER
        )
    notes: list[str] = []
    if _last(message.get("content") or "") >= 0 and not inside.said:
        if not message.get("tool_calls"):
            raise RenderError(
                f"the chat template does not write the content of turn {i + 1}", fix=ANOTHER
            )
        notes.append("the chat template does not write the content beside a call")
    thoughts = [
        key for key in THOUGHTS if isinstance(message.get(key), str) and _last(message[key]) >= 0
    ]
    return notes + [
        f"the chat template does not write {key!r}" for key in thoughts[:1] if not inside.thought
    ]


PlaceMark = Callable[[str, str], str]


def _mark_name(call: Mapping[str, Any], mark: str, place: PlaceMark) -> Mapping[str, Any]:
    """Mark the name of a tool, or of a call of one."""
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


def _last(text: str) -> int:
    """Return the place of the last letter that is in no tag at the end of a text; -1 where there is
    none.
    """
    end = len(text.rstrip())
    while end and text[end - 1] == ">" and (at := text.rfind("<", 0, end)) >= 0:
        end = len(text[:at].rstrip())
    return end - 1


def _before_last(text: str, mark: str) -> str:
    at = _last(text)
    return f"{text[:at]}{mark}{text[at:]}" if at >= 0 else text


def _text_before(text: str, mark: str) -> str:
    at = len(text) - len(text.lstrip())
    return f"{text[:at]}{mark}{text[at:]}" if text.strip() else text


def _nowhere(text: str, mark: str) -> str:
    return text


def _free(text: str, n: int) -> list[str]:
    """Return characters for private use that a text does not hold."""
    return list(
        itertools.islice((mark for mark in map(chr, range(0xE000, 0xF8FF)) if mark not in text), n)
    )


def _unmark(text: str, marks: Sequence[str]) -> tuple[str, list[list[int]]]:
    """Return a text without marks, and the places where each stood."""
    found: dict[str, list[int]] = {mark: [] for mark in marks}
    parts: list[str] = []
    length = 0
    for part in re.split(f"([{''.join(marks)}])", text):
        if part in found:
            found[part].append(length)
        else:
            parts.append(part)
            length += len(part)
    return "".join(parts), list(found.values())


def _read_arguments(dialog: Dialog) -> Writing[tuple[Message, ...]]:
    """Return the turns with the arguments of calls as the template takes them.

    Arguments that are JSON stay a text where the template writes a text as it is, and are parsed
    where it would write it as JSON once more: what it does with a quotation mark tells.
    """
    turns = [
        i
        for i, message in enumerate(dialog.messages)
        if any(map(_has_text, message.get("tool_calls") or ()))
    ]
    if not turns:
        return dialog.messages
    before, behind = _free(json.dumps(dialog.messages, ensure_ascii=False, default=str), 2)
    probe = f'{before}"{behind}'
    written = yield RenderRequest(
        [_with_arguments(message, lambda _: probe) for message in dialog.messages],
        dialog.tools,
        [(i + 1, False) for i in turns],
    )
    if any(isinstance(text, str) and probe in text for text in written):
        return dialog.messages
    return tuple(
        _with_arguments(message, lambda text: json.loads(text or "{}"))
        for message in dialog.messages
    )


def _has_text(call: Mapping[str, Any]) -> bool:
    return isinstance((call.get("function") or call).get("arguments"), str)


def _with_arguments(message: Message, change: Callable[[str], Any]) -> Message:
    def changed(call: Mapping[str, Any]) -> Mapping[str, Any]:
        if not _has_text(call):
            return call
        inner = call.get("function") or call
        inner = {**inner, "arguments": change(inner["arguments"])}
        return {**call, "function": inner} if call.get("function") else inner

    calls = message.get("tool_calls")
    return {**message, "tool_calls": [changed(call) for call in calls]} if calls else message

"""Dialogs to tokens and labels: what the model sees, and which of its tokens it learns.

The text of a dialog is cut where an answer of the assistant begins. A cut is where generation would begin, so the tokens
up to it must be those that generation would see. They are: each piece of the text is tokenised with all that comes before
it, and where that would change a token before the cut (`"A: "` and `"A: 42"` split differently), the piece is tokenised
behind a short anchor instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxpeft.data.dialogs import Completion, Dialog
from jaxpeft.data.templates import Cut, RenderError, Request, Template

IGNORED = -100
ANCHOR = "\n"


@dataclass(frozen=True)
class Script:
    """A dialog written out.

    Attributes:
        text: all of it.
        learned: `(start, end)` of each part that is learned, in characters, in order.
        begun: whether the text holds the tokens that a text begins with: a template writes them itself.
        answer: what is written of the answer that the text ends with, and its content; None where it ends with none.
    """

    text: str
    learned: tuple[tuple[int, int], ...]
    begun: bool
    answer: tuple[str, str] | None

    @property
    def cuts(self) -> list[int]:
        """Where the pieces of the text end: where each learned part begins, and the end."""
        return [*(start for start, _ in self.learned), len(self.text)]


@dataclass(frozen=True)
class Labelled:
    """Tokens and labels of one dialog, both of the same length; -100 where nothing is learned."""

    ids: list[int]
    labels: list[int]


Written = Mapping[Cut, str]
"""The text of a dialog at each cut."""


def write_all(
    dialogs: Sequence[Dialog | Completion], template: Template | None, separator: str = ""
) -> Iterator[Script | RenderError]:
    """Writes dialogs out, or says why one cannot be; what makes all of them fail is the last thing said.

    The learned part of a turn of the assistant is what the template adds to what it writes of the turns before, with a
    prompt to generate, up to where the turn ends. No mark in the template is needed.

    Args:
        dialogs: the dialogs.
        template: of their chats; None where there are only completions.
        separator: stands between a prompt and its completion.

    Raises:
        ConfigError: the template is no jinja.
    """
    chats = [dialog for dialog in dialogs if isinstance(dialog, Dialog)]
    rendered = _rendered(chats, [_cuts(chat, len(chat.messages), generate=False) for chat in chats], template)
    for dialog in dialogs:
        if isinstance(dialog, Completion):
            yield _completion(dialog, separator)
            continue
        made = next(rendered)
        try:
            yield made if isinstance(made, RenderError) else _chat(dialog, made)
        except RenderError as error:
            yield error
        if isinstance(made, RenderError) and made.fatal:
            return


def write(dialog: Dialog | Completion, template: Template | None, separator: str = "") -> Script:
    """Writes one dialog out: see `write_all`.

    Raises:
        RenderError: the template cannot write it, or writes earlier turns otherwise once later ones follow.
    """
    (made,) = write_all([dialog], template, separator)
    if isinstance(made, RenderError):
        raise made
    return made


def write_prompt(dialog: Dialog | Completion, template: Template | None, separator: str = "") -> Script:
    """Writes out what an answer is to be generated from; its tokens are those that training has before the answer.

    Args:
        dialog: the turns so far; of a completion, its prompt counts.
        template: of its chat; None for a completion.
        separator: stands behind a prompt.

    Raises:
        RenderError: as `write` does.
    """
    if isinstance(dialog, Completion):
        return Script(dialog.prompt + separator, (), begun=False, answer=None)
    end = len(dialog.messages)
    (made,) = _rendered([dialog], [_cuts(dialog, end, generate=True)], template)
    if isinstance(made, RenderError):
        raise made
    return Script(made[end, True], _learned(dialog, made[end, True], made), begun=True, answer=None)


def _completion(dialog: Completion, separator: str) -> Script:
    prompt = dialog.prompt + separator
    text = prompt + dialog.completion
    return Script(text, ((len(prompt), len(text)),), begun=False, answer=(dialog.completion, dialog.completion))


def _chat(dialog: Dialog, written: Written) -> Script:
    text = written[len(dialog.messages), False]
    learned = _learned(dialog, text, written)
    (start, end), last = learned[-1], dialog.messages[-1]
    answer = (text[start:], str(last["content"]).strip()) if end == len(text) and last["role"] == "assistant" else None
    return Script(text, learned, begun=True, answer=answer)


def _answers(dialog: Dialog) -> list[int]:
    return [i for i, message in enumerate(dialog.messages) if message["role"] == "assistant"]


def _cuts(dialog: Dialog, end: int, *, generate: bool) -> list[Cut]:
    """Lists the cuts at which a dialog is to be rendered: its end, and where each answer begins and ends."""
    around = [cut for i in _answers(dialog) for cut in ((i, True), (i + 1, False))]
    return list(dict.fromkeys([(end, generate), *around]))


def _rendered(
    dialogs: Sequence[Dialog], cuts: Sequence[Sequence[Cut]], template: Template | None
) -> Iterator[Written | RenderError]:
    if template is None:
        yield from (RenderError("there is no chat template to write messages with") for _ in dialogs)
        return
    requests = [Request(dialog.messages, dialog.tools, of) for dialog, of in zip(dialogs, cuts, strict=True)]
    for made, of in zip(template.render_all(requests), cuts, strict=False):  # nothing follows a fatal error
        yield made if isinstance(made, RenderError) else dict(zip(of, made, strict=True))


def _learned(dialog: Dialog, text: str, written: Written) -> tuple[tuple[int, int], ...]:
    """Finds the answers in the text of a dialog."""
    learned: list[tuple[int, int]] = []
    for i in _answers(dialog):
        before = written[i, True]
        if not text.startswith(before) or (learned and len(before) < learned[-1][1]):
            raise RenderError(f"the chat template writes the turns before turn {i + 1} otherwise once it follows")
        learned.append((len(before), _end(text, len(before), dialog, i, written[i + 1, False])))
    return tuple(learned)


def _end(text: str, start: int, dialog: Dialog, i: int, upto: str) -> int:
    """Finds where turn `i` ends in the whole text; `upto` is what the template writes if it is the last."""
    if text.startswith(upto):
        return len(upto)
    # Some templates write the last turn of a chat otherwise than those before (thoughts kept or dropped); what follows
    # its content is the same.
    content = str(dialog.messages[i]["content"]).strip()
    begin = upto.find(content, start) if content else -1
    while begin >= 0:  # the content may stand in what is left out, too
        at = text.find(upto[begin:], start)
        if at >= 0:
            return at + len(upto) - begin
        begin = upto.find(content, begin + 1)
    raise RenderError(f"the chat template writes turn {i + 1} otherwise once another follows")


def marks_of(tokenizer: Any) -> set[str]:
    """Gives the texts that are one token each, whatever stands around them: EOS, the marks of a chat template, and so on."""
    return {token.content for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)


def _marked(answer: tuple[str, str], marks: set[str]) -> bool:
    """Says whether a mark stands behind the content of an answer; one that is part of the content is none."""
    written, content = answer
    bare = written
    for mark in sorted(marks, key=len, reverse=True):
        if mark not in content:
            bare = bare.replace(mark, "\0" * len(mark))  # the content may stand in a mark, too: `d` in `<|im_end|>`
    at = bare.rfind(content) if content else 0
    tail = written[max(0, at) + len(content) :]
    return any(mark in tail for mark in marks)


def label(scripts: Sequence[Script], tokenizer: Any, *, begin: Sequence[int], end: int | None) -> list[Labelled]:
    """Tokenises dialogs and labels what is learned.

    Args:
        scripts: the dialogs, written out.
        tokenizer: a fast tokenizer of `transformers`.
        begin: tokens that a text begins with, where a template has not written them.
        end: token that an answer at the end is followed by, where the template has put no mark there that is a token of its
            own, such as `<|im_end|>` where the tokenizer knows it; None for none.
    """
    marks = marks_of(tokenizer)
    texts = [script.text[:cut] for script in scripts for cut in script.cuts]
    pieces = iter(encodings(tokenizer, texts))
    out: list[Labelled] = []
    for script in scripts:
        ids, learned = _join(script, [next(pieces) for _ in script.cuts], tokenizer)
        labels = [IGNORED] * len(ids)
        for start, stop in learned:
            labels[start:stop] = ids[start:stop]
        if not script.begun:
            ids, labels = [*begin, *ids], [IGNORED] * len(begin) + labels
        unmarked = script.answer is not None and not _marked(script.answer, marks)
        if end is not None and unmarked and labels[-1:] not in ([IGNORED], [end], []):
            ids.append(end)
            labels.append(end)
        if doubled := _doubled(ids, tokenizer.bos_token_id):
            ids, labels = ids[doubled:], labels[doubled:]
        out.append(Labelled(ids, labels))
    return out


def encodings(tokenizer: Any, texts: Sequence[str]) -> list[Any]:
    """Tokenises texts without special tokens, as `tokenizers` gives them: what is not asked for is not made.

    Args:
        tokenizer: a fast tokenizer of `transformers`.
        texts: the texts.
    """
    backend = tokenizer.backend_tokenizer
    # a call with truncation leaves these set; they must not be touched while another thread uses the tokenizer
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if backend.encode_special_tokens:
        backend.encode_special_tokens = False
    return backend.encode_batch(list(texts), add_special_tokens=False)


def _doubled(ids: Sequence[int], bos: int | None) -> int:
    """Counts the BOS before the last BOS of those that a text begins with."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair == (bos, bos), itertools.pairwise(ids)))


def _join(script: Script, pieces: Sequence[Any], tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Joins the tokens up to each cut, never changing those before it; gives tokens, and from which to which is learned."""
    ids: list[int] = []
    learned: list[tuple[int, int]] = []
    ends = [None, *(end for _, end in script.learned)]
    for before, cut, end, piece in zip([0, *script.cuts], script.cuts, ends, pieces, strict=False):
        start, tokens, anchored = len(ids), piece.ids, None
        known = start
        if tokens[:known] == ids:
            ids = tokens
        else:
            anchored, known = _behind_anchor(script.text[before:cut], tokenizer), 0
            tokens = anchored[0]
            ids = ids + tokens
        if end is None:
            continue
        inside = len(tokens)
        if end < cut:  # something of the template stands between the answer and the next cut
            offsets, shift = (anchored[1], before) if anchored else (piece.offsets, 0)
            inside = sum(at + shift < end for at, _ in offsets)
        learned.append((start, start + max(0, inside - known)))
    return ids, learned


def _behind_anchor(text: str, tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokenises a text as if something stood before it: some tokenizers begin a text with a mark of their own."""
    anchor, whole = encodings(tokenizer, [ANCHOR, ANCHOR + text])
    known = len(anchor.ids)
    if whole.ids[:known] == anchor.ids:
        return whole.ids[known:], [(start - len(ANCHOR), end - len(ANCHOR)) for start, end in whole.offsets[known:]]
    (alone,) = encodings(tokenizer, [text])
    return alone.ids, alone.offsets

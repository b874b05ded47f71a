"""Dialogs to tokens and labels: what the model sees, and which of its tokens it learns.

The tokens before an answer are those that generation would see: those of the text up to there,
tokenized by itself. Those of the answer go on behind them; where the tokens of both together would
begin otherwise (`"A: "` and `"A: 42"` split differently), the answer is tokenized behind a short
anchor instead. The next answer shares the row if the tokens before it begin with the row's; else it
gets one of its own.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxpeft.data.chat.dialogs import Completion, Dialog
from jaxpeft.data.chat.scripts import Script, Writing, write_dialog, write_turns
from jaxpeft.data.chat.templates import RenderError, RenderRequest, Template

IGNORED = -100
ANCHOR = "\n"
TOGETHER = 64
"""How many dialogs are rendered at once: each is held to every one of its cuts."""


@dataclass(frozen=True)
class Labeled:
    """Tokens and labels of one row, both of the same length; -100 where nothing is learned.

    `earlier` are the rows of the same dialog before it.
    """

    ids: list[int]
    labels: list[int]
    earlier: tuple[Labeled, ...] = ()


def write_all(
    dialogs: Sequence[Dialog | Completion], template: Template | None, separator: str = ""
) -> Iterator[Script | RenderError]:
    """Write dialogs out, or say why one cannot be; what makes all of them fail is the last thing
    said.

    Args:
        dialogs: the dialogs.
        template: of their chats; None where there are only completions.
        separator: stands between a prompt and its completion.

    Raises:
        ConfigError: the template is no jinja.
    """
    for start in range(0, len(dialogs), TOGETHER):
        some = dialogs[start : start + TOGETHER]
        written = iter(
            _render_all(
                [write_dialog(dialog) for dialog in some if isinstance(dialog, Dialog)], template
            )
        )
        for dialog in some:
            made = next(written) if isinstance(dialog, Dialog) else _completion(dialog, separator)
            yield made
            if isinstance(made, RenderError) and made.fatal:
                return


def write(dialog: Dialog | Completion, template: Template | None, separator: str = "") -> Script:
    """Write one dialog out: see `write_all`.

    Raises:
        RenderError: the template cannot write it, or no answer of it can be learned.
    """
    (made,) = write_all([dialog], template, separator)
    if isinstance(made, RenderError):
        raise made
    return made


def write_prompt(
    dialog: Dialog | Completion, template: Template | None, separator: str = ""
) -> Script:
    """Write out what an answer is to be generated from; its tokens are those that training has
    before the answer.

    Args:
        dialog: the turns so far; of a completion, its prompt counts.
        template: of its chat; None for a completion.
        separator: stands behind a prompt.

    Raises:
        RenderError: the template cannot write it.
    """
    if isinstance(dialog, Completion):
        return Script(dialog.prompt + separator, (), (), begun=False)
    (made,) = _render_all([write_turns(dialog)], template)
    if isinstance(made, RenderError):
        raise made
    return made


def _completion(dialog: Completion, separator: str) -> Script:
    prompt = dialog.prompt + separator
    text = prompt + dialog.completion
    return Script(text, ((len(prompt), len(text)),), ("",), begun=False)


def _render_all(
    writings: Sequence[Writing[Script]], template: Template | None
) -> list[Script | RenderError]:
    """Let a template answer what each writing asks for, all of them at once; a fatal error is the
    last thing returned.
    """
    if template is None:
        return [RenderError("there is no chat template to write messages with") for _ in writings]
    made: dict[int, Script | RenderError] = {}
    stop = len(writings)

    def ask(i: int, reply: list[str | RenderError] | RenderError | None) -> RenderRequest | None:
        try:
            if isinstance(reply, RenderError):
                return writings[i].throw(reply)
            return next(writings[i]) if reply is None else writings[i].send(reply)
        except StopIteration as done:
            made[i] = done.value
        except RenderError as error:
            made[i] = error
        return None

    asked = {i: ask(i, None) for i in range(stop)}
    while requests := {
        i: request for i, request in asked.items() if request is not None and i < stop
    }:
        replies = template.render_all(list(requests.values()))
        asked = {
            i: ask(i, reply) for i, reply in zip(requests, replies, strict=False)
        }  # nothing follows a fatal error
        if isinstance(replies[-1], RenderError):
            stop = list(requests)[len(replies) - 1]
    return [made[i] for i in range(min(stop + 1, len(writings)))]


def marks_of(tokenizer: Any) -> set[str]:
    """Return the texts that are one token each, whatever stands around them: EOS, the marks of a
    chat template, and so on.
    """
    return {token.content for token in tokenizer.added_tokens_decoder.values()} | set(
        tokenizer.all_special_tokens
    )


def label(
    scripts: Sequence[Script], tokenizer: Any, *, begin: Sequence[int], end: int | None
) -> list[Labeled]:
    """Tokenize dialogs and labels what is learned.

    Args:
        scripts: the dialogs, written out.
        tokenizer: a fast tokenizer of `transformers`.
        begin: tokens that a text begins with, where a template has not written them.
        end: token that an answer at the end of a row is followed by, where the template ends it
            with no mark that is a token of its own, such as `<|im_end|>` where the tokenizer knows
            it; None for none.

    Returns:
        For each dialog its last row, which holds those before it.
    """
    marks = tuple(mark for mark in marks_of(tokenizer) if mark)
    rows = [(i, row) for i, script in enumerate(scripts) for row in (*script.earlier, script)]
    pieces = prefixes(tokenizer, [(row.text, row.cuts) for _, row in rows])
    made: list[list[Labeled]] = [[] for _ in scripts]
    for (i, row), upto in zip(rows, pieces, strict=True):
        for ids, learned, tail in _rows(row, upto, tokenizer):
            labels = [IGNORED] * len(ids)
            for start, stop in learned:
                labels[start:stop] = ids[start:stop]
            unmarked = not tail.rstrip().endswith(marks)
            last = (
                [end]
                if end is not None and unmarked and labels[-1:] not in ([IGNORED], [end], [])
                else []
            )
            first = [] if row.begun else [*begin]
            whole = [*first, *ids, *last]
            doubled = _count_doubled_bos(whole, tokenizer.bos_token_id)
            made[i].append(
                Labeled(whole[doubled:], [*[IGNORED] * len(first), *labels, *last][doubled:])
            )
    return [replace(of[-1], earlier=tuple(of[:-1])) for of in made]


def _rows(
    script: Script, pieces: Sequence[list[int]], tokenizer: Any
) -> list[tuple[list[int], list[tuple[int, int]], str]]:
    """Join the tokens up to each cut, never changing those before it.

    Returns:
        The tokens of each row, from which to which is learned, and what ends its last answer.
    """
    rows: list[tuple[list[int], list[tuple[int, int]], str]] = []
    ids, learned, tail = pieces[0], list[tuple[int, int]](), ""
    answers = zip(script.learned, script.tails, pieces[::2], pieces[1::2], strict=False)
    for (start, end), ends, prompt, upto in answers:
        if prompt[: len(ids)] != ids:
            rows.append((ids, learned, tail))
            learned = []
        torn = upto[: len(prompt)] != prompt
        ids = prompt + _tokenize_behind_anchor(script.text[start:end], tokenizer) if torn else upto
        learned.append((len(prompt), len(ids)))
        tail = ends
    return [*rows, (ids, learned, tail)]


def encodings(tokenizer: Any, texts: Sequence[str]) -> list[Any]:
    """Tokenize texts without special tokens, as `tokenizers` gives them: what is not asked for is
    not made.

    Args:
        tokenizer: a fast tokenizer of `transformers`.
        texts: the texts.
    """
    backend = tokenizer.backend_tokenizer
    # a call with truncation leaves these set; they must not be touched while another thread uses
    # the tokenizer
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if backend.encode_special_tokens:
        backend.encode_special_tokens = False
    return backend.encode_batch(list(texts), add_special_tokens=False)


def prefixes(tokenizer: Any, texts: Sequence[tuple[str, Sequence[int]]]) -> list[list[list[int]]]:
    """Tokenize texts up to each of their cuts, as if each was a text of its own.

    A token that has been added to the vocabulary parts a text: what stands before it and behind it
    do not see each other. So a text up to a cut has the tokens that the whole has before the last
    such token, and those of the rest.

    Args:
        tokenizer: a fast tokenizer of `transformers`.
        texts: each with its cuts, in characters.
    """
    added = {i: token.content.strip() for i, token in tokenizer.added_tokens_decoder.items()}
    heads: list[list[int]] = []
    rests: list[str] = []
    for (text, cuts), whole in zip(
        texts, encodings(tokenizer, [text for text, _ in texts]), strict=True
    ):
        ids = whole.ids
        # an unknown letter is the same token as the mark of one, and parts nothing
        parted = [(0, 0, 0)] + [
            (end, start, at)
            for at, (token, (start, end)) in enumerate(zip(ids, whole.offsets, strict=True))
            if token in added and text[start:end].strip() == added[token]
        ]
        for cut in cuts:
            _, start, at = parted[bisect.bisect_right(parted, cut, key=lambda part: part[0]) - 1]
            heads.append(ids if cut == len(text) else ids[:at])
            rests.append("" if cut == len(text) else text[start:cut])
    tails = encodings(tokenizer, rests)
    made = iter([[*head, *tail.ids] for head, tail in zip(heads, tails, strict=True)])
    return [[next(made) for _ in cuts] for _, cuts in texts]


def _count_doubled_bos(ids: Sequence[int], bos: int | None) -> int:
    """Count the BOS before the last BOS of those that a text begins with."""
    return sum(
        1 for _ in itertools.takewhile(lambda pair: pair == (bos, bos), itertools.pairwise(ids))
    )


def _tokenize_behind_anchor(text: str, tokenizer: Any) -> list[int]:
    """Tokenize a text as if something stood before it: some tokenizers begin a text with a mark of
    their own.
    """
    anchor, whole = encodings(tokenizer, [ANCHOR, ANCHOR + text])
    known = len(anchor.ids)
    return (
        whole.ids[known:]
        if whole.ids[:known] == anchor.ids
        else encodings(tokenizer, [text])[0].ids
    )

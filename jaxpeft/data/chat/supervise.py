"""Turn dialogs into token ids and labels: the model's input and its loss mask.

The tokens before an answer are exactly those that generation would see: its prompt, tokenized
separately. The answer's tokens follow them. If tokenizing both together would change the prompt's
tokens (`"A: "` and `"A: 42"` split differently), the answer is tokenized after a short anchor
instead. The next answer shares the row if its prompt's tokens start with the row's; otherwise it
gets a new row.
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
DIALOGS_PER_BATCH = 64
"""Number of dialogs rendered at once; each stays in memory with the texts of all its cuts."""


@dataclass(frozen=True)
class Labeled:
    """Token ids and labels of one row, of the same length; the label of masked tokens is -100.

    `earlier` has the preceding rows of the same dialog.
    """

    ids: list[int]
    labels: list[int]
    earlier: tuple[Labeled, ...] = ()


def write_all(
    dialogs: Sequence[Dialog | Completion], template: Template | None, separator: str = ""
) -> Iterator[Script | RenderError]:
    """Yield the script or the error of each dialog; stop after a fatal error.

    Args:
        dialogs: the dialogs.
        template: the chat template; None if all dialogs are completions.
        separator: text between a prompt and its completion.

    Raises:
        ConfigError: the template is not valid Jinja.
    """
    for start in range(0, len(dialogs), DIALOGS_PER_BATCH):
        batch = dialogs[start : start + DIALOGS_PER_BATCH]
        rendered = iter(
            _render_all(
                [write_dialog(dialog) for dialog in batch if isinstance(dialog, Dialog)], template
            )
        )
        for dialog in batch:
            script = (
                next(rendered) if isinstance(dialog, Dialog) else _completion(dialog, separator)
            )
            yield script
            if isinstance(script, RenderError) and script.fatal:
                return


def write(dialog: Dialog | Completion, template: Template | None, separator: str = "") -> Script:
    """Return the script of one dialog: see `write_all`.

    Raises:
        RenderError: the template cannot render it, or none of its answers can be in the loss.
    """
    (script,) = write_all([dialog], template, separator)
    if isinstance(script, RenderError):
        raise script
    return script


def write_prompt(
    dialog: Dialog | Completion, template: Template | None, separator: str = ""
) -> Script:
    """Return the prompt to generate an answer from; training sees the same tokens before it.

    Args:
        dialog: the turns so far; for a completion, only its prompt is used.
        template: the chat template; None for a completion.
        separator: text after the prompt of a completion.

    Raises:
        RenderError: the template cannot render the turns.
    """
    if isinstance(dialog, Completion):
        return Script(dialog.prompt + separator, (), (), has_bos=False)
    (script,) = _render_all([write_turns(dialog)], template)
    if isinstance(script, RenderError):
        raise script
    return script


def _completion(dialog: Completion, separator: str) -> Script:
    prompt = dialog.prompt + separator
    text = prompt + dialog.completion
    return Script(text, ((len(prompt), len(text)),), ("",), has_bos=False)


def _render_all(
    writings: Sequence[Writing[Script]], template: Template | None
) -> list[Script | RenderError]:
    """Run all generators together, batching their render requests; a fatal error comes last."""
    if template is None:
        return [RenderError("there is no chat template to render messages with") for _ in writings]
    scripts: dict[int, Script | RenderError] = {}
    stop = len(writings)

    def advance(
        i: int, reply: list[str | RenderError] | RenderError | None
    ) -> RenderRequest | None:
        try:
            if isinstance(reply, RenderError):
                return writings[i].throw(reply)
            return next(writings[i]) if reply is None else writings[i].send(reply)
        except StopIteration as done:
            scripts[i] = done.value
        except RenderError as error:
            scripts[i] = error
        return None

    pending = {i: advance(i, None) for i in range(stop)}
    while requests := {
        i: request for i, request in pending.items() if request is not None and i < stop
    }:
        replies = template.render_all(list(requests.values()))
        pending = {
            i: advance(i, reply) for i, reply in zip(requests, replies, strict=False)
        }  # no reply follows a fatal error
        if isinstance(replies[-1], RenderError):
            stop = list(requests)[len(replies) - 1]
    return [scripts[i] for i in range(min(stop + 1, len(writings)))]


def marks_of(tokenizer: Any) -> set[str]:
    """Return the texts that are always a single token: EOS, chat markers and other added tokens."""
    return {token.content for token in tokenizer.added_tokens_decoder.values()} | set(
        tokenizer.all_special_tokens
    )


def label(
    scripts: Sequence[Script], tokenizer: Any, *, begin: Sequence[int], end: int | None
) -> list[Labeled]:
    """Tokenize dialogs and label the tokens in the loss.

    Args:
        scripts: the rendered dialogs.
        tokenizer: a fast tokenizer of `transformers`.
        begin: tokens that start a text, such as BOS; added if the template does not write them.
        end: token to append to an answer at the end of a row, unless the template already ends it
            with a marker that is a token, such as `<|im_end|>`; None for no token.

    Returns:
        The last row of each dialog; its `earlier` has the preceding ones.
    """
    marks = tuple(mark for mark in marks_of(tokenizer) if mark)
    rows = [(i, row) for i, script in enumerate(scripts) for row in (*script.earlier, script)]
    pieces = prefixes(tokenizer, [(row.text, row.cuts) for _, row in rows])
    labeled: list[list[Labeled]] = [[] for _ in scripts]
    for (i, row), upto in zip(rows, pieces, strict=True):
        for ids, spans, tail in _rows(row, upto, tokenizer):
            labels = [IGNORED] * len(ids)
            for start, stop in spans:
                labels[start:stop] = ids[start:stop]
            unmarked = not tail.rstrip().endswith(marks)
            last = (
                [end]
                if end is not None and unmarked and labels[-1:] not in ([IGNORED], [end], [])
                else []
            )
            first = [] if row.has_bos else [*begin]
            all_ids = [*first, *ids, *last]
            extra = _count_extra_bos(all_ids, tokenizer.bos_token_id)
            labeled[i].append(
                Labeled(all_ids[extra:], [*[IGNORED] * len(first), *labels, *last][extra:])
            )
    return [replace(of_dialog[-1], earlier=tuple(of_dialog[:-1])) for of_dialog in labeled]


def _rows(
    script: Script, pieces: Sequence[list[int]], tokenizer: Any
) -> list[tuple[list[int], list[tuple[int, int]], str]]:
    """Join the tokens up to each cut without changing those before it.

    Returns:
        For each row: its token ids, the spans in the loss, and the text that ends its last answer.
    """
    rows: list[tuple[list[int], list[tuple[int, int]], str]] = []
    ids, spans, tail = pieces[0], list[tuple[int, int]](), ""
    answers = zip(script.loss_spans, script.tails, pieces[::2], pieces[1::2], strict=False)
    for (start, end), answer_tail, prompt, upto in answers:
        if prompt[: len(ids)] != ids:
            rows.append((ids, spans, tail))
            spans = []
        if upto[: len(prompt)] == prompt:
            ids = upto
        else:
            ids = prompt + _tokenize_after_anchor(script.text[start:end], tokenizer)
        spans.append((len(prompt), len(ids)))
        tail = answer_tail
    return [*rows, (ids, spans, tail)]


def encodings(tokenizer: Any, texts: Sequence[str]) -> list[Any]:
    """Tokenize texts without special tokens; return the `tokenizers` encodings, which are lazy.

    Args:
        tokenizer: a fast tokenizer of `transformers`.
        texts: the texts.
    """
    backend = tokenizer.backend_tokenizer
    # earlier calls with truncation leave these set; do not change them while another thread uses
    # the tokenizer
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if backend.encode_special_tokens:
        backend.encode_special_tokens = False
    return backend.encode_batch(list(texts), add_special_tokens=False)


def prefixes(tokenizer: Any, texts: Sequence[tuple[str, Sequence[int]]]) -> list[list[list[int]]]:
    """Tokenize texts up to each of their cuts, as if each prefix were a separate text.

    Added tokens split a text: the parts before and after one are tokenized independently. So the
    tokens of a prefix are those of the full text before its last added token, then those of the
    rest of the prefix.

    Args:
        tokenizer: a fast tokenizer of `transformers`.
        texts: each text with its cuts, in characters.
    """
    added = {i: token.content.strip() for i, token in tokenizer.added_tokens_decoder.items()}
    heads: list[list[int]] = []
    rests: list[str] = []
    for (text, cuts), encoding in zip(
        texts, encodings(tokenizer, [text for text, _ in texts]), strict=True
    ):
        ids = encoding.ids
        # an unknown character has the id of the unknown token, but does not split the text
        splits = [(0, 0, 0)] + [
            (end, start, at)
            for at, (token, (start, end)) in enumerate(zip(ids, encoding.offsets, strict=True))
            if token in added and text[start:end].strip() == added[token]
        ]
        for cut in cuts:
            _, start, at = splits[bisect.bisect_right(splits, cut, key=lambda split: split[0]) - 1]
            heads.append(ids if cut == len(text) else ids[:at])
            rests.append("" if cut == len(text) else text[start:cut])
    tails = encodings(tokenizer, rests)
    ids_of_prefixes = iter([[*head, *tail.ids] for head, tail in zip(heads, tails, strict=True)])
    return [[next(ids_of_prefixes) for _ in cuts] for _, cuts in texts]


def _count_extra_bos(ids: Sequence[int], bos: int | None) -> int:
    """Return the number of BOS tokens to remove so that the text starts with only one."""
    return sum(
        1 for _ in itertools.takewhile(lambda pair: pair == (bos, bos), itertools.pairwise(ids))
    )


def _tokenize_after_anchor(text: str, tokenizer: Any) -> list[int]:
    """Tokenize a text as a continuation: some tokenizers add a marker at the start of a text."""
    anchor, joined = encodings(tokenizer, [ANCHOR, ANCHOR + text])
    n = len(anchor.ids)
    return joined.ids[n:] if joined.ids[:n] == anchor.ids else encodings(tokenizer, [text])[0].ids

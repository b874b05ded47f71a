"""Texts to token ids with a fast tokenizer, one batch of rows at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jaxpeft.data.chat.dialogs import Dialog
from jaxpeft.data.chat.supervise import IGNORED, Script, label, write_all, write_prompt
from jaxpeft.data.chat.templates import Template, get_template
from jaxpeft.data.examples.make import Examples
from jaxpeft.data.problems import Problems, excerpt


@dataclass(frozen=True)
class TokenizeOptions:
    """What changes the tokens, beside the tokenizer: see `encode`.

    `spaced` puts a space before each word: words given one by one lose it where it is part of a
    word's first token.
    """

    max_length: int
    add_bos: bool
    add_eos: bool
    template: Mapping[str, str] | None = None
    separator: str = ""
    spaced: bool = False


@dataclass
class TokenizedRows:
    """The token sequences of some rows.

    Attributes:
        ids: the tokens of each sequence.
        types: their token types, empty where the tokenizer makes none.
        labels: their labels, empty where a label belongs to an example.
        source: the row of each sequence.
        truncated: how many rows lost tokens.
        dropped: the rows that are left out, since no token of theirs is learned.
        unlearned: how many answers cannot be learned.
        notes: what should be told of the answers, and of how many.
    """

    ids: list[list[int]]
    types: list[list[int]]
    labels: list[list[int]]
    source: list[int]
    truncated: int = 0
    dropped: list[int] = field(default_factory=list[int])
    unlearned: int = 0
    notes: Counter[str] = field(default_factory=Counter[str])


def tokenize(
    examples: Examples, tokenizer: Any, start: int, stop: int, options: TokenizeOptions
) -> TokenizedRows:
    """Tokenize the rows from `start` up to `stop`."""
    kinds = {"classification": _sentences, "token_classification": _words, "text": _documents}
    return kinds.get(examples.kind, _dialogs)(examples, tokenizer, range(start, stop), options)


def _sentences(
    examples: Examples, tokenizer: Any, rows: range, options: TokenizeOptions
) -> TokenizedRows:
    texts = examples.texts[rows.start : rows.stop]
    pairs = examples.pairs[rows.start : rows.stop] if examples.pairs else None
    made = tokenizer(texts, pairs, truncation=True, max_length=options.max_length, verbose=False)
    return TokenizedRows(made["input_ids"], _types(made), [], list(rows), _truncate(made))


def _words(
    examples: Examples, tokenizer: Any, rows: range, options: TokenizeOptions
) -> TokenizedRows:
    texts = examples.texts[rows.start : rows.stop]
    if options.spaced:
        texts = [[word if word[:1].isspace() else f" {word}" for word in words] for words in texts]
    made = tokenizer(
        texts,
        is_split_into_words=True,
        truncation=True,
        max_length=options.max_length,
        verbose=False,
    )
    tags: Any = examples.labels
    labels = [_first_subtokens(made.word_ids(i), tags[row]) for i, row in enumerate(rows)]
    return TokenizedRows(made["input_ids"], _types(made), labels, list(rows), _truncate(made))


def _documents(
    examples: Examples, tokenizer: Any, rows: range, options: TokenizeOptions
) -> TokenizedRows:
    made = tokenizer(examples.texts[rows.start : rows.stop], truncation=False, verbose=False)
    batch = TokenizedRows([], [], [], [])
    for row, ids in zip(rows, made["input_ids"], strict=True):
        whole = _with_ends(ids, tokenizer, options)
        chunks = [
            whole[i : i + options.max_length] for i in range(0, len(whole), options.max_length)
        ] or [[]]
        batch.ids += chunks
        batch.source += [row] * len(chunks)
    batch.labels = batch.ids
    return batch


def _dialogs(
    examples: Examples, tokenizer: Any, rows: range, options: TokenizeOptions
) -> TokenizedRows:
    eos, begin = tokenizer.eos_token_id, _begin_token(tokenizer, options)
    scripts = _scripts(examples, tokenizer, rows, options)
    batch = TokenizedRows([], [], [], [])
    for script in scripts:
        batch.unlearned += len(script.excluded)
        parts = (*script.earlier, script)
        batch.notes.update(note for part in parts for note in (*part.excluded, *part.notes))
    most = options.max_length
    for row, made in zip(
        rows,
        label(scripts, tokenizer, begin=begin, end=eos if options.add_eos else None),
        strict=True,
    ):
        parts = (*made.earlier, made)
        batch.truncated += any(len(part.ids) > most for part in parts)
        kept = [part for part in parts if any(token != IGNORED for token in part.labels[1:most])]
        if not kept:
            batch.dropped.append(row)
        for part in kept:
            batch.ids.append(part.ids[:most])
            batch.labels.append(part.labels[:most])
            batch.source.append(row)
    return batch


def prompt_ids(examples: Examples, row: int, tokenizer: Any, options: TokenizeOptions) -> list[int]:
    """Return the tokens that the last answer of a dialog is generated from: those that training has
    before it.

    Args:
        examples: of dialogs.
        row: which, from 0.
        tokenizer: a fast tokenizer of `transformers`.
        options: as `encode` makes them.
    """
    dialog: Any = examples.texts[row]
    if isinstance(dialog, Dialog):
        dialog = replace(dialog, messages=dialog.messages[: dialog.answers[-1]])
    (made,) = label(
        [write_prompt(dialog, _template(options, tokenizer), options.separator)],
        tokenizer,
        begin=_begin_token(tokenizer, options),
        end=None,
    )
    return made.ids


def _begin_token(tokenizer: Any, options: TokenizeOptions) -> list[int]:
    own = prefix(tokenizer)
    return own if options.add_bos else [token for token in own if token != tokenizer.bos_token_id]


def _template(options: TokenizeOptions, tokenizer: Any) -> Template | None:
    if options.template is None:
        return None
    return get_template(tuple(options.template.items()), tuple(special_tokens(tokenizer).items()))


def _scripts(
    examples: Examples, tokenizer: Any, rows: range, options: TokenizeOptions
) -> list[Script]:
    problems, scripts = Problems(), list[Script]()
    dialogs: Any = examples.texts[rows.start : rows.stop]
    for made, row in zip(
        write_all(dialogs, _template(options, tokenizer), options.separator), rows, strict=False
    ):
        if isinstance(made, Script):
            scripts.append(made)
            continue
        text = excerpt(str(examples.rows.records[row]))
        problems.add(examples.rows.where(row), str(made), text, made.fix)
    problems.raise_if_any()
    return scripts


def prefix(tokenizer: Any) -> list[int]:
    """Return the tokens that a tokenizer puts before a text by itself, such as BOS."""
    whole, alone = (
        tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False)
    )
    at = next((i for i in range(len(whole)) if whole[i : i + len(alone)] == alone), 0)
    return whole[:at]


def special_tokens(tokenizer: Any) -> dict[str, str]:
    """Return a tokenizer's special tokens by name, such as `bos_token`."""
    return {
        name: str(token)
        for name, token in tokenizer.special_tokens_map.items()
        if isinstance(token, str)
    }


def _with_ends(ids: Sequence[int], tokenizer: Any, options: TokenizeOptions) -> list[int]:
    """Add BOS and EOS where asked for and not there, and never leaves two BOS at the beginning."""
    whole, bos, eos = list(ids), tokenizer.bos_token_id, tokenizer.eos_token_id
    while len(whole) > 1 and bos is not None and whole[0] == whole[1] == bos:
        del whole[0]
    if options.add_bos and bos is not None and whole[:1] != [bos]:
        whole.insert(0, bos)
    if options.add_eos and eos is not None and whole[-1:] != [eos]:
        whole.append(eos)
    return whole


def _first_subtokens(word_ids: Sequence[int | None], tags: np.ndarray) -> list[int]:
    before = (None, *word_ids[:-1])
    return [
        IGNORED if word is None or word == previous else int(tags[word])
        for word, previous in zip(word_ids, before, strict=True)
    ]


def _types(made: Any) -> list[list[int]]:
    return made.get("token_type_ids", [])


def _truncate(made: Any) -> int:
    return sum(bool(encoding.overflowing) for encoding in made.encodings)

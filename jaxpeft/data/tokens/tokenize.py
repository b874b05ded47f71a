"""Tokenize examples with a fast tokenizer, one batch of rows at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jaxpeft.data.chat.dialogs import Completion, Dialog
from jaxpeft.data.chat.supervise import IGNORED, Script, label, write_all, write_prompt
from jaxpeft.data.chat.templates import Template, get_template
from jaxpeft.data.examples.make import Examples
from jaxpeft.data.problems import Problems, excerpt


@dataclass(frozen=True)
class TokenizeOptions:
    """Everything that determines the tokens, in addition to the tokenizer: see `encode`.

    `spaced` adds a space before each word of pre-split input, for tokenizers in which the space is
    part of a word's first token.
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
        ids: the token ids of each sequence.
        types: the token types of each sequence; empty if the tokenizer has none.
        labels: the token labels of each sequence; empty if labels are per example.
        source: the row of each sequence.
        truncated: number of truncated rows.
        dropped: the rows that are dropped because none of their tokens is in the loss.
        unlearned: number of answers that cannot be in the loss.
        notes: warnings about answers, with the number of answers.
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
    encoding = tokenizer(
        texts, pairs, truncation=True, max_length=options.max_length, verbose=False
    )
    return TokenizedRows(
        encoding["input_ids"], _types(encoding), [], list(rows), _count_truncated(encoding)
    )


def _words(
    examples: Examples, tokenizer: Any, rows: range, options: TokenizeOptions
) -> TokenizedRows:
    texts = examples.texts[rows.start : rows.stop]
    if options.spaced:
        texts = [[word if word[:1].isspace() else f" {word}" for word in words] for words in texts]
    encoding = tokenizer(
        texts,
        is_split_into_words=True,
        truncation=True,
        max_length=options.max_length,
        verbose=False,
    )
    tags: Any = examples.labels
    labels = [_label_first_subtokens(encoding.word_ids(i), tags[row]) for i, row in enumerate(rows)]
    return TokenizedRows(
        encoding["input_ids"], _types(encoding), labels, list(rows), _count_truncated(encoding)
    )


def _documents(
    examples: Examples, tokenizer: Any, rows: range, options: TokenizeOptions
) -> TokenizedRows:
    encoding = tokenizer(examples.texts[rows.start : rows.stop], truncation=False, verbose=False)
    batch = TokenizedRows([], [], [], [])
    for row, ids in zip(rows, encoding["input_ids"], strict=True):
        document = _with_ends(ids, tokenizer, options)
        chunks = [
            document[i : i + options.max_length]
            for i in range(0, len(document), options.max_length)
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
    max_length = options.max_length
    for row, labeled in zip(
        rows,
        label(scripts, tokenizer, begin=begin, end=eos if options.add_eos else None),
        strict=True,
    ):
        parts = (*labeled.earlier, labeled)
        batch.truncated += any(len(part.ids) > max_length for part in parts)
        trainable = [
            part for part in parts if any(token != IGNORED for token in part.labels[1:max_length])
        ]
        if not trainable:
            batch.dropped.append(row)
        for part in trainable:
            batch.ids.append(part.ids[:max_length])
            batch.labels.append(part.labels[:max_length])
            batch.source.append(row)
    return batch


def prompt_ids(examples: Examples, row: int, tokenizer: Any, options: TokenizeOptions) -> list[int]:
    """Return the prompt tokens of the last answer in a dialog, the same as in training.

    Args:
        examples: examples with dialogs.
        row: the index of the row, from 0.
        tokenizer: a fast tokenizer of `transformers`.
        options: the options, from `make_options`.
    """
    dialog: Any = examples.texts[row]
    if isinstance(dialog, Dialog):
        dialog = replace(dialog, messages=dialog.messages[: dialog.answers[-1]])
    return encode_prompt(dialog, tokenizer, options)


def encode_prompt(
    dialog: Dialog | Completion, tokenizer: Any, options: TokenizeOptions
) -> list[int]:
    """Return the tokens from which to generate an answer; training sees the same before it.

    Args:
        dialog: the turns so far; for a completion, only its prompt is used.
        tokenizer: a fast tokenizer of `transformers`.
        options: the options.

    Raises:
        RenderError: the template cannot render the turns.
    """
    (labeled,) = label(
        [write_prompt(dialog, _template(options, tokenizer), options.separator)],
        tokenizer,
        begin=_begin_token(tokenizer, options),
        end=None,
    )
    return labeled.ids


def _begin_token(tokenizer: Any, options: TokenizeOptions) -> list[int]:
    ids = prefix(tokenizer)
    return ids if options.add_bos else [token for token in ids if token != tokenizer.bos_token_id]


def _template(options: TokenizeOptions, tokenizer: Any) -> Template | None:
    if options.template is None:
        return None
    return get_template(tuple(options.template.items()), tuple(special_tokens(tokenizer).items()))


def _scripts(
    examples: Examples, tokenizer: Any, rows: range, options: TokenizeOptions
) -> list[Script]:
    problems, scripts = Problems(), list[Script]()
    dialogs: Any = examples.texts[rows.start : rows.stop]
    for result, row in zip(
        write_all(dialogs, _template(options, tokenizer), options.separator), rows, strict=False
    ):
        if isinstance(result, Script):
            scripts.append(result)
            continue
        text = excerpt(str(examples.rows.records[row]))
        problems.add(examples.rows.where(row), str(result), text, result.fix)
    problems.raise_if_any()
    return scripts


def prefix(tokenizer: Any) -> list[int]:
    """Return the special tokens that a tokenizer adds before a text, such as BOS."""
    full, plain = (
        tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False)
    )
    at = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    return full[:at]


def special_tokens(tokenizer: Any) -> dict[str, str]:
    """Return a tokenizer's special tokens by name, such as `bos_token`."""
    return {
        name: str(token)
        for name, token in tokenizer.special_tokens_map.items()
        if isinstance(token, str)
    }


def _with_ends(ids: Sequence[int], tokenizer: Any, options: TokenizeOptions) -> list[int]:
    """Add missing BOS and EOS according to the options, and remove duplicates of BOS."""
    tokens, bos, eos = list(ids), tokenizer.bos_token_id, tokenizer.eos_token_id
    while len(tokens) > 1 and bos is not None and tokens[0] == tokens[1] == bos:
        del tokens[0]
    if options.add_bos and bos is not None and tokens[:1] != [bos]:
        tokens.insert(0, bos)
    if options.add_eos and eos is not None and tokens[-1:] != [eos]:
        tokens.append(eos)
    return tokens


def _label_first_subtokens(word_ids: Sequence[int | None], tags: np.ndarray) -> list[int]:
    before = (None, *word_ids[:-1])
    return [
        IGNORED if word is None or word == previous else int(tags[word])
        for word, previous in zip(word_ids, before, strict=True)
    ]


def _types(encoding: Any) -> list[list[int]]:
    return encoding.get("token_type_ids", [])


def _count_truncated(encoding: Any) -> int:
    return sum(bool(one.overflowing) for one in encoding.encodings)

"""Tokenize examples, cached on disk by a hash of everything that determines the tokens."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from jaxpeft.data.chat.dialogs import Dialog
from jaxpeft.data.chat.supervise import IGNORED
from jaxpeft.data.chat.templates import template_source
from jaxpeft.data.examples.make import Examples
from jaxpeft.data.problems import Problems, excerpt
from jaxpeft.data.rows.columns import GENERATIVE
from jaxpeft.data.tokens.token_arrays import (
    Arrays,
    CacheState,
    Encoded,
    cache_folder,
    load_arrays,
    save_arrays,
    to_arrays,
)
from jaxpeft.data.tokens.tokenize import TokenizedRows, TokenizeOptions, tokenize
from jaxpeft.errors import ConfigError, DataError

_log = logging.getLogger(__name__)
FORMAT = 5
BATCH = 1000
COUNTS = ("dropped", "learned", "rows", "sequences", "tokens", "truncated", "unlearned")

OnProgress = Callable[[int, int], None]


def encode(
    examples: Examples,
    tokenizer: Any,
    *,
    max_length: int,
    vocab_size: int,
    add_bos: bool = False,
    add_eos: bool = False,
    chat_template: str | None = None,
    separator: str = "",
    most_dropped: float | None = 0.05,
    progress: OnProgress | None = None,
    cache_dir: str | Path | None = None,
    use_cache: bool = True,
) -> Encoded:
    """Tokenize examples, or load the tokens from the cache.

    Classification: one sequence per row, truncated to `max_length`. Token classification: the same,
    with a word's tag on its first subtoken and -100 on the rest. Text: every document is split into
    consecutive sequences, without truncation. Dialogs: one sequence per row, truncated to
    `max_length`, or several if the template rewrites earlier turns once others follow; only the
    assistant's answers are in the loss, and rows without a token in the loss are dropped.

    Args:
        examples: the examples of one split.
        tokenizer: a fast tokenizer of `transformers`.
        max_length: the maximum length of a sequence.
        vocab_size: the vocabulary size of the model; every token id must be below it.
        add_bos: for text, start each document with BOS, unless the tokenizer does. For prompts with
            completions, keep the BOS that the tokenizer adds.
        add_eos: end each document, and each answer that the template does not end, with EOS, unless
            it already has one.
        chat_template: the name of a template of the tokenizer or of a built-in one, or the path of
            a Jinja file; None for the tokenizer's default.
        separator: text between a prompt and its completion.
        most_dropped: the maximum share of dropped rows, never all; None for no check.
        progress: called with the numbers of finished and of all rows, after every thousand.
        cache_dir: the cache directory; by default `JAXPEFT_CACHE`, or `~/.cache/jaxpeft`.
        use_cache: whether to read and write the cache.

    Raises:
        ConfigError: an option does not fit the tokenizer.
        DataError: a row has no tokens, a token id is not below `vocab_size`, or too many rows are
            dropped.
    """
    options = make_options(
        examples, tokenizer, max_length, add_bos, add_eos, chat_template, separator
    )
    _check_options(examples, tokenizer, options)
    key = fingerprint(examples, tokenizer, options)
    folder = cache_folder(cache_dir) if use_cache else None
    path = folder / f"{key}.npz" if folder else None
    existed = path is not None and path.exists()
    arrays = load_arrays(path) if path is not None and existed else None
    if arrays is not None:
        encoded = _from_arrays(examples, arrays, max_length, key, "hit")
    else:
        state: CacheState = "off" if path is None else "rebuilt" if existed else "miss"
        encoded = _from_arrays(
            examples, _build(examples, tokenizer, options, progress), max_length, key, state
        )
        if path is not None:
            save_arrays(path, to_arrays(encoded))
    if most_dropped is not None:
        _check_dropped(examples, encoded, most_dropped)
    _check_vocabulary(encoded, tokenizer, vocab_size)
    return encoded


def make_options(
    examples: Examples,
    tokenizer: Any,
    max_length: int,
    add_bos: bool,
    add_eos: bool,
    chat_template: str | None,
    separator: str,
) -> TokenizeOptions:
    """Return the options that determine the tokens, with the chat template if there are chats."""
    chat = any(isinstance(text, Dialog) for text in examples.texts)
    source = (
        template_source(tokenizer.chat_template, chat_template, examples.kind) if chat else None
    )
    template = {"default": source} if isinstance(source, str) else source
    spaced = examples.kind == "token_classification" and _joins_words(tokenizer)
    return TokenizeOptions(max_length, add_bos, add_eos, template, separator, spaced)


def _joins_words(tokenizer: Any) -> bool:
    """Return whether a space is part of the next word's token, and the tokenizer adds no leading
    space (GPT-2, RoBERTa, Llama 3).
    """
    before = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    parts = before.get("pretokenizers", [before])
    return any(
        part.get("type") == "ByteLevel" and not part.get("add_prefix_space") for part in parts
    )


def fingerprint(examples: Examples, tokenizer: Any, options: TokenizeOptions) -> str:
    """Return the hash of everything that determines the tokens: this cache format, the tokenizer,
    the options with the template, and the data.
    """
    return _hash([FORMAT, tokenizer_hash(tokenizer), dataclasses.asdict(options), examples.sha256])


def tokenizer_hash(tokenizer: Any) -> str:
    """Return the hash of a tokenizer's behavior."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # A call with truncation changes these two, so a second run would miss the cache of the first.
    state.pop("truncation", None)
    state.pop("padding", None)
    settings = [tokenizer.special_tokens_map, tokenizer.chat_template, tokenizer.model_input_names]
    return _hash(
        [state, settings, tokenizer.truncation_side, getattr(tokenizer, "add_prefix_space", None)]
    )


def _hash(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def pad_id(tokenizer: Any, vocab_size: int) -> int:
    """Return the padding id: the tokenizer's if it is in the model's vocabulary, else 0.

    Padding is identified by position, never by id, so the pad token may also be EOS.
    """
    own = tokenizer.pad_token_id
    return own if own is not None and 0 <= own < vocab_size else 0


def _check_options(examples: Examples, tokenizer: Any, options: TokenizeOptions) -> None:
    name, problems = _name(tokenizer), list[str]()
    if examples.kind == "preference":
        problems.append(
            f"{examples.rows.name}: {len(examples)} valid preference pairs, but no method trains on"
            " pairs yet; use rows of another format"
        )
    if not getattr(tokenizer, "is_fast", False):
        problems.append(
            f"tokenizer {name}: not a fast tokenizer; use one that has a tokenizer.json"
        )
    for end in ("bos", "eos"):
        if getattr(options, f"add_{end}"):
            if examples.kind not in GENERATIVE:
                problems.append(f"add_{end}=True is for text, not for {examples.kind}; remove it")
            elif getattr(tokenizer, f"{end}_token_id") is None:
                problems.append(
                    f"add_{end}=True, but the tokenizer {name} has no {end}_token; remove it"
                )
    least = (
        2
        if examples.kind in GENERATIVE
        else 1 + tokenizer.num_special_tokens_to_add(examples.pairs is not None)
    )
    if options.max_length < least:
        problems.append(
            f"max_length={options.max_length} leaves no room for text; set at least {least}"
        )
    if problems:
        raise ConfigError(problems)


@contextmanager
def _without_gc() -> Generator[None]:
    """Disable garbage collection, which would repeatedly scan lists of millions of numbers."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _build(
    examples: Examples, tokenizer: Any, options: TokenizeOptions, progress: OnProgress | None
) -> Arrays:
    with _without_gc():
        batches = list(_batches(examples, tokenizer, options, progress))
    lengths = [len(ids) for batch in batches for ids in batch.ids]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    source = _flat([batch.source for batch in batches])
    _check_lengths(examples, tokenizer, source[np.diff(offsets) == 0])
    tokens = _flat([ids for batch in batches for ids in batch.ids])
    types = [ids for batch in batches for ids in batch.types]
    labels = [ids for batch in batches for ids in batch.labels]
    truncated = sum(batch.truncated for batch in batches)
    arrays = {"tokens": tokens, "offsets": offsets, "source": source}
    dropped = sum(len(batch.dropped) for batch in batches)
    flat = _flat(labels)
    learned = int((flat != IGNORED).sum())
    unlearned = sum(batch.unlearned for batch in batches)
    counts = [dropped, learned, len(examples), len(lengths), len(tokens), truncated, unlearned]
    arrays["counts"] = np.array(counts, np.int64)
    for note, answers in sum((batch.notes for batch in batches), Counter[str]()).items():
        _log.warning("%s: %s, in %d rows", examples.rows.name, note, answers)
    if types:
        arrays["type_ids"] = _flat(types)
    per_row: Any = examples.labels
    arrays["labels"] = per_row if examples.kind == "classification" else flat
    return arrays


def _batches(
    examples: Examples, tokenizer: Any, options: TokenizeOptions, progress: OnProgress | None
) -> Iterator[TokenizedRows]:
    total = len(examples)
    stops = [min(start + BATCH, total) for start in range(0, total, BATCH)]

    def batch_until(stop: int) -> TokenizedRows:
        return tokenize(examples, tokenizer, stop - (stop - 1) % BATCH - 1, stop, options)

    def in_order() -> Iterator[TokenizedRows]:
        # The tokenizer releases the GIL, so Python's work on one batch overlaps with tokenizing the
        # next. The first batch runs alone: it may change the tokenizer's settings, which no other
        # thread may be using.
        yield from map(batch_until, stops[:1])
        yield from pool.map(batch_until, stops[1:])

    pool = ThreadPoolExecutor(2, thread_name_prefix="tokens")
    try:
        for stop, batch in zip(stops, in_order(), strict=True):
            yield batch
            if progress:
                progress(stop, total)
    finally:
        pool.shutdown(cancel_futures=True)


def _flat(lists: list[list[int]]) -> np.ndarray:
    return np.fromiter(chain.from_iterable(lists), np.int32, sum(map(len, lists)))


def _from_arrays(
    examples: Examples, arrays: Arrays, max_length: int, key: str, state: CacheState
) -> Encoded:
    return Encoded(
        kind=examples.kind,
        problem=examples.problem,
        tokens=arrays["tokens"],
        offsets=arrays["offsets"],
        labels=arrays["labels"],
        type_ids=arrays.get("type_ids"),
        source=arrays["source"],
        label_names=examples.label_names,
        counts=dict(zip(COUNTS, arrays["counts"].tolist(), strict=True)),
        max_length=max_length,
        fingerprint=key,
        cache=state,
    )


def _check_lengths(examples: Examples, tokenizer: Any, empty: np.ndarray) -> None:
    problems = Problems()
    for row in empty.tolist():
        fault = f"the tokenizer {_name(tokenizer)} returns no tokens"
        problems.add(
            examples.rows.where(row), fault, excerpt(str(examples.texts[row])), "remove the row"
        )
    problems.raise_if_any()


def _check_dropped(examples: Examples, encoded: Encoded, most: float) -> None:
    dropped, rows, length = encoded.counts["dropped"], encoded.counts["rows"], encoded.max_length
    if dropped <= most * rows and dropped < rows:
        return
    remaining = set(encoded.source.tolist())
    first = next(row for row in range(rows) if row not in remaining)
    limit, fix = (
        f"at most {most:.1%} may be dropped",
        "increase data.max_length, shorten the prompts, or increase data.most_dropped",
    )
    if dropped == rows:
        limit, fix = "no rows remain", "increase data.max_length, or shorten the prompts"
    raise DataError(
        f"{examples.rows.name}: {dropped} of {rows} rows ({dropped / rows:.1%}) have no token in"
        f" the loss among their first {length}, such as {examples.rows.where(first)}; {limit}:"
        f" {fix}"
    )


def _check_vocabulary(encoded: Encoded, tokenizer: Any, vocab_size: int) -> None:
    highest = int(encoded.tokens.max(initial=0))
    if highest >= vocab_size:
        word = tokenizer.convert_ids_to_tokens(highest)
        raise DataError(
            f"tokenizer {_name(tokenizer)}: its vocabulary has {len(tokenizer)} tokens, the model's"
            f" {vocab_size}, and the data contains token {highest} ({word!r}); use the model's own"
            " tokenizer"
        )


def _name(tokenizer: Any) -> str:
    return repr(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)

"""From a config to token sequences of three splits: what the main job trains on and `python -m jaxpeft.data` shows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from jaxpeft.config.schema import Config
from jaxpeft.data import plan
from jaxpeft.data.batches import Batches
from jaxpeft.data.buckets import choose_lengths
from jaxpeft.data.columns import GENERATIVE, Columns, Kind, find_format
from jaxpeft.data.encode import encode, pad_id
from jaxpeft.data.encoded import Encoded
from jaxpeft.data.examples import Examples, make_examples
from jaxpeft.data.holdout import hold_out, hold_out_text
from jaxpeft.data.packing import fill, pack
from jaxpeft.data.rows import Rows, is_hub_id, read_rows
from jaxpeft.errors import ConfigError, DataError
from jaxpeft.hub import sources

_log = logging.getLogger(__name__)
_KINDS: Mapping[str, Kind] = {
    "sequence_classification": "classification",
    "token_classification": "token_classification",
}
Shown = Callable[[str], AbstractContextManager[Callable[[int, int], None] | None]]
"""Makes, of what is being done, a context that gives a function `(rows done, rows in all)`, or None to show nothing."""


@dataclass(frozen=True)
class Splits:
    """The token sequences of a run.

    Attributes:
        examples: the rows of the training split.
        train: to train on.
        validation: to choose the best step by.
        test: for the final figures; the validation rows where there are no others.
        tokenizer: of the model.
        pad_id: token to pad with.
        problem: `single_label`, `multi_label`, `regression`, `token` or `lm`.
    """

    examples: Examples
    train: Encoded
    validation: Encoded
    test: Encoded
    tokenizer: Any
    pad_id: int
    problem: str


def read_splits(config: Config, source: sources.Source, shown: Shown) -> Splits:
    """Reads and tokenises the rows of a config.

    Args:
        config: a checked config.
        source: the model, whose tokenizer is used.
        shown: shows how far the tokenising is.

    Raises:
        ConfigError: an option does not fit the rows, the tokenizer or the model.
        DataError: rows cannot be used.
    """
    model_config = sources.read_json(source.folder / "config.json")
    vocab = model_config.get("vocab_size")
    if not isinstance(vocab, int):
        raise ConfigError(f"{source.folder / 'config.json'}: vocab_size must be an integer, is {vocab!r}")
    tokenizer = load_tokenizer(source)
    train, validation, test = read_examples(config)
    encoded = _encode(train, tokenizer, config, vocab, shown)
    held_out = _encode(validation, tokenizer, config, vocab, shown)
    last = _encode(test, tokenizer, config, vocab, shown) if test is not validation else held_out
    problem = {"classification": str(train.problem), "token_classification": "token"}.get(train.kind, "lm")
    return Splits(train, encoded, held_out, last, tokenizer, pad_id(tokenizer, vocab), problem)


def make_batches(config: Config, splits: Splits) -> Batches:
    """Makes the training batches of a run."""
    options = config.train
    lengths = padded_lengths(config, splits.train)
    return Batches(
        splits.train, options.batch_size, lengths, options.seed, splits.pad_id, accumulation=options.accumulation
    )


def padded_lengths(config: Config, split: Encoded) -> tuple[int, ...]:
    """Gives the lengths that the rows of a split are padded to."""
    if config.data.packing:
        return (config.data.max_length,)
    return config.data.lengths or choose_lengths(split.lengths, config.data.max_length)


def load_tokenizer(source: sources.Source) -> Any:
    """Loads the tokenizer of a model folder; no code of the folder is run.

    Raises:
        DataError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{source.folder}: no tokenizer that can be used ({str(error).splitlines()[0][:200]}); "
            "the folder must hold tokenizer.json and tokenizer_config.json"
        ) from error


def read_examples(config: Config) -> tuple[Examples, Examples, Examples]:
    """Reads the rows of the three splits; the validation split stands for a test split that is not given.

    Raises:
        ConfigError: an option does not fit the rows.
        DataError: rows cannot be used.
    """
    options, columns = config.data, Columns(**config.data.columns)
    problem = None if options.problem == "auto" else options.problem
    rows = _read(options.train, "train", config)
    kind = _kind(config, rows, columns)
    # labels are those of all rows: which of them are drawn to be trained on or held out must not change the classes
    whole = make_examples(rows, kind=kind, problem=problem, columns=columns) if kind not in GENERATIVE else None
    rows = _drawn(rows, config)
    if not options.validation:
        share, seed = options.validation_share, config.train.seed
        rows, held_out = hold_out_text(rows, share, seed, columns) if kind == "text" else hold_out(rows, share, seed)
    else:
        held_out = _drawn(_read(options.validation, "validation", config), config)
    train = make_examples(rows, kind=kind, problem=problem, columns=columns, like=whole)
    validation = make_examples(held_out, kind=kind, like=train)
    if not options.test:
        return train, validation, validation
    return train, validation, make_examples(_drawn(_read(options.test, "test", config), config), kind=kind, like=train)


def _kind(config: Config, rows: Rows, columns: Columns) -> Kind:
    task, given = config.model.task, config.data.format
    if task in _KINDS:
        if given != "auto":
            raise ConfigError(f"data.format: {given!r} is for task 'causal_lm', task is {task!r}; set it to 'auto'")
        return _KINDS[task]
    kind = find_format(rows.columns(), columns, rows.name) if given == "auto" else given
    _log.info("%s: rows of format %s", rows.name, kind)
    return kind


def _read(path: str, split: str, config: Config) -> Rows:
    if not is_hub_id(path):
        return read_rows(path)
    return read_rows(path, split=split, config=config.data.subset, revision=config.data.revision)


def _drawn(rows: Rows, config: Config) -> Rows:
    most = config.data.max_rows
    if most is None or most >= len(rows):
        return rows
    return rows.take(sorted(plan.order(len(rows), config.train.seed)[:most].tolist()))


def _encode(examples: Examples, tokenizer: Any, config: Config, vocab: int, shown: Shown) -> Encoded:
    text, options = examples.kind in GENERATIVE, config.data
    with shown(f"tokenising {examples.rows.name}") as progress:
        encoded = encode(
            examples,
            tokenizer,
            max_length=options.max_length,
            vocab_size=vocab,
            add_bos=text and options.add_bos and tokenizer.bos_token_id is not None,
            add_eos=text and options.add_eos and tokenizer.eos_token_id is not None,
            chat_template=options.chat_template,
            most_dropped=options.most_dropped,
            progress=progress,
        )
    _log.info("%s: %s", examples.rows.name, _told(encoded, text))
    if not options.packing:
        return encoded
    packed = pack(encoded, options.max_length)
    full = fill(packed, options.max_length)
    _log.info("packed %d sequences into %d rows of %d tokens, %.1f%% full",
              len(encoded), len(packed), options.max_length, 100 * full)  # fmt: skip
    return packed


def _told(encoded: Encoded, text: bool) -> str:
    counts = encoded.counts
    parts = [f"{counts['rows']} rows", f"{counts['tokens']} tokens"]
    parts += [f"{counts['learned'] / max(1, counts['tokens']):.0%} of them learned"] if text else []
    parts += [f"{counts['truncated']} cut at {encoded.max_length} tokens"] if counts["truncated"] else []
    parts += [f"{counts['dropped']} rows dropped: nothing learned is left of them"] if counts["dropped"] else []
    return f"{', '.join(parts)} ({'from the cache' if encoded.cache == 'hit' else 'tokenised'})"

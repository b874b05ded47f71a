"""Tokenize the rows of a run, loaded or streamed, and choose the lengths to pad to."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxpeft.config.data_config import DataConfig
from jaxpeft.config.schema import Config
from jaxpeft.data.examples.make import Examples
from jaxpeft.data.rows.columns import GENERATIVE
from jaxpeft.data.tokens.buckets import choose_lengths
from jaxpeft.data.tokens.encode import OnProgress, encode, make_options, pad_id, tokenizer_hash
from jaxpeft.data.tokens.packing import fill, pack
from jaxpeft.data.tokens.token_arrays import Encoded
from jaxpeft.data.tokens.tokenize import prompt_ids

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowEncoder:
    """Tokenizes examples, and packs them if `data.packing` is set.

    Attributes:
        options: the data options.
        tokenizer: the tokenizer of the model.
        vocab: the vocabulary size of the model.
        use_cache: whether to cache the tokens on disk.
    """

    options: DataConfig
    tokenizer: Any
    vocab: int
    use_cache: bool = True

    @property
    def pad_id(self) -> int:
        """The padding token id."""
        return pad_id(self.tokenizer, self.vocab)

    def __call__(
        self, examples: Examples, progress: OnProgress | None = None, *, check_dropped: bool = True
    ) -> Encoded:
        """Tokenize examples.

        Args:
            examples: the examples of one split.
            progress: called with the numbers of finished and of all rows.
            check_dropped: whether to refuse too many dropped rows.

        Raises:
            ConfigError: an option does not fit the tokenizer.
            DataError: rows cannot be used.
        """
        options = self.options
        encoded = encode(
            examples,
            self.tokenizer,
            vocab_size=self.vocab,
            most_dropped=options.most_dropped if check_dropped else None,
            progress=progress,
            use_cache=self.use_cache,
            **self._arguments(examples),
        )
        if not options.packing:
            return encoded
        return pack(encoded, options.max_length)

    def identity(self, examples: Examples) -> dict[str, str]:
        """Return the hashes of the tokenizer and of the chat template of the examples."""
        template = json.dumps(self.chat_template(examples) or "", sort_keys=True)
        return {
            "tokenizer": tokenizer_hash(self.tokenizer),
            "template": hashlib.sha256(template.encode()).hexdigest(),
        }

    def chat_template(self, examples: Examples) -> str | Mapping[str, str] | None:
        """Return the chat template in use, in the form of a tokenizer's `chat_template`.

        Named templates are `default`, and `tool_use` for chats with tools. Returns None if there
        are no chats.
        """
        template = make_options(examples, self.tokenizer, **self._arguments(examples)).template
        return template["default"] if template and len(template) == 1 else template

    def prompt(self, examples: Examples, row: int) -> list[int]:
        """Return the prompt tokens for generating the answer of a row."""
        return prompt_ids(
            examples,
            row,
            self.tokenizer,
            make_options(examples, self.tokenizer, **self._arguments(examples)),
        )

    def _arguments(self, examples: Examples) -> dict[str, Any]:
        text, options, tokenizer = examples.kind in GENERATIVE, self.options, self.tokenizer
        return {
            "max_length": options.max_length,
            "add_bos": text and options.add_bos and tokenizer.bos_token_id is not None,
            "add_eos": text and options.add_eos and tokenizer.eos_token_id is not None,
            "chat_template": options.chat_template,
            "separator": options.separator,
        }


_PROGRAM = 1 << 14
"""Number of token positions that take as long to train on as compiling a program, for a small model
on a CPU; many more elsewhere.
"""


def padded_lengths(config: Config, train: Encoded) -> tuple[int, ...]:
    """Return the bucket lengths of training rows, which are padded to them unless `one_length` is
    set.

    A short run has fewer lengths: each must save more padding over the run than it costs to
    compile.
    """
    if config.data.packing or (config.data.streaming and not config.data.lengths):
        return (config.data.max_length,)
    passes = config.train.epochs or (config.train.steps or 0) * config.train.batch_size / max(
        1, len(train)
    )
    return config.data.lengths or choose_lengths(
        train.lengths, config.data.max_length, worth=_PROGRAM / passes
    )


def evaluated_lengths(config: Config, train: Encoded, split: Encoded) -> tuple[int, ...]:
    """Return the lengths for an evaluation split: those of the training rows, plus one if the split
    has longer rows.
    """
    trained = padded_lengths(config, train)
    longer = split.lengths[split.lengths > trained[-1]]
    return (
        (*trained, *choose_lengths(longer, config.data.max_length, most=1))
        if len(longer)
        else trained
    )


def one_length(config: Config) -> int | None:
    """Return the single length of all batches if positions are sharded over devices, else None.

    The rows of a batch do not depend on it: a run has the same batches on any mesh.
    """
    return config.data.max_length if config.mesh.long_rows and not config.data.lengths else None


def describe(encoded: Encoded) -> str:
    """Return a one-line summary of the tokenized rows."""
    counts = encoded.counts
    parts = [f"{counts['rows']} rows", f"{counts['tokens']} tokens"]
    if encoded.kind in GENERATIVE:
        parts.append(f"{counts['learned'] / max(1, counts['tokens']):.0%} of them in the loss")
    if counts["truncated"]:
        parts.append(f"{counts['truncated']} truncated to {encoded.max_length} tokens")
    if counts["unlearned"]:
        parts.append(f"{counts['unlearned']} answers excluded from the loss")
    if counts["dropped"]:
        parts.append(f"{counts['dropped']} rows dropped: no token in the loss")
    line = f"{', '.join(parts)} ({'from the cache' if encoded.cache == 'hit' else 'tokenized'})"
    if encoded.segments is not None:
        full = fill(encoded, encoded.max_length)
        line += f"; packed into {len(encoded)} rows of {encoded.max_length} tokens, {full:.1%} full"
        line += f", with {counts['cut']} cuts in texts" if counts["cut"] else ""
    return line

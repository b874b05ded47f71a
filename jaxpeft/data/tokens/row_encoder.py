"""How the rows of a run become tokens: the same for those that are held and those that are
streamed.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxpeft.config.schema import Config, DataConfig
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
    """Makes token sequences of examples, packed if the config asks for it.

    Attributes:
        options: of the data.
        tokenizer: of the model.
        vocab: size of the model's vocabulary.
        use_cache: whether the tokens are kept on disk.
    """

    options: DataConfig
    tokenizer: Any
    vocab: int
    use_cache: bool = True

    @property
    def pad_id(self) -> int:
        """The token to pad with."""
        return pad_id(self.tokenizer, self.vocab)

    def __call__(
        self, examples: Examples, progress: OnProgress | None = None, *, judged: bool = True
    ) -> Encoded:
        """Tokenize examples.

        Args:
            examples: of one split.
            progress: called with the rows done and the rows in all.
            judged: whether too many dropped rows are refused.

        Raises:
            ConfigError: an option does not fit the tokenizer.
            DataError: rows cannot be used.
        """
        options = self.options
        encoded = encode(
            examples,
            self.tokenizer,
            vocab_size=self.vocab,
            most_dropped=options.most_dropped if judged else None,
            progress=progress,
            use_cache=self.use_cache,
            **self._of(examples),
        )
        if not options.packing:
            return encoded
        return pack(encoded, options.max_length)

    def identity(self, examples: Examples) -> dict[str, str]:
        """Return the hashes of the tokenizer and of the chat template that examples are written
        with.
        """
        template = json.dumps(self.chat_template(examples) or "", sort_keys=True)
        return {
            "tokenizer": tokenizer_hash(self.tokenizer),
            "template": hashlib.sha256(template.encode()).hexdigest(),
        }

    def chat_template(self, examples: Examples) -> str | Mapping[str, str] | None:
        """Return the template that chats are written with, in the form of a tokenizer's
        `chat_template`; None without chats.

        Several by name are those that are used: `default`, and `tool_use` for chats with tools.
        """
        made = make_options(examples, self.tokenizer, **self._of(examples)).template
        return made["default"] if made and len(made) == 1 else made

    def prompt(self, examples: Examples, row: int) -> list[int]:
        """Return the tokens that the answer of a row is generated from."""
        return prompt_ids(
            examples,
            row,
            self.tokenizer,
            make_options(examples, self.tokenizer, **self._of(examples)),
        )

    def _of(self, examples: Examples) -> dict[str, Any]:
        text, options, tokenizer = examples.kind in GENERATIVE, self.options, self.tokenizer
        return {
            "max_length": options.max_length,
            "add_bos": text and options.add_bos and tokenizer.bos_token_id is not None,
            "add_eos": text and options.add_eos and tokenizer.eos_token_id is not None,
            "chat_template": options.chat_template,
            "separator": options.separator,
        }


_PROGRAM = 1 << 14
"""Places that take about as long to train on as a program takes to compile, of a small model on a
CPU; of others it is many more.
"""


def padded_lengths(config: Config, train: Encoded) -> tuple[int, ...]:
    """Return the lengths that training rows are sorted into batches by, and padded to unless all
    have one length (`one_length`).

    A short run has fewer of them: each must spare more places over the whole run than its program
    costs.
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
    """Return the lengths for a split that is not trained on: those of the training rows, whose
    programs serve all splits.

    One more stands behind them where a row of the split is longer.
    """
    trained = padded_lengths(config, train)
    longer = split.lengths[split.lengths > trained[-1]]
    return (
        (*trained, *choose_lengths(longer, config.data.max_length, most=1))
        if len(longer)
        else trained
    )


def one_length(config: Config) -> int | None:
    """Return the length of all batches where positions are spread over devices, which is known to
    divide; None elsewhere.

    Which rows make a batch does not depend on it: a run has the same batches on any mesh.
    """
    return config.data.max_length if config.mesh.long_rows and not config.data.lengths else None


def describe(encoded: Encoded) -> str:
    """Return in one line what became of the rows."""
    counts = encoded.counts
    parts = [f"{counts['rows']} rows", f"{counts['tokens']} tokens"]
    if encoded.kind in GENERATIVE:
        parts.append(f"{counts['learned'] / max(1, counts['tokens']):.0%} of them learned")
    parts += (
        [f"{counts['truncated']} cut at {encoded.max_length} tokens"] if counts["truncated"] else []
    )
    parts += (
        [f"{counts['unlearned']} answers that cannot be learned"] if counts["unlearned"] else []
    )
    parts += (
        [f"{counts['dropped']} rows dropped: nothing learned is left of them"]
        if counts["dropped"]
        else []
    )
    line = f"{', '.join(parts)} ({'from the cache' if encoded.cache == 'hit' else 'tokenized'})"
    if encoded.segments is not None:
        full = fill(encoded, encoded.max_length)
        line += f"; packed into {len(encoded)} rows of {encoded.max_length} tokens, {full:.1%} full"
        line += f", by cutting texts in {counts['cut']} places" if counts["cut"] else ""
    return line

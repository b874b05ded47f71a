"""Load and tokenize the three splits of a config, for training and for `python -m jaxpeft.data`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxpeft.config.schema import Config
from jaxpeft.data.batches.stream import Stream
from jaxpeft.data.batches.training import Batches
from jaxpeft.data.examples.make import Examples
from jaxpeft.data.examples.reading import read_examples, read_holdout
from jaxpeft.data.tokens.row_encoder import RowEncoder, describe, one_length, padded_lengths
from jaxpeft.data.tokens.token_arrays import Encoded
from jaxpeft.errors import ConfigError, DataError, shorten
from jaxpeft.hub import sources
from jaxpeft.hub.text_config import read_model_config
from jaxpeft.logs import log_time

_log = logging.getLogger(__name__)
ProgressContext = Callable[[str], AbstractContextManager[Callable[[int, int], None] | None]]
"""Takes a description of the work, and returns a context manager whose value is a function of
`(finished rows, all rows)`, or None to show no progress.
"""


@dataclass(frozen=True)
class Splits:
    """The token sequences of a run.

    Attributes:
        examples: the training examples.
        train: the training tokens.
        validation: the validation tokens, which select the best step.
        test: the test tokens, for the final metrics; the validation tokens if there is no test
            split.
        tokenizer: the tokenizer of the model.
        pad_id: the padding token id.
        problem: `single_label`, `multi_label`, `regression`, `token` or `lm`.
        asked: the test examples, for sample answers.
        encoding: the encoder from examples to tokens.
        identity: hashes of the sources, the tokenizer, the template and the tokens.
        stream: the stream of training rows, or None; `examples` and `train` are then its first
            buffer.
    """

    examples: Examples
    train: Encoded
    validation: Encoded
    test: Encoded
    tokenizer: Any
    pad_id: int
    problem: str
    asked: Examples
    encoding: RowEncoder
    identity: Mapping[str, Any]
    stream: Stream | None = None


def read_splits(
    config: Config,
    source: sources.Source,
    show_progress: ProgressContext,
    splits: tuple[Examples, Examples, Examples] | None = None,
) -> Splits:
    """Load and tokenize the rows of a config; for a stream, its first buffer.

    Args:
        config: a validated config.
        source: the model, whose tokenizer is used.
        show_progress: shows the progress of tokenization.
        splits: the result of `read_examples`, if already available.

    Raises:
        ConfigError: an option does not fit the rows, the tokenizer or the model.
        DataError: rows cannot be used.
    """
    file = source.folder / "config.json"
    vocab = read_model_config(source.folder).get("vocab_size")
    if not isinstance(vocab, int) or isinstance(vocab, bool) or vocab < 1:
        raise ConfigError(
            f"{file}: vocab_size must be a positive integer, but is {shorten(repr(vocab))}"
        )
    encoding = RowEncoder(config.data, load_tokenizer(source), config.model.vocab_size or vocab)

    def tokens(examples: Examples) -> Encoded:
        what = f"tokenizing {examples.rows.name}"
        with log_time(what) as note, show_progress(what) as progress:
            encoded = encoding(examples, progress)
            note(describe(encoded))
        return encoded

    stream = None
    if config.data.streaming:
        stream, (validation, test) = _open_stream(
            config, dataclasses.replace(encoding, use_cache=False), source
        )
        train, encoded = stream.first
        _log.info("%s, first buffer: %s", train.rows.name, describe(encoded))
    else:
        train, validation, test = splits or read_examples(config, source)
        encoded = tokens(train)
    held_out = tokens(validation)
    last = tokens(test) if test is not validation else held_out
    problem = {"classification": str(train.problem), "token_classification": "token"}.get(
        train.kind, "lm"
    )
    named = zip(
        ("train", "validation", "test"),
        (train, validation, test),
        (encoded, held_out, last),
        strict=True,
    )
    hashes = {name: (examples.rows.source, tokens.fingerprint) for name, examples, tokens in named}
    if stream is not None:
        hashes["train"] = (stream.identity, hashes["train"][1])
    identity: dict[str, Any] = {
        "sources": {name: rows for name, (rows, _) in hashes.items()},
        **encoding.identity(train),
        "tokens": {name: encoded for name, (_, encoded) in hashes.items()},
    }
    return Splits(
        train,
        encoded,
        held_out,
        last,
        encoding.tokenizer,
        encoding.pad_id,
        problem,
        test,
        encoding,
        identity,
        stream,
    )


def _open_stream(
    config: Config, encoding: RowEncoder, source: sources.Source
) -> tuple[Stream, tuple[Examples, Examples]]:
    """Open a stream, and load the validation and test examples, which define the labels, since the
    stream cannot be read in advance.
    """
    if config.model.task == "causal_lm":
        stream = Stream(config, encoding)
        return stream, read_holdout(config, stream.first[0])
    held_out = read_holdout(config, None, source)
    # the labels without the rows, since this is sent to worker processes
    like = dataclasses.replace(
        held_out[0], texts=[], pairs=None, labels=None, rows=held_out[0].rows.take([])
    )
    return Stream(config, encoding, like), held_out


def make_batches(config: Config, splits: Splits) -> Batches | Stream:
    """Return the training batches of a run."""
    if splits.stream is not None:
        return splits.stream
    options = config.train
    return Batches(
        splits.train,
        options.batch_size,
        padded_lengths(config, splits.train),
        options.seed,
        splits.pad_id,
        accumulation=options.accumulation,
        workers=config.data.workers,
        timeout=config.data.worker_timeout,
        pad_to=one_length(config),
    )


def load_tokenizer(source: sources.Source) -> Any:
    """Load the tokenizer of a model folder without running code from the folder.

    Raises:
        DataError: there is no tokenizer, or it cannot be loaded.
    """
    _require_tokenizers(source.folder / "tokenizer.json")
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            source.folder, trust_remote_code=False, local_files_only=True
        )
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
        StrictDataclassError,
    ) as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise DataError(
            f"{source.folder}: the tokenizer cannot be loaded ({reason}); the folder must contain"
            " tokenizer.json and tokenizer_config.json as published, and config.json of the same"
            " model"
        ) from error


def _require_tokenizers(file: Path) -> None:
    """Refuse a `tokenizer.json` that the `tokenizers` library cannot read; ignore a missing one.

    Raises:
        DataError: the library cannot read the file; the message includes its reason.
    """
    from tokenizers import Tokenizer

    if not file.is_file():
        return
    try:
        Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{file}: the tokenizer cannot be loaded ({reason}); use the file as it was published,"
            " or save it again with the tokenizer's save_pretrained"
        ) from error

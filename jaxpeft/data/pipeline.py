"""From a config to token sequences of three splits: what the main job trains on and `python -m
jaxpeft.data` shows.
"""

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
from jaxpeft.data.examples.reading import read_examples, read_held
from jaxpeft.data.tokens.row_encoder import RowEncoder, describe, one_length, padded_lengths
from jaxpeft.data.tokens.token_arrays import Encoded
from jaxpeft.errors import ConfigError, DataError, shorten
from jaxpeft.hub import sources
from jaxpeft.json_files import read_json
from jaxpeft.logs import log_time

_log = logging.getLogger(__name__)
Shown = Callable[[str], AbstractContextManager[Callable[[int, int], None] | None]]
"""Makes, of what is being done, a context that gives a function `(rows done, rows in all)`, or None
to show nothing.
"""


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
        asked: the test rows, to be answered.
        encoding: how rows become tokens.
        identity: hashes of what was read, of what turns it into tokens, and of the tokens: what
            makes this data this data.
        stream: the training rows where they are streamed: `examples` and `train` are its first
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
    shown: Shown,
    read: tuple[Examples, Examples, Examples] | None = None,
) -> Splits:
    """Read and tokenizes the rows of a config; of a stream, its first buffer.

    Args:
        config: a checked config.
        source: the model, whose tokenizer is used.
        shown: shows how far the tokenizing is.
        read: what `read_examples` gives, where it is there.

    Raises:
        ConfigError: an option does not fit the rows, the tokenizer or the model.
        DataError: rows cannot be used.
    """
    file = source.folder / "config.json"
    vocab = read_json(file).get("vocab_size")
    if not isinstance(vocab, int) or isinstance(vocab, bool) or vocab < 1:
        raise ConfigError(
            f"{file}: vocab_size must be an integer above 0, is {shorten(repr(vocab))}"
        )
    encoding = RowEncoder(config.data, load_tokenizer(source), config.model.vocab_size or vocab)

    def tokens(examples: Examples) -> Encoded:
        what = f"tokenizing {examples.rows.name}"
        with log_time(what) as note, shown(what) as progress:
            encoded = encoding(examples, progress)
            note(describe(encoded))
        return encoded

    stream = None
    if config.data.streaming:
        stream, (validation, test) = _open_stream(
            config, dataclasses.replace(encoding, use_cache=False), source
        )
        train, encoded = stream.first
        _log.info("%s, its first rows: %s", train.rows.name, describe(encoded))
    else:
        train, validation, test = read or read_examples(config, source)
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
        "sources": {name: read for name, (read, _) in hashes.items()},
        **encoding.identity(train),
        "tokens": {name: made for name, (_, made) in hashes.items()},
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
    """Open a stream and reads the rows that are held out; labels are those of the latter: a stream
    is not read through.
    """
    if config.model.task == "causal_lm":
        stream = Stream(config, encoding)
        return stream, read_held(config, stream.first[0])
    held = read_held(config, None, source)
    # what is known of the labels, without the rows: worker processes are sent it
    like = dataclasses.replace(
        held[0], texts=[], pairs=None, labels=None, rows=held[0].rows.take([])
    )
    return Stream(config, encoding, like), held


def make_batches(config: Config, splits: Splits) -> Batches | Stream:
    """Make the training batches of a run."""
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
    """Load the tokenizer of a model folder; no code of the folder is run.

    Raises:
        DataError: there is none, or its files cannot be used.
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
        said = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise DataError(
            f"{source.folder}: no tokenizer that can be used ({said}); the folder must hold"
            " tokenizer.json and tokenizer_config.json, as they were published, and config.json of"
            " the same model"
        ) from error


def _require_tokenizers(file: Path) -> None:
    """Refuse a `tokenizer.json`, where there is one, that the `tokenizers` library cannot read.

    Raises:
        DataError: saying what the library says.
    """
    from tokenizers import Tokenizer

    if not file.is_file():
        return
    try:
        Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        said = " ".join(str(error).split())[:200]
        raise DataError(
            f"{file}: is no tokenizer that can be used ({said}); give the file as it was published,"
            " or write it again with save_pretrained of the tokenizer"
        ) from error

"""Stream training batches: rows are read in buffers, each of which is a small dataset."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jaxpeft.config.schema import Config
from jaxpeft.data.batches.prefetch import prefetch
from jaxpeft.data.batches.training import Batch, Batches, Own, Position
from jaxpeft.data.examples.make import Examples, join, make_examples
from jaxpeft.data.examples.reading import (
    columns_of,
    cut_texts,
    file_options_of,
    kind_of,
    report_unread,
)
from jaxpeft.data.rows.columns import OPTIONAL, Columns, Kind
from jaxpeft.data.rows.read import is_hub_id
from jaxpeft.data.rows.row_streams import RowStream
from jaxpeft.data.tokens.row_encoder import RowEncoder, padded_lengths
from jaxpeft.data.tokens.token_arrays import Encoded
from jaxpeft.errors import ConfigError, DataError

_ENDLESS = 1 << 40
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StreamedSource:
    """One source of a stream.

    Attributes:
        config: the config of the run.
        rows: the row stream.
        format: the format of the rows.
        kind: the format after splitting at `data.separator`.
        columns: the columns in use.
        count: number of rows of this source per buffer.
        like: examples with the same labels, or None.
    """

    config: Config
    rows: RowStream
    format: Kind
    kind: Kind
    columns: Columns
    count: int
    like: Examples | None

    def examples(self, buffer: int) -> Examples | None:
        """Return the examples of a buffer, or None after the last row."""
        rows = self.rows.rows(buffer * self.count, self.count)
        if not len(rows):
            return None
        rows = cut_texts(self.config, rows, self.format)[0]
        # optional columns may be missing in all rows of a buffer
        optional, present = OPTIONAL.get(self.kind, {}), set(rows.columns())
        columns = {
            field: column
            for field, column in self.columns.named_fields().items()
            if field not in optional or column in present
        }
        return make_examples(rows, kind=self.kind, columns=Columns(**columns), like=self.like)


class Stream:
    """Training batches of streamed rows.

    Buffer `b` of an epoch has the rows from `b * data.buffer_rows` on; several sources are mixed by
    their weights. It is tokenized, packed and shuffled as a separate dataset, so its batches are a
    function of the seed, the epoch and the buffer number. An epoch ends with the first source that
    ends.

    Args:
        config: a validated config.
        encoding: the encoder from rows to tokens.
        like: examples with the labels of the rows, or None.

    Raises:
        DataError: a source cannot be streamed.
        ConfigError: the weight of a source is too small for one row per buffer.
    """

    steps_per_epoch: int | None = None
    """Number of batches per epoch: unknown."""

    def __init__(self, config: Config, encoding: RowEncoder, like: Examples | None = None) -> None:
        self._config, self._encoding = config, encoding
        weights = config.data.weights or (1.0,)
        shares = [weight / sum(weights) for weight in weights]
        self._sources: list[StreamedSource] = []
        for path, share in zip(config.data.sources, shares, strict=True):
            hub = (config.data.subset, config.data.revision) if is_hub_id(path) else (None, None)
            stream, count = (
                RowStream(path, "train", *hub, file_options_of(config)),
                round(share * config.data.buffer_rows),
            )
            if count < 1:
                least = math.ceil(0.5 / share) + 1
                raise ConfigError(
                    f"data.weights: a share of {share:.2%} gives no row of {path} in a buffer of"
                    f" {config.data.buffer_rows}; increase data.buffer_rows to {least} or more, or"
                    " remove the source"
                )
            if len(shares) > 1:
                _log.info("%s: %d of every %d rows", path, count, config.data.buffer_rows)
            first = stream.rows(0, count)
            if not len(first):
                raise DataError(f"{path}: has no rows; give a source with at least one row")
            row_format = kind_of(config, first)
            report_unread(config, first, row_format)
            split, kind = cut_texts(config, first, row_format)
            examples = make_examples(split, kind=kind, columns=columns_of(config, kind), like=like)
            self._sources.append(
                StreamedSource(config, stream, row_format, kind, examples.columns, count, like)
            )

    @cached_property
    def first(self) -> tuple[Examples, Encoded]:
        """The examples and tokens of the first buffer."""
        examples = self._examples(0)
        if examples is None:
            raise DataError(f"{', '.join(self._config.data.sources)}: has no rows")
        return examples, self._encoding(examples)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The possible lengths of batches."""
        return self._config.data.lengths or (self._config.data.max_length,)

    @property
    def padding_share(self) -> float:
        """The share of padding in the batches of the first buffer."""
        return self._batches(self.first[1]).padding_share

    @property
    def identity(self) -> str:
        """Hash of the sources: their sizes, first and last MiB, or hub commits."""
        parts = [f"{source.rows.identity()} {source.count}" for source in self._sources]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def sample(self) -> Batch:
        """Return an example batch, for its shapes."""
        return self._batches(self.first[1]).batch(0)

    def __getstate__(self) -> dict[str, Any]:
        """Drop the first buffer: worker processes create their own."""
        return {name: value for name, value in self.__dict__.items() if name != "first"}

    def describe_batch(self, position: Position) -> str:
        """Return the name of the batch before a position for messages."""
        return (
            f"batch {position['batch'] - 1} of buffer {position['buffer']} of epoch"
            f" {position['epoch']}"
        )

    def buffer(self, number: int) -> Encoded | None:
        """Read and tokenize a buffer; None after the last one."""
        examples = self._examples(number)
        if examples is None:
            return None
        # in a short last buffer, a single dropped row is a large share
        is_full = number == 0 or len(examples) >= sum(source.count for source in self._sources)
        return self._encoding(examples, check_dropped=is_full)

    def feed(
        self,
        position: Position,
        steps: int,
        waiting: Callable[[], None] = lambda: None,
        own: Own = None,
    ) -> Generator[tuple[Batch, Position]]:
        """Yield batches from a position on, each with the position after it.

        Args:
            position: `epoch`, `buffer` and `batch` of the next batch; empty for the start.
            steps: unused: a stream continues until it is closed.
            waiting: called while waiting for a batch; may raise to stop.
            own: the rows of each micro-batch to build; None for all.

        Raises:
            DataError: a row cannot be read, or an epoch has no batch.
        """
        epoch, number, batch = (position.get(name, 0) for name in ("epoch", "buffer", "batch"))
        options = self._config.data
        while True:
            before = number
            buffers = prefetch(
                _Buffers(self, number),
                options.workers,
                timeout=options.worker_timeout,
                waiting=waiting,
            )
            with closing(buffers):
                for encoded in buffers:
                    if encoded is None:
                        break
                    yield from self._buffer_batches(encoded, epoch, number, batch, own)
                    number, batch = number + 1, 0
            if number == before == 0:
                raise DataError(
                    f"{', '.join(options.sources)}: an entire pass over the stream gave no batch"
                )
            epoch, number = epoch + 1, 0

    def _buffer_batches(
        self, encoded: Encoded, epoch: int, number: int, start: int, own: Own
    ) -> Generator[tuple[Batch, Position]]:
        if not len(encoded):
            return
        batches = self._batches(encoded)
        # each buffer of each epoch is shuffled differently
        first = (epoch * _ENDLESS + number) * batches.steps_per_epoch
        for i in range(start, batches.steps_per_epoch):
            yield batches.batch(first + i, own), {"epoch": epoch, "buffer": number, "batch": i + 1}

    def _batches(self, encoded: Encoded) -> Batches:
        options = self._config.train
        return Batches(
            encoded,
            options.batch_size,
            padded_lengths(self._config, encoded),
            options.seed,
            self._encoding.pad_id,
            accumulation=options.accumulation,
        )

    def _examples(self, number: int) -> Examples | None:
        parts = [source.examples(number) for source in self._sources]
        remaining = [part for part in parts if part is not None]
        return join(remaining) if len(remaining) == len(parts) else None


@dataclass(frozen=True)
class _Buffers:
    """The buffers from `start` on, as `Items`."""

    stream: Stream
    start: int

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, i: int) -> Encoded | None:
        return self.stream.buffer(self.start + i)

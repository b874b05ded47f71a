"""Batches of rows that are read while training: a stream is taken in buffers, each of them a small
data set.
"""

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
from jaxpeft.data.examples.reading import columns_of, cut_texts, kind_of, layout_of, report_unread
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
        config: of the run.
        rows: its rows.
        format: of its rows.
        kind: the same, of those that are cut at a separator that of the pieces.
        columns: the columns that are used.
        count: how many of its rows a buffer holds.
        like: examples whose labels these rows have; None where there are none.
    """

    config: Config
    rows: RowStream
    format: Kind
    kind: Kind
    columns: Columns
    count: int
    like: Examples | None

    def examples(self, buffer: int) -> Examples | None:
        """Make the examples of a buffer, None where the rows have ended."""
        rows = self.rows.rows(buffer * self.count, self.count)
        if not len(rows):
            return None
        rows = cut_texts(self.config, rows, self.format)[0]
        # a column that a format may do without may be missing in a whole buffer
        optional, there = OPTIONAL.get(self.kind, {}), set(rows.columns())
        given = {
            field: c
            for field, c in self.columns.named_fields().items()
            if field not in optional or c in there
        }
        return make_examples(rows, kind=self.kind, columns=Columns(**given), like=self.like)


class Stream:
    """The training batches of rows that are not held.

    Buffer `b` of an epoch holds the rows from `b * data.buffer_rows` on, of several sources in the
    proportion of their weights. It is tokenized, packed and shuffled as a data set of its own, so
    its batches are a function of the seed, the epoch and its number. An epoch ends where the first
    source ends.

    Args:
        config: a checked config.
        encoding: of rows as tokens.
        like: examples whose labels the rows have; None where there are none.

    Raises:
        DataError: a source cannot be streamed.
        ConfigError: the weight of a source leaves it no row in a buffer.
    """

    steps_per_epoch: int | None = None
    """How many batches an epoch has: not known."""

    def __init__(self, config: Config, encoding: RowEncoder, like: Examples | None = None) -> None:
        self._config, self._encoding = config, encoding
        weights = config.data.weights or (1.0,)
        shares = [weight / sum(weights) for weight in weights]
        self._sources: list[StreamedSource] = []
        for path, share in zip(config.data.sources, shares, strict=True):
            hub = (config.data.subset, config.data.revision) if is_hub_id(path) else (None, None)
            stream, count = (
                RowStream(path, "train", *hub, layout_of(config)),
                round(share * config.data.buffer_rows),
            )
            if count < 1:
                least = math.ceil(0.5 / share) + 1
                raise ConfigError(
                    f"data.weights: a share of {share:.2%} is no row of {path} in a buffer of"
                    f" {config.data.buffer_rows}; raise data.buffer_rows to {least} or more, or"
                    " leave the source out"
                )
            if len(shares) > 1:
                _log.info("%s: %d of each %d rows", path, count, config.data.buffer_rows)
            first = stream.rows(0, count)
            if not len(first):
                raise DataError(f"{path}: has no rows; give a source with at least one row")
            told = kind_of(config, first)
            report_unread(config, first, told)
            ready, kind = cut_texts(config, first, told)
            found = make_examples(ready, kind=kind, columns=columns_of(config, kind), like=like)
            self._sources.append(
                StreamedSource(config, stream, told, kind, found.columns, count, like)
            )

    @cached_property
    def first(self) -> tuple[Examples, Encoded]:
        """The first buffer, to look at."""
        examples = self._examples(0)
        if examples is None:
            raise DataError(f"{', '.join(self._config.data.sources)}: has no rows")
        return examples, self._encoding(examples)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths that batches may have."""
        return self._config.data.lengths or (self._config.data.max_length,)

    @property
    def padding_share(self) -> float:
        """The share of all places of the first buffer's batches that hold no token."""
        return self._batches(self.first[1]).padding_share

    @property
    def identity(self) -> str:
        """Tell this stream from another: its sources' sizes, first and last MiB, or commit."""
        named = [f"{source.rows.identity()} {source.count}" for source in self._sources]
        return hashlib.sha256(" ".join(named).encode()).hexdigest()

    def sample(self) -> Batch:
        """Return a batch, for its shapes."""
        return self._batches(self.first[1]).batch(0)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the first buffer behind: worker processes make their own."""
        return {name: value for name, value in self.__dict__.items() if name != "first"}

    def describe_batch(self, position: Position) -> str:
        """Name the batch before a position, for a message."""
        return (
            f"batch {position['batch'] - 1} of buffer {position['buffer']} of epoch"
            f" {position['epoch']}"
        )

    def buffer(self, number: int) -> Encoded | None:
        """Read and tokenizes a buffer, None where there is none."""
        examples = self._examples(number)
        if examples is None:
            return None
        # of the few rows that are left at the end, one is a large share
        whole = number == 0 or len(examples) >= sum(source.count for source in self._sources)
        return self._encoding(examples, judged=whole)

    def feed(
        self,
        position: Position,
        steps: int,
        waiting: Callable[[], None] = lambda: None,
        own: Own = None,
    ) -> Generator[tuple[Batch, Position]]:
        """Yield batches from a position on, each with the position behind it.

        Args:
            position: `epoch`, `buffer` and `batch` of the next batch; empty for the beginning.
            steps: optimizer steps of the run: not used, a stream goes on until it is closed.
            waiting: called while a batch is waited for; may raise to stop.
            own: which rows of each micro-batch to make; None for all.

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
                    yield from self._of(encoded, epoch, number, batch, own)
                    number, batch = number + 1, 0
            if number == before == 0:
                raise DataError(
                    f"{', '.join(options.sources)}: a whole pass over the stream gave no batch"
                )
            epoch, number = epoch + 1, 0

    def _of(
        self, encoded: Encoded, epoch: int, number: int, start: int, own: Own
    ) -> Generator[tuple[Batch, Position]]:
        if not len(encoded):
            return
        batches = self._batches(encoded)
        # each buffer of each epoch is shuffled in its own way
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
        found = [part for part in parts if part is not None]
        return join(found) if len(found) == len(parts) else None


@dataclass(frozen=True)
class _Buffers:
    """The buffers from one on, as numbered items."""

    stream: Stream
    start: int

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, i: int) -> Encoded | None:
        return self.stream.buffer(self.start + i)

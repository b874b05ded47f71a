"""Parquet and Arrow: bytes to records, batch by batch, and class labels by their names."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import IO, Any, cast

from jaxpeft.data.problems import Record
from jaxpeft.data.rows.file_options import Parsed, Take
from jaxpeft.errors import DataError

_BATCH_BYTES, _FEWEST, _MOST = 1 << 26, 16, 1024
_FEATURES = b"huggingface"


def parse_parquet(data: bytes, name: str, take: Take) -> Parsed:
    """Read a parquet file.

    Args:
        data: the file.
        name: of the file.
        take: is told how many bytes are unpacked, before any row is made of them.

    Raises:
        DataError: it is not one, or holds more than is allowed.
    """
    with _fault(name, "a parquet file"):
        _measure(
            _parquet_batches(_buffer(data), lambda size: (take(size, name), take(-size, name))),
            name,
            take,
        )
    return _parse(parquet_records(_buffer(data), name))


def parse_arrow(data: bytes, name: str, take: Take) -> Parsed:
    """Read an Arrow file or stream: the arguments are those of `parse_parquet`."""
    with _fault(name, "an Arrow file"):
        _measure(_arrow_batches(_buffer(data)), name, take)
    return _parse(arrow_records(_buffer(data), name))


def parquet_records(source: Any, name: str) -> Iterator[list[Record]]:
    """Yield the records of a parquet file, some at a time.

    Args:
        source: a path, or what pyarrow reads as a file.
        name: of the file.

    Raises:
        DataError: it is not one.
    """
    with _fault(name, "a parquet file"):
        yield from map(_records, _parquet_batches(source))


def arrow_records(source: Any, name: str) -> Iterator[list[Record]]:
    """Yield the records of an Arrow file or stream, as `parquet_records` does."""
    with _fault(name, "an Arrow file"):
        for batch in _arrow_batches(source):
            yield from (
                _records(batch.slice(start, _MOST)) for start in range(0, batch.num_rows, _MOST)
            )


def _measure(batches: Iterator[Any], name: str, take: Take) -> None:
    """Count what the batches hold, keeping none: a value that stands in the file once may be meant
    a million times.
    """
    for batch in batches:
        take(batch.nbytes, name)


def _parquet_batches(
    source: Any, claims: Callable[[int], Any] = lambda size: None
) -> Iterator[Any]:
    """Yield the batches of a parquet file, after how many bytes it says that its columns are."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(source) as file:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        chunks = [
            group.column(j).total_uncompressed_size
            for group in groups
            for j in range(group.num_columns)
        ]
        claims(sum(chunks))
        # no value is larger than its column, so few of them are unpacked at once
        rows = min(_MOST, max(_FEWEST, _BATCH_BYTES // max(1, *chunks, 1)))
        yield from file.iter_batches(batch_size=rows)


def _arrow_batches(source: Any) -> Iterator[Any]:
    import pyarrow as pa

    with source if hasattr(source, "read") else pa.memory_map(str(source)) as file:
        stream = file.read(6) != b"ARROW1"
        file.seek(0)
        if stream:  # as `datasets` writes them
            yield from pa.ipc.open_stream(file)
            return
        whole = pa.ipc.open_file(file)
        yield from (whole.get_batch(i) for i in range(whole.num_record_batches))


@contextmanager
def _fault(name: str, what: str) -> Generator[None]:
    """Say of what pyarrow cannot read that it is not what its name says, in its words without the
    name of its buffer.
    """
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].rpartition("': ")[2]
        raise DataError(f"{name}:1:1: not {what} ({reason}); write or download it again") from None


def with_label_names(record: Record, features: Any) -> Record:
    """Return a record with the numbers of class labels replaced by their names; -1, a hidden label,
    by None.

    Args:
        record: one row.
        features: those of `datasets`, by column; None where there are none.
    """
    return (
        {key: _label_names(value, features.get(key)) for key, value in record.items()}
        if features
        else record
    )


def _label_names(value: Any, feature: Any) -> Any:
    names, inner = getattr(feature, "names", None), getattr(feature, "feature", None)
    if names and isinstance(value, int):
        return names[value] if 0 <= value < len(names) else None
    if inner is not None and isinstance(value, list):
        return [_label_names(item, inner) for item in cast(list[Any], value)]
    return value


def _records(batch: Any) -> list[Record]:
    features = None
    if _FEATURES in (batch.schema.metadata or {}):
        from datasets import Features

        features = Features.from_arrow_schema(batch.schema)
    return [with_label_names(_decode_floats(record), features) for record in batch.to_pylist()]


def _decode_floats(record: Record) -> Record:
    """Return a record with its decimal numbers as those that JSON has."""
    return {
        key: float(value) if isinstance(value, Decimal) else value for key, value in record.items()
    }


def _parse(batches: Iterator[list[Record]]) -> Parsed:
    return Parsed([record for records in batches for record in records])


def _buffer(data: bytes) -> IO[bytes]:
    import pyarrow as pa

    return cast(IO[bytes], pa.BufferReader(data))

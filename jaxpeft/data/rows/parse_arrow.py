"""Parse Parquet and Arrow files batch by batch, with class labels converted to names."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import IO, Any, cast

from jaxpeft.data.problems import Record
from jaxpeft.data.rows.file_options import Parsed, Take
from jaxpeft.errors import DataError

_BATCH_BYTES, _MIN_ROWS, _MAX_ROWS = 1 << 26, 16, 1024
_FEATURES = b"huggingface"


def parse_parquet(data: bytes, name: str, take: Take) -> Parsed:
    """Parse a Parquet file.

    Args:
        data: the contents.
        name: the name of the file in messages.
        take: called with the number of unpacked bytes before they are converted to rows.

    Raises:
        DataError: the file is invalid or too large.
    """
    with _fault(name, "a parquet file"):
        _measure(
            _parquet_batches(_buffer(data), lambda size: (take(size, name), take(-size, name))),
            name,
            take,
        )
    return _parse(parquet_records(_buffer(data), name))


def parse_arrow(data: bytes, name: str, take: Take) -> Parsed:
    """Parse an Arrow file or stream; see `parse_parquet` for the arguments."""
    with _fault(name, "an Arrow file"):
        _measure(_arrow_batches(_buffer(data)), name, take)
    return _parse(arrow_records(_buffer(data), name))


def parquet_records(source: Any, name: str) -> Iterator[list[Record]]:
    """Yield batches of the records in a Parquet file.

    Args:
        source: a path, or a file object for pyarrow.
        name: the name of the file in messages.

    Raises:
        DataError: the file is invalid.
    """
    with _fault(name, "a parquet file"):
        yield from map(_records, _parquet_batches(source))


def arrow_records(source: Any, name: str) -> Iterator[list[Record]]:
    """Yield batches of the records in an Arrow file or stream; see `parquet_records`."""
    with _fault(name, "an Arrow file"):
        for batch in _arrow_batches(source):
            yield from (
                _records(batch.slice(start, _MAX_ROWS))
                for start in range(0, batch.num_rows, _MAX_ROWS)
            )


def _measure(batches: Iterator[Any], name: str, take: Take) -> None:
    """Count the bytes of all batches without keeping them: dictionary encoding can repeat a stored
    value a million times.
    """
    for batch in batches:
        take(batch.nbytes, name)


def _parquet_batches(
    source: Any, on_size: Callable[[int], Any] = lambda size: None
) -> Iterator[Any]:
    """Yield the batches of a Parquet file, after calling `on_size` with its declared size."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(source) as file:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        chunks = [
            group.column(j).total_uncompressed_size
            for group in groups
            for j in range(group.num_columns)
        ]
        on_size(sum(chunks))
        # a value may be as large as its column chunk, so limit the rows that are unpacked at once
        rows = min(_MAX_ROWS, max(_MIN_ROWS, _BATCH_BYTES // max(1, *chunks, 1)))
        yield from file.iter_batches(batch_size=rows)


def _arrow_batches(source: Any) -> Iterator[Any]:
    import pyarrow as pa

    with source if hasattr(source, "read") else pa.memory_map(str(source)) as file:
        is_stream = file.read(6) != b"ARROW1"
        file.seek(0)
        if is_stream:  # as written by `datasets`
            yield from pa.ipc.open_stream(file)
            return
        reader = pa.ipc.open_file(file)
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))


@contextmanager
def _fault(name: str, what: str) -> Generator[None]:
    """Convert pyarrow's errors to a DataError, without the name of the buffer."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].rpartition("': ")[2]
        raise DataError(f"{name}:1:1: not {what} ({reason}); write or download it again") from None


def with_label_names(record: Record, features: Any) -> Record:
    """Return a record with class label ids replaced by their names, and -1 (hidden) by None.

    Args:
        record: one row.
        features: the features of `datasets` by column, or None.
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
    """Return a record with Decimal values converted to float."""
    return {
        key: float(value) if isinstance(value, Decimal) else value for key, value in record.items()
    }


def _parse(batches: Iterator[list[Record]]) -> Parsed:
    return Parsed([record for records in batches for record in records])


def _buffer(data: bytes) -> IO[bytes]:
    import pyarrow as pa

    return cast(IO[bytes], pa.BufferReader(data))

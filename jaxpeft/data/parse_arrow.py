"""Parquet and Arrow: bytes to records, batch by batch, and class labels by their names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any, cast

from jaxpeft.data.layout import Parsed, Take
from jaxpeft.data.problems import Record
from jaxpeft.errors import DataError

_BATCH_BYTES, _FEWEST, _MOST = 1 << 26, 16, 1024
_FEATURES = b"huggingface"


def parse_parquet(data: bytes, name: str, take: Take) -> Parsed:
    """Read a parquet file.

    Args:
        data: the file.
        name: of the file.
        take: is told how many bytes are unpacked, before they are made rows.

    Raises:
        DataError: it is not one, or holds more than is allowed.
    """
    return _parsed(parquet_records(_buffer(data), name, take))


def parse_arrow(data: bytes, name: str, take: Take) -> Parsed:
    """Read an Arrow file or stream: the arguments are those of `parse_parquet`."""
    return _parsed(arrow_records(_buffer(data), name, take))


def parquet_records(source: Any, name: str, take: Take) -> Iterator[list[Record]]:
    """Yield the records of a parquet file, some at a time.

    Args:
        source: a path, or what pyarrow reads as a file.
        name: of the file.
        take: is told how many bytes are unpacked.

    Raises:
        DataError: it is not one, or holds more than is allowed.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(source) as file:
            chunks = [
                file.metadata.row_group(i).column(j).total_uncompressed_size
                for i in range(file.metadata.num_row_groups)
                for j in range(file.metadata.num_columns)
            ]
            take(sum(chunks), name)
            spared = sum(chunks)
            # a value may stand once and be meant a million times, but is not larger than its column
            rows = min(_MOST, max(_FEWEST, _BATCH_BYTES // max(1, *chunks, 1)))
            for batch in file.iter_batches(batch_size=rows):
                take(max(0, batch.nbytes - spared), name)
                spared = max(0, spared - batch.nbytes)
                yield _records(batch)
    except (pa.ArrowException, OSError) as error:
        raise DataError(no_parquet(name, error)) from None


def arrow_records(source: Any, name: str, take: Take) -> Iterator[list[Record]]:
    """Yield the records of an Arrow file or stream, as `parquet_records` does."""
    import pyarrow as pa

    try:
        for batch in _arrow_batches(source):
            take(batch.nbytes, name)
            for start in range(0, batch.num_rows, _MOST):
                yield _records(batch.slice(start, _MOST))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{name}: not an Arrow file ({_reason(error)}); write or download it again") from None


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


def with_label_names(record: Record, features: Any) -> Record:
    """Return a record with the numbers of class labels replaced by their names; -1, a hidden label, by None.

    Args:
        record: one row.
        features: those of `datasets`, by column; None where there are none.
    """
    return {key: _label_names(value, features.get(key)) for key, value in record.items()} if features else record


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
    return [with_label_names(record, features) for record in batch.to_pylist()]


def _parsed(batches: Iterator[list[Record]]) -> Parsed:
    return Parsed([record for records in batches for record in records])


def _buffer(data: bytes) -> IO[bytes]:
    import pyarrow as pa

    return cast(IO[bytes], pa.BufferReader(data))


def no_parquet(name: str, error: Exception) -> str:
    """Return what to say of a file that is no parquet file, in the words of `pyarrow` without the name of its buffer."""
    return f"{name}:1:1: not a parquet file ({_reason(error)}); write or download it again"


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0].rpartition("': ")[2]

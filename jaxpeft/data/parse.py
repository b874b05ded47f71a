"""The file formats, by the ending of the file's name.

Each parser takes `(data, name)` and gives `(records, lines)`: the rows as dicts and the 1-based line at which each
begins, or no lines where the format has none.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from jaxpeft.data.parse_delimited import parse_delimited
from jaxpeft.data.parse_json import parse_json, parse_jsonl
from jaxpeft.data.problems import Parsed
from jaxpeft.data.utf8 import body_of, decode
from jaxpeft.errors import DataError


def parse_parquet(data: bytes, name: str) -> Parsed:
    """Reads a parquet file.

    Raises:
        DataError: it is not one.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(body_of(data, name)))
    except (pa.ArrowException, OSError) as error:
        raise DataError(no_parquet(name, error)) from None
    return table.to_pylist(), ()


def no_parquet(name: str, error: Exception) -> str:
    """Says that a file is no parquet file, in the words of `pyarrow` without the name of its buffer."""
    reason = str(error).splitlines()[0].rpartition("': ")[2]
    return f"{name}:1:1: not a parquet file ({reason}); write or download it again"


def parse_text(data: bytes, name: str) -> Parsed:
    """Reads a plain text file as one row with the column `text`.

    Raises:
        DataError: the file is empty or not UTF-8.
    """
    return [{"text": decode(body_of(data, name), name)}], (1,)


PARSERS: dict[str, Callable[[bytes, str], Parsed]] = {
    ".jsonl": parse_jsonl,
    ".json": parse_json,
    ".csv": partial(parse_delimited, delimiter=","),
    ".tsv": partial(parse_delimited, delimiter="\t"),
    ".parquet": parse_parquet,
    ".txt": parse_text,
}

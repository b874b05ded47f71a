"""Stream rows from sources too large for memory, in order and from any start row."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol, TextIO

from jaxpeft.data.problems import Record
from jaxpeft.data.rows.data_files import (
    check_file,
    ending_of,
    gzip_fault,
    open_file,
    unreadable_file,
)
from jaxpeft.data.rows.dialect import Dialect, Fields, dialect_of, fields_of
from jaxpeft.data.rows.file_options import AS_FOUND, FileOptions, flatten_nested
from jaxpeft.data.rows.folders import files_of
from jaxpeft.data.rows.parse_arrow import arrow_records, parquet_records, with_label_names
from jaxpeft.data.rows.parse_delimited import header_of, parse_fields
from jaxpeft.data.rows.parse_json import parse_lines
from jaxpeft.data.rows.read import Rows, hub_name, is_hub_id, load_hub
from jaxpeft.data.rows.utf8 import UTF8, check_pointer, encoding_fault, encoding_of, first_fault
from jaxpeft.errors import DataError

_EDGE = 1 << 20
_HEAD = 1 << 10
Raw = tuple[int, Any]
"""The 1-based line of a row (0 if the format has no lines), and the unparsed row."""


class _Reader(Protocol):
    """One file or hub split."""

    name: str
    note: str

    def raw(self) -> Iterator[Raw]:
        """Yield all rows unparsed, so that skipping rows is cheap."""
        ...

    def parse(self, raws: Sequence[Raw]) -> list[Record]:
        """Parse some rows."""
        ...

    def identity(self) -> str:
        """Return a string that identifies the content."""
        ...


class RowStream:
    """The rows of a source, in order.

    Args:
        path: a JSONL, CSV, TSV, parquet or Arrow file, a folder of them, or a hub id.
        split: the split of a folder whose files are named after splits, or of a hub dataset.
        config: the configuration of a hub dataset.
        revision: the commit, tag or branch of a hub dataset.
        file_options: the user's file options.

    Raises:
        DataError: the file does not exist or cannot be streamed.
    """

    def __init__(
        self,
        path: str,
        split: str,
        config: str | None = None,
        revision: str | None = None,
        file_options: FileOptions = AS_FOUND,
    ) -> None:
        self.name, self._columns = path, file_options.columns
        local = Path(path).expanduser()
        if is_hub_id(path):
            self._readers: list[_Reader] = [_Hub(path, split, config, revision)]
        elif local.is_dir():
            self._readers = [_reader(file, file_options) for file in files_of(local, split).paths]
        else:
            check_file(local, path)
            self._readers = [_reader(local, file_options)]
        self._at, self._rest = 0, iter(())
        self._identity = ""

    def rows(self, start: int, count: int) -> Rows:
        """Return up to `count` rows from row `start`; continues after the last call if possible.

        Raises:
            DataError: a row cannot be read.
        """
        if start < self._at or self._at == 0:
            self._at, self._rest = 0, self._all()
        at, self._at = self._at, 0  # restart from the first row after an error
        for _ in islice(self._rest, start - at):
            pass
        chunk = list(islice(self._rest, count))
        records: list[Record] = []
        for reader, group in groupby(chunk, itemgetter(0)):
            records += reader.parse([raw for _, _, raw in group])
        self._at = start + len(chunk)
        places = tuple((reader.name, number) for reader, number, _ in chunk)
        lines = tuple(line for _, _, (line, _) in chunk)
        digest = f"{self.identity()} {start} {len(chunk)}"
        notes = tuple(f"{reader.name}: {reader.note}" for reader in self._readers if reader.note)
        return Rows(
            flatten_nested(records, self._columns), self.name, digest, lines, places, notes=notes
        )

    def _all(self) -> Iterator[tuple[_Reader, int, Raw]]:
        """Yield every row with its 1-based number in its file."""
        return (
            (reader, i, raw) for reader in self._readers for i, raw in enumerate(reader.raw(), 1)
        )

    def identity(self) -> str:
        """Return a cached hash that identifies the source without reading all of it."""
        if not self._identity:
            text = " ".join(reader.identity() for reader in self._readers)
            self._identity = hashlib.sha256(text.encode()).hexdigest()
        return self._identity

    def __getstate__(self) -> dict[str, Any]:
        """Drop open files, so that another process opens its own."""
        return self.__dict__ | {"_at": 0, "_rest": iter(())}


class _File:
    def __init__(self, path: Path, file_options: FileOptions) -> None:
        self.path, self.name, self.file_options, self.note = path, str(path), file_options, ""

    def raw(self) -> Iterator[Raw]:
        """Yield the rows without trailing blank ones."""
        blank: list[Raw] = []
        try:
            for number, row in self._raw():
                blank.append((number, row))
                if row and not (isinstance(row, bytes) and row.isspace()):
                    yield from blank
                    blank.clear()
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(gzip_fault(self.name, error)) from None
        except OSError as error:
            raise DataError(unreadable_file(self.name, error)) from None

    def _raw(self) -> Iterator[Raw]:
        """Yield every row; a blank one is falsy or whitespace."""
        raise NotImplementedError

    def identity(self) -> str:
        """Return the hash of the size, the first and the last MiB; other changes go unnoticed."""
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            edges = file.read(_EDGE)
            file.seek(max(0, size - _EDGE))
            edges += file.read(_EDGE)
        return hashlib.sha256(f"{size}".encode() + edges).hexdigest()


class _TextFile(_File):
    @cached_property
    def encoding(self) -> str:
        with open_file(self.path) as file:
            return encoding_of(file.read(_HEAD), self.name, self.file_options.encoding)

    @contextmanager
    def _text(self) -> Generator[TextIO]:
        """Open the file as text, without a byte order mark."""
        encoding = "utf-8-sig" if self.encoding == UTF8 else self.encoding
        try:
            with open_file(self.path) as file, io.TextIOWrapper(file, encoding, newline="") as text:
                yield text
        except UnicodeError:
            with open_file(self.path) as file:
                if self.encoding == UTF8:
                    raise DataError(first_fault(file, self.name)) from None
                pieces = iter(partial(file.read, _EDGE), b"")
                raise DataError(encoding_fault(self.encoding, pieces, self.name)) from None


class _Jsonl(_TextFile):
    def _raw(self) -> Iterator[Raw]:
        if self.encoding == UTF8:  # `parse` reports lines that are not UTF-8
            with open_file(self.path) as file:
                for number, line in enumerate(file, 1):
                    yield (
                        number,
                        (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).removesuffix(
                            b"\n"
                        ),
                    )
            return
        with self._text() as text:
            for number, line in enumerate(text, 1):
                yield number, line.removeprefix("\ufeff").rstrip("\r\n").encode()

    def parse(self, raws: Sequence[Raw]) -> list[Record]:
        return parse_lines(raws, self.name)


class _Delimited(_TextFile):
    def __init__(self, path: Path, file_options: FileOptions, delimiter: str) -> None:
        super().__init__(path, file_options)
        self._delimiter = delimiter

    @cached_property
    def _dialect(self) -> Dialect:
        with self._text() as text:
            head = text.read(_EDGE)
            head += text.readline() if head else ""
            is_complete = not text.read(1)
        dialect = dialect_of(
            head.rstrip("\r\n") if is_complete else head,
            self.name,
            self._delimiter,
            self.file_options,
            is_complete=is_complete,
        )
        self.note = f"{dialect}, encoding {self.encoding}"
        return dialect

    @cached_property
    def _header(self) -> tuple[list[str], int]:
        return header_of(next(self._fields(), (1, [])), self.name, self._dialect)

    def _fields(self) -> Iterator[tuple[int, Fields]]:
        dialect = self._dialect
        with self._text() as text:
            for _ in range(dialect.skipped):
                text.readline()
            for number, row in fields_of(text, dialect.delimiter, dialect.quoted):
                yield number + dialect.skipped, row

    def _raw(self) -> Iterator[Raw]:
        with open_file(self.path) as file:
            if not file.read(1):
                return iter(())
        return islice(self._fields(), self._header[1], None)

    def parse(self, raws: Sequence[Raw]) -> list[Record]:
        return parse_fields(raws, self._header[0], self.name, self._dialect)


class _Table(_File):
    """A self-describing binary file."""

    def __init__(
        self, path: Path, file_options: FileOptions, read: Callable[..., Iterator[list[Record]]]
    ) -> None:
        super().__init__(path, file_options)
        self._read = read

    def _raw(self) -> Iterator[Raw]:
        with self.path.open("rb") as file:
            check_pointer(file.read(_HEAD), self.name)
        for records in self._read(self.path, self.name):
            yield from ((0, record) for record in records)

    def parse(self, raws: Sequence[Raw]) -> list[Record]:
        return [record for _, record in raws]


class _Hub:
    def __init__(self, hub_id: str, split: str, config: str | None, revision: str | None) -> None:
        self.name, self.note = hub_name(hub_id, split, config), ""
        self._where = (hub_id, split, config, revision)
        self._hash = ""

    def raw(self) -> Iterator[Raw]:
        data = load_hub(*self._where, streaming=True)
        try:
            yield from ((0, with_label_names(record, data.features)) for record in data)
        except OSError as error:
            raise DataError(
                f"{self.name}: reading stopped before the end ({error}); check the network and run"
                " again"
            ) from error

    def parse(self, raws: Sequence[Raw]) -> list[Record]:
        return [record for _, record in raws]

    def identity(self) -> str:
        """Return the split and the commit to which the revision currently points."""
        if not self._hash:
            from huggingface_hub import HfApi
            from huggingface_hub.errors import HfHubHTTPError

            hub_id, split, config, revision = self._where
            try:
                commit = HfApi().dataset_info(hub_id, revision=revision).sha
            except (HfHubHTTPError, OSError) as error:
                raise DataError(
                    f"{hub_id}: its revision cannot be determined ({type(error).__name__}); check"
                    " the network"
                ) from None
            self._hash = f"{hub_id} {split} {config} {commit}"
        return self._hash


def _reader(path: Path, file_options: FileOptions) -> _Reader:
    makers: dict[str, Callable[[Path, FileOptions], _Reader]] = {
        ".jsonl": _Jsonl,
        ".ndjson": _Jsonl,
        ".csv": lambda path, file_options: _Delimited(path, file_options, ","),
        ".tsv": lambda path, file_options: _Delimited(path, file_options, "\t"),
        ".parquet": lambda path, file_options: _Table(path, file_options, parquet_records),
        ".arrow": lambda path, file_options: _Table(path, file_options, arrow_records),
    }
    if ending_of(path) not in makers:
        raise DataError(
            f"{path}: files with the extension {path.suffix!r} cannot be streamed; convert it to"
            " .jsonl, one row per line"
        )
    return makers[ending_of(path)](path, file_options)

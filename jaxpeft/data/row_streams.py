"""Rows of files that are too large to hold: read in order, some at a time, from any row on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

from jaxpeft.data.parse import no_parquet
from jaxpeft.data.parse_delimited import Fields, fields_of, header_of, parse_fields
from jaxpeft.data.parse_json import parse_lines
from jaxpeft.data.problems import Record
from jaxpeft.data.rows import Rows, files_of, hub_name, hub_record, is_hub_id, load_hub, missing, unreadable
from jaxpeft.data.utf8 import check_start, first_fault
from jaxpeft.errors import DataError

_EDGE = 1 << 20
_HEAD = 1 << 10
Raw = tuple[int, Any]
"""The 1-based line of a row, 0 where there are no lines, and the row before it is parsed."""


class _Reader(Protocol):
    """One file or hub split."""

    name: str

    def raw(self) -> Iterator[Raw]:
        """Yields the rows from the first on, unparsed, so that those before a start cost little."""
        ...

    def parse(self, raws: Sequence[Raw]) -> list[Record]:
        """Parses some of them."""
        ...

    def identity(self) -> str:
        """Tells this content from another."""
        ...


class RowStream:
    """The rows of a source, in order.

    Args:
        path: a JSONL, CSV, TSV or parquet file, a folder of them, or a hub id.
        split: of a folder whose files are named by split, or of a hub id.
        config: the hub data set's configuration.
        revision: the hub data set's commit, tag or branch.

    Raises:
        DataError: there is no such file, or it cannot be streamed.
    """

    def __init__(self, path: str, split: str, config: str | None = None, revision: str | None = None) -> None:
        self.name = path
        if is_hub_id(path):
            self._readers: list[_Reader] = [_Hub(path, split, config, revision)]
        else:
            local = Path(path).expanduser()
            if not local.exists():
                raise DataError(missing(local, path))
            files = files_of(local, split) if local.is_dir() else [local]
            self._readers = [_reader(file) for file in files]
        self._at, self._rest = 0, iter(())
        self._identity = ""

    def rows(self, start: int, count: int) -> Rows:
        """Gives `count` rows from row `start` on, fewer where they end; goes on from the last call where it can.

        Raises:
            DataError: a row cannot be read.
        """
        if start < self._at or self._at == 0:
            self._at, self._rest = 0, self._all()
        at, self._at = self._at, 0  # what fails on the way begins anew
        for _ in islice(self._rest, start - at):
            pass
        taken = list(islice(self._rest, count))
        records: list[Record] = []
        for reader, group in groupby(taken, itemgetter(0)):
            records += reader.parse([raw for _, _, raw in group])
        self._at = start + len(taken)
        places = tuple((of.name, number) for of, number, _ in taken)
        lines = tuple(line for _, _, (line, _) in taken)
        return Rows(records, self.name, f"{self.identity()} {start} {len(taken)}", lines, places)

    def _all(self) -> Iterator[tuple[_Reader, int, Raw]]:
        """Yields every row with its 1-based number in its file."""
        return ((reader, i, raw) for reader in self._readers for i, raw in enumerate(reader.raw(), 1))

    def identity(self) -> str:
        """Gives the SHA-256 of what tells this source from another without reading all of it; looked up once."""
        if not self._identity:
            told = " ".join(reader.identity() for reader in self._readers)
            self._identity = hashlib.sha256(told.encode()).hexdigest()
        return self._identity

    def __getstate__(self) -> dict[str, Any]:
        """Leaves open files behind: another process opens them itself."""
        return self.__dict__ | {"_at": 0, "_rest": iter(())}


class _File:
    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)

    def raw(self) -> Iterator[Raw]:
        """Yields the rows, but not the blank ones that a file may end with."""
        blank: list[Raw] = []
        try:
            with self.path.open("rb") as file:
                check_start(file.read(_HEAD), self.name)
            for number, row in self._raw():
                blank.append((number, row))
                if row and not (isinstance(row, bytes) and row.isspace()):
                    yield from blank
                    blank.clear()
        except OSError as error:
            raise DataError(unreadable(self.name, error)) from None

    def _raw(self) -> Iterator[Raw]:
        """Yields every row; a blank one is false, or white space."""
        raise NotImplementedError

    def identity(self) -> str:
        """Gives the hash of the size, the first and the last MiB: a change in between is not seen."""
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            edges = file.read(_EDGE)
            file.seek(max(0, size - _EDGE))
            edges += file.read(_EDGE)
        return hashlib.sha256(f"{size}".encode() + edges).hexdigest()


class _Jsonl(_File):
    def _raw(self) -> Iterator[Raw]:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield number, (check_start(line, self.name) if number == 1 else line).removesuffix(b"\n")

    def parse(self, raws: Sequence[Raw]) -> list[Record]:
        return parse_lines(raws, self.name)


class _Delimited(_File):
    def __init__(self, path: Path, delimiter: str) -> None:
        super().__init__(path)
        self._delimiter = delimiter

    @cached_property
    def _header(self) -> list[str]:
        return header_of(next(self._fields(), (1, []))[1], self.name)

    def _fields(self) -> Iterator[tuple[int, Fields]]:
        with self.path.open(encoding="utf-8-sig", newline="") as text:
            try:
                yield from fields_of(text, self._delimiter)
            except UnicodeDecodeError:
                with self.path.open("rb") as file:
                    raise DataError(first_fault(file, self.name)) from None

    def _raw(self) -> Iterator[Raw]:
        return islice(self._fields(), 1, None)

    def parse(self, raws: Sequence[Raw]) -> list[Record]:
        return parse_fields(raws, self._header, self.name, self._delimiter)


class _Parquet(_File):
    def _raw(self) -> Iterator[Raw]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(self.path) as file:
                for batch in file.iter_batches(batch_size=1024):
                    yield from ((0, record) for record in batch.to_pylist())
        except (pa.ArrowException, OSError) as error:
            raise DataError(no_parquet(self.name, error)) from None

    def parse(self, raws: Sequence[Raw]) -> list[Record]:
        return [record for _, record in raws]


class _Hub:
    def __init__(self, hub_id: str, split: str, config: str | None, revision: str | None) -> None:
        self.name = hub_name(hub_id, split, config)
        self._where = (hub_id, split, config, revision)
        self._hash = ""

    def raw(self) -> Iterator[Raw]:
        data = load_hub(*self._where, streaming=True)
        try:
            yield from ((0, hub_record(record, data.features)) for record in data)
        except OSError as error:
            raise DataError(
                f"{self.name}: cannot be read on ({error}); check the network, then run it again"
            ) from error

    def parse(self, raws: Sequence[Raw]) -> list[Record]:
        return [record for _, record in raws]

    def identity(self) -> str:
        """Gives the split and the commit that the revision stands for now."""
        if not self._hash:
            from huggingface_hub import HfApi
            from huggingface_hub.errors import HfHubHTTPError

            hub_id, split, config, revision = self._where
            try:
                commit = HfApi().dataset_info(hub_id, revision=revision).sha
            except (HfHubHTTPError, OSError) as error:
                raise DataError(
                    f"{hub_id}: its revision cannot be told ({type(error).__name__}); check the network"
                ) from None
            self._hash = f"{hub_id} {split} {config} {commit}"
        return self._hash


def _reader(path: Path) -> _Reader:
    makers: dict[str, Callable[[Path], _Reader]] = {
        ".jsonl": _Jsonl,
        ".csv": lambda path: _Delimited(path, ","),
        ".tsv": lambda path: _Delimited(path, "\t"),
        ".parquet": _Parquet,
    }
    if path.suffix.lower() not in makers:
        raise DataError(
            f"{path}: files of the ending {path.suffix!r} cannot be streamed; convert it to .jsonl, one row a line"
        )
    return makers[path.suffix.lower()](path)

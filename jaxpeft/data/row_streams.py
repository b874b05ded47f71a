"""Rows of files that are too large to hold: read in order, some at a time, from any row on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from jaxpeft.data.parse_delimited import fields_of, header_of, parse_fields
from jaxpeft.data.parse_json import parse_lines
from jaxpeft.data.problems import Record
from jaxpeft.data.rows import Rows, files_of, hub_record, is_hub_id, load_hub, missing
from jaxpeft.data.utf8 import check_start
from jaxpeft.errors import DataError

_EDGE = 1 << 20
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

    def rows(self, start: int, count: int) -> Rows:
        """Gives `count` rows from row `start` on, fewer where they end; goes on from the last call where it can.

        Raises:
            DataError: a row cannot be read.
        """
        if start < self._at or self._at == 0:
            self._at, self._rest = 0, ((reader, raw) for reader in self._readers for raw in reader.raw())
        for _ in islice(self._rest, start - self._at):
            pass
        taken = list(islice(self._rest, count))
        self._at = start + len(taken)
        records: list[Record] = []
        for reader in self._readers:
            raws = [raw for of, raw in taken if of is reader]
            records += reader.parse(raws) if raws else []
        places = tuple((of.name, start + i + 1) for i, (of, _) in enumerate(taken))
        lines = tuple(line for _, (line, _) in taken)
        return Rows(records, self.name, f"{self.identity()} {start} {len(taken)}", lines, places)

    def identity(self) -> str:
        """Gives the SHA-256 of what tells this source from another without reading all of it."""
        return hashlib.sha256(" ".join(reader.identity() for reader in self._readers).encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        """Leaves open files behind: another process opens them itself."""
        return {"name": self.name, "_readers": self._readers, "_at": 0, "_rest": iter(())}


class _File:
    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)

    def identity(self) -> str:
        """Gives the hash of the size, the first and the last MiB: a change in between is not seen."""
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            edges = file.read(_EDGE)
            file.seek(max(0, size - _EDGE))
            edges += file.read(_EDGE)
        return hashlib.sha256(f"{size}".encode() + edges).hexdigest()


class _Jsonl(_File):
    def raw(self) -> Iterator[Raw]:
        blank: list[Raw] = []
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                raw = check_start(line, self.name) if number == 1 else line
                if not raw.strip():
                    blank.append((number, raw))  # at the end of the file they are no rows
                    continue
                yield from blank
                blank.clear()
                yield number, raw.removesuffix(b"\n")

    def parse(self, raws: Sequence[Raw]) -> list[Record]:
        return parse_lines(raws, self.name)


class _Delimited(_File):
    def __init__(self, path: Path, delimiter: str) -> None:
        super().__init__(path)
        self._delimiter = delimiter

    def raw(self) -> Iterator[Raw]:
        with self.path.open("rb") as file:
            check_start(file.readline(), self.name)
        with self.path.open(encoding="utf-8-sig", newline="") as text:
            rows = fields_of(text, self._delimiter)
            try:
                header = header_of(next(rows)[1], self.name)
                yield from ((number, (header, fields)) for number, fields in rows)
            except UnicodeDecodeError as error:
                raise DataError(f"{self.name}: not UTF-8 ({error.reason}); save the file as UTF-8") from None

    def parse(self, raws: Sequence[Raw]) -> list[Record]:
        rows = [(number, fields) for number, (_, fields) in raws]
        return parse_fields(rows, raws[0][1][0], self.name, self._delimiter)


class _Parquet(_File):
    def raw(self) -> Iterator[Raw]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(self.path) as file:
                for batch in file.iter_batches(batch_size=1024):
                    yield from ((0, record) for record in batch.to_pylist())
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"{self.name}: not a parquet file ({reason}); write or download it again") from None

    def parse(self, raws: Sequence[Raw]) -> list[Record]:
        return [record for _, record in raws]


class _Hub:
    def __init__(self, hub_id: str, split: str, config: str | None, revision: str | None) -> None:
        self.name = hub_id
        self._where = (hub_id, split, config, revision)
        self._hash = ""

    def raw(self) -> Iterator[Raw]:
        data = load_hub(*self._where, streaming=True)
        return ((0, hub_record(record, data.features)) for record in data)

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

"""Rows from a file, from the package, or from the Hugging Face hub."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.resources
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxpeft.data.problems import Record
from jaxpeft.data.rows.data_files import check_file, ending_of, read_bytes
from jaxpeft.data.rows.file_options import AS_FOUND, Allowance, FileOptions, flatten_nested
from jaxpeft.data.rows.folders import files_of
from jaxpeft.data.rows.parse_arrow import with_label_names
from jaxpeft.data.rows.parsers import PARSERS, other
from jaxpeft.errors import DataError, nearest
from jaxpeft.logs import log_time

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PACKAGE_PATH = re.compile(r"package:([A-Za-z0-9_-]+)/([A-Za-z0-9_-]+)")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """Rows as they were read.

    Attributes:
        records: one dict a row, from column to value.
        name: what to call them in messages: the path or hub id.
        sha256: of the file's bytes, or of the hub's rows written as JSON.
        lines: the 1-based line at which each row begins; empty where the format has no lines.
        places: `(file, 1-based number in it)` of each row; empty where they are all those of
            `name`, in order.
        origin: the hash of all that was read, where these rows are drawn or made from it; empty
            where it is `sha256`.
        notes: how files were read, where there is something to say.
    """

    records: list[Record]
    name: str
    sha256: str
    lines: tuple[int, ...] = ()
    places: tuple[tuple[str, int], ...] = ()
    origin: str = ""
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    @property
    def source(self) -> str:
        """The hash of all that was read: the same whichever rows of it these are."""
        return self.origin or self.sha256

    def derive(self, *made_by: str, **changes: Any) -> Rows:
        """Return rows that were made from these.

        Args:
            made_by: what made them: other words give another hash.
            changes: attributes that are other ones now.
        """
        digest = hashlib.sha256(json.dumps([self.sha256, *made_by]).encode()).hexdigest()
        return dataclasses.replace(self, sha256=digest, origin=self.source, **changes)

    def where(self, row: int) -> str:
        """Return the place of row `row` (from 0) for a message: `file:line:1 (row N)`, N counted
        from 1.
        """
        name, number = self.places[row] if self.places else (self.name, row + 1)
        line = f":{self.lines[row]}:1" if self.lines and self.lines[row] else ""
        return f"{name}{line} (row {number})"

    def take(self, chosen: Sequence[int]) -> Rows:
        """Return some of the rows, by number from 0; they count as other content, so their hash is
        another.
        """
        lines = tuple(self.lines[i] for i in chosen) if self.lines else ()
        places = tuple(self._place(i) for i in chosen)
        return self.derive(
            str(list(chosen)), records=[self.records[i] for i in chosen], lines=lines, places=places
        )

    def _place(self, row: int) -> tuple[str, int]:
        return self.places[row] if self.places else (self.name, row + 1)

    @staticmethod
    def join(parts: Sequence[Rows], name: str) -> Rows:
        """Put rows behind one another; each keeps its place.

        Args:
            parts: at least one.
            name: what to call all of them in messages.
        """
        if len(parts) == 1:
            return dataclasses.replace(parts[0], name=name, places=_locations(parts))
        digest = hashlib.sha256(" ".join(part.sha256 for part in parts).encode()).hexdigest()
        lines = tuple(line for part in parts for line in part.lines or (0,) * len(part))
        origin = hashlib.sha256(" ".join(part.source for part in parts).encode()).hexdigest()
        notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))
        return Rows(
            [r for part in parts for r in part.records],
            name,
            digest,
            lines,
            _locations(parts),
            origin,
            notes,
        )

    def columns(self) -> list[str]:
        """Return the columns that any row has, in the order of first appearance."""
        return list(dict.fromkeys(key for record in self.records for key in record))


def _locations(parts: Sequence[Rows]) -> tuple[tuple[str, int], ...]:
    return tuple(
        place
        for part in parts
        for place in part.places or [(part.name, i + 1) for i in range(len(part))]
    )


def read_rows(
    path: str | Path,
    *,
    split: str | None = None,
    config: str | None = None,
    revision: str | None = None,
    layout: FileOptions = AS_FOUND,
) -> Rows:
    """Read the rows of one file, of a folder of files or of one split of a hub data set.

    Args:
        path: a file of a format that `parse` knows, plain or packed as .gz; a folder of them (see
            `files_of`); `package:NAME/SPLIT` for a data set inside jaxpeft; or a hub id, `name` or
            `org/name`, loaded with `datasets`. What exists as a file is never looked up on the hub.
        split: the split of a hub data set or of a folder whose files are named by split, `train`
            where not given.
        config: the hub data set's configuration, such as `mrpc` of `nyu-mll/glue`.
        revision: the hub data set's commit, tag or branch.
        layout: what is told of files.

    Raises:
        DataError: there is no such file or data set, or its rows cannot be read; lists the first 20
            problems.
    """
    text, local = str(path), Path(path).expanduser()
    packaged = text.startswith("package:")
    if is_hub_id(path):
        return _read_hub(text, split or "train", config, revision, layout)
    folder = local.is_dir() and not packaged
    named = {"split": None if folder else split, "config": config, "revision": revision}
    if given := [k for k, v in named.items() if v is not None]:
        raise DataError(
            f"{text}: {', '.join(given)} is for hub ids, this is a"
            f" {'folder' if folder else 'file'}; remove it"
        )
    if packaged:
        return _read_package(text)
    rows = (
        _read_folder(local, text, split or "train", layout)
        if folder
        else _read_file(local, text, layout)
    )
    for note in rows.notes:
        _log.info("%s", note)
    return rows


def is_hub_id(path: str | Path) -> bool:
    """Return whether `read_rows` would look for a path on the hub: it reads as an id, and is no
    file here.
    """
    if str(path).startswith("package:") or Path(path).expanduser().exists():
        return False
    if not isinstance(path, str) or not _HUB_ID.fullmatch(path) or ending_of(path) in PARSERS:
        return False
    return "/" not in path or not Path(path).parent.is_dir()


def _read_folder(folder: Path, name: str, split: str, layout: FileOptions) -> Rows:
    files, allowed = files_of(folder, split), Allowance(layout.most)
    parts = [_read_file(path, str(path), layout, allowed) for path in files.paths]
    rows = Rows.join(parts, name)
    if files.labels:
        labeled = [
            {**record, "label": label}
            for record, label in zip(rows.records, files.labels, strict=True)
        ]
        rows = dataclasses.replace(rows.derive(*files.labels, records=labeled), origin="")
    return dataclasses.replace(
        rows, notes=(f"{name}: {files.note}", *rows.notes) if files.note else rows.notes
    )


def _read_file(
    path: Path, name: str, layout: FileOptions, allowed: Allowance | None = None
) -> Rows:
    check_file(path, name)
    ending = ending_of(path) or (".txt" if allowed else "")
    if ending not in PARSERS:
        raise DataError(
            f"{name}: files of the ending {path.suffix!r} are not read;"
            f" {other(path.suffix.lower())}"
        )
    allowed = allowed or Allowance(layout.most)
    return _rows(read_bytes(path, name, allowed), ending, name, layout, allowed)


def _rows(data: bytes, ending: str, name: str, layout: FileOptions, allowed: Allowance) -> Rows:
    parsed = PARSERS[ending](data, name, layout, allowed.take)
    if not parsed.records:
        raise DataError(f"{name}:1:1: the file has no rows; give a file with at least one row")
    notes = (f"{name}: {parsed.note}",) if parsed.note else ()
    records = flatten_nested(parsed.records, layout.columns)
    return Rows(records, name, hashlib.sha256(data).hexdigest(), parsed.lines, notes=notes)


def _read_package(text: str) -> Rows:
    match = _PACKAGE_PATH.fullmatch(text)
    if match is None:
        raise DataError(
            f"{text}: not of the form package:NAME/SPLIT, such as package:support_tickets/train"
        )
    folder = importlib.resources.files("jaxpeft.data").joinpath(match[1])
    file = folder.joinpath(f"{match[2]}.jsonl")
    if not file.is_file():
        splits = (
            [p.name.removesuffix(".jsonl") for p in folder.iterdir()] if folder.is_dir() else []
        )
        known = sorted(f"package:{match[1]}/{s}" for s in splits if "." not in s and "_" not in s)
        raise DataError(
            f"{text}: no such data set in jaxpeft;"
            f" {'there are ' + ', '.join(known) if known else 'check it'}"
        )
    return _rows(file.read_bytes(), ".jsonl", text, AS_FOUND, Allowance(AS_FOUND.most))


def load_hub(
    hub_id: str, split: str, config: str | None, revision: str | None, *, streaming: bool = False
) -> Any:
    """Open one split of a hub data set.

    Raises:
        DataError: there is none.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        with log_time(f"fetching {hub_name(hub_id, split, config)} from the hub"):
            return datasets.load_dataset(
                hub_id, config, split=split, revision=revision, streaming=streaming
            )
    except (DatasetsError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        near = nearest(Path(hub_id).name, [p.name for p in Path.cwd().iterdir()])
        raise DataError(
            f"{hub_name(hub_id, split, config)}: neither a file here nor loaded from the hub"
            f" ({reason}){near or '; check it'}"
        ) from None


def hub_name(hub_id: str, split: str, config: str | None) -> str:
    """Name one split of a hub data set, for messages."""
    return f"{hub_id}[{':'.join(filter(None, (config, split)))}]"


def _read_hub(
    hub_id: str, split: str, config: str | None, revision: str | None, layout: FileOptions
) -> Rows:
    name, data = hub_name(hub_id, split, config), load_hub(hub_id, split, config, revision)
    records = [with_label_names(record, data.features) for record in data]
    if not records:
        raise DataError(f"{name}: the split has no rows; choose another")
    content = json.dumps([data.column_names, records], sort_keys=True, default=str).encode()
    return Rows(flatten_nested(records, layout.columns), name, hashlib.sha256(content).hexdigest())

"""Read rows from files, the package, or the Hugging Face hub."""

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
from jaxpeft.data.rows.parsers import PARSERS, fix_for_unsupported
from jaxpeft.errors import DataError, nearest
from jaxpeft.logs import log_time

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PACKAGE_PATH = re.compile(r"package:([A-Za-z0-9_-]+)/([A-Za-z0-9_-]+)")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """Rows read from a source.

    Attributes:
        records: one dict per row, from column to value.
        name: the name in messages: the path or hub id.
        sha256: the hash of the file's bytes, or of the hub's rows as JSON.
        lines: the 1-based first line of each row; empty if the format has no lines.
        places: `(file, 1-based number)` of each row; empty if these are all rows of the file
            `name`, in order.
        origin: the hash of the complete source if these rows were derived from it; empty if it is
            `sha256`.
        notes: short descriptions of how files were read.
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
        """Hash of the complete source, whichever of its rows these are."""
        return self.origin or self.sha256

    def derive(self, *made_by: str, **changes: Any) -> Rows:
        """Return rows derived from these, with a new hash.

        Args:
            made_by: strings that identify the derivation; they determine the hash.
            changes: attributes to replace.
        """
        digest = hashlib.sha256(json.dumps([self.sha256, *made_by]).encode()).hexdigest()
        return dataclasses.replace(self, sha256=digest, origin=self.source, **changes)

    def where(self, row: int) -> str:
        """Return the location of a row (from 0) in messages, `file:line:1 (row N)` (N from 1)."""
        name, number = self.places[row] if self.places else (self.name, row + 1)
        line = f":{self.lines[row]}:1" if self.lines and self.lines[row] else ""
        return f"{name}{line} (row {number})"

    def take(self, chosen: Sequence[int]) -> Rows:
        """Return some of the rows by index from 0, with a new hash."""
        lines = tuple(self.lines[i] for i in chosen) if self.lines else ()
        places = tuple(self._place(i) for i in chosen)
        return self.derive(
            str(list(chosen)), records=[self.records[i] for i in chosen], lines=lines, places=places
        )

    def _place(self, row: int) -> tuple[str, int]:
        return self.places[row] if self.places else (self.name, row + 1)

    @staticmethod
    def join(parts: Sequence[Rows], name: str) -> Rows:
        """Concatenate rows; each keeps its location.

        Args:
            parts: one or more.
            name: the name of the result in messages.
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
        """Return the columns of all rows, in order of first appearance."""
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
    file_options: FileOptions = AS_FOUND,
) -> Rows:
    """Read the rows of a file, a folder of files, or a split of a hub dataset.

    Args:
        path: a file with an extension in `PARSERS`, plain or compressed as .gz; a folder of such
            files (see `files_of`); `package:NAME/SPLIT` for a dataset included in jaxpeft; or a hub
            id, `name` or `org/name`, loaded with `datasets`. Existing paths are never looked up on
            the hub.
        split: the split of a hub dataset, or of a folder whose files are named after splits;
            `train` by default.
        config: the configuration of a hub dataset, such as `mrpc` of `nyu-mll/glue`.
        revision: the commit, tag or branch of a hub dataset.
        file_options: the user's file options.

    Raises:
        DataError: the file or dataset does not exist, or rows cannot be read; lists the first 20
            problems.
    """
    text, local = str(path), Path(path).expanduser()
    packaged = text.startswith("package:")
    if is_hub_id(path):
        return _read_hub(text, split or "train", config, revision, file_options)
    folder = local.is_dir() and not packaged
    named = {"split": None if folder else split, "config": config, "revision": revision}
    if hub_only := [k for k, v in named.items() if v is not None]:
        raise DataError(
            f"{text}: {', '.join(hub_only)} is for hub ids, but this is a"
            f" {'folder' if folder else 'file'}; remove it"
        )
    if packaged:
        return _read_package(text)
    rows = (
        _read_folder(local, text, split or "train", file_options)
        if folder
        else _read_file(local, text, file_options)
    )
    for note in rows.notes:
        _log.info("%s", note)
    return rows


def is_hub_id(path: str | Path) -> bool:
    """Return whether `read_rows` treats a path as a hub id: it looks like one and does not exist
    locally.
    """
    if str(path).startswith("package:") or Path(path).expanduser().exists():
        return False
    if not isinstance(path, str) or not _HUB_ID.fullmatch(path) or ending_of(path) in PARSERS:
        return False
    return "/" not in path or not Path(path).parent.is_dir()


def _read_folder(folder: Path, name: str, split: str, file_options: FileOptions) -> Rows:
    files, allowed = files_of(folder, split), Allowance(file_options.most)
    parts = [_read_file(path, str(path), file_options, allowed) for path in files.paths]
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
    path: Path, name: str, file_options: FileOptions, allowed: Allowance | None = None
) -> Rows:
    check_file(path, name)
    extension = ending_of(path) or (".txt" if allowed else "")
    if extension not in PARSERS:
        raise DataError(
            f"{name}: the extension {path.suffix!r} is not supported;"
            f" {fix_for_unsupported(path.suffix.lower())}"
        )
    allowed = allowed or Allowance(file_options.most)
    return _rows(read_bytes(path, name, allowed), extension, name, file_options, allowed)


def _rows(
    data: bytes, extension: str, name: str, file_options: FileOptions, allowed: Allowance
) -> Rows:
    parsed = PARSERS[extension](data, name, file_options, allowed.take)
    if not parsed.records:
        raise DataError(f"{name}:1:1: the file has no rows; give a file with at least one row")
    notes = (f"{name}: {parsed.note}",) if parsed.note else ()
    records = flatten_nested(parsed.records, file_options.columns)
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
            f"{text}: no such dataset in jaxpeft;"
            f" {'choose from ' + ', '.join(known) if known else 'check the name'}"
        )
    return _rows(file.read_bytes(), ".jsonl", text, AS_FOUND, Allowance(AS_FOUND.most))


def load_hub(
    hub_id: str, split: str, config: str | None, revision: str | None, *, streaming: bool = False
) -> Any:
    """Load one split of a hub dataset.

    Raises:
        DataError: the dataset cannot be loaded.
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
            f"{hub_name(hub_id, split, config)}: not a local file, and cannot be loaded from the"
            f" hub ({reason}){near or '; check the name'}"
        ) from None


def hub_name(hub_id: str, split: str, config: str | None) -> str:
    """Return the name of a split of a hub dataset for messages."""
    return f"{hub_id}[{':'.join(filter(None, (config, split)))}]"


def _read_hub(
    hub_id: str, split: str, config: str | None, revision: str | None, file_options: FileOptions
) -> Rows:
    name, data = hub_name(hub_id, split, config), load_hub(hub_id, split, config, revision)
    records = [with_label_names(record, data.features) for record in data]
    if not records:
        raise DataError(f"{name}: the split has no rows; choose another")
    content = json.dumps([data.column_names, records], sort_keys=True, default=str).encode()
    return Rows(
        flatten_nested(records, file_options.columns), name, hashlib.sha256(content).hexdigest()
    )

"""Folders of data files: which files belong to a split, and what the names of sub-folders say of
them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxpeft.data.rows.data_files import ending_of
from jaxpeft.data.rows.parsers import PARSERS
from jaxpeft.errors import DataError

SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "test": "test",
}
UNLABELED = frozenset({"unsup", "unsupervised", "unlabeled", "unlabelled"})
_TEXT = ".txt"


@dataclass(frozen=True)
class Files:
    """The files of a split of a folder.

    Attributes:
        paths: the files, by name.
        labels: the label of each, where sub-folders are labels; else empty.
        note: what was left out, and how the folder was read; empty where there is nothing to say.
    """

    paths: list[Path]
    labels: tuple[str, ...] = ()
    note: str = ""


def files_of(folder: Path, split: str) -> Files:
    """List the data files of a folder, in the order of their names: those of its split where files
    are named by split.

    A file belongs to a split that its name, or that of a folder above it, begins with:
    `train.jsonl`, `data/train-00000-of-00002.parquet`, `test/part1.csv`; `val`, `valid` and `dev`
    are names of `validation`. Text files in two or more sub-folders are labeled by them:
    `train/pos/0_9.txt`, `spam/1.txt`.

    Args:
        folder: with data files, or folders of them.
        split: `train`, `validation` or `test`.

    Raises:
        DataError: it has no data files, or none of that split though others are named by split.
    """
    there = [
        path
        for path in folder.rglob("*")
        if not _is_hidden(path.relative_to(folder)) and path.is_file()
    ]
    files = sorted(path for path in _drop_notes(there) if ending_of(path) in PARSERS)
    bare = not files and any(len(path.relative_to(folder).parts) > 1 for path in there)
    if bare:  # as 20 Newsgroups, whose files are called by a number
        files = sorted(path for path in there if not path.suffix)
    splits = [split_of(path.relative_to(folder)) for path in files]
    chosen = [
        path for path, named in zip(files, splits, strict=True) if named == split or not any(splits)
    ]
    labeled = _label_by_folder(folder, chosen)
    if not files or (bare and not labeled):
        raise DataError(
            f"{folder}: a folder without data files; give one with files of {', '.join(PARSERS)}"
        )
    if not chosen:
        known = ", ".join(sorted({named for named in splits if named}))
        texts = (path.parent.name for path in files if ending_of(path) in (_TEXT, ""))
        label = next(filter(_split_by_name, texts), "")
        bare = (
            f", or call the folder {label!r} otherwise, such as 'label_{label}', if it is a label"
            if label
            else ""
        )
        raise DataError(
            f"{folder}: no data file is named for the split {split!r} (there are: {known}); name"
            f" one file{bare}"
        )
    return labeled or Files(chosen)


def split_of(path: Path) -> str | None:
    """Return the split that a relative path is named for, None where it is for none."""
    return next(filter(None, map(_split_by_name, path.parts)), None)


def sibling_split(folder: Path, split: str) -> Path | None:
    """Return the folder that holds another split than `train`, None where there is none.

    Args:
        folder: of the training rows: it holds all splits, or is named for its own and lies beside
            the others.
        split: `validation` or `test`.
    """
    if _split_by_name(folder.resolve().name) == "train":
        beside = (path for path in sorted(folder.resolve().parent.iterdir()) if path.is_dir())
        return next((path for path in beside if _split_by_name(path.name) == split), None)
    parts = (
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.is_file() and ending_of(path) in PARSERS
    )
    return (
        folder if any(split_of(part) == split for part in parts if not _is_hidden(part)) else None
    )


def _split_by_name(name: str) -> str | None:
    return SPLITS.get(re.sub(r"[^a-z].*", "", name.lower()))


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in path.parts)


def _label_by_folder(folder: Path, files: Sequence[Path]) -> Files | None:
    """Return text files with the names of their sub-folders as labels, None where there are not two
    such folders.
    """
    if any(ending_of(path) not in (_TEXT, "") for path in files):
        return None
    below = _files_below(folder, files)
    _refuse_two_levels(folder, below)
    inside = {path: parts[0] if parts else None for path, parts in below.items()}
    names = {label for label in inside.values() if label}
    known = {label for label in names if label.lower() not in UNLABELED}
    if len(known) < 2:
        return None
    kept = [path for path in files if inside[path] in known]
    others = Counter(label or "no sub-folder" for label in inside.values() if label not in known)
    left = [f"{count} of {name}" for name, count in sorted(others.items())]
    note = f"labels are the sub-folders {', '.join(sorted(known))}"
    if left:
        note += f"; left out, as unlabeled: {', '.join(left)}"
    return Files(kept, tuple(inside[path] or "" for path in kept), note)


def _files_below(folder: Path, files: Sequence[Path]) -> dict[Path, list[str]]:
    """Return the sub-folders that each file is in, below the folders that all of those in
    sub-folders share.
    """
    inside = {
        path: [part for part in path.relative_to(folder).parts[:-1] if not _split_by_name(part)]
        for path in files
    }
    while len({parts[0] for parts in inside.values() if parts}) == 1:
        inside = {path: parts[1:] for path, parts in inside.items()}
    return inside


def _refuse_two_levels(folder: Path, below: Mapping[Path, Sequence[str]]) -> None:
    """Refuse sub-folders that hold two or more folders of the same names: either could be the
    labels.

    Raises:
        DataError: names both.
    """
    above: dict[str, set[str]] = {}
    for parts in below.values():
        if len(parts) > 1:
            above.setdefault(parts[1], set()).add(parts[0])
    shared = sorted(name for name, outer in above.items() if len(outer) > 1)
    if len(shared) > 1:
        outer = sorted(set.union(*(above[name] for name in shared)))
        inner = next(
            path.parents[len(parts) - 1] for path, parts in below.items() if len(parts) > 1
        )
        raise DataError(
            f"{folder}: the labels could be the sub-folders {', '.join(outer)} or, inside of them,"
            f" {', '.join(shared)}; keep one level of folders, or give one of them, such as {inner}"
        )


def _drop_notes(files: Sequence[Path]) -> list[Path]:
    """Leave out what `datasets` writes beside the rows that it saves: figures, states, and rows
    that it made of them later.
    """
    states = {path.parent: path for path in files if path.name == "state.json"}
    saved = {folder: _files_of_saved(path) for folder, path in states.items()}
    return [
        path
        for path in files
        if not path.name.startswith("dataset_info")
        and path.name not in ("state.json", "dataset_dict.json")
        and path.name in saved.get(path.parent, {path.name})
    ]


def _files_of_saved(state: Path) -> set[str]:
    """Return the names of the files of a data set that `datasets` has saved.

    Raises:
        DataError: its state cannot be read, or says that rows are taken in another order than they
            lie there.
    """
    try:
        known = json.loads(state.read_text(encoding="utf-8"))
        names = {str(file["filename"]) for file in known["_data_files"]}
        moved = known.get("_indices_data_files")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{state}: not written by `save_to_disk` ({type(error).__name__}); save the data set"
            " again"
        ) from None
    if moved:
        raise DataError(
            f"{state}: its rows are in another order than they lie there; call `flatten_indices`,"
            " and save it again"
        )
    return names

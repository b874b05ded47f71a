"""Folders of data files: find the files of a split, and take labels from subfolder names."""

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
    """The files of a split in a folder.

    Attributes:
        paths: the files, sorted by name.
        labels: the label of each file if subfolders are labels, else empty.
        note: short description of how the folder was read and which files were skipped, or empty.
    """

    paths: list[Path]
    labels: tuple[str, ...] = ()
    note: str = ""


def files_of(folder: Path, split: str) -> Files:
    """List the data files in a folder, sorted by name; only those of the split if files are named
    after splits.

    A file belongs to a split if its name, or that of a folder above it, starts with the split:
    `train.jsonl`, `data/train-00000-of-00002.parquet`, `test/part1.csv`; `val`, `valid` and `dev`
    mean `validation`. Text files in two or more subfolders are labeled by them:
    `train/pos/0_9.txt`, `spam/1.txt`.

    Args:
        folder: the folder; files may be in subfolders.
        split: `train`, `validation` or `test`.

    Raises:
        DataError: the folder has no data files, or files named after splits but none of this one.
    """
    all_files = [
        path
        for path in folder.rglob("*")
        if not _is_hidden(path.relative_to(folder)) and path.is_file()
    ]
    files = sorted(path for path in _drop_metadata(all_files) if ending_of(path) in PARSERS)
    no_extension = not files and any(len(path.relative_to(folder).parts) > 1 for path in all_files)
    if no_extension:  # as in 20 Newsgroups, whose file names are numbers
        files = sorted(path for path in all_files if not path.suffix)
    splits = [split_of(path.relative_to(folder)) for path in files]
    chosen = [
        path for path, named in zip(files, splits, strict=True) if named == split or not any(splits)
    ]
    labeled = _label_by_folder(folder, chosen)
    if not files or (no_extension and not labeled):
        raise DataError(
            f"{folder}: the folder has no data files; supported are {', '.join(PARSERS)}"
        )
    if not chosen:
        known = ", ".join(sorted({named for named in splits if named}))
        texts = (path.parent.name for path in files if ending_of(path) in (_TEXT, ""))
        label = next(filter(_split_by_name, texts), "")
        rename = (
            f", or if the folder {label!r} is a label, rename it, such as to 'label_{label}'"
            if label
            else ""
        )
        raise DataError(
            f"{folder}: no data file is named after the split {split!r} (splits found: {known});"
            f" give the path of a file{rename}"
        )
    return labeled or Files(chosen)


def split_of(path: Path) -> str | None:
    """Return the split that a relative path is named after, or None."""
    return next(filter(None, map(_split_by_name, path.parts)), None)


def sibling_split(folder: Path, split: str) -> Path | None:
    """Return the folder with the files of another split than `train`, or None.

    Args:
        folder: the folder of the training rows: it contains all splits, or is named `train` and is
            next to the folders of the other splits.
        split: `validation` or `test`.
    """
    if _split_by_name(folder.resolve().name) == "train":
        siblings = (path for path in sorted(folder.resolve().parent.iterdir()) if path.is_dir())
        return next((path for path in siblings if _split_by_name(path.name) == split), None)
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
    """Return text files labeled by their subfolders, or None if there are fewer than two."""
    if any(ending_of(path) not in (_TEXT, "") for path in files):
        return None
    subfolders = _subfolders_of(folder, files)
    _refuse_two_levels(folder, subfolders)
    label_of = {path: parts[0] if parts else None for path, parts in subfolders.items()}
    names = {label for label in label_of.values() if label}
    labels = {label for label in names if label.lower() not in UNLABELED}
    if len(labels) < 2:
        return None
    labeled = [path for path in files if label_of[path] in labels]
    others = Counter(label or "no subfolder" for label in label_of.values() if label not in labels)
    skipped = [f"{count} in {name}" for name, count in sorted(others.items())]
    note = f"labels are the subfolders {', '.join(sorted(labels))}"
    if skipped:
        note += f"; skipped unlabeled files: {', '.join(skipped)}"
    return Files(labeled, tuple(label_of[path] or "" for path in labeled), note)


def _subfolders_of(folder: Path, files: Sequence[Path]) -> dict[Path, list[str]]:
    """Return the subfolders of each file, without those of splits and common parents."""
    subfolders = {
        path: [part for part in path.relative_to(folder).parts[:-1] if not _split_by_name(part)]
        for path in files
    }
    while len({parts[0] for parts in subfolders.values() if parts}) == 1:
        subfolders = {path: parts[1:] for path, parts in subfolders.items()}
    return subfolders


def _refuse_two_levels(folder: Path, subfolders: Mapping[Path, Sequence[str]]) -> None:
    """Refuse subfolders that contain two or more folders of the same names: either level could be
    the labels.

    Raises:
        DataError: both levels could be labels.
    """
    parents: dict[str, set[str]] = {}
    for parts in subfolders.values():
        if len(parts) > 1:
            parents.setdefault(parts[1], set()).add(parts[0])
    shared = sorted(name for name, outer in parents.items() if len(outer) > 1)
    if len(shared) > 1:
        outer = sorted(set.union(*(parents[name] for name in shared)))
        inner = next(
            path.parents[len(parts) - 1] for path, parts in subfolders.items() if len(parts) > 1
        )
        raise DataError(
            f"{folder}: the labels could be the subfolders {', '.join(outer)}, or"
            f" {', '.join(shared)} inside them; keep one level of folders, or use one of them, such"
            f" as {inner}"
        )


def _drop_metadata(files: Sequence[Path]) -> list[Path]:
    """Drop the metadata that `datasets` saves with the rows, and the cache files of later calls."""
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
    """Return the names of the files of a dataset saved by `datasets`.

    Raises:
        DataError: the state cannot be read, or has an indices mapping.
    """
    try:
        content = json.loads(state.read_text(encoding="utf-8"))
        names = {str(file["filename"]) for file in content["_data_files"]}
        indices = content.get("_indices_data_files")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{state}: not written by `save_to_disk` ({type(error).__name__}); save the dataset"
            " again"
        ) from None
    if indices:
        raise DataError(
            f"{state}: the dataset was saved with an indices mapping; call `flatten_indices` and"
            " save it again"
        )
    return names

"""Checks of output paths, before any work: what cannot be written at the end is told at once."""

from __future__ import annotations

import tempfile
from pathlib import Path


def file_problem(flag: str, path: str | None, *, is_new: bool = False) -> str | None:
    """Return why a file cannot be written; None if it can be, or no path is given.

    Args:
        flag: flag of the path.
        path: the file.
        is_new: whether the file must not exist yet; its folder is then created.
    """
    if path is None:
        return None
    file = Path(path).expanduser().absolute()
    if file.is_dir():
        return f"{flag} {path}: is a folder; give the name of a file"
    if is_new and file.exists():
        return f"{flag} {path}: exists already; choose another file, or remove it"
    if not is_new and not _is_inside_file(file) and not file.parent.is_dir():
        return f"{flag} {path}: {file.parent} is not a folder; create it, or give another path"
    return _place_problem(flag, path)


def folder_problem(flag: str, path: str | None, *, is_new: bool = False) -> str | None:
    """Return why files cannot be written into a folder; None if they can be, or no path is given.

    Args:
        flag: flag of the path.
        path: the folder, which is created if necessary.
        is_new: whether it must not contain anything yet.
    """
    if path is None:
        return None
    folder = Path(path).expanduser().absolute()
    if folder.exists() and not folder.is_dir():
        return f"{flag} {path}: is a file; choose a new folder"
    if is_new and folder.is_dir() and any(folder.iterdir()):
        return f"{flag} {path}: is not empty; choose a new folder"
    return _place_problem(flag, path)


def _place_problem(flag: str, path: str) -> str | None:
    if _is_inside_file(Path(path).expanduser().absolute()):
        return f"{flag} {path}: is inside a file; choose another folder"
    place = Path(path).expanduser().absolute()
    while not place.is_dir():
        place = place.parent
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        return f"{flag} {path}: cannot be written ({error.strerror}); give another path"
    return None


def _is_inside_file(path: Path) -> bool:
    return any(up.is_file() for up in path.parents)

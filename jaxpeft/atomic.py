"""Atomic writes of files and folders: written under a temporary name, then renamed."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replace_when_done(path: Path, *, unique: bool = False) -> Generator[Path]:
    """Yield a temporary path for a file or folder, renamed to `path` on success and deleted on
    failure.

    Args:
        path: final path.
        unique: use a unique temporary name, because other processes may write the same path;
            otherwise leftovers of a killed process are overwritten.
    """
    temporary = path.with_name(
        f".{path.name}.{secrets.token_hex(4)}.tmp" if unique else f".{path.name}.tmp"
    )
    try:
        yield temporary
        temporary.replace(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str, *, sync: bool = False) -> None:
    """Write a text file atomically.

    Args:
        path: path of the file.
        text: contents.
        sync: whether to fsync before renaming.
    """
    with replace_when_done(path) as temporary, temporary.open("w") as file:
        file.write(text)
        file.flush()
        if sync:
            os.fsync(file.fileno())

"""Files and folders that are there whole or not at all: written under another name beside their
place, then renamed.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replace_when_done(path: Path, *, unique: bool = False) -> Generator[Path]:
    """Yield where to write a file or a folder, which gets its name at the end; after a failure
    nothing is left.

    Args:
        path: its place.
        unique: whether other processes may write it at the same time; else what one that was killed
            has left is written over.
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
    """Write a text file.

    Args:
        path: its place.
        text: its content.
        sync: whether it must be on the disk before it gets its name.
    """
    with replace_when_done(path) as temporary, temporary.open("w") as file:
        file.write(text)
        file.flush()
        if sync:
            os.fsync(file.fileno())

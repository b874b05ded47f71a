"""One run per folder: two at once would overwrite each other's files."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from jaxpeft.errors import ConfigError

FILE = ".lock"


@contextmanager
def lock_folder(folder: Path) -> Generator[None]:
    """Keep every other run out of a folder; the system frees it with the process, however that
    ends.

    Args:
        folder: of the run.

    Raises:
        ConfigError: another run uses it; the message names its host and process.
    """
    path = folder / FILE
    # no soft lock where the filesystem has no flock: that one outlives a killed process
    lock = FileLock(path, blocking=False, fallback_to_soft=False, on_acquired=_write_owner)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"--workdir {folder}: another run is active there ({_read_owner(path)}); wait for it,"
            " or give another folder"
        ) from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def _write_owner(file: int) -> None:
    os.ftruncate(file, 0)
    os.write(
        file, f"{platform.node()}, pid {os.getpid()}, since {time.strftime('%F %T')}\n".encode()
    )


def _read_owner(path: Path) -> str:
    try:
        return path.read_text(errors="replace")[:200].strip() or "another process"
    except FileNotFoundError:  # it has just ended
        return "another process"

"""Lock a run's folder, so that no two runs overwrite each other's files."""

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
    """Lock a folder; the system releases the lock when the process ends, however it ends.

    Args:
        folder: folder of the run.

    Raises:
        ConfigError: another run uses the folder; names its host and process.
    """
    with _lock(folder / FILE, f"--workdir {folder}: another run uses it", "give another folder"):
        yield


@contextmanager
def lock_output(path: Path) -> Generator[None]:
    """Lock an output file while it is written.

    Args:
        path: the file.

    Raises:
        ConfigError: another process writes it; names its host and process.
    """
    lock = path.with_name(f".{path.name}{FILE}")
    with _lock(lock, f"--output {path}: another process writes it", "choose another file"):
        yield


@contextmanager
def _lock(path: Path, used: str, instead: str) -> Generator[None]:
    # no soft lock on filesystems without flock, since it would outlive a killed process
    lock = FileLock(path, blocking=False, fallback_to_soft=False, on_acquired=_write_owner)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(f"{used} ({_read_owner(path)}); wait for it, or {instead}") from None
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
    except FileNotFoundError:  # it has just finished
        return "another process"

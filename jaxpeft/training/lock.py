"""One run a folder: two at once would write each other's files."""

from __future__ import annotations

import fcntl
import os
import platform
import time
from pathlib import Path
from types import TracebackType

from jaxpeft.errors import ConfigError

FILE = ".lock"


class Lock:
    """A context in which no other run uses the folder; the system frees it with the process, however that ends.

    Args:
        folder: of the run.

    Raises:
        ConfigError: on entering: another run uses it.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._file: int | None = None

    def __enter__(self) -> Lock:
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(self._file, 200).decode(errors="replace").strip() or "another process"
            os.close(self._file)
            raise ConfigError(
                f"--workdir {self._path.parent}: a run is going on there ({owner}); wait for it, or give another folder"
            ) from None
        os.ftruncate(self._file, 0)
        os.write(self._file, f"{platform.node()}, pid {os.getpid()}, since {time.strftime('%F %T')}\n".encode())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._file)

"""Open data files, and read their bytes unpacked and up to a maximum size."""

from __future__ import annotations

import gzip
import stat
import zlib
from pathlib import Path
from typing import IO, cast

from jaxpeft.data.rows.file_options import Allowance
from jaxpeft.errors import DataError, nearest

GZIP = ".gz"
_PIECE = 1 << 20
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


def ending_of(path: str | Path) -> str:
    """Return the extension of the format in lower case: `.csv` for `x.CSV` and `x.csv.gz`."""
    path = Path(path)
    return Path(path.stem).suffix.lower() if is_packed(path) else path.suffix.lower()


def is_packed(path: str | Path) -> bool:
    """Return whether a file name ends in .gz."""
    return Path(path).suffix.lower() == GZIP


def check_file(path: Path, name: str) -> int:
    """Return the size of a file on disk in bytes.

    Args:
        path: the path of the file.
        name: the name of the file in messages.

    Raises:
        DataError: the file does not exist, or is not a regular file: reading a pipe or a device may
            never end.
    """
    if not path.exists():
        raise DataError(missing_file(path, name))
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(unreadable_file(name, error)) from None
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "a special file")
        raise DataError(
            f"{name}: {kind}, not a regular file; write its rows to a file, and use that"
        )
    return status.st_size


def open_file(path: Path) -> IO[bytes]:
    """Open a file for reading; .gz files are unpacked."""
    return cast(IO[bytes], gzip.open(path, "rb")) if is_packed(path) else path.open("rb")


def read_bytes(path: Path, name: str, allowed: Allowance) -> bytes:
    """Read a file; .gz files are unpacked.

    Args:
        path: the path of the file.
        name: the name of the file in messages.
        allowed: counts the bytes.

    Raises:
        DataError: the file cannot be read, or is too large.
    """
    size = check_file(path, name)
    if not is_packed(path):
        allowed.take(size, name)
    try:
        with open_file(path) as file:
            if not is_packed(path):
                return file.read(size)
            pieces: list[bytes] = []
            while piece := file.read(_PIECE):
                allowed.take(len(piece), name)
                pieces.append(piece)
            return b"".join(pieces)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(gzip_fault(name, error)) from None
    except OSError as error:
        raise DataError(unreadable_file(name, error)) from None


def gzip_fault(name: str, error: Exception) -> str:
    """Return the error message for a file that gzip cannot unpack."""
    return f"{name}: not an intact gzip file ({error}); write or download it again"


def missing_file(path: Path, name: str) -> str:
    """Return the error message for a missing file, with the nearest name as a hint."""
    folder = path.parent
    if not folder.is_dir():
        return f"{name}: no such file, and no folder {str(folder)!r}; check the path"
    names = sorted(p.name for p in folder.iterdir())
    hint = nearest(path.name, names)
    return f"{name}: no such file in {str(folder.resolve())!r}{hint or '; check the path'}"


def unreadable_file(name: str, error: OSError) -> str:
    """Return the error message for a file that cannot be read."""
    return f"{name}: cannot be read ({error.strerror or error}); check the path and its permissions"

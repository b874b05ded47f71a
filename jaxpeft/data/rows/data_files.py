"""Data files as they lie on disk: which they are, and their bytes, unpacked and bounded."""

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
    """Return the ending that tells the format, in small letters: `.csv` of `x.CSV` and of
    `x.csv.gz`.
    """
    path = Path(path)
    return Path(path.stem).suffix.lower() if is_packed(path) else path.suffix.lower()


def is_packed(path: str | Path) -> bool:
    """Return whether a file is packed by gzip, by its name."""
    return Path(path).suffix.lower() == GZIP


def check_file(path: Path, name: str) -> int:
    """Return the size of a file in bytes, as it lies there.

    Args:
        path: of the file.
        name: what to call it in messages.

    Raises:
        DataError: there is none, or it is not a regular file: a pipe may never begin, and a device
            never end.
    """
    if not path.exists():
        raise DataError(missing_file(path, name))
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(unreadable_file(name, error)) from None
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise DataError(
            f"{name}: {kind}, not a regular file; write its rows to a file, and name that"
        )
    return found.st_size


def open_file(path: Path) -> IO[bytes]:
    """Open a file, unpacked."""
    return cast(IO[bytes], gzip.open(path, "rb")) if is_packed(path) else path.open("rb")


def read_bytes(path: Path, name: str, allowed: Allowance) -> bytes:
    """Read a file, unpacked.

    Args:
        path: of the file.
        name: what to call it in messages.
        allowed: counts the bytes.

    Raises:
        DataError: it cannot be read, or holds more than is allowed.
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
    """Return what to say of a file that gzip cannot unpack."""
    return f"{name}: not whole as a gzip file ({error}); write or download it again"


def missing_file(path: Path, name: str) -> str:
    """Return what to say where there is no such file, with the nearest name."""
    folder = path.parent
    if not folder.is_dir():
        return f"{name}: no such file, and no folder {str(folder)!r}; check the path"
    names = sorted(p.name for p in folder.iterdir())
    hint = nearest(path.name, names)
    return f"{name}: no such file in {str(folder.resolve())!r}{hint or '; check the path'}"


def unreadable_file(name: str, error: OSError) -> str:
    """Return what to say of a file that cannot be read."""
    return f"{name}: cannot be read ({error.strerror or error}); check the path and its permissions"

"""Bytes of a data file to text, naming every line that is not UTF-8."""

from __future__ import annotations

from collections.abc import Iterable

from jaxpeft.data.problems import Problems, RowError, excerpt
from jaxpeft.errors import DataError

_BOM = b"\xef\xbb\xbf"
_LFS = b"version https://git-lfs"
_UTF8_FIX = "save the file as UTF-8, such as by `iconv -f latin1 -t utf-8`"


def body_of(data: bytes, name: str) -> bytes:
    """Gives the bytes without a byte order mark.

    Raises:
        DataError: nothing but white space is left, or it is a Git LFS pointer.
    """
    body = check_start(data, name)
    if not body.strip():
        raise DataError(f"{name}:1:1: the file is empty; give a file with at least one row")
    return body


def check_start(data: bytes, name: str) -> bytes:
    """Gives the first bytes of a file, or all of them, without a byte order mark.

    Raises:
        DataError: it is UTF-16, or a Git LFS pointer.
    """
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{name}:1:1: UTF-16, not UTF-8; save the file as UTF-8, such as by `iconv -f utf-16 -t utf-8`")
    body = data.removeprefix(_BOM)
    if body.startswith(_LFS):
        raise DataError(f"{name}:1:1: a Git LFS pointer instead of the data; fetch it with `git lfs pull`")
    return body


def decode_line(raw: bytes) -> str:
    """Decodes one line.

    Raises:
        RowError: it is not UTF-8.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        column = len(raw[: error.start].decode("utf-8")) + 1
        raise RowError(f"not UTF-8 (byte 0x{raw[error.start]:02x})", _UTF8_FIX, column) from None


def first_fault(lines: Iterable[bytes], name: str) -> str:
    """Says where the first line is that is not UTF-8."""
    for number, raw in enumerate(lines, 1):
        try:
            decode_line(raw)
        except RowError as fault:
            return f"{name}:{number}:{fault.column}: {fault.fault}; {fault.fix}"
    return f"{name}: not UTF-8; {_UTF8_FIX}"


def decode(body: bytes, name: str) -> str:
    """Decodes a whole file.

    Raises:
        DataError: some lines are not UTF-8; lists them.
    """
    problems, lines = Problems(), list[str]()
    for number, raw in enumerate(body.split(b"\n"), 1):
        try:
            lines.append(decode_line(raw))
        except RowError as fault:
            text = excerpt(raw.decode("utf-8", "replace"), fault.column)
            problems.add(f"{name}:{number}:{fault.column}", fault.fault, text, fault.fix)
    problems.raise_if_any()
    return "\n".join(lines)

"""Detect the encoding of data files, decode them, and report invalid lines."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from jaxpeft.data.problems import Problems, RowError, excerpt
from jaxpeft.errors import DataError

UTF8 = "utf-8"
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, UTF8),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_LFS = b"version https://git-lfs"
_HEAD = 1 << 10
_ODD, _EVEN = slice(1, _HEAD, 2), slice(0, _HEAD, 2)


def encoding_of(head: bytes, name: str, option: str = "auto") -> str:
    """Return Python's name of the encoding of a text file.

    Only unambiguous signs are used: a byte order mark, or the zero bytes of UTF-16.

    Args:
        head: the first bytes, or all of them.
        name: the name of the file in messages.
        option: the user's choice; `auto` to detect the encoding.

    Raises:
        DataError: the file is a Git LFS pointer.
    """
    check_pointer(head, name)
    if option != "auto":
        return UTF8 if codecs.lookup(option).name in ("utf-8", "utf-8-sig", "ascii") else option
    marked = next((encoding for mark, encoding in _MARKS if head.startswith(mark)), None)
    if marked is not None:
        return marked
    if 2 * head[_ODD].count(0) > len(head[_ODD]):
        return "utf-16-le"
    return "utf-16-be" if 2 * head[_EVEN].count(0) > len(head[_EVEN]) else UTF8


def check_pointer(head: bytes, name: str) -> None:
    """Refuse a Git LFS pointer.

    Raises:
        DataError: the file is a Git LFS pointer.
    """
    if head.startswith(_LFS):
        raise DataError(
            f"{name}:1:1: a Git LFS pointer instead of the data; fetch it with `git lfs pull`"
        )


def as_utf8(data: bytes, name: str, option: str = "auto") -> tuple[bytes, str]:
    """Convert a text file to UTF-8 without a byte order mark; return it with the old encoding.

    Args:
        data: the contents; UTF-8 is not validated.
        name: the name of the file in messages.
        option: the encoding; `auto` to detect it.

    Raises:
        DataError: the file is blank, a Git LFS pointer, or not in this encoding.
    """
    encoding = encoding_of(data, name, option)
    if encoding != UTF8:
        try:
            data = data.decode(encoding).removeprefix("\ufeff").encode()
        except UnicodeError:
            raise DataError(encoding_fault(encoding, (data,), name)) from None
    return body_of(data, name), encoding


def encoding_fault(encoding: str, pieces: Iterable[bytes], name: str) -> str:
    """Return the error message for a file in another encoding, with the first invalid position.

    Args:
        encoding: Python's name of the expected encoding.
        pieces: the contents in pieces.
        name: the name of the file in messages.
    """
    line = column = 1
    for text in codecs.iterdecode(pieces, encoding, "replace"):
        head, found, _ = text.partition("\ufffd")
        line += head.count("\n")
        column = len(head) - head.rfind("\n") if "\n" in head else column + len(head)
        if found:
            break
    return f"{name}:{line}:{column}: not {encoding}; set data.encoding to the file's encoding"


def body_of(data: bytes, name: str) -> bytes:
    """Return the bytes without the byte order mark of UTF-8.

    Raises:
        DataError: the file is blank.
    """
    body = data.removeprefix(codecs.BOM_UTF8)
    if not body.strip():
        raise DataError(f"{name}:1:1: the file is empty; give a file with at least one row")
    return body


def decode_line(raw: bytes) -> str:
    """Decode one line.

    Raises:
        RowError: the line is not UTF-8.
    """
    try:
        return raw.decode(UTF8)
    except UnicodeDecodeError as error:
        column = len(raw[: error.start].decode(UTF8)) + 1
        raise RowError(
            f"not UTF-8 (byte 0x{raw[error.start]:02x})", _fix(raw, column), column
        ) from None


def _fix(raw: bytes, column: int) -> str:
    """Return the fix for a line that is not UTF-8; single-byte encodings cannot be detected."""
    try:
        read = excerpt(raw.decode("cp1252").strip(), column)
    except UnicodeDecodeError:
        return "set data.encoding to the file's encoding"
    return (
        "set data.encoding to the file's encoding: with 'cp1252', as of Excel on Windows, the line"
        f" is {read!r}"
    )


def first_fault(lines: Iterable[bytes], name: str) -> str:
    """Return the error message for the first line that is not UTF-8."""
    for number, raw in enumerate(lines, 1):
        try:
            decode_line(raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw)
        except RowError as fault:
            return f"{name}:{number}:{fault.column}: {fault.fault}; {fault.fix}"
    return f"{name}: not UTF-8; set data.encoding to the file's encoding"


def decode(body: bytes, name: str) -> str:
    """Decode a complete file.

    Raises:
        DataError: lines are not UTF-8; the error lists them.
    """
    problems, lines = Problems(), list[str]()
    for number, raw in enumerate(body.split(b"\n"), 1):
        try:
            lines.append(decode_line(raw))
        except RowError as fault:
            text = excerpt(raw.decode(UTF8, "replace"), fault.column)
            problems.add(f"{name}:{number}:{fault.column}", fault.fault, text, fault.fix)
    problems.raise_if_any()
    return "\n".join(lines)

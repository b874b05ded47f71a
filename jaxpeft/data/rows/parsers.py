"""The file formats, by the ending of the file's name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from jaxpeft.data.rows.file_options import FileOptions, Parsed, Take
from jaxpeft.data.rows.parse_arrow import parse_arrow, parse_parquet
from jaxpeft.data.rows.parse_conll import parse_conll
from jaxpeft.data.rows.parse_delimited import parse_delimited
from jaxpeft.data.rows.parse_json import parse_json, parse_jsonl
from jaxpeft.data.rows.utf8 import UTF8, as_utf8, body_of, check_pointer, decode


def parse_text(body: bytes, name: str, _: FileOptions) -> Parsed:
    """Read a plain text file as one row with the column `text`.

    Args:
        body: the file in UTF-8.
        name: of the file.

    Raises:
        DataError: the file is not UTF-8.
    """
    return Parsed([{"text": decode(body, name)}], (1,))


@dataclass(frozen=True)
class TextFormat:
    """A format of text, parsed from UTF-8."""

    parser: Callable[[bytes, str, FileOptions], Parsed]

    def __call__(self, data: bytes, name: str, layout: FileOptions, _: Take) -> Parsed:
        """Parse a file in whatever encoding it is, which is noted where it is not UTF-8."""
        body, encoding = as_utf8(data, name, layout.encoding)
        parsed = self.parser(body, name, layout)
        note = ", ".join(
            filter(
                None,
                (parsed.note, f"encoding {encoding}" if encoding != UTF8 or parsed.note else ""),
            )
        )
        return Parsed(parsed.records, parsed.lines, note)


@dataclass(frozen=True)
class Binary:
    """A format that says itself what is in it; what it unpacks is counted."""

    parser: Callable[[bytes, str, Take], Parsed]

    def __call__(self, data: bytes, name: str, _: FileOptions, take: Take) -> Parsed:
        """Parse a file."""
        check_pointer(data, name)
        body_of(data, name)
        return self.parser(data, name, take)


Parser = Callable[[bytes, str, FileOptions, Take], Parsed]
PARSERS: dict[str, Parser] = {
    ".jsonl": TextFormat(parse_jsonl),
    ".ndjson": TextFormat(parse_jsonl),
    ".json": TextFormat(parse_json),
    ".csv": TextFormat(partial(parse_delimited, delimiter=",")),
    ".tsv": TextFormat(partial(parse_delimited, delimiter="\t")),
    ".parquet": Binary(parse_parquet),
    ".arrow": Binary(parse_arrow),
    ".conll": TextFormat(parse_conll),
    ".bio": TextFormat(parse_conll),
    ".iob": TextFormat(parse_conll),
    ".iob2": TextFormat(parse_conll),
    ".txt": TextFormat(parse_text),
}
OTHERS = {
    ".gz": "name it by what is inside, such as rows.csv.gz",
    **dict.fromkeys(
        (".zip", ".tgz", ".tar", ".bz2", ".xz", ".zst", ".7z", ".rar"),
        "unpack it first; of packed files .gz alone is read",
    ),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "save it as CSV (UTF-8)"),
    **dict.fromkeys(
        (".pkl", ".pickle", ".pt", ".pth"), "it may hold code; write its rows as JSONL"
    ),
}


def other(ending: str) -> str:
    """Return what to do about a file of another ending."""
    known = (
        f"name it by what it holds, or convert it to one of {', '.join(PARSERS)}, also packed"
        " as .gz"
    )
    return OTHERS.get(ending, known)

"""File formats by file extension."""

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
    """Parse a plain text file into one row with the column `text`.

    Args:
        body: the contents in UTF-8.
        name: the name of the file in messages.

    Raises:
        DataError: the file is not UTF-8.
    """
    return Parsed([{"text": decode(body, name)}], (1,))


@dataclass(frozen=True)
class TextFormat:
    """A text format, parsed from UTF-8."""

    parser: Callable[[bytes, str, FileOptions], Parsed]

    def __call__(self, data: bytes, name: str, file_options: FileOptions, _: Take) -> Parsed:
        """Parse a file in any encoding; `note` names it unless it is UTF-8."""
        body, encoding = as_utf8(data, name, file_options.encoding)
        parsed = self.parser(body, name, file_options)
        note = ", ".join(
            filter(
                None,
                (parsed.note, f"encoding {encoding}" if encoding != UTF8 or parsed.note else ""),
            )
        )
        return Parsed(parsed.records, parsed.lines, note)


@dataclass(frozen=True)
class Binary:
    """A self-describing binary format; its unpacked bytes are counted with `take`."""

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
UNSUPPORTED_FIXES = {
    ".gz": "name it by what is inside, such as rows.csv.gz",
    **dict.fromkeys(
        (".zip", ".tgz", ".tar", ".bz2", ".xz", ".zst", ".7z", ".rar"),
        "unpack it first; the only supported compression is .gz",
    ),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "save it as CSV (UTF-8)"),
    **dict.fromkeys(
        (".pkl", ".pickle", ".pt", ".pth"), "it may contain code; write its rows as JSONL"
    ),
}


def fix_for_unsupported(extension: str) -> str:
    """Return the fix for a file with an unsupported extension."""
    default = (
        f"rename it to match its format, or convert it to one of {', '.join(PARSERS)}, optionally"
        " compressed as .gz"
    )
    return UNSUPPORTED_FIXES.get(extension, default)

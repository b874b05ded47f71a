"""Parse CoNLL files: one word per line with its tags, and a blank line after each sentence."""

from __future__ import annotations

import re

from jaxpeft.data.problems import Problems, Record, RowError, excerpt
from jaxpeft.data.rows.file_options import FileOptions, Parsed
from jaxpeft.data.rows.utf8 import decode

_DOCUMENT = "-DOCSTART-"
_COMMENT = re.compile(r"#\s?(id\b|\S+ ?=)")  # a lone `#` is a word


def parse_conll(body: bytes, name: str, _: FileOptions) -> Parsed:
    """Parse a CoNLL file: `tokens` is the first column, `tags` the last.

    With more than two columns, all of them are also available by number, from 1. Before a sentence,
    -DOCSTART- and comments such as `# sent_id = 1` are skipped.

    Args:
        body: the contents in UTF-8.
        name: the name of the file in messages.

    Raises:
        DataError: the file is not UTF-8, or a line has no tag or another number of columns than the
            first.
    """
    problems, width = Problems(), 0
    sentences: list[list[list[str]]] = []
    lines: list[int] = []
    at_start = True
    for number, line in enumerate(decode(body, name).split("\n"), 1):
        if not line.strip() or line.startswith(_DOCUMENT) or (at_start and _COMMENT.match(line)):
            at_start = True
            continue
        fields = _fields(line)
        width = width or len(fields)
        try:
            _check(fields, width)
        except RowError as fault:
            problems.add(f"{name}:{number}:1", fault.fault, excerpt(line), fault.fix)
            continue
        if at_start:
            sentences.append([])
            lines.append(number)
        at_start = False
        sentences[-1].append(fields)
    problems.raise_if_any()
    return Parsed(
        [_record(words, width) for words in sentences],
        tuple(lines),
        f"{width} columns, one word per line",
    )


def _fields(line: str) -> list[str]:
    line = line.strip(" \r\t")
    return line.split("\t") if "\t" in line else re.split(" +", line)


def _check(fields: list[str], width: int) -> None:
    if len(fields) < 2:
        raise RowError("a word without a tag", "write the word, a tab or a space, and its tag")
    if len(fields) != width:
        raise RowError(
            f"{len(fields)} columns, but the first word has {width}",
            "give each word the same number of columns",
        )


def _record(words: list[list[str]], width: int) -> Record:
    columns = [list(column) for column in zip(*words, strict=True)]
    numbered = {str(i + 1): column for i, column in enumerate(columns)} if width > 2 else {}
    return {"tokens": columns[0], "tags": columns[-1], **numbered}

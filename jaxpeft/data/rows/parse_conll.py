"""Column files of tagged words: one word a line with its tags, and a blank line behind each
sentence.
"""

from __future__ import annotations

import re

from jaxpeft.data.problems import Problems, Record, RowError, excerpt
from jaxpeft.data.rows.file_options import FileOptions, Parsed
from jaxpeft.data.rows.utf8 import decode

_DOCUMENT = "-DOCSTART-"
_COMMENT = re.compile(r"#\s?(id\b|\S+ ?=)")  # `#` alone is a word


def parse_conll(body: bytes, name: str, _: FileOptions) -> Parsed:
    """Read a CoNLL file: `tokens` is its first column, `tags` the last; the columns are there by
    number, too, from 1.

    Before a sentence, -DOCSTART- and comments such as `# sent_id = 1` are no words.

    Args:
        body: the file in UTF-8.
        name: of the file.

    Raises:
        DataError: it is not UTF-8, or a line has no tag, or more or fewer columns than the first.
    """
    problems, width = Problems(), 0
    sentences: list[list[list[str]]] = []
    lines: list[int] = []
    fresh = True
    for number, line in enumerate(decode(body, name).split("\n"), 1):
        if not line.strip() or line.startswith(_DOCUMENT) or (fresh and _COMMENT.match(line)):
            fresh = True
            continue
        fields = _fields(line)
        width = width or len(fields)
        try:
            _check(fields, width)
        except RowError as fault:
            problems.add(f"{name}:{number}:1", fault.fault, excerpt(line), fault.fix)
            continue
        if fresh:
            sentences.append([])
            lines.append(number)
        fresh = False
        sentences[-1].append(fields)
    problems.raise_if_any()
    return Parsed(
        [_record(words, width) for words in sentences],
        tuple(lines),
        f"{width} columns, a word a line",
    )


def _fields(line: str) -> list[str]:
    bare = line.strip(" \r\t")
    return bare.split("\t") if "\t" in bare else re.split(" +", bare)


def _check(fields: list[str], width: int) -> None:
    if len(fields) < 2:
        raise RowError("a word without a tag", "write the word, a tab or a space, and its tag")
    if len(fields) != width:
        raise RowError(
            f"{len(fields)} columns where the first word has {width}",
            "give each word as many columns",
        )


def _record(words: list[list[str]], width: int) -> Record:
    columns = [list(column) for column in zip(*words, strict=True)]
    numbered = {str(i + 1): column for i, column in enumerate(columns)} if width > 2 else {}
    return {"tokens": columns[0], "tags": columns[-1], **numbered}

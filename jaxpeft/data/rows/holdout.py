"""Holding out a share of the training rows for validation."""

from __future__ import annotations

import math

from jaxpeft.data.order import order
from jaxpeft.data.problems import Record
from jaxpeft.data.rows.columns import Columns, find_columns
from jaxpeft.data.rows.read import Rows
from jaxpeft.errors import DataError


def hold_out(rows: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    """Split rows in two, the second drawn by the seed.

    Args:
        rows: the training rows.
        share: of the rows to hold out, at least one row.
        seed: of the draw.

    Returns:
        `(training, held out)`, both in the order of the file.

    Raises:
        DataError: no row would be left to train on.
    """
    held = max(1, round(share * len(rows)))
    if held >= len(rows):
        raise DataError(
            f"{rows.name}: {len(rows)} rows are too few to hold out {share:.0%} for validation"
        )
    drawn = order(len(rows), seed)
    return rows.take(sorted(drawn[held:].tolist())), rows.take(sorted(drawn[:held].tolist()))


def hold_out_text(rows: Rows, share: float, seed: int, columns: Columns) -> tuple[Rows, Rows]:
    """The same for documents; where they are too few to give some away, the end of each is held
    out.

    Args:
        rows: the training documents.
        share: of the documents, or of each document's characters, to hold out; a cut is made at the
            end of a line.
        seed: of the draw.
        columns: the text column, if it is named.

    Raises:
        DataError: no column holds the text, or a document is too short to cut.
    """
    if len(rows) >= math.ceil(1 / share):
        return hold_out(rows, share, seed)
    column = find_columns(rows.columns(), columns, "text", rows.name).text or ""
    parts = [_cut_share(str(record.get(column) or ""), share) for record in rows.records]
    short = [
        rows.where(i)
        for i, (first, second) in enumerate(parts)
        if not first.strip() or not second.strip()
    ]
    if short:
        raise DataError(
            [f"{where}: too short to hold out {share:.0%} of it for validation" for where in short]
        )
    train, held = zip(*parts, strict=True)
    return _with_texts(rows, column, train, "first part"), _with_texts(
        rows, column, held, "last part"
    )


def _cut_share(text: str, share: float) -> tuple[str, str]:
    at = round(len(text) * (1 - share))
    line_end = text.find("\n", at)
    at = line_end + 1 if 0 <= line_end < len(text) - 1 else at
    return text[:at], text[at:]


def _with_texts(rows: Rows, column: str, texts: tuple[str, ...], part: str) -> Rows:
    records: list[Record] = [
        {**record, column: text} for record, text in zip(rows.records, texts, strict=True)
    ]
    return rows.derive(part, *texts, records=records, name=f"{rows.name} ({part})")

"""Hold out a share of the training rows for validation."""

from __future__ import annotations

import math

from jaxpeft.data.order import order
from jaxpeft.data.problems import Record
from jaxpeft.data.rows.columns import Columns, find_columns
from jaxpeft.data.rows.read import Rows
from jaxpeft.errors import DataError


def hold_out(rows: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    """Split rows randomly into training and held-out rows.

    Args:
        rows: the training rows.
        share: the share of the rows to hold out, at least one row.
        seed: the random seed.

    Returns:
        `(training, held out)`, both in the order of the file.

    Raises:
        DataError: no row would remain for training.
    """
    count = max(1, round(share * len(rows)))
    if count >= len(rows):
        raise DataError(
            f"{rows.name}: {len(rows)} rows are too few to hold out {share:.0%} for validation"
        )
    shuffled = order(len(rows), seed)
    return rows.take(sorted(shuffled[count:].tolist())), rows.take(
        sorted(shuffled[:count].tolist())
    )


def hold_out_text(rows: Rows, share: float, seed: int, columns: Columns) -> tuple[Rows, Rows]:
    """Hold out documents; if there are too few, hold out the end of each.

    Args:
        rows: the training documents.
        share: the share of the documents to hold out, or of the characters of each; documents are
            cut at the end of a line.
        seed: the random seed.
        columns: names the text column; unset to find it.

    Raises:
        DataError: there is no text column, or a document is too short to cut.
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
    train, held_out = zip(*parts, strict=True)
    return _with_texts(rows, column, train, "first part"), _with_texts(
        rows, column, held_out, "last part"
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

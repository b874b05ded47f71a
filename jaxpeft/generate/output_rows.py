"""Rows of output files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def json_line(record: Mapping[str, Any], fields: Mapping[str, Any]) -> str:
    """Return a row with additional fields as a line of JSON.

    A field that the row has already is kept as `reference_FIELD`.

    Args:
        record: the row.
        fields: the fields to add.
    """
    kept = {f"reference_{name}" if name in fields else name: x for name, x in record.items()}
    row = {**kept, **fields}
    line = json.dumps(row, ensure_ascii=False, default=str)
    try:
        line.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can only escape
        line = json.dumps(row, default=str)
    return line + "\n"

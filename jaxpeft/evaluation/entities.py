"""Find entities in tag sequences, as CoNLL's `conlleval` and `seqeval` do.

The tests compare this with `seqeval`, which is not used directly: its last release (2020) has no
wheel, and supports L and U of BILOU only in its strict mode, which drops every entity that starts
with the wrong letter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

OUTSIDE = "O"
_TAG = re.compile(r"[BIESLU](-.+)?")


def has_entities(tags: Sequence[str]) -> bool:
    """Return whether the tags follow IOB1, IOB2, IOBES or BILOU, such as `B-PER`, or are plain `B`,
    `I` and `O`.
    """
    inside = [tag for tag in tags if tag != OUTSIDE]
    typed = all("-" in tag for tag in inside) or {"B", "I", OUTSIDE} <= set(tags)
    return (
        typed
        and any(tag[:1] in "BI" for tag in inside)
        and all(_TAG.fullmatch(tag) for tag in inside)
    )


def find_entities(
    ids: np.ndarray, rows: np.ndarray, tags: Sequence[str]
) -> set[tuple[int, int, str]]:
    """Return the entities of tag sequences.

    An entity starts at B, S or U, and at any other tag that follows O, E, S, L, U, a tag of another
    type, or the end of a row.

    Args:
        ids: int [n], the tag of each position as an index into `tags`, with the rows concatenated.
        rows: int [n], the row of each position; entities do not cross rows.
        tags: the tag names, for which `has_entities` is true.

    Returns:
        The first position, last position and type of each entity.
    """
    letters = np.array([tag[0] for tag in tags])[ids]
    types = np.array([tag[2:] for tag in tags])[ids]
    inside = letters != OUTSIDE
    starts = inside.copy()
    starts[1:] &= (
        np.isin(letters[1:], list("BSU"))
        | np.isin(letters[:-1], list("OESLU"))
        | (types[1:] != types[:-1])
        | (rows[1:] != rows[:-1])
    )
    ends = inside.copy()
    ends[:-1] &= starts[1:] | ~inside[1:]
    first, last = np.flatnonzero(starts), np.flatnonzero(ends)
    return set(zip(first.tolist(), last.tolist(), types[first].tolist(), strict=True))

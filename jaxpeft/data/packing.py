"""Several documents in one row, none of which sees another: few places are left to padding."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from jaxpeft.data.encoded import Encoded
from jaxpeft.data.supervise import IGNORED


def first_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Puts each item, the longest first, into the first bin that has room for it (first-fit decreasing).

    A tree over the bins holds the most room below each node, so an item finds its bin in `O(log n)`. It takes at most 11/9
    of the fewest bins possible, plus 6/9 (Dósa 2007).

    Args:
        lengths: of the items, int [n], each from 1 to `capacity`.
        capacity: of a bin.

    Returns:
        The items of each bin, ascending.
    """
    leaves = 1 << max(0, int(np.ceil(np.log2(max(1, len(lengths))))))
    room = [capacity] * (2 * leaves)
    bins: list[list[int]] = []
    sizes = lengths.tolist()
    for item in np.argsort(-lengths, kind="stable").tolist():
        size, node = sizes[item], 1
        while node < leaves:
            node *= 2
            node += room[node] < size
        if node - leaves == len(bins):
            bins.append([])
        bins[node - leaves].append(item)
        room[node] -= size
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return [sorted(items) for items in bins]


def pack(encoded: Encoded, capacity: int) -> Encoded:
    """Packs documents into rows.

    A document's first token has no label any more: it would be predicted from another document.

    Args:
        encoded: sequences with a label a token, none longer than `capacity`.
        capacity: tokens of a row.

    Returns:
        Rows of one or more documents, with `segments`; the documents of a row keep their order.
    """
    rows = first_fit(encoded.lengths, capacity)
    order = np.fromiter((i for row in rows for i in row), np.int64, len(encoded))
    sizes = encoded.lengths[order]
    ends = np.cumsum(sizes)
    starts = ends - sizes
    # where in the old arrays each token of the new ones stands
    take = np.arange(len(encoded.tokens)) + np.repeat(encoded.offsets[:-1][order] - starts, sizes)
    counts = np.fromiter(map(len, rows), np.int64, len(rows))
    last = np.cumsum(counts) - 1
    number = np.arange(len(order)) - np.repeat(last + 1 - counts, counts) + 1
    labels = encoded.labels[take]
    labels[starts] = IGNORED
    return dataclasses.replace(
        encoded,
        tokens=encoded.tokens[take],
        offsets=np.concatenate([[0], ends[last]]).astype(np.int64),
        labels=labels,
        type_ids=None if encoded.type_ids is None else encoded.type_ids[take],
        source=encoded.source[order][last + 1 - counts],
        segments=np.repeat(number, sizes).astype(np.int32),
        counts={**encoded.counts, "sequences": len(rows)},
        fingerprint=hashlib.sha256(f"{encoded.fingerprint} packed {capacity}".encode()).hexdigest(),
    )


def fill(packed: Encoded, capacity: int) -> float:
    """Gives the share of all places of the rows that hold a token."""
    return len(packed.tokens) / (len(packed) * capacity)

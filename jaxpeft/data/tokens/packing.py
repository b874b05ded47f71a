"""Several documents in one row, none of which sees another: few places are left to padding."""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
from collections.abc import Sequence

import numpy as np

from jaxpeft.data.chat.supervise import IGNORED
from jaxpeft.data.tokens.token_arrays import Encoded

FORMAT = 2
SHORTEST = 64
Piece = tuple[int, int, int]


def first_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Put each item, the longest first, into the first bin that has room for it (first-fit
    decreasing).

    A tree over the bins holds the most room below each node, so an item finds its bin in `O(log
    n)`. It takes at most 11/9 of the fewest bins possible, plus 6/9 (Dósa 2007).

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


def pour(bins: Sequence[Sequence[int]], lengths: np.ndarray, capacity: int) -> list[list[Piece]]:
    """Cut the sequences of the emptiest bins, to fill the rooms of the others with them.

    Texts of two thirds of a row leave a third of each row empty, however they are packed. A text
    that is longer than a row is cut anyway; here a few others are, too. None is cut to less than 64
    tokens.

    Args:
        bins: the sequences of each bin, as `first_fit` gives them.
        lengths: of the sequences, int [n].
        capacity: of a bin.

    Returns:
        The pieces of each bin, each `(sequence, start, stop)`; every token stands in exactly one.
    """
    pieces = [[(i, 0, int(lengths[i])) for i in items] for items in bins]
    rooms = [
        (sum(stop for _, _, stop in of) - capacity, number) for number, of in enumerate(pieces)
    ]
    heapq.heapify(rooms)
    while len(rooms) > 1:
        _, emptiest = heapq.heappop(rooms)
        moved = _spread(pieces[emptiest], rooms)
        if moved is None:
            break
        pieces[emptiest] = []
        for number, piece in moved:
            pieces[number].append(piece)
    return [sorted(of) for of in pieces if of]


def _spread(
    pieces: Sequence[Piece], rooms: list[tuple[int, int]]
) -> list[tuple[int, Piece]] | None:
    """Cut pieces into the largest rooms, a heap of `(-room, bin)`; return None where they do not
    fit.
    """
    out: list[tuple[int, Piece]] = []
    for sequence, first, stop in pieces:
        start = first
        while start < stop:
            room, number = -rooms[0][0], rooms[0][1]
            size = stop - start if stop - start <= room else min(room, stop - start - SHORTEST)
            if size < min(SHORTEST, stop - start):
                return None
            heapq.heapreplace(rooms, (size - room, number))
            out.append((number, (sequence, start, start + size)))
            start += size
    return out


def pack(encoded: Encoded, capacity: int) -> Encoded:
    """Pack documents into rows.

    A document's first token has no label any more: it would be predicted from another document.
    Texts, of which long ones are split anyway, are cut where that fills rows; a dialog stays whole.

    Args:
        encoded: sequences with a label a token, none longer than `capacity`.
        capacity: tokens of a row.

    Returns:
        Rows of one or more documents, with `segments`; the documents of a row keep their order.
    """
    bins = first_fit(encoded.lengths, capacity)
    whole = [[(i, 0, int(encoded.lengths[i])) for i in items] for items in bins]
    rows = pour(bins, encoded.lengths, capacity) if encoded.kind == "text" else whole
    pieces = np.array([piece for row in rows for piece in row], np.int64).reshape(-1, 3)
    order, sizes = pieces[:, 0], pieces[:, 2] - pieces[:, 1]
    ends = np.cumsum(sizes)
    starts = ends - sizes
    # where in the old arrays each token of the new ones stands
    take = np.arange(len(encoded.tokens)) + np.repeat(
        encoded.offsets[:-1][order] + pieces[:, 1] - starts, sizes
    )
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
        counts={**encoded.counts, "sequences": len(rows), "cut": len(pieces) - len(encoded)},
        fingerprint=hashlib.sha256(
            f"{encoded.fingerprint} packed {FORMAT} {capacity}".encode()
        ).hexdigest(),
    )


def fill(packed: Encoded, capacity: int) -> float:
    """Return the share of all places of the rows that hold a token."""
    return len(packed.tokens) / (len(packed) * capacity)

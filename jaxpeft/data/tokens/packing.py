"""Packing: several documents in one row, which do not attend to each other, to reduce padding."""

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
    """Assign items to bins by first-fit decreasing.

    A tree over the bins stores the most free room below each node, so the bin of an item is found
    in `O(log n)`. The number of bins is at most 11/9 of the optimum plus 6/9 (Dósa 2007).

    Args:
        lengths: the lengths of the items, int [n], each from 1 to `capacity`.
        capacity: the capacity of a bin.

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
    """Cut the sequences of the emptiest bins to fill the free room in other bins.

    Without cuts, texts of two thirds of a row would leave a third of each row empty. Texts longer
    than a row are cut anyway; this cuts a few others. No piece is shorter than 64 tokens because of
    a cut.

    Args:
        bins: the sequences of each bin, from `first_fit`.
        lengths: the lengths of the sequences, int [n].
        capacity: the capacity of a bin.

    Returns:
        The pieces of each bin as `(sequence, start, stop)`; every token is in exactly one piece.
    """
    pieces = [[(i, 0, int(lengths[i])) for i in items] for items in bins]
    rooms = [
        (sum(stop for _, _, stop in in_bin) - capacity, number)
        for number, in_bin in enumerate(pieces)
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
    return [sorted(in_bin) for in_bin in pieces if in_bin]


def _spread(
    pieces: Sequence[Piece], rooms: list[tuple[int, int]]
) -> list[tuple[int, Piece]] | None:
    """Distribute pieces over the bins with most room, a heap of `(-room, bin)`; return None if they
    do not fit.
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

    The first token of each document is masked: it would be predicted from another document. Texts
    may be cut to fill rows, since long ones are split anyway; dialogs are not cut.

    Args:
        encoded: sequences with token labels, none longer than `capacity`.
        capacity: number of tokens per row.

    Returns:
        Rows of one or more documents, with `segments`; the documents of a row keep their order.
    """
    bins = first_fit(encoded.lengths, capacity)
    uncut = [[(i, 0, int(encoded.lengths[i])) for i in items] for items in bins]
    rows = pour(bins, encoded.lengths, capacity) if encoded.kind == "text" else uncut
    pieces = np.array([piece for row in rows for piece in row], np.int64).reshape(-1, 3)
    order, sizes = pieces[:, 0], pieces[:, 2] - pieces[:, 1]
    ends = np.cumsum(sizes)
    starts = ends - sizes
    # index in the old arrays of each token in the new ones
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
    """Return the share of token positions in the rows that are not padding."""
    return len(packed.tokens) / (len(packed) * capacity)

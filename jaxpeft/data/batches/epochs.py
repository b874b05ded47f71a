"""Assign rows to the batches of an epoch, as a pure function of the seed and the epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxpeft.data.order import order

FILLER = -1


@dataclass(frozen=True)
class EpochPlan:
    """The batches of one epoch.

    Attributes:
        rows: int64 [batches, batch], the sequence of each row, -1 for a filler row (only in the
            last batch).
        lengths: int64 [batches], the padded length of each batch.
    """

    rows: np.ndarray
    lengths: np.ndarray


def make_plan(
    bucket_of: np.ndarray,
    buckets: Sequence[int],
    batch_size: int,
    seeds: tuple[int, int] | None,
    drop: bool = False,
) -> EpochPlan:
    """Plan the batches of one epoch.

    Each bucket's rows are divided into full batches, and the remainder moves to the next longer
    bucket, so the number of batches of each length is the same for any seed.

    Args:
        bucket_of: the bucket index of each sequence, int64 [n].
        buckets: ascending lengths.
        batch_size: sequences per batch.
        seeds: the seed of the run and the epoch; None to keep the order of rows in each bucket.
        drop: whether to drop the last batch if it is not full.
    """
    permutation = np.arange(len(bucket_of)) if seeds is None else order(len(bucket_of), *seeds, 0)
    rows, lengths = list[np.ndarray](), list[int]()
    remainder, remainder_length = np.empty(0, np.int64), buckets[0]
    for i, length in enumerate(buckets):
        in_bucket = permutation[bucket_of[permutation] == i]
        pool = np.concatenate([remainder, in_bucket])
        remainder_length = length if len(in_bucket) else remainder_length
        full = len(pool) // batch_size
        rows.append(pool[: full * batch_size].reshape(full, batch_size))
        lengths += [length] * full
        remainder = pool[full * batch_size :]
    plan = EpochPlan(np.concatenate(rows), np.asarray(lengths, np.int64))
    if seeds is not None:
        shuffled = order(len(plan.rows), *seeds, 1)
        plan = EpochPlan(plan.rows[shuffled], plan.lengths[shuffled])
    return plan if drop or not len(remainder) else _with_last(plan, remainder, remainder_length)


def _with_last(plan: EpochPlan, remainder: np.ndarray, length: int) -> EpochPlan:
    last = np.full((1, plan.rows.shape[1]), FILLER, np.int64)
    last[0, : len(remainder)] = remainder
    return EpochPlan(np.concatenate([plan.rows, last]), np.append(plan.lengths, length))

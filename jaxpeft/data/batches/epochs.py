"""Which rows stand in which batch of an epoch, a pure function of the seed and the epoch."""

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
        rows: int64 [batches, batch], the sequence at each place, -1 for a filler; only the last
            batch has fillers.
        lengths: int64 [batches], the length that each batch is padded to.
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
    """Make the plan of one epoch.

    Each bucket's rows are cut into batches, and what is left over moves up to the next bucket; so
    the number of batches of each length is the same for any seed.

    Args:
        bucket_of: the index of the bucket of each sequence, int64 [n].
        buckets: ascending lengths.
        batch_size: sequences a batch.
        seeds: the run's seed and the epoch; None keeps the order of the rows inside each bucket.
        drop: leave out the last batch where it is not full.
    """
    permutation = np.arange(len(bucket_of)) if seeds is None else order(len(bucket_of), *seeds, 0)
    rows, lengths = list[np.ndarray](), list[int]()
    left, left_length = np.empty(0, np.int64), buckets[0]
    for i, length in enumerate(buckets):
        own = permutation[bucket_of[permutation] == i]
        pool = np.concatenate([left, own])
        left_length = length if len(own) else left_length
        full = len(pool) // batch_size
        rows.append(pool[: full * batch_size].reshape(full, batch_size))
        lengths += [length] * full
        left = pool[full * batch_size :]
    plan = EpochPlan(np.concatenate(rows), np.asarray(lengths, np.int64))
    if seeds is not None:
        shuffled = order(len(plan.rows), *seeds, 1)
        plan = EpochPlan(plan.rows[shuffled], plan.lengths[shuffled])
    return plan if drop or not len(left) else _with_last(plan, left, left_length)


def _with_last(plan: EpochPlan, left: np.ndarray, length: int) -> EpochPlan:
    last = np.full((1, plan.rows.shape[1]), FILLER, np.int64)
    last[0, : len(left)] = left
    return EpochPlan(np.concatenate([plan.rows, last]), np.append(plan.lengths, length))

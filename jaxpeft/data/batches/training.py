"""Batches as a pure function of seed and step: a checkpoint's data position is the step."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from jaxpeft.data.batches.epochs import FILLER, EpochPlan, make_plan
from jaxpeft.data.batches.prefetch import prefetch
from jaxpeft.data.chat.supervise import IGNORED
from jaxpeft.data.examples.labels import ProblemType, label_array
from jaxpeft.data.tokens.buckets import assign, choose_lengths, padding_share
from jaxpeft.data.tokens.token_arrays import Encoded
from jaxpeft.errors import ConfigError

Batch = dict[str, np.ndarray]
Position = dict[str, int]
"""Position of the next batch, saved with each checkpoint."""
Own = tuple[int, ...] | None
"""The rows of each micro-batch that this process builds; None for all."""


class Batches:
    """The training batches of a run.

    Every epoch is a different permutation with every sequence exactly once. Only the last batch of
    an epoch may have filler rows, with weight 0. The number of batches and their lengths are the
    same in every epoch.

    Args:
        encoded: the training split.
        batch_size: sequences per step, over all micro-batches.
        lengths: ascending lengths to pad to; chosen from the data by default.
        seed: the seed of the order.
        pad_id: the padding token id.
        shuffle: whether to shuffle; if not, rows of each length keep their order in every epoch.
        accumulation: micro-batches per step; if more than one, every array has a leading axis of
            micro-batches.
        drop_remainder: whether to drop the last batch of an epoch if it is not full.
        workers: number of processes that prefetch batches for `feed`; 0 for a thread.
        timeout: seconds that `feed` waits for a batch of the workers.
        pad_to: a fixed length of all batches; None to pad each batch to its bucket.

    Raises:
        ConfigError: a number is out of range, or the longest sequence does not fit `lengths`.
    """

    def __init__(
        self,
        encoded: Encoded,
        batch_size: int,
        lengths: Sequence[int] | None = None,
        seed: int = 0,
        pad_id: int = 0,
        shuffle: bool = True,
        accumulation: int = 1,
        drop_remainder: bool = False,
        workers: int = 0,
        timeout: float = 60.0,
        pad_to: int | None = None,
    ) -> None:
        _check(len(encoded), batch_size, seed, pad_id, accumulation, drop_remainder)
        self._workers, self._timeout = workers, timeout
        self._encoded, self._batch_size, self._seed = encoded, batch_size, seed
        self._pad_id, self._shuffle, self._accumulation = pad_id, shuffle, accumulation
        self._drop, self._pad_to = drop_remainder, pad_to
        self._buckets = tuple(lengths) if lengths is not None else _default_lengths(encoded)
        self._bucket_of = assign(encoded.lengths, self._buckets)
        self._last = (0, self._make_plan(0))

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches per epoch."""
        return len(self._last[1].rows)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths that occur in batches, in every epoch; one program is compiled for each."""
        return tuple(np.unique(self._lengths(self._last[1])).tolist())

    def _lengths(self, plan: EpochPlan) -> np.ndarray:
        return plan.lengths if self._pad_to is None else np.full_like(plan.lengths, self._pad_to)

    @property
    def padding_share(self) -> float:
        """The share of padding in the batches of an epoch, including filler rows."""
        plan = self._last[1]
        kept = plan.rows[plan.rows != FILLER]
        return padding_share(
            self._encoded.lengths[kept], int(self._lengths(plan).sum()) * self._batch_size
        )

    def rows(self, step: int) -> np.ndarray:
        """Return the sequences of a step, int64 [batch], -1 for a filler row.

        Raises:
            ConfigError: the step is negative.
        """
        plan, i = self._at(step)
        return plan.rows[i]

    def batch(self, step: int, own: Own = None) -> Batch:
        """Return the arrays of a step; with accumulation, each starts with the axes
        `[accumulation, batch / accumulation]`.

        Args:
            step: the step number.
            own: the rows of each micro-batch to build; None for all.

        Returns:
            input_ids, attention_mask: int32 [batch, T].
            token_type_ids: int32 [batch, T], if the tokenizer has token types.
            segment_ids: int32 [batch, T], with packing: the number of the document, 0 for padding.
            labels: int32 [batch] (single_label), float32 [batch] (regression), float32 [batch,
                labels] (multi_label), or int32 [batch, T] with -100 for masked tokens.
            weights: float32 [batch], 0 for filler rows.

        Raises:
            ConfigError: the step is negative.
        """
        plan, i = self._at(step)
        k, rows = self._accumulation, plan.rows[i]
        if own is not None:
            rows = rows.reshape(k, -1)[:, list(own)].ravel()
        return _in_parts(collate(self._encoded, rows, int(self._lengths(plan)[i]), self._pad_id), k)

    def sample(self) -> Batch:
        """Return an example batch, for its shapes."""
        return self.batch(0)

    def describe_batch(self, position: Position) -> str:
        """Return the sequences of the batch before a position for messages."""
        rows = self.rows(position["step"] - 1)
        return (
            f"sequences {', '.join(map(str, rows[:4].tolist()))}{', ...' if len(rows) > 4 else ''}"
        )

    def feed(
        self,
        position: Position,
        steps: int,
        waiting: Callable[[], None] = lambda: None,
        own: Own = None,
    ) -> Generator[tuple[Batch, Position]]:
        """Yield the batches of a run from a position on, each with the position after it.

        Args:
            position: `step` of the next batch; empty for the start.
            steps: number of steps of the run.
            waiting: called while waiting for a batch; may raise to stop.
            own: the rows of each micro-batch to build; None for all. Together, the processes of a
                run build the same batch as a single process.

        Raises:
            WorkerError: a worker process has ended or hangs.
        """
        start = position.get("step", 0)
        batches = prefetch(
            _Steps(self, start, steps, own), self._workers, timeout=self._timeout, waiting=waiting
        )
        with closing(batches):
            for step, batch in enumerate(batches, start + 1):
                yield batch, {"step": step}

    def _at(self, step: int) -> tuple[EpochPlan, int]:
        if step < 0:
            raise ConfigError(f"step={step} must be 0 or more")
        epoch, i = divmod(step, self.steps_per_epoch)
        planned_epoch, plan = self._last
        if planned_epoch != epoch:
            plan = self._make_plan(epoch)
            # A single assignment, so that a prefetch thread never sees one plan's epoch with
            # another's rows.
            self._last = (epoch, plan)
        return plan, i

    def _make_plan(self, epoch: int) -> EpochPlan:
        seeds = (self._seed, epoch) if self._shuffle else None
        return make_plan(self._bucket_of, self._buckets, self._batch_size, seeds, self._drop)


@dataclass(frozen=True)
class _Steps:
    """The batches of the steps from `start` to `stop`, as `Items`."""

    batches: Batches
    start: int
    stop: int
    own: Own = None

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __getitem__(self, i: int) -> Batch:
        return self.batches.batch(self.start + i, self.own)


def eval_batches(
    encoded: Encoded,
    batch_size: int,
    lengths: Sequence[int] | None = None,
    pad_id: int = 0,
    own: Own = None,
    pad_to: int | None = None,
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yield batches with every sequence once, sorted by length and then in order.

    Args:
        encoded: the split to evaluate.
        batch_size: sequences per batch.
        lengths: ascending lengths to pad to; chosen from the data by default.
        pad_id: the padding token id.
        own: the rows of each batch to build; None for all.
        pad_to: a fixed length of all batches, as in `Batches`.

    Yields:
        The arrays of `Batches.batch`, and int64 [batch], the index of each sequence, -1 for filler
        rows (only in the last batch). `out[rows[rows >= 0]] = predictions[rows >= 0]` restores the
        original order.

    Raises:
        ConfigError: an argument is invalid, as in `Batches`.
    """
    batches = Batches(encoded, batch_size, lengths, pad_id=pad_id, shuffle=False, pad_to=pad_to)
    return (
        (batches.batch(step, own), batches.rows(step)) for step in range(batches.steps_per_epoch)
    )


def collate(encoded: Encoded, rows: np.ndarray, length: int, pad_id: int) -> Batch:
    """Build a batch with padding on the right.

    A filler row has one unmasked position, since attention over an empty row is NaN.

    Args:
        encoded: the sequences.
        rows: int64 [batch], the sequence of each row, -1 for a filler row.
        length: the padded length T.
        pad_id: the padding token id.

    Returns:
        The arrays of `Batches.batch`, without accumulation.
    """
    real = rows != FILLER
    position = np.arange(length)
    size = np.where(real, encoded.lengths[rows], 0)[:, None]
    inside = position < size
    at = np.where(inside, encoded.offsets[:-1][rows][:, None] + position, 0)
    batch = {
        "input_ids": np.where(inside, encoded.tokens[at], np.int32(pad_id)).astype(np.int32),
        "attention_mask": (position < np.maximum(size, 1)).astype(np.int32),
        "labels": (
            np.where(inside, encoded.labels[at], np.int32(IGNORED))
            if encoded.per_token
            else encoded.labels[rows]
        ),
        "weights": real.astype(np.float32),
    }
    if encoded.segments is not None:
        batch["segment_ids"] = np.where(inside, encoded.segments[at], np.int32(0))
    if encoded.type_ids is not None:
        batch["token_type_ids"] = np.where(inside, encoded.type_ids[at], np.int32(0))
    return batch


def _in_parts(arrays: Batch, parts: int) -> Batch:
    if parts == 1:
        return arrays
    return {name: a.reshape(parts, len(a) // parts, *a.shape[1:]) for name, a in arrays.items()}


def batch_like(
    problem: ProblemType | None,
    num_labels: int,
    batch_size: int,
    length: int,
    accumulation: int = 1,
    *,
    packed: bool = False,
    types: bool = False,
) -> Batch:
    """Return a dummy batch for its shapes and dtypes; all rows are views of one.

    Args:
        problem: the problem type of a sequence classification; None if labels are per token.
        num_labels: number of classes of a sequence classification.
        batch_size: sequences per step.
        length: length of a row.
        accumulation: micro-batches per step.
        packed: whether rows are packed.
        types: whether the tokenizer has token types.

    Returns:
        The arrays of `Batches.batch`.
    """
    token = np.zeros(1, np.int32)
    label = (
        token
        if problem is None
        else label_array([[]] if problem == "multi_label" else [0], problem, num_labels)
    )
    one = Encoded(
        "text" if problem is None else "classification",
        problem,
        token,
        np.arange(2),
        label,
        token if types else None,
        token,
        (),
        {},
        length,
        "",
        token if packed else None,
    )
    rows = collate(one, np.zeros(1, np.int64), length, 0)
    return _in_parts(
        {k: np.broadcast_to(a, (batch_size, *a.shape[1:])) for k, a in rows.items()}, accumulation
    )


def _default_lengths(encoded: Encoded) -> tuple[int, ...]:
    return choose_lengths(encoded.lengths, encoded.max_length)


def _check(n: int, batch_size: int, seed: int, pad_id: int, accumulation: int, drop: bool) -> None:
    minimums = {
        "batch_size": (batch_size, 1),
        "seed": (seed, 0),
        "pad_id": (pad_id, 0),
        "accumulation": (accumulation, 1),
    }
    problems = [
        f"{name}={value} must be {least} or more"
        for name, (value, least) in minimums.items()
        if value < least
    ]
    if accumulation > 0 and batch_size % accumulation:
        below = batch_size // accumulation * accumulation
        near = " or ".join(str(b) for b in (below, below + accumulation) if b)
        problems.append(
            f"batch_size={batch_size} is not divisible by accumulation={accumulation}; use {near}"
        )
    if n == 0:
        problems.append("there are no sequences to build batches from")
    elif drop and n < batch_size:
        problems.append(
            f"drop_remainder=True drops the only batch: {n} sequences, batch_size={batch_size}"
        )
    if problems:
        raise ConfigError(problems)

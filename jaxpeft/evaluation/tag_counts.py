"""Token classification by row: counts that add up to the metrics of any set of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxpeft.errors import DataError
from jaxpeft.evaluation.entities import OUTSIDE, find_entities, has_entities
from jaxpeft.evaluation.intervals import Statistic
from jaxpeft.evaluation.metrics import Metrics


@dataclass(frozen=True)
class TagCounts:
    """Counts of tags and entities of each row.

    Attributes:
        correct: correctly tagged positions by tag, int [n, tags].
        predicted: positions by predicted tag, int [n, tags].
        true: positions by true tag, int [n, tags].
        entities: correct, predicted and true entities, int [n, 3]; None for tags that are not
            those of entities.
        tags: names of the tags.
    """

    correct: np.ndarray
    predicted: np.ndarray
    true: np.ndarray
    entities: np.ndarray | None
    tags: tuple[str, ...]

    @property
    def accuracy(self) -> np.ndarray:
        """The share of correctly tagged positions of each row, float64 [n]."""
        return self.correct.sum(1) / np.maximum(self.true.sum(1), 1)


def count_tags(
    predicted: np.ndarray, true: np.ndarray, rows: np.ndarray, count: int, tags: Sequence[str]
) -> TagCounts:
    """Count the tags and entities of each row.

    Args:
        predicted: predicted tags, int [positions].
        true: true tags, int [positions], none masked.
        rows: row of each position, int [positions], ascending.
        count: number of rows.
        tags: names of the tags.

    Raises:
        DataError: A tag has no name.
    """
    if len(true) and (highest := max(predicted.max(), true.max())) >= len(tags):
        raise DataError(f"class {highest} has no name among the {len(tags)} tags")
    shape = (count, len(tags))
    hit = predicted == true

    def table(ids: np.ndarray, where: np.ndarray) -> np.ndarray:
        found = np.zeros(shape, np.int64)
        np.add.at(found, (where, ids), 1)
        return found

    entities = None
    if has_entities(tags):
        own, right = find_entities(predicted, rows, tags), find_entities(true, rows, tags)
        entities = np.zeros((count, 3), np.int64)
        for column, found in enumerate((own & right, own, right)):
            np.add.at(entities[:, column], rows[[first for first, _, _ in found]], 1)
    return TagCounts(
        table(true[hit], rows[hit]),
        table(predicted, rows),
        table(true, rows),
        entities,
        tuple(tags),
    )


def tag_statistic(counts: TagCounts) -> Statistic:
    """Return the statistic of a token classifier, with the metrics of `classification_metrics`."""
    inside = np.array([tag != OUTSIDE for tag in counts.tags])

    def compute(chosen: np.ndarray) -> Metrics:
        correct, predicted, true = (
            table[chosen].sum(0) for table in (counts.correct, counts.predicted, counts.true)
        )
        present = predicted + true > 0
        by_tag = 2 * correct[present] / (predicted + true)[present]
        found = {
            "accuracy": float(correct.sum() / max(true.sum(), 1)),
            "tag_f1": _f1(*(int(table[inside].sum()) for table in (correct, predicted, true))),
            "tag_f1_macro": float(by_tag.mean()) if len(by_tag) else 0.0,
        }
        if counts.entities is None:
            return found
        hits, own, right = (int(total) for total in counts.entities[chosen].sum(0))
        return found | {
            "f1": _f1(hits, own, right),
            "precision": hits / max(own, 1),
            "recall": hits / max(right, 1),
        }

    return compute


def _f1(correct: int, predicted: int, true: int) -> float:
    return 2 * correct / max(predicted + true, 1)

"""Counts by row add up to the metrics of token classification."""

from __future__ import annotations

import numpy as np
import pytest

from jaxpeft.errors import DataError
from jaxpeft.evaluation.metrics import classification_metrics
from jaxpeft.evaluation.tag_counts import count_tags, tag_statistic


@pytest.mark.parametrize(
    "tags", [("O", "B-PER", "I-PER", "B-LOC", "I-LOC"), ("NOUN", "VERB", "ADJ")]
)
@pytest.mark.parametrize("chosen", [range(12), [0, 0, 3, 7, 7, 7]])
def test_metrics_equal_those_of_the_rows_themselves(tags, chosen):
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 9, 12)
    rows = np.repeat(np.arange(12), sizes)
    true = rng.integers(0, len(tags), len(rows))
    predicted = np.where(
        rng.uniform(size=len(rows)) < 0.6, true, rng.integers(0, len(tags), len(rows))
    )
    found = tag_statistic(count_tags(predicted, true, rows, 12, tags))(np.array(chosen))
    places = [np.flatnonzero(rows == row) for row in chosen]
    theirs = classification_metrics(
        np.concatenate([predicted[place] for place in places]),
        np.concatenate([true[place] for place in places]),
        "token",
        tags=tags,
        rows=np.repeat(np.arange(len(places)), [len(place) for place in places]),
    )
    assert found == pytest.approx(theirs)


def test_a_tag_without_a_name_is_refused():
    with pytest.raises(DataError, match="class 2 has no name among the 2 tags"):
        count_tags(np.array([2]), np.array([0]), np.array([0]), 1, ("O", "B-X"))

"""Evaluating a split: what is computed from batches of several lengths is what its rows say."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from seqeval.metrics import f1_score, precision_score, recall_score

import jaxpeft
from jaxpeft import data
from jaxpeft.config.schema import Config
from jaxpeft.errors import ConfigError
from jaxpeft.train.evaluator import Evaluator
from jaxpeft.train.setup import prepare
from tests.train.runs import TAGS

MakeConfig = Callable[..., Config]
pytestmark = pytest.mark.slow


def tagged(make_config: MakeConfig, **options: object) -> Config:
    return make_config(
        "tags", model__task="token_classification", data__lengths=(6, 9, 16), **options
    )


def test_entities_are_counted_in_rows_whatever_batch_and_length_they_come_in(
    make_config: MakeConfig,
) -> None:
    setup = prepare(tagged(make_config, evaluation__batch_size=5))
    assert set(setup.data.labels) == set(TAGS)
    figures = Evaluator(setup)({}, setup.params, setup.data.train)
    wanted, made = [], []
    for batch, rows in data.eval_batches(setup.data.train, 1, (16,), setup.data.pad_id):
        assert rows.tolist() != [-1]
        logits = np.asarray(
            jaxpeft.apply(
                setup.model, setup.params, **{k: batch[k] for k in ("input_ids", "attention_mask")}
            )
        )
        there = batch["labels"][0] != -100
        wanted.append([setup.data.labels[i] for i in batch["labels"][0][there]])
        made.append([setup.data.labels[i] for i in logits[0].argmax(-1)[there]])
    assert len(wanted) > 40 and len({len(row) for row in wanted}) > 5
    assert figures["f1"] == pytest.approx(f1_score(wanted, made))
    assert figures["precision"] == pytest.approx(precision_score(wanted, made))
    assert figures["recall"] == pytest.approx(recall_score(wanted, made))
    assert 0 < figures["f1"] != pytest.approx(figures["tag_f1"])


@pytest.mark.parametrize("metric", ["f1_macro", "mcc"])
def test_a_figure_that_tags_do_not_have_is_refused(make_config: MakeConfig, metric: str) -> None:
    known = "loss, accuracy, tag_f1, tag_f1_macro, f1, precision, recall"
    with pytest.raises(
        ConfigError,
        match=rf"evaluation.metric: '{metric}' is not a metric of this data.*known: {known}\)",
    ):
        prepare(tagged(make_config, evaluation__metric=metric))

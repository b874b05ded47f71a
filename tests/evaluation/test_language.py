"""Language model metrics from the losses of rows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jaxpeft.evaluation.language import RowLosses, lm_statistic


def test_loss_is_weighted_by_tokens_and_bits_by_bytes():
    losses = RowLosses(np.array([2.0, 9.0]), np.array([2, 3]), np.array([10, 12]))
    found = lm_statistic(losses)(np.arange(2))
    assert found["loss"] == pytest.approx(11 / 5)
    assert found["perplexity"] == pytest.approx(math.exp(11 / 5))
    assert found["bits_per_byte"] == pytest.approx(11 / math.log(2) / 22)
    assert losses.mean.tolist() == [1.0, 3.0]
    assert lm_statistic(losses)(np.array([1, 1]))["loss"] == pytest.approx(3.0)


def test_special_tokens_alone_have_no_bits_per_byte():
    losses = RowLosses(np.array([2.0, 9.0]), np.array([2, 3]), np.array([0, 0]))
    assert list(lm_statistic(losses)(np.arange(2))) == ["loss", "perplexity"]

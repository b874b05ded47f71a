"""Calibration: expected error and bins, on constructed predictions."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit
from scipy.special import softmax as scipy_softmax
from sklearn.calibration import calibration_curve

from jaxpeft.evaluation.calibration import calibrate, sigmoid, softmax


def test_ece_by_hand():
    # 0.65 is in the bin up to 0.7 with half right, 0.95 in the last with all right
    confidence = np.array([0.65, 0.65, 0.95, 0.95])
    found = calibrate(confidence, np.array([True, False, True, True]), bins=10)
    assert found.ece == pytest.approx((2 * 0.15 + 2 * 0.05) / 4)
    assert found.counts == (0, 0, 0, 0, 0, 0, 2, 0, 0, 2)
    assert found.accuracy[6] == 0.5 and found.confidence[9] == pytest.approx(0.95)


def test_bins_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0, 1, 2000)
    correct = rng.uniform(0, 1, 2000) < confidence
    found = calibrate(confidence, correct, bins=15)
    share, mean = calibration_curve(correct, confidence, n_bins=15)
    assert found.accuracy == pytest.approx(share)
    assert found.confidence == pytest.approx(mean)
    assert found.ece < 0.05
    assert sum(found.counts) == 2000


def test_edges_belong_to_a_bin_each():
    found = calibrate(np.array([0.0, 0.5, 1.0]), np.array([False, True, True]), bins=2)
    assert found.counts == (2, 1)


def test_probabilities_are_those_of_scipy():
    logits = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32) * 30
    assert softmax(logits) == pytest.approx(scipy_softmax(logits.astype(np.float64), axis=-1))
    assert sigmoid(logits) == pytest.approx(expit(logits.astype(np.float64)))
    assert sigmoid(np.array([-1e4, 1e4])).tolist() == [0.0, 1.0]

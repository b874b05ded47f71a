"""Calibration: whether predictions with a probability of 0.8 are correct in 80% of the rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BINS = 15
"""Number of bins, as in Guo et al. 2017."""


@dataclass(frozen=True)
class Calibration:
    """Reliability by confidence (Guo et al. 2017, section 2, arXiv:1706.04599).

    Attributes:
        edges: edges of the equally wide bins, `bins + 1`; a bin includes its upper edge.
        counts: predictions in each bin.
        confidence: mean probability of the predictions in each bin; 0 for an empty bin.
        accuracy: share of correct predictions in each bin; 0 for an empty bin.
        ece: expected calibration error: mean of `|accuracy - confidence|` over the predictions.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]
    ece: float


def calibrate(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> Calibration:
    """Return the reliability of predictions.

    Args:
        confidence: probability of each prediction, [n].
        correct: whether each prediction is correct, bool [n].
        bins: number of equally wide bins from 0 to 1.
    """
    edges = np.linspace(0, 1, bins + 1)
    where = np.clip(np.searchsorted(edges, confidence) - 1, 0, bins - 1)
    counts = np.bincount(where, minlength=bins)
    filled = np.maximum(counts, 1)
    mean = np.bincount(where, confidence, bins) / filled
    share = np.bincount(where, correct, bins) / filled
    ece = float(np.abs(share - mean) @ counts / max(len(confidence), 1))
    return Calibration(
        tuple(edges.tolist()),
        tuple(counts.tolist()),
        tuple(mean.tolist()),
        tuple(share.tolist()),
        ece,
    )


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the probabilities of logits in float64, over the last axis."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Return the probability of each logit in float64."""
    return np.exp(-np.logaddexp(0, -logits.astype(np.float64)))

"""Metrics of a language model from the losses of rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jaxpeft.evaluation.intervals import Statistic
from jaxpeft.evaluation.metrics import lm_metrics


@dataclass(frozen=True)
class RowLosses:
    """Losses of a language model, by row.

    Attributes:
        total: sum of the token losses of each row in nats, float64 [n].
        tokens: number of tokens in the loss of each row, int [n].
        sizes: number of bytes of their text in UTF-8, int [n].
    """

    total: np.ndarray
    tokens: np.ndarray
    sizes: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """The mean token loss of each row, float64 [n]."""
        return self.total / np.maximum(self.tokens, 1)


def lm_statistic(losses: RowLosses) -> Statistic:
    """Return the statistic of a language model: `loss`, the mean over all tokens, `perplexity` and
    `bits_per_byte`.

    Bits per byte compare models with different tokenizers. They are left out if the tokens have no
    text, as special tokens.
    """
    has_text = losses.sizes.any()

    def compute(chosen: np.ndarray) -> Mapping[str, float]:
        total, tokens = float(losses.total[chosen].sum()), float(losses.tokens[chosen].sum())
        found = lm_metrics(total, tokens)
        if has_text:
            size = max(int(losses.sizes[chosen].sum()), 1)
            found["bits_per_byte"] = total / math.log(2) / size
        return found

    return compute

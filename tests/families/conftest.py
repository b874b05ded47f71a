"""The torch references of the tests of models, and tiny models with a tokenizer."""

from __future__ import annotations

from tests.models.conftest import padded, parity, reference
from tests.train.runs import tiny_models

__all__ = ["padded", "parity", "reference", "tiny_models"]

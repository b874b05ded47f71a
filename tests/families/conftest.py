"""The torch references of the tests of models."""

from __future__ import annotations

from tests.models.conftest import padded, parity, reference

__all__ = ["padded", "parity", "reference"]

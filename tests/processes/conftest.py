"""What the tests of several processes share: tiny model folders."""

from __future__ import annotations

from tests.train.runs import tiny_models

__all__ = ["tiny_models"]

"""What the tests of quantized bases share: tiny models that torch saved, and whole runs."""

from __future__ import annotations

from tests.models.conftest import reference
from tests.train.runs import make_config, tiny_models

__all__ = ["make_config", "reference", "tiny_models"]

"""What the tests of quantised bases share: tiny models that torch saved."""

from __future__ import annotations

from tests.models.conftest import reference

__all__ = ["reference"]

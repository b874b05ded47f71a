"""Full fine-tuning: every floating-point leaf is trained, in float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxpeft.core.method import Leaves, Method
from jaxpeft.core.paths import Path


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """Trains the entire model; adds no leaves."""

    name: ClassVar[str] = "full"

    def trains(self, path: Path, params: Leaves) -> bool:
        """Return True."""
        del path, params
        return True

"""Head only: a trained classifier on the features of the frozen base (a linear probe)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxpeft.core.method import Method


@dataclass(frozen=True, kw_only=True)
class Head(Method):
    """Trains the task head, and `modules_to_save`; adds no leaves."""

    name: ClassVar[str] = "head"

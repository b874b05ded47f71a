"""Fixtures of the hub's tests: tiny torch models, and a guard against pickles."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from tests.models.conftest import reference  # noqa: F401 - a fixture


@pytest.fixture
def no_unpickling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test where anything is unpickled."""

    def refuse(*args: Any, **kw: Any) -> Any:
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler", "_load", "_loads", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)

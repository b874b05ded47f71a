"""Stand-ins for the programs of clouds and clusters."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.helpers import Stubs


@pytest.fixture
def stubs(tmp_path: Path) -> Stubs:
    return Stubs(tmp_path / "stubs")

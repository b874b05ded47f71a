"""What the pages of docs/ show works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_both_examples_of_your_own_model_run() -> None:
    codes = re.findall(r"```python\n(.*?)```", (DOCS / "your_own_model.md").read_text(), re.DOTALL)
    linen, nnx = ({} for _ in codes)
    with jax.numpy_dtype_promotion("standard"):
        run(codes[0], linen)
        run(codes[1], nnx)
    assert float(linen["value"]) < 2.2  # ln 10 is 2.30
    assert set(linen["merged"]) == set(linen["base"])
    assert float(abs(nnx["merged"](nnx["x"]) - nnx["y"]).max()) < 1e-4


def run(code: str, names: dict[str, Any]) -> None:
    exec(compile(code, "docs", "exec"), names)


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_every_link_leads_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", (DOCS / page).read_text()):
        assert link.startswith("https://") or (DOCS / link).exists(), link

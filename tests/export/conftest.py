"""The fixtures of the hub's tests, whose adapters are exported, and the adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jaxpeft
from tests.conformance.conftest import moved
from tests.export.making import LORA, SEQUENCE, Made
from tests.hub.conftest import no_unpickling, one_torch_thread, reference, save

__all__ = ["make", "no_unpickling", "one_torch_thread", "reference", "save"]


@pytest.fixture
def make(reference: Any, tmp_path: Path) -> Any:
    """Train and save an adapter of a tiny model; the base's folder, or `edit` of a copy of it."""

    def made(
        method: Any = LORA,
        kind: str = "bert",
        task: str = SEQUENCE,
        *,
        labels: tuple[str, ...] = (),
        base: Path | None = None,
        size: float = 0.2,
        switches: Any = None,
        **options: Any,
    ) -> Made:
        folder = base or reference(kind, task, **(switches or {})).folder
        given = {
            "dtype": jnp.float32,
            "num_labels": 3 if "classification" in task else None,
        } | options
        model, params = jaxpeft.load(folder, task=task, **given)
        params = moved(method, jaxpeft.rewrite(method, params, jax.random.key(0)), size=size)
        jaxpeft.save_adapter(tmp_path / "adapter", method, params, model, labels=labels)
        return Made(folder, tmp_path / "adapter", task, model, params)

    return made

"""Fixtures of the hub's tests: tiny torch models, and a guard against pickles."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import jax
import pytest

import jaxpeft
from tests.hub.helpers import METHOD, Saved, trained
from tests.models import conftest as models

reference = models.reference  # a fixture, of tiny torch models


@pytest.fixture
def no_unpickling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test where anything is unpickled."""

    def refuse(*args: Any, **kw: Any) -> Any:
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler", "_load", "_loads", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    """Tiny matrices are multiplied a hundred times faster by one thread than by several that wait
    for each other.
    """
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def save(reference: Any, tmp_path: Any) -> Callable[..., Saved]:
    """Train and save an adapter."""

    def make(
        method: Any = METHOD,
        kind: str = "bert",
        task: str = "sequence_classification",
        labels: Any = (),
        **options: Any,
    ) -> Saved:
        model, base = reference(kind, task).load(**options)
        params = trained(method, jaxpeft.rewrite(method, base, jax.random.key(0)))
        jaxpeft.save_adapter(tmp_path / "adapter", method, params, model, labels=labels)
        return Saved(tmp_path / "adapter", model, base, params)

    return make

"""What the tests of exports share: an adapter of a tiny model on disk, and the logits of both."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxpeft
from jaxpeft.errors import ConfigError
from jaxpeft.export.export import ExportRequest, export
from tests.models.conftest import Reference, forward, make_batch

CAUSAL, SEQUENCE, TOKENS, ENCODER = (
    "causal_lm",
    "sequence_classification",
    "token_classification",
    "encoder",
)
LINEAR = r".*\.(q_proj|down_proj|query|q_lin|output\.dense)"
LORA = jaxpeft.LoRA(rank=4, alpha=6.0, targets=LINEAR)
BATCH = make_batch("right")


@dataclasses.dataclass(frozen=True)
class Made:
    """An adapter on disk, the base, and the logits of the two together."""

    base: Path
    folder: Path
    task: str
    model: Any
    params: Any

    def logits(self) -> Any:
        return ours(self.model, self.params)

    def export(self, out: Path, to: str = "merged", **options: Any) -> Any:
        return export(ExportRequest(self.folder, to, out, **options))

    def refused(
        self, out: Path, error: Any = ConfigError, to: str = "merged", **options: Any
    ) -> str:
        """Return why an export is refused; nothing is left of it."""
        before = sorted(out.parent.iterdir())
        with pytest.raises(error) as caught:
            self.export(out, to, **options)
        assert sorted(out.parent.iterdir()) == before
        return str(caught.value)


def ours(model: Any, params: Any) -> Any:
    """Return logits of the real tokens."""
    return real(np.asarray(forward(model, params, BATCH.ids, BATCH.mask)))


def theirs(task: str, torch_model: Any) -> Any:
    return real(Reference(Path(), task, torch_model)(BATCH))


def real(out: Any) -> Any:
    return out[BATCH.mask.astype(bool)] if out.ndim == 3 else out


def assert_close(found: Any, wanted: Any, tolerance: float = 1e-4) -> None:
    assert np.abs(found - wanted).max() <= tolerance * max(1.0, np.abs(wanted).max())

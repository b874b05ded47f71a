"""The probe batch: random tokens on which the logits of what was written are compared with those of
what it was made from.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, cast

import jax
import numpy as np

from jaxpeft.core import training_hooks
from jaxpeft.core.method import Method
from jaxpeft.core.paths import Tree
from jaxpeft.errors import ExportError
from jaxpeft.forward import apply
from jaxpeft.models.base import Pretrained

TOLERANCE = 1e-4
"""The largest difference of logits that float32 may make, for logits up to 1; relative to the
largest one above that.
"""
ROWS, LENGTH = 4, 16
_SEED = 0


def logits(model: Pretrained, params: Tree, method: Method | None = None) -> np.ndarray[Any, Any]:
    """Compute the logits of the probe batch, or the hidden states of an encoder, at its real
    tokens.

    The batch holds random tokens of the vocabulary, the last ones among them, where new tokens are;
    its rows differ in length.

    Args:
        model: what is probed; its activations are float32.
        params: adapted or plain.
        method: that adapts them, which may need places in front of the tokens.
    """
    rng = np.random.default_rng(_SEED)
    virtual = training_hooks.virtual_positions(method) if method else 0
    roberta = getattr(model.config, "kind", None) == "roberta"
    behind = model.config.pad_token_id + 1 if roberta else 0  # where its positions begin
    length = max(1, min(LENGTH, model.config.max_position_embeddings - virtual - behind))
    ids = rng.integers(0, model.config.vocab_size, (ROWS, length)).astype(np.int32)
    ids[0, -2:] = model.config.vocab_size - np.arange(1, 1 + min(2, length))
    mask = (
        np.arange(length) < np.linspace(length, max(1, length // 4), ROWS).astype(int)[:, None]
    ).astype(np.int32)
    out = np.asarray(_program(cast(Any, model.clone(source=None)))(params, ids, mask))
    return out[mask.astype(bool)] if out.ndim == 3 else out


@lru_cache(maxsize=4)
def _program(model: Pretrained) -> Any:
    def run(params: Tree, ids: jax.Array, mask: jax.Array) -> Any:
        with jax.default_matmul_precision("highest"):
            return apply(model, params, ids, mask)

    return jax.jit(run)


def gap_of(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> float:
    """Return the largest difference of two arrays of logits."""
    return float(np.abs(found - wanted).max()) if found.shape == wanted.shape else float("inf")


def require_equal(gap: float, wanted: np.ndarray[Any, Any], tolerance: float, what: str) -> None:
    """Refuse logits that differ.

    Raises:
        ExportError: saying by how much.
    """
    most = tolerance * max(1.0, float(np.abs(wanted).max()))
    if not gap <= most:  # a NaN as well
        raise ExportError(
            f"{what}: logits differ by {gap:.2g} on the probe batch, at most {most:.2g} is allowed;"
            " nothing was kept"
        )

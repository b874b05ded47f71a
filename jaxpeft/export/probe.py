"""The probe batch: random tokens on which the logits of the exported model are checked, and the
log-probabilities of given tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.core import training_hooks
from jaxpeft.core.method import Method
from jaxpeft.core.paths import Tree
from jaxpeft.errors import ExportError
from jaxpeft.forward import apply
from jaxpeft.models.base import Pretrained

TOLERANCE = 1e-4
"""The largest allowed difference of float32 logits: absolute for logits up to 1, else relative to
the largest one.
"""
ROUNDING = 2e-6
"""The difference of logits, relative to the largest one, up to which two models compute the same:
17 units in the last place of float32. A method that changes nothing gives equal bits, or an error
of a few such units.
"""
ROWS, LENGTH = 4, 16
_SEED = 0


def logits(model: Pretrained, params: Tree, method: Method | None = None) -> np.ndarray[Any, Any]:
    """Compute the logits (or an encoder's hidden states) of the probe batch, without padding.

    The batch consists of random tokens and the last ones of the vocabulary, which may be new. Its
    rows differ in length.

    Args:
        model: the model, with float32 activations.
        params: its parameters, adapted or plain.
        method: the method that adapts them, which may use virtual tokens.
    """
    rng = np.random.default_rng(_SEED)
    virtual = training_hooks.virtual_positions(method) if method else 0
    offset = getattr(model.config, "first_position", 0)
    length = max(1, min(LENGTH, model.config.max_position_embeddings - virtual - offset))
    ids = rng.integers(0, model.config.vocab_size, (ROWS, length)).astype(np.int32)
    ids[0, -2:] = model.config.vocab_size - np.arange(1, 1 + min(2, length))
    mask = (
        np.arange(length) < np.linspace(length, max(1, length // 4), ROWS).astype(int)[:, None]
    ).astype(np.int32)
    out = np.asarray(_program(cast(Any, model.clone(source=None)))(params, ids, mask))
    return out[mask.astype(bool)] if out.ndim == 3 else out


def log_probs_of(
    model: Pretrained, params: Tree, rows: Sequence[Sequence[int]]
) -> np.ndarray[Any, Any]:
    """Compute the log-probabilities of every next token after each token of some rows.

    Args:
        model: a language model, with float32 activations.
        params: its parameters, adapted or plain.
        rows: token ids, rows of different lengths.

    Returns:
        `[rows, longest, vocab]` float32; what follows the end of a row has no meaning.
    """
    ids = np.zeros((len(rows), max(map(len, rows))), np.int32)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    out = _program(cast(Any, model.clone(source=None)))(params, ids, mask)
    return np.asarray(jax.nn.log_softmax(out.astype(jnp.float32)))


@lru_cache(maxsize=4)
def _program(model: Pretrained) -> Any:
    def run(params: Tree, ids: jax.Array, mask: jax.Array) -> Any:
        with jax.default_matmul_precision("highest"):
            return apply(model, params, ids, mask)

    return jax.jit(run)


def gap_of(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> float:
    """Return the largest absolute difference of two arrays of logits."""
    return float(np.abs(found - wanted).max()) if found.shape == wanted.shape else float("inf")


def rounding_of(wanted: np.ndarray[Any, Any]) -> float:
    """Return the largest difference from some logits that counts as rounding."""
    return ROUNDING * float(np.abs(wanted).max())


def require_equal(gap: float, wanted: np.ndarray[Any, Any], tolerance: float, what: str) -> None:
    """Raise an error if logits differ.

    Raises:
        ExportError: They differ by more than the tolerance; it says by how much.
    """
    most = tolerance * max(1.0, float(np.abs(wanted).max()))
    if not gap <= most:  # also true for NaN
        raise ExportError(
            f"{what}: logits differ by {gap:.2g} on the probe batch, at most {most:.2g} is allowed;"
            " the output was removed"
        )

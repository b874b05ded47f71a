"""The logits of attention's softmax."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

Array = jax.Array


@dataclass(frozen=True)
class Scoring:
    """How the scores of queries and keys become logits of the softmax.

    Attributes:
        scale: multiplies the products of queries and keys; None for `1 / sqrt(d)`.
        cap: bounds the scaled scores: `cap tanh(s / cap)` (Gemma team 2024, section 2,
            arXiv:2408.00118); None for no bound.
    """

    scale: float | None = None
    cap: float | None = None

    def scale_of(self, d: int) -> float:
        """Return the scale of heads of size d."""
        return d**-0.5 if self.scale is None else self.scale

    def logits(self, scores: Array, d: int) -> Array:
        """Return the float32 logits of products of queries and keys of size d, of any shape."""
        scores = scores * self.scale_of(d)
        return scores if self.cap is None else self.cap * jnp.tanh(scores / self.cap)

    def slope(self, logits: Array) -> Array | float:
        """Return the derivative of unmasked logits by the scaled scores; 0 for masked ones."""
        if self.cap is None:
            return 1.0
        return 1.0 - jnp.square(jnp.clip(logits / self.cap, -1.0, 1.0))

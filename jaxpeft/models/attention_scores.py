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
        sinks: whether each head has a sink, see `softmax`.
    """

    scale: float | None = None
    cap: float | None = None
    sinks: bool = False

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


def softmax(logits: Array, sinks: Array | None) -> Array:
    """Return the weights of the keys: `exp(z_j) / (exp(s) + sum over k of exp(z_k))`.

    The sink `s` of a head is the logit of a key without a value: the weights of its keys sum to
    less than 1, and a query with no visible key gets zeros.

    Args:
        logits: float32 `[batch, heads, query, key]`.
        sinks: `[heads]`, any float dtype; None for the softmax without them.

    Returns:
        The shape of `logits`, float32.

    Source: Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks", section
    3.2 (arXiv:2309.17453); a learned logit of each head: Agarwal et al. 2025, "gpt-oss-120b &
    gpt-oss-20b Model Card", section 2.2 (arXiv:2508.10925).
    """
    if sinks is None:
        return jax.nn.softmax(logits, axis=-1)
    own = sinks.astype(jnp.float32)[:, None, None]
    most = jax.lax.stop_gradient(jnp.maximum(jnp.max(logits, axis=-1, keepdims=True), own))
    shares = jnp.exp(logits - most)
    return shares / (jnp.sum(shares, axis=-1, keepdims=True) + jnp.exp(own - most))

"""Choose the next token from its logits: greedily, or by sampling from a filtered distribution.

The filters act in the order of `transformers`: repetition penalty, temperature, top-k, top-p,
min-p.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxpeft.errors import ConfigError

Array = jax.Array
_LOWEST = float(jnp.finfo(jnp.float32).min)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: divides the logits; 0 chooses the most likely token.
        top_k: keep the k most likely tokens; None for all.
        top_p: keep the most likely tokens whose probabilities sum to p (Holtzman et al. 2020,
            arXiv:1904.09751, section 3.1); None for all.
        min_p: keep the tokens with at least this share of the largest probability (Nguyen et al.
            2025, arXiv:2407.01082, section 3); None for all.
        repetition_penalty: divides positive logits of tokens of the prompt and the text so far, and
            multiplies negative ones (Keskar et al. 2019, arXiv:1909.05858, section 4.1); 1 for
            none.

    Raises:
        ConfigError: An option is out of range, or has no effect; it lists all of them.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        filters = {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        idle = [name for name, value in filters.items() if value is not None]
        problems = [
            f"{name}: must be {must}, is {value!r}"
            for name, value, good, must in (
                ("temperature", self.temperature, self.temperature >= 0, "at least 0"),
                ("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "at least 1"),
                ("top_p", self.top_p, _is_share(self.top_p), "above 0 and at most 1"),
                ("min_p", self.min_p, _is_share(self.min_p), "above 0 and at most 1"),
                (
                    "repetition_penalty",
                    self.repetition_penalty,
                    self.repetition_penalty > 0,
                    "above 0",
                ),
            )
            if not good
        ]
        if self.temperature == 0 and idle:
            problems.append(
                f"{idle[0]}: has no effect at temperature 0, which chooses the most likely token;"
                " set a temperature, such as 1"
            )
        if problems:
            raise ConfigError(problems)

    @property
    def penalizes(self) -> bool:
        """Whether the choice depends on the tokens so far."""
        return self.repetition_penalty != 1.0

    def choose(self, logits: Array, seen: Array | None, keys: Array) -> tuple[Array, Array]:
        """Choose a token for each row.

        Args:
            logits: `[batch, vocab]` float32.
            seen: bool `[batch, vocab]`, the tokens so far; None if there is no penalty.
            keys: a random key for each row, `[batch]`.

        Returns:
            The tokens, `[batch]` int32, and their log-probabilities under the unfiltered logits,
            `[batch]` float32.
        """
        tokens = self._choose(logits, seen, keys).astype(jnp.int32)
        picked = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
        return tokens, picked - jax.nn.logsumexp(logits, axis=-1)

    def _choose(self, logits: Array, seen: Array | None, keys: Array) -> Array:
        if seen is not None:
            penalty = self.repetition_penalty
            penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
            logits = jnp.where(seen, penalized, logits)
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1)
        logits = logits / self.temperature
        for keep in self._filters():
            logits = jnp.where(keep(logits), logits, _LOWEST)
        return jax.vmap(jax.random.categorical)(keys, logits)

    def _filters(self) -> list[Callable[[Array], Array]]:
        """Return the filters, each from logits to the tokens that it keeps."""
        found: list[Callable[[Array], Array]] = []
        if self.top_k is not None:
            k = self.top_k
            found.append(lambda z: z >= jax.lax.top_k(z, min(k, z.shape[-1]))[0][..., -1:])
        if self.top_p is not None and self.top_p < 1:
            p = self.top_p
            found.append(lambda z: z >= _smallest_of(z, p))
        if self.min_p is not None:
            log_share = math.log(self.min_p)
            found.append(lambda z: z >= jnp.max(z, axis=-1, keepdims=True) + log_share)
        return found


def _smallest_of(logits: Array, p: float) -> Array:
    """Return the smallest logit of the most likely tokens with a probability of p, `[batch, 1]`."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    shares = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares
    kept = jnp.where(before < p, ordered, jnp.inf)
    return jnp.min(kept, axis=-1, keepdims=True)


def _is_share(value: float | None) -> bool:
    return value is None or 0 < value <= 1

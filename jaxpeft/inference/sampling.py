"""Choose the next token from its logits: greedily, or by sampling from a filtered distribution.

The filters act in the order of `transformers`: repetition penalty, temperature, top-k, top-p,
min-p.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.errors import ConfigError, show

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
        ConfigError: An option is no number, is out of range, or has no effect; it lists all of
            them.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        problems: list[str] = []
        for name, (optional, good, must) in _BOUNDS.items():
            given = getattr(self, name)
            if optional and given is None:
                continue
            value = number(given)
            if value is None or not good(value):
                problems.append(f"{name}: must be {must}, is {show(given)}")
            else:
                object.__setattr__(self, name, int(value) if name == "top_k" else value)
        idle = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        if not problems and self.temperature == 0 and idle:
            problems.append(
                f"{idle[0]}: has no effect at temperature 0, which chooses the most likely token;"
                " set a temperature, such as 1"
            )
        if problems:
            raise ConfigError(problems)

    @property
    def rule(self) -> SamplingRule:
        """What a compiled program depends on."""
        return SamplingRule(
            self.temperature == 0,
            self.top_k,
            self.top_p is not None and self.top_p < 1,
            self.min_p is not None,
            self.repetition_penalty != 1,
        )

    @property
    def numbers(self) -> dict[str, Any]:
        """The arguments of a compiled program, float32 scalars by name."""
        names = ("temperature", "top_p", "min_p", "repetition_penalty")
        values = {name: getattr(self, name) for name in names}
        return {name: np.float32(1 if value is None else value) for name, value in values.items()}


def number(value: Any) -> float | None:
    """Return a real number, such as a NumPy or JAX scalar, as a float; None if it is none."""
    if isinstance(value, bool | str | bytes) or value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


_BOUNDS: Mapping[str, tuple[bool, Any, str]] = {
    "temperature": (False, lambda value: 0 <= value < math.inf, "a number of at least 0"),
    "top_k": (
        True,
        lambda value: value >= 1 and value.is_integer(),
        "an integer of at least 1",
    ),
    "top_p": (True, lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "min_p": (True, lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "repetition_penalty": (False, lambda value: 0 < value < math.inf, "a number above 0"),
}


@dataclass(frozen=True)
class SamplingRule:
    """The operations by which tokens are chosen; their numbers are arguments.

    Attributes:
        greedy: whether the most likely token is chosen.
        top_k: number of tokens to sample from, or None.
        top_p: whether to filter by `top_p`.
        min_p: whether to filter by `min_p`.
        penalizes: whether there is a repetition penalty.
    """

    greedy: bool
    top_k: int | None
    top_p: bool
    min_p: bool
    penalizes: bool

    def choose(
        self, logits: Array, seen: Array | None, keys: Array, numbers: Mapping[str, Any]
    ) -> tuple[Array, Array]:
        """Choose a token for each row.

        Args:
            logits: `[batch, vocab]` float32.
            seen: bool `[batch, vocab]`, the tokens so far; None if there is no penalty.
            keys: a random key for each row, `[batch]`.
            numbers: see `Sampling.numbers`.

        Returns:
            The tokens, `[batch]` int32, and their log-probabilities under the unfiltered logits,
            `[batch]` float32.
        """
        tokens = self._choose(logits, seen, keys, numbers).astype(jnp.int32)
        picked = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
        return tokens, picked - jax.nn.logsumexp(logits, axis=-1)

    def _choose(
        self, logits: Array, seen: Array | None, keys: Array, numbers: Mapping[str, Any]
    ) -> Array:
        z = logits
        if seen is not None:
            penalty = numbers["repetition_penalty"]
            z = jnp.where(seen, jnp.where(z > 0, z / penalty, z * penalty), z)
        if self.greedy:
            return jnp.argmax(z, axis=-1)
        # relative to the largest, so that a small temperature cannot overflow
        z = (z - jnp.max(z, axis=-1, keepdims=True)) / numbers["temperature"]
        z = jnp.maximum(z, _LOWEST)
        if self.top_k is not None:
            least = jax.lax.top_k(z, min(self.top_k, z.shape[-1]))[0][..., -1:]
            z = jnp.where(z >= least, z, _LOWEST)
        if self.top_p:
            z = jnp.where(z >= _smallest_of(z, numbers["top_p"]), z, _LOWEST)
        if self.min_p:
            z = jnp.where(z >= jnp.log(numbers["min_p"]), z, _LOWEST)
        return jax.vmap(jax.random.categorical)(keys, z)


def _smallest_of(logits: Array, p: Array) -> Array:
    """Return the smallest logit of the most likely tokens with a probability of p, `[batch, 1]`."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    shares = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares
    kept = jnp.where(before < p, ordered, jnp.inf)
    return jnp.min(kept, axis=-1, keepdims=True)

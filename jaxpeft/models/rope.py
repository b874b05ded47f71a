"""Rotary position embeddings, with linear, dynamic NTK and Llama 3 scaling.

Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", section 3.4
(arXiv:2104.09864).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.errors import show
from jaxpeft.models.base import ConfigReader

TYPES = ("default", "linear", "dynamic", "llama3")


@dataclass(frozen=True)
class Rope:
    """The parameters of the rotary frequencies.

    Attributes:
        kind: one of `TYPES`.
        theta: base of the wavelengths.
        factor: scaling factor.
        low: `low_freq_factor` of llama3.
        high: `high_freq_factor` of llama3.
        original: number of positions in the original training.
    """

    kind: str
    theta: float
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original: int = 0


_NEEDED: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def read(reader: ConfigReader) -> Rope:
    """Read `rope_theta` and `rope_scaling`, or else the `rope_parameters` of transformers 5.

    Problems are recorded in `reader`.
    """
    field, settings = _find_settings(reader)
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind not in TYPES:
        reader.problems.append(
            f"{field}: rope_type {show(kind)} is not supported (supported: {', '.join(TYPES)})"
        )
        return Rope("default", 1.0)
    partial = settings.get("partial_rotary_factor", reader.get("partial_rotary_factor"))
    if partial not in (None, 1):
        reader.problems.append(
            f"{field}: partial_rotary_factor {show(partial)} is not supported (supported: 1)"
        )
    theta = reader.positive("rope_theta", settings.get("rope_theta", reader.get("rope_theta")))
    numbers = {key: reader.positive(f"{field}: {key}", settings.get(key)) for key in _NEEDED[kind]}
    if kind == "llama3" and numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
        reader.problems.append(f"{field}: high_freq_factor must be above low_freq_factor")
    return Rope(
        kind=kind,
        theta=theta,
        factor=numbers.get("factor", 1.0),
        low=numbers.get("low_freq_factor", 1.0),
        high=numbers.get("high_freq_factor", 4.0),
        original=_original(reader, settings) if kind == "llama3" else 0,
    )


def _original(reader: ConfigReader, settings: Mapping[str, Any]) -> int:
    """Return the number of positions in the original training, which has three possible fields."""
    name = "original_max_position_embeddings"
    return int(
        reader.positive(
            name, reader.get(name) or settings.get(name) or reader.get("max_position_embeddings")
        )
    )


def _find_settings(reader: ConfigReader) -> tuple[str, Mapping[str, Any]]:
    """Return the name of the field with the rope's settings, and the settings."""
    field = "rope_scaling" if reader.get("rope_scaling") else "rope_parameters"
    settings: Any = reader.get(field) or {}
    if not isinstance(settings, Mapping):
        reader.problems.append(f"{field}: must be a mapping, is {show(settings)}")
        return field, {}
    nested = [key for key, value in settings.items() if isinstance(value, Mapping)]
    if nested:
        reader.problems.append(
            f"{field}: separate settings for {', '.join(nested)[:80]} are not supported"
            " (supported: one for all layers)"
        )
    return field, settings


def tables(
    rope: Rope, head_dim: int, most_positions: int, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the cosines and sines of the rotation angles.

    Args:
        rope: parameters of the frequencies.
        head_dim: d, even.
        most_positions: `max_position_embeddings` of the model, beyond which dynamic scaling starts.
        positions: `[batch, length]` int32.

    Returns:
        Two arrays `[batch, length, 1, d / 2]`, float32.
    """
    frequencies = _frequencies(rope, head_dim, most_positions, positions)
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def _frequencies(rope: Rope, head_dim: int, most_positions: int, positions: jax.Array) -> Any:
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    if rope.kind == "dynamic":
        longest = jnp.maximum(jnp.max(positions) + 1, most_positions).astype(jnp.float32)
        grown = rope.factor * longest / most_positions - (rope.factor - 1)
        base = rope.theta * grown ** (head_dim / (head_dim - 2))
        return 1.0 / base**exponents
    # The power in float64, rounded, equals torch's in float32; NumPy's float32 power is off by one
    # ulp.
    wavelengths = (rope.theta ** exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1.0) / wavelengths
    if rope.kind == "linear":
        frequencies = frequencies / np.float32(rope.factor)
    if rope.kind == "llama3":
        frequencies = _llama3(rope, frequencies)
    return frequencies.astype(np.float32)


def _llama3(rope: Rope, frequencies: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Keep high frequencies, divide low ones by the factor, and blend in between (Llama 3.1)."""
    wavelengths = 2 * math.pi / frequencies
    blend = (rope.original / wavelengths - rope.low) / (rope.high - rope.low)
    blended = (1 - blend) * frequencies / rope.factor + blend * frequencies
    slow, fast = wavelengths > rope.original / rope.low, wavelengths < rope.original / rope.high
    return np.where(slow, frequencies / rope.factor, np.where(fast, frequencies, blended))


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate each pair `(x[i], x[i + d/2])` by its angle.

    Args:
        x: `[batch, length, heads, d]`.
        cos: `[batch, length, 1, d / 2]`, float32.
        sin: `[batch, length, 1, d / 2]`, float32.

    Returns:
        The shape and dtype of `x`, computed in float32.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)

"""Rotary position embeddings, and their scaling to longer contexts.

With the frequencies `f_i = theta^(-2i/d)`, the pair `i` of a query or key at position `p` is
rotated by the angle `p f_i`: Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position
Embedding", section 3.4 (arXiv:2104.09864). The scalings change the frequencies:

    linear      f_i / factor (Chen et al. 2023, arXiv:2306.15595)
    dynamic     theta grows with the longest position (NTK-aware scaling)
    llama3      low frequencies divided by the factor, high ones kept, a blend in between
    yarn        the same with another blend, and cosines and sines multiplied by
                `0.1 ln(factor) + 1` (Peng et al. 2023, equations 17 to 22, arXiv:2309.00071)
    longrope    each frequency divided by its own factor; one list up to the original number of
                positions, one beyond (Ding et al. 2024, arXiv:2402.13753)
    proportional  the first `share d / 2` frequencies divided by the factor, the others 0: their
                pairs are not rotated (Gemma 4)
    none        no rotation
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.errors import show
from jaxpeft.models.base import ConfigReader

TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional")


@dataclass(frozen=True)
class Rope:
    """The parameters of a rotation.

    Attributes:
        kind: one of `TYPES`, or `none`.
        theta: base of the wavelengths.
        factor: scaling factor.
        low: `low_freq_factor` of llama3, `beta_slow` of yarn.
        high: `high_freq_factor` of llama3, `beta_fast` of yarn.
        original: number of positions in the original training.
        dims: number of dimensions of a head that are rotated, the first ones; 0 for all.
        interleaved: whether a pair is `(x[2i], x[2i+1])` instead of `(x[i], x[i + d/2])`.
        amplitude: multiplies cosines and sines.
        short: factor of each frequency of longrope, up to `original` positions.
        long: the same for longer rows.
        truncate: whether yarn rounds the range of its blend to integers.
        share: share of the pairs that proportional rotates.
        sharpness: multiplies the scores of queries and keys.
    """

    kind: str
    theta: float
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original: int = 0
    dims: int = 0
    interleaved: bool = False
    amplitude: float = 1.0
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()
    truncate: bool = True
    share: float = 1.0
    sharpness: float = 1.0


NO_ROPE = Rope("none", 1.0)
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
    "longrope": (),
    "proportional": (),
}
_SCALED_FROM = ("llama3", "yarn", "longrope")


@dataclass(frozen=True)
class RopeSwitches:
    """How a family spells its rotation.

    Attributes:
        layers: the `layer_types` value of the layers, whose settings may be separate.
        theta: field of the base of the wavelengths, outside of the settings.
        scaled: whether `rope_scaling` applies to these layers.
        partial: whether only a part of a head may be rotated.
        interleaved: see `Rope`; or the name of the switch that says it.
        sharpened: whether `mscale_all_dim` multiplies the scores, too (DeepSeek-AI's code).
        renamed: pairs of another name of a type and its name here.
        all_layers: the `layer_types` values that may have separate settings.
    """

    layers: str = "full_attention"
    theta: str = "rope_theta"
    scaled: bool = True
    partial: bool = False
    interleaved: bool | str = False
    sharpened: bool = False
    renamed: tuple[tuple[str, str], ...] = ()
    all_layers: tuple[str, ...] = ()


def read(reader: ConfigReader, head_dim: int, switches: RopeSwitches = RopeSwitches()) -> Rope:
    """Read `rope_theta` and `rope_scaling`, or else the `rope_parameters` of transformers 5.

    Problems are recorded in `reader`.

    Args:
        reader: reader of the `config.json`.
        head_dim: number of dimensions of a head.
        switches: how the family spells it.
    """
    field, settings = _find_settings(reader, switches)
    kind = settings.get("rope_type", settings.get("type", "default"))
    kind = dict(switches.renamed).get(kind, kind) if isinstance(kind, str) else kind
    if kind not in TYPES:
        reader.problems.append(
            f"{field}: rope_type {show(kind)} is not supported (supported: {', '.join(TYPES)})"
        )
        return Rope("default", 1.0)
    theta = settings.get("rope_theta", reader.get(switches.theta))
    numbers = {key: reader.positive(f"{field}: {key}", settings.get(key)) for key in _NEEDED[kind]}
    if kind == "llama3" and numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
        reader.problems.append(f"{field}: high_freq_factor must be above low_freq_factor")
    found = Rope(
        kind=kind,
        theta=reader.positive(switches.theta, theta),
        factor=numbers.get("factor", 1.0),
        low=numbers.get("low_freq_factor", 1.0),
        high=numbers.get("high_freq_factor", 4.0),
        original=_original(reader, settings) if kind in _SCALED_FROM else 0,
        dims=0 if kind == "proportional" else _dims(reader, field, settings, head_dim, switches),
        interleaved=(
            reader.flag(switches.interleaved)
            if isinstance(switches.interleaved, str)
            else switches.interleaved
        ),
    )
    if kind == "proportional":
        return _read_proportional(reader, field, settings, found)
    if kind in ("yarn", "longrope"):
        found = _read_extension(reader, field, settings, found, head_dim)
    name = "mscale_all_dim"
    if not switches.sharpened or kind == "default" or settings.get(name) is None:
        return found
    scale = reader.positive(f"{field}: {name}", settings[name])
    return replace(found, sharpness=_yarn_amplitude(found.factor, scale) ** 2)


def _read_proportional(
    reader: ConfigReader, field: str, settings: Mapping[str, Any], found: Rope
) -> Rope:
    """Read the settings of proportional."""
    name = "partial_rotary_factor"
    factor, share = settings.get("factor", 1.0), settings.get(name, reader.get(name) or 1.0)
    if not isinstance(share, int | float) or not 0 <= share <= 1:
        reader.problems.append(f"{field}: {name}: must be from 0 to 1, is {show(share)}")
        return found
    return replace(found, factor=reader.positive(f"{field}: factor", factor), share=float(share))


def _dims(
    reader: ConfigReader,
    field: str,
    settings: Mapping[str, Any],
    head_dim: int,
    switches: RopeSwitches,
) -> int:
    """Return the number of rotated dimensions, 0 for all."""
    name = "partial_rotary_factor"
    partial = settings.get(name, reader.get(name))
    if partial in (None, 1):
        return 0
    supported = "at most 1" if switches.partial else "1"
    is_share = isinstance(partial, int | float) and 0 < partial < 1
    dims = int(head_dim * partial) if is_share and switches.partial else 0
    if not dims or dims % 2:
        reader.problems.append(
            f"{field}: {name} {show(partial)} is not supported (supported: {supported}"
            + (", for an even number of dimensions)" if dims else ")")
        )
        return 0
    return dims


def _read_extension(
    reader: ConfigReader, field: str, settings: Mapping[str, Any], found: Rope, head_dim: int
) -> Rope:
    """Read the settings of yarn and longrope.

    Without a factor, it is the ratio of the numbers of positions.
    """

    def read(key: str, default: float) -> float:
        value = settings.get(key)
        return default if value is None else reader.positive(f"{field}: {key}", value)

    most = reader.get("max_position_embeddings")
    ratio = most / found.original if isinstance(most, int) and most > 0 else 1.0
    factor = read("factor", ratio)
    if found.kind == "yarn":
        scales = [read(key, 0.0) for key in ("mscale", "mscale_all_dim")]
        usual = (
            _yarn_amplitude(factor, scales[0]) / _yarn_amplitude(factor, scales[1])
            if all(scales)
            else _yarn_amplitude(factor)
        )
        truncate = settings.get("truncate")
        return replace(
            found,
            factor=factor,
            low=read("beta_slow", 1.0),
            high=read("beta_fast", 32.0),
            amplitude=read("attention_factor", usual),
            truncate=truncate is None or bool(truncate),
        )
    log = math.log(max(found.original, 2))
    usual = math.sqrt(1 + math.log(factor) / log) if factor > 1 else 1.0
    lists = {
        key: _factors(reader, f"{field}: {key}", settings.get(key), (found.dims or head_dim) // 2)
        for key in ("short_factor", "long_factor")
    }
    return replace(
        found,
        factor=factor,
        amplitude=read("attention_factor", usual),
        short=lists["short_factor"],
        long=lists["long_factor"],
    )


def _yarn_amplitude(factor: float, scale: float = 1.0) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _factors(reader: ConfigReader, name: str, value: Any, count: int) -> tuple[float, ...]:
    """Return a list of `count` positive numbers; record a problem if it is none."""
    if not isinstance(value, list) or len(value) != count:
        reader.problems.append(f"{name}: must be a list of {count} numbers, is {show(value)}")
        return (1.0,) * count
    return tuple(reader.positive(f"{name}[{i}]", each) for i, each in enumerate(value))


def _original(reader: ConfigReader, settings: Mapping[str, Any]) -> int:
    """Return the number of positions in the original training, which has three possible fields."""
    name = "original_max_position_embeddings"
    return int(
        reader.positive(
            name, reader.get(name) or settings.get(name) or reader.get("max_position_embeddings")
        )
    )


def _find_settings(reader: ConfigReader, switches: RopeSwitches) -> tuple[str, Mapping[str, Any]]:
    """Return the name of the field with the rope's settings, and the settings."""
    field = "rope_scaling" if reader.get("rope_scaling") else "rope_parameters"
    settings: Any = reader.get(field) or {}
    if not isinstance(settings, Mapping):
        reader.problems.append(f"{field}: must be a mapping, is {show(settings)}")
        return field, {}
    nested = [key for key, value in settings.items() if isinstance(value, Mapping)]
    if not nested:
        return field, settings if switches.scaled or field == "rope_parameters" else {}
    own: Any = settings.get(switches.layers) or {}
    unknown = [key for key in nested if key not in switches.all_layers]
    if unknown:
        kinds = " or ".join(switches.all_layers) or "one for all layers"
        reader.problems.append(
            f"{field}: separate settings for {', '.join(unknown)[:80]} are not supported"
            f" (supported: {kinds})"
        )
        return field, {}
    return f"{field}: {switches.layers}", own


def tables(
    rope: Rope, head_dim: int, most_positions: int, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the cosines and sines of the rotation angles.

    Args:
        rope: parameters of the rotation.
        head_dim: number of dimensions of a head, even.
        most_positions: `max_position_embeddings` of the model, beyond which dynamic scaling starts.
        positions: `[batch, length]` int32.

    Returns:
        Two arrays `[batch, length, 1, d / 2]`, float32, for d rotated dimensions.
    """
    frequencies = _frequencies(rope, rope.dims or head_dim, most_positions, positions)
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if rope.amplitude == 1 else (cos * rope.amplitude, sin * rope.amplitude)


def _frequencies(rope: Rope, d: int, most_positions: int, positions: jax.Array) -> Any:
    """Return the frequencies, `[d / 2]` float32."""
    exponents = np.arange(0, d, 2, dtype=np.float32) / d
    if rope.kind == "none":
        return np.zeros_like(exponents)
    if rope.kind == "dynamic":
        longest = jnp.maximum(jnp.max(positions) + 1, most_positions).astype(jnp.float32)
        grown = rope.factor * longest / most_positions - (rope.factor - 1)
        base = rope.theta * grown ** (d / (d - 2))
        return 1.0 / base**exponents
    # The power in float64, rounded, equals torch's in float32; NumPy's float32 power is off by one
    # ulp.
    wavelengths = (rope.theta ** exponents.astype(np.float64)).astype(np.float32)
    if rope.kind == "longrope":
        short, long = (
            np.float32(1.0) / (np.asarray(factors, np.float32) * wavelengths)
            for factors in (rope.short, rope.long)
        )
        return jnp.where(jnp.max(positions) < rope.original, short, long)
    frequencies = np.float32(1.0) / wavelengths
    if rope.kind == "proportional":
        rotated = np.arange(d // 2) < int(rope.share * d // 2)
        frequencies = np.where(rotated, frequencies / np.float32(rope.factor), np.float32(0))
    if rope.kind == "linear":
        frequencies = frequencies / np.float32(rope.factor)
    if rope.kind == "llama3":
        frequencies = _llama3(rope, frequencies)
    if rope.kind == "yarn":
        kept = _yarn_kept(rope, d)
        frequencies = frequencies * (kept + (1 - kept) / rope.factor)
    return frequencies.astype(np.float32)


def _llama3(rope: Rope, frequencies: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Keep high frequencies, divide low ones by the factor, and blend in between (Llama 3.1)."""
    wavelengths = 2 * math.pi / frequencies
    blend = (rope.original / wavelengths - rope.low) / (rope.high - rope.low)
    blended = (1 - blend) * frequencies / rope.factor + blend * frequencies
    slow, fast = wavelengths > rope.original / rope.low, wavelengths < rope.original / rope.high
    return np.where(slow, frequencies / rope.factor, np.where(fast, frequencies, blended))


def _yarn_kept(rope: Rope, d: int) -> np.ndarray[Any, Any]:
    """Return the share of each frequency that is not divided by the factor, `[d / 2]`.

    It falls from 1 to 0 between the dimensions that turn `high` and `low` times within the original
    number of positions.
    """
    first, last = (
        d * math.log(rope.original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
        for turns in (rope.high, rope.low)
    )
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, d - 1)
    span = last - first or 0.001
    return 1 - np.clip((np.arange(d // 2, dtype=np.float32) - first) / span, 0, 1)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool = False) -> jax.Array:
    """Rotate pairs of dimensions by their angles: `(x[i], x[i + d/2])` of the first d dimensions.

    Args:
        x: `[batch, length, heads, head_dim]`.
        cos: `[batch, length, 1, d / 2]`, float32.
        sin: `[batch, length, 1, d / 2]`, float32.
        interleaved: whether the pairs are `(x[2i], x[2i+1])`.

    Returns:
        The shape and dtype of `x`, computed in float32.
    """
    d = 2 * cos.shape[-1]
    rotated = x[..., :d].astype(jnp.float32)
    if interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    else:
        first, second = jnp.split(rotated, 2, axis=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    if interleaved:
        out = jnp.stack(turned, axis=-1).reshape(rotated.shape)
    else:
        out = jnp.concatenate(turned, axis=-1)
    out = out.astype(x.dtype)
    return out if d == x.shape[-1] else jnp.concatenate([out, x[..., d:]], axis=-1)

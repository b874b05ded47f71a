"""Building blocks of the architectures: norms, dropout, linear modules and poolings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax.ad_checkpoint import checkpoint_name

from jaxpeft.kernels import few_rows
from jaxpeft.models.base import ModelOptions
from jaxpeft.remat import INPUT, PRODUCT

Array = jax.Array


def normalize(x: Array, eps: float) -> Array:
    """Return `x / sqrt(mean(x^2) + eps)` over the last axis, float32 (Zhang and Sennrich 2019,
    equation 4, without the scale).
    """
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + eps)


class RMSNorm(nn.Module):
    """`scale * x / sqrt(mean(x^2) + eps)` over the last axis, computed in float32 (Zhang and
    Sennrich 2019, equation 4).

    With an offset, the leaf is `scale - offset`: Gemma stores the difference to 1.
    """

    eps: float
    dtype: Any
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalize `[..., d]`; the result has the dtype of the activations."""
        init = nn.initializers.constant(1.0 - self.offset)
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32).astype(jnp.float32)
        normal = normalize(x, self.eps)
        return (normal * (scale + self.offset if self.offset else scale)).astype(self.dtype)


class LayerNorm(nn.Module):
    """`scale * (x - mean) / sqrt(var + eps) + bias` over the last axis, computed in float32 (Ba et
    al. 2016); `bias` may be absent.
    """

    eps: float
    dtype: Any
    with_bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalize `[..., d]`; the result has the dtype of the activations."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        centered = x - jnp.mean(x, -1, keepdims=True)
        normal = centered * jax.lax.rsqrt(
            jnp.mean(jnp.square(centered), -1, keepdims=True) + self.eps
        )
        out = normal * scale.astype(jnp.float32)
        if self.with_bias:
            bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
            out = out + bias.astype(jnp.float32)
        return out.astype(self.dtype)


def dropout(module: nn.Module, rate: float, x: Array) -> Array:
    """Apply dropout in a training call, that is, one with a `dropout` key (Srivastava et al. 2014).

    Args:
        module: module whose key stream is used.
        rate: probability of a zero, rounded to a multiple of 1/65536.
        x: any shape except a scalar.

    Returns:
        The shape and dtype of `x`.
    """
    kept_steps = round((1 - rate) * _STEPS)
    if kept_steps == _STEPS or not module.has_rng("dropout"):
        return x
    draws = _random_uint16(module.make_rng("dropout"), x.shape)
    return jnp.where(
        draws < kept_steps,
        x * jnp.asarray(_STEPS / max(kept_steps, 1), x.dtype),
        jnp.zeros((), x.dtype),
    )


_STEPS = 1 << 16


def _random_uint16(key: Array, shape: tuple[int, ...]) -> Array:
    """Draw uniform uint16 numbers, two from each 32 bits, since random bits dominate the cost of
    dropout.
    """
    words = jax.random.bits(key, (*shape[:-1], -(-shape[-1] // 2)), jnp.uint32)
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16)
    return halves.reshape(*shape[:-1], -1)[..., : shape[-1]]


def scaled(x: Array, factor: Array | float) -> Array:
    """Return `factor * x`, computed in float32, in the dtype of `x`."""
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def mark_product(x: Array) -> Array:
    """Name the output of a layer's products, which the remat policy `products` saves."""
    return checkpoint_name(x, PRODUCT)


def mark_input(x: Array) -> Array:
    """Name the input of a layer, which the remat policy `offload` stores in host memory."""
    return checkpoint_name(x, INPUT)


class Linear(nn.Dense):
    """A linear module that can compute other modules with the same input (`together`)."""

    dot_general: Any = few_rows.dot_general

    def together(self, x: Array, *others: nn.Dense) -> tuple[Array, ...]:
        """Return the outputs of this module and of others for `x`."""
        modules = (self, *others)
        plain = (set(each.variables.get("params", {})) == {"kernel"} for each in modules)
        if not few_rows.joins(x, [each.features for each in modules]) or not all(plain):
            return tuple(each(x) for each in modules)
        leaves = (each.get_variable("params", "kernel") for each in modules)
        x, *kernels = promote_dtype(x, *leaves, dtype=self.dtype)
        return few_rows.products(x, kernels)


def dense(features: int, name: str | None, options: ModelOptions, *, bias: bool = True) -> Linear:
    """Return a linear module that computes in the activations' dtype."""
    return Linear(features, use_bias=bias, dtype=options.dtype, name=name)


class ResidualDense(Linear):
    """A linear module whose output is added to the residual stream by a method, `join`."""

    def join(
        self, h: Array, residual: Array, norm: Callable[[Array], Array] | None = None
    ) -> Array:
        """Return `residual + h`, normalized in a post-norm layer.

        Args:
            h: `[..., d]`, the sub-layer's output.
            residual: `[..., d]`, the sub-layer's input before its norm.
            norm: the norm after the sum, or None.
        """
        out = residual + h
        return out if norm is None else norm(out)


def residual_dense(
    features: int, name: str, options: ModelOptions, *, bias: bool = True
) -> ResidualDense:
    """Return a linear module whose output is added to the residual stream."""
    return ResidualDense(features, use_bias=bias, dtype=options.dtype, name=name)


def head_dense(features: int, name: str | None, *, bias: bool = True) -> nn.Dense:
    """Return a float32 linear module of a task head."""
    return nn.Dense(
        features,
        use_bias=bias,
        dtype=jnp.float32,
        name=name,
        kernel_init=nn.initializers.normal(0.02),
    )


def pool(x: Array, attention_mask: Array | None, how: str | None) -> Array:
    """Return one vector per row.

    Args:
        x: `[batch, length, d]`.
        attention_mask: `[batch, length]`, 1 for a token; padding may be on either side.
        how: `cls` for the first position, `mean` for the mean over tokens (in float32), `last` for
            the last token.

    Returns:
        `[batch, d]`.
    """
    if how == "cls":
        return x[:, 0]
    mask = (
        jnp.ones(x.shape[:2], jnp.int32)
        if attention_mask is None
        else attention_mask.astype(jnp.int32)
    )
    if how == "last":
        index = jnp.argmax(jnp.arange(x.shape[1], dtype=jnp.int32) * mask, axis=1)
        return jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]
    weights = mask.astype(jnp.float32)[..., None]
    total = jnp.sum(x.astype(jnp.float32) * weights, axis=1)
    return (total / jnp.maximum(jnp.sum(weights, axis=1), 1.0)).astype(x.dtype)
